from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comparison_fixture import competing, make_comparison
from moestro.comparison import Comparison
from moestro.difference import Difference
from moestro.gate.visible import shortened, visible
from moestro.report import sentences
from moestro.report.learnt import Cell, learnt_rows
from moestro.report.numbers import decimals_for, fixed, mean, memory, metric, signed
from moestro.report.summary import domain_rows, rows
from moestro.report.text import plotly_label
from moestro.statistics import compare_with_first


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x07", "⟨U+001B⟩[31mred⟨U+0007⟩"),
        ("a\r\nb\tc", "a⟨U+000D⟩⟨U+000A⟩b⟨U+0009⟩c"),
        ("\u202eevil", "⟨U+202E⟩evil"),
        ("\x9b2J", "⟨U+009B⟩2J"),
        ("\ud800", "⟨U+D800⟩"),
        ("\u2028", "⟨U+2028⟩"),
        ("naïve 日本語 👩\u200d💻 − ±", "naïve 日本語 👩\u200d💻 − ±"),
    ],
)
def test_control_characters_are_shown(text, shown):
    assert visible(text) == shown


@given(st.text(st.characters(codec=None)))
def test_visible_text_prints_and_encodes(text):
    visible(text).encode()
    assert not any(ord(character) < 0x20 or 0x7F <= ord(character) < 0xA0 for character in visible(text))
    assert visible(visible(text)) == visible(text)


def test_plotly_gets_no_markup():
    label = plotly_label("<b>x</b> &lt;i&gt;")
    assert label == "&lt;b&gt;x&lt;/b&gt; &amp;lt;i&amp;gt;"


def test_shortened_keeps_the_length():
    assert [shortened("abcdef", n) for n in (6, 5, 2)] == ["abcdef", "abcd…", "a…"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (8e6, "8.00M"),
        (1_310_720, "1.31M"),
        (99_960, "100k"),
        (999.7, "1.00k"),
        (12, "12"),
        (3.4e12, "3.40T"),
        (None, "–"),
    ],
)
def test_metric(value, shown):
    assert metric(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"), [(2**30, "1.00 GiB"), (1.31e9, "1.22 GiB"), (5 * 2**20, "5.00 MiB"), (10, "10 B"), (None, "–")]
)
def test_memory(value, shown):
    assert memory(value) == shown


def test_fixed_and_signed_know_no_negative_zero():
    assert [fixed(v) for v in (-1.5, -0.0001, 1234.5)] == ["−1.500", "0.000", "1,234.500"]
    assert [signed(v) for v in (-1.5, -0.0001, 0.0001, 1.5)] == ["−1.500", "0.000", "0.000", "+1.500"]


@pytest.mark.parametrize(
    ("scale", "decimals"), [(0.5, 3), (0.012, 3), (0.0043, 4), (0.0001, 5), (1e-9, 6), (0.0, 3), (7.0, 3)]
)
def test_decimals_show_two_digits(scale, decimals):
    assert decimals_for(scale) == decimals


def test_mean_leaves_out_what_is_unknown():
    assert mean([1.0, None, 3.0]) == 2.0
    assert mean([None]) is None


def _with_losses(*losses: list[float]) -> Comparison:
    """A comparison whose verdicts come from these losses, one list a recipe."""
    comparison = make_comparison(tuple(range(len(losses[0]))))
    differences = (None, *compare_with_first(losses))
    recipes = [replace(r, difference=d) for r, d in zip(comparison.recipes[: len(losses)], differences, strict=True)]
    return replace(comparison, recipes=tuple(recipes))


