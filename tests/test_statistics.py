import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from moestro.errors import Misuse
from moestro.statistics import (
    compare_with_first,
    document_bootstrap,
    holm,
    paired_difference,
)

# Student 1908, Biometrika 6: extra hours of sleep under two drugs, the textbook case of the paired t test.
SLEEP_1 = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
SLEEP_2 = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]


def test_the_textbook_case_of_the_paired_t_test():
    found = paired_difference(SLEEP_1, SLEEP_2)
    assert found.mean == pytest.approx(-1.58)
    assert found.interval == pytest.approx((-2.4598858, -0.7001142), abs=1e-6)
    assert found.p == pytest.approx(0.002833, abs=1e-6)
    assert found.by_seed == pytest.approx(np.subtract(SLEEP_1, SLEEP_2))


@given(st.integers(3, 12), st.integers(0, 10_000))
def test_interval_and_p_are_those_of_scipy_and_agree_with_each_other(seeds, seed):
    a, b = np.random.default_rng(seed).normal(size=(2, seeds))
    found = paired_difference(a.tolist(), b.tolist())
    expected = stats.ttest_rel(a, b)
    assert found.p == pytest.approx(expected.pvalue)
    assert found.interval is not None
    assert found.interval == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert found.deviation == pytest.approx(np.std(a - b, ddof=1))
    assert (found.interval[0] <= 0 <= found.interval[1]) == (expected.pvalue >= 0.05)


def test_the_first_recipe_is_subtracted_and_lower_is_better():
    first, noise = [4.11, 4.09, 4.10, 4.12], np.array([0.001, -0.001, 0.0005, 0.0])
    assert paired_difference((np.array(first) - 0.05 + noise).tolist(), first).verdict == "better"
    assert paired_difference((np.array(first) + 0.05 + noise).tolist(), first).verdict == "worse"


@pytest.mark.parametrize("seeds", [1, 2])
def test_fewer_than_three_seeds_are_too_few_to_rank(seeds):
    found = paired_difference([1.0, 1.1][:seeds], [2.0, 2.2][:seeds])
    assert found.verdict == "too few seeds to rank"
    assert (found.interval, found.p, found.p_holm, found.minimum_detectable) == (None, None, None, None)
    assert (found.p_equivalence, found.p_equivalence_holm, found.minimum_margin) == (None, None, None)
    assert (found.deviation is None) == (seeds == 1)


def test_identical_arms_are_not_answered():
    found = paired_difference([4.1, 4.2, 4.3], [4.1, 4.2, 4.3])
    assert (found.mean, found.deviation, found.verdict) == (0.0, 0.0, "not answered")


@pytest.mark.parametrize("offset", [0.7, 0.3, 1e-3])
def test_a_difference_that_no_seed_varies_is_not_evidence(offset):
    first = [4.1, 4.23, 9.37]
    assert np.std([value + offset - value for value in first]) > 0  # by rounding alone, which would pass for p = 1e-30
    found = paired_difference([value + offset for value in first], first)
    assert found.interval is None
    assert found.verdict == "not answered"


@pytest.mark.parametrize(
    ("recipe", "first"), [([1.0], [1.0, 2.0]), ([], []), ([1.0, float("nan")], [1.0, 2.0]), ([1e101, 1.0], [1.0, 2.0])]
)
def test_values_that_cannot_be_paired_are_refused(recipe, first):
    with pytest.raises(Misuse, match="paired values must be"):
        paired_difference(recipe, first)


def test_holm_known_case():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.04]) == [0.04]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.001, 0.2))
def test_holm_rejects_exactly_what_the_sequential_procedure_rejects(p_values, alpha):
    rejected = set()
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if (len(p_values) - rank) * p_values[index] > alpha:
            break
        rejected.add(index)
    assert {i for i, p in enumerate(holm(p_values)) if p <= alpha} == rejected


