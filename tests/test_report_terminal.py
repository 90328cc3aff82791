import io

import pytest
from rich.cells import cell_len
from rich.console import Console

from comparison_fixture import HOSTILE, hostile, make_comparison
from moestro.gate.visible import visible
from moestro.report.terminal import print_comparison


def _printed(comparison, width: int, encoding: str = "utf-8", *, verbose: bool = True, **options) -> str:
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding=encoding), width=width, **options)
    print_comparison(comparison, console, verbose=verbose)
    console.file.flush()
    return raw.getvalue().decode(encoding)


@pytest.mark.parametrize("width", [140, 80, 40])
def test_every_width_shows_every_figure(width):
    shown = _printed(make_comparison(), width)
    assert max(cell_len(line) for line in shown.splitlines()) <= width
    words = " ".join(shown.split())
    for part in (
        "fine-grained beats dense",
        "equivalent",
        "at most 5 % of comparisons",
        "better",
        "1 of 64",
        "2.584",
        "3.29M",
        "tech docs",
        "± 0.02",
    ):
        assert part in words, part


@pytest.mark.parametrize("width", [140, 80, 40])
def test_the_answer_fits_on_one_screen(width):
    shown = _printed(make_comparison(), width, verbose=False)
    assert max(cell_len(line) for line in shown.splitlines()) <= width
    assert len(shown.splitlines()) <= (40 if width >= 80 else 60)
    words = " ".join(shown.split())
    for part in ("fine-grained beats dense", "equivalent", "[0.0230, 0.0379]", "± 0.02", "gzip -9"):
        assert part in words, part
    for part in ("perplexity", "at most 5 % of comparisons", "tech docs"):
        assert part not in words, part


def test_recipes_stand_side_by_side_where_they_fit():
    wide, narrow = (_printed(make_comparison(), width) for width in (80, 50))
    assert wide.count("perplexity") == 1
    assert narrow.count("perplexity") > 1


@pytest.mark.parametrize("width", [200, 60])
def test_hostile_text_is_neither_markup_nor_escape(width):
    shown = _printed(hostile(make_comparison((0,))), width)
    assert not any(ord(character) < 0x20 and character != "\n" for character in shown)
    assert "\u202e" not in shown
    joined = "".join(shown.split())
    assert "[bold]markup[/bold]" in joined
    assert "".join(visible(HOSTILE[4]).split()) in joined


def test_only_our_own_styles_colour_a_terminal():
    shown = _printed(hostile(make_comparison()), 300, force_terminal=True, color_system="standard")
    assert "\x1b[31mred" not in shown
    assert "⟨U+001B⟩[31mred" in shown


def test_an_ascii_terminal_gets_ascii():
    shown = _printed(hostile(make_comparison()), 120, encoding="ascii")
    assert "+-" in shown
    assert "<U+001B>[31mred" in shown


def test_unequal_budgets_are_said():
    assert "The budgets are not equal" in _printed(hostile(make_comparison((0,))), 100)


def test_too_few_seeds_are_said():
    words = " ".join(_printed(make_comparison((0, 1)), 80).split())
    assert "too few seeds to rank (an interval takes 3 seeds)" in words