FIRST = [4.100, 4.110, 4.120, 4.105]
BETTER = [4.088, 4.097, 4.108, 4.094]
WORSE = [4.112, 4.123, 4.132, 4.116]
NOISY = [4.090, 4.123, 4.115, 4.106]
NOISIER = [4.060, 4.183, 4.115, 4.136]


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ([BETTER, NOISY], "smoe beats dense by 0.0120 nats per token, less than the margin of 0.02"),
        ([NOISY, [v - 0.03 for v in BETTER]], "fine-grained beats dense by 0.0420 nats per token"),
        (
            [BETTER, [value - 0.01 for value in BETTER[:3]] + [4.0835]],
            "fine-grained and smoe beat dense on held-out text",
        ),
        ([WORSE, [v + 0.001 for v in WORSE[:2]] + WORSE[2:]], "dense beats smoe and fine-grained on held-out text"),
        ([WORSE, NOISY], "Nothing beats dense; smoe is worse"),
        ([NOISIER, NOISIER], "No difference from dense stands out of the noise of 4 seeds"),
        ([NOISIER, NOISY], "fine-grained is equivalent to dense: it differs from it by less than 0.02 nats per token"),
    ],
)
def test_the_headline_is_the_plain_answer(others, said):
    assert sentences.headline(_with_losses(FIRST, *others)) == said


def test_the_headline_admits_too_few_seeds():
    assert sentences.headline(make_comparison((0, 1))) == "Too few seeds to rank: 2 of the 3 that it takes"


def test_the_headline_of_a_single_recipe():
    said = sentences.headline(_with_losses(FIRST))
    assert said.startswith("dense reaches 4.1")


def test_the_sentence_of_a_difference():
    comparison = _with_losses(FIRST, BETTER, WORSE)
    said = [sentences.difference(comparison, recipe) for recipe in comparison.recipes]
    assert said[0] == "what the others are compared to"
    assert said[1] == "0.0120 nats lower than dense [0.0107, 0.0133], 4 seeds"
    assert said[2] == "0.0120 nats higher than dense [0.0107, 0.0133], 4 seeds"


def test_the_interval_of_a_difference_turns_with_its_words():
    comparison = _with_losses(FIRST, NOISY)
    found = comparison.recipes[1].difference
    assert found is not None
    assert found.interval is not None
    assert found.mean < 0 < found.interval[1]
    assert "lower than dense [−" in sentences.difference(comparison, comparison.recipes[1])


def test_the_sentence_without_an_interval():
    comparison = _with_losses([4.1], [4.088])
    assert sentences.difference(comparison, comparison.recipes[1]) == "0.012 nats lower than dense, 1 seed"
    cancelled = _with_losses([4.1, 4.2], [4.112, 4.1881])
    assert sentences.difference(cancelled, cancelled.recipes[1]) == "0.000 nats higher than dense, 2 seeds"
    same = _with_losses(FIRST, FIRST)
    assert sentences.difference(same, same.recipes[1]) == "equal to dense, 4 seeds"


def _found(**changes) -> Difference:
    values = {
        "by_seed": (-0.01,) * 3,
        "mean": -0.01,
        "deviation": 0.001,
        "interval": (-0.012, -0.008),
        "p": 0.01,
        "p_holm": 0.08,
        "minimum_detectable": 0.002,
        "verdict": "not answered",
        "margin": 0.02,
        "p_equivalence_holm": 0.3,
    }
    return Difference(**(values | changes))


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (_found(verdict="better"), ""),
        (_found(verdict="too few seeds to rank"), "an interval takes 3 seeds"),
        (_found(interval=None, p=None, p_holm=None), "every seed gave the same difference"),
        (_found(verdict="better", p_equivalence_holm=0.04), "by less than the margin of 0.02 nats"),
        (_found(verdict="equivalent"), "the true difference is below the margin of 0.02 nats"),
        (
            _found(),
            "neither a difference nor equivalence within 0.02 nats is shown (p = 0.08 and 0.30 by Holm's method)",
        ),
        (_found(margin=None, p_equivalence_holm=None), "no difference is shown (p = 0.08"),
    ],
)
def test_the_reason_of_a_verdict(found, why):
    comparison = make_comparison()
    said = sentences.reason(comparison, replace(comparison.recipes[1], difference=found))
    assert said.startswith(why)
    assert bool(said) == bool(why)