def test_holm_counts_only_the_recipes_that_were_tested():
    first = [4.0, 4.1, 4.2]
    tested, constant = [3.95, 4.06, 4.14], [4.5, 4.6, 4.7]
    found = compare_with_first([first, tested, constant])
    assert found[0].p_holm == found[0].p
    assert found[1].p_holm is None
    assert compare_with_first([first]) == ()


def test_holm_can_take_a_verdict_away():
    first = [4.0, 4.1, 4.2, 4.3]
    arm = [3.93, 4.02, 4.17, 4.25]
    alone = compare_with_first([first, arm])[0]
    among_many = compare_with_first([first, arm, *[[v + d for v, d in zip(first, (0.1, -0.1, 0.2, -0.2))]] * 9])[0]  # noqa: B905
    assert alone.p == among_many.p
    assert (alone.verdict, among_many.verdict) == ("better", "not answered")


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng, truth, covered = np.random.default_rng(1), 0.3, 0
    for _ in range(300):
        shared = rng.normal(size=4)
        found = paired_difference((shared + truth + rng.normal(size=4)).tolist(), shared.tolist())
        assert found.interval is not None
        covered += found.interval[0] <= truth <= found.interval[1]
    assert 0.92 <= covered / 300 <= 0.98


def test_equal_recipes_are_rarely_called_different():
    rng, claims = np.random.default_rng(2), 0
    for _ in range(120):
        found = compare_with_first(rng.normal(size=(4, 3)).tolist())
        claims += any(d.verdict in ("better", "worse") for d in found)
    assert claims <= 12  # 5 % of 120 is 6; test_verdicts counts more closely


def test_document_bootstrap_is_the_difference_per_token_not_per_document():
    found = document_bootstrap([10.0, 300.0], [20.0, 300.0], [10, 90], resamples=200)
    assert found.difference == pytest.approx(-0.1)
    assert found.interval == pytest.approx((-1.0, 0.0))  # the first document only; the second only
    assert (found.documents, found.resamples, found.seed) == (2, 200, 0)


def test_document_bootstrap_depends_on_its_seed_alone():
    a, b = np.random.default_rng(0).normal(size=(2, 50))
    tokens = np.full(50, 7)
    np.random.seed(1)
    one = document_bootstrap(a, b, tokens, seed=3, resamples=99)
    np.random.seed(2)
    assert document_bootstrap(a, b, tokens, seed=3, resamples=99) == one
    assert document_bootstrap(a, b, tokens, seed=4, resamples=99).interval != one.interval


def test_document_bootstrap_covers_the_truth():
    rng, truth, covered = np.random.default_rng(5), -0.02, 0
    for _ in range(150):
        tokens = rng.integers(50, 500, size=60)
        first = tokens * rng.normal(4.0, 0.5, size=60)
        recipe = first + tokens * truth + np.sqrt(tokens) * rng.normal(0, 0.8, size=60)
        interval = document_bootstrap(recipe, first, tokens, resamples=300).interval
        assert interval is not None
        covered += interval[0] <= truth <= interval[1]
    assert 0.87 <= covered / 150 <= 0.99


def test_document_bootstrap_pairs_documents():
    rng = np.random.default_rng(6)
    first = rng.normal(400, 100, size=80)
    tokens = rng.integers(10, 1000, size=80)  # long documents gain more, in proportion: no draw can show another gain
    interval = document_bootstrap(first - 0.01 * tokens, first, tokens, resamples=200).interval
    assert interval == pytest.approx((-0.01, -0.01))


def test_one_document_has_no_interval():
    assert document_bootstrap([1.0], [2.0], [4]).interval is None


@pytest.mark.parametrize("tokens", [[1, 0], [1], [1, float("inf")], [1, -3]])
def test_documents_need_tokens(tokens):
    with pytest.raises(Misuse, match="tokens must hold a count of at least 1"):
        document_bootstrap([1.0, 2.0], [1.0, 2.0], tokens)