def test_the_budget_says_what_was_equal():
    comparison = make_comparison()
    assert sentences.budget(comparison) == (
        "3 recipes, about 3.29M active parameters each, trained with 3 seeds on 1.31M tokens (640 steps of 2,048) in "
        "sequences of 256, float32."
    )
    by_flops = replace(comparison, budget=replace(comparison.budget, match="flops"))
    assert "on the training FLOPs that dense spends on 1.31M tokens" in sentences.budget(by_flops)


def test_what_only_seeds_could_say():
    comparison = make_comparison((0, 1))
    assert sentences.noise(comparison, comparison.recipes[1]).endswith("noise takes 3 seeds to say.")
    comparison = make_comparison()
    said = sentences.noise(comparison, comparison.recipes[1])
    assert (
        "detects a true difference of 0.0056 nats four times in five, and shows an equal recipe equivalent to" in said
    )
    assert said.endswith("more often if the same is true of other recipes.")
    alone = replace(comparison, recipes=comparison.recipes[:2])
    assert "more often" not in sentences.noise(alone, alone.recipes[1])


def test_the_table_holds_means_and_the_worst():
    comparison = make_comparison()
    dense, smoe, _ = rows(comparison)
    losses = [run.held_out.loss for run in comparison.recipes[1].runs]
    assert smoe.loss == f"{sum(losses) / 3:.3f}"
    assert smoe.dead_experts == "1 of 64"
    assert (dense.dead_experts, dense.max_vio_batch, dense.difference, dense.verdict) == ("–", "–", "–", "")
    assert smoe.verdict == "equivalent"


def test_one_seed_has_no_spread():
    assert [row.spread for row in rows(make_comparison((0,)))] == ["", "", ""]


def test_domains_hold_every_recipe_and_their_difference():
    comparison = make_comparison()
    domains = domain_rows(comparison)
    assert [domain.name for domain in domains] == ["code", "fiction", "law", "math", "tech docs", "wiki"]
    code = domains[0].cells
    assert code[0].loss_difference == ""
    means = [sum(run.held_out.domains["code"].loss for run in recipe.runs) / 3 for recipe in comparison.recipes]
    assert code[2].loss_difference == signed(means[2] - means[0])


def test_a_domain_that_a_recipe_lacks_is_a_dash():
    comparison = make_comparison((0,))
    run = comparison.recipes[2].runs[0]
    held_out = replace(run.held_out, domains={"code": run.held_out.domains["code"]})
    lacking = replace(comparison.recipes[2], runs=(replace(run, held_out=held_out),))
    cells = domain_rows(replace(comparison, recipes=(*comparison.recipes[:2], lacking)))[1].cells
    assert (cells[2].loss, cells[2].loss_difference) == ("–", "")


def test_what_routers_learnt_is_told_by_recipe():
    """Means over layers and seeds, their spread over seeds, what chance alone gives, the difference to the first."""
    rows = {row.measure.field: row.cells for row in learnt_rows(competing(make_comparison()))}
    assert rows["agreement"] == (
        Cell(value="0.310", spread="± 0.010", chance="0.200", difference=""),
        Cell(value="0.710", spread="± 0.010", chance="0.200", difference="+0.400"),
    )
    assert [cell.chance for cell in rows["overlap"]] == ["0.900", "0.900"]
    assert rows["regret"][1].difference == "−0.120"
    assert [cell.value for cell in rows["competed"]] == ["0.140", "0.060"]
    assert [cell.value for cell in rows["composed"]] == ["–", "0.310"]  # of the blocks that have two sub-layers
    assert [cell.difference for cell in rows["composed"]] == ["", ""]


def test_competition_is_no_measure_where_nothing_competes():
    fields = {row.measure.field for row in learnt_rows(make_comparison((0,)))}
    assert {"max_vio_batch", "domain_mutual_information", "composed"} <= fields
    assert not {"agreement", "regret", "competed"} & fields
    assert all(cell.spread == "" for row in learnt_rows(make_comparison((0,))) for cell in row.cells)
    dense = make_comparison((0,))
    assert learnt_rows(replace(dense, recipes=dense.recipes[:1])) == ()
