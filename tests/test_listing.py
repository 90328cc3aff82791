"""`moestro recipes`: every recipe and variant, readable at 80 columns."""

import re

import pytest
from rich.cells import cell_len

from command_line import moestro
from moestro.training.recipes import RECIPES, VARIANTS, recipe


@pytest.fixture
def shown(monkeypatch, capsys) -> str:
    monkeypatch.setenv("COLUMNS", "80")
    assert moestro(monkeypatch, "recipes") == 0
    return capsys.readouterr().out


def test_every_recipe_and_variant_is_listed_with_what_it_is(shown: str):
    assert max(cell_len(line) for line in shown.splitlines()) <= 80
    words = " ".join(shown.split())
    for name in (*RECIPES, *VARIANTS):
        assert re.search(rf"^ ?{re.escape(name)} ", shown, re.MULTILINE), name
    assert re.search(r"^ smoe +3,904,256 +2,528,000 +15.6M ", shown, re.MULTILINE)
    assert "parallel All sub-layers of a block read the same stream" in words


def test_what_it_says_to_type_can_be_typed(shown: str):
    examples = re.findall(rf"(?:{'|'.join(RECIPES)})[+:]\S*\w", shown.partition("Variants")[2])
    assert {"cartesian+parallel", "dense+halved", "smoe:top_k=4"} <= set(examples)
    for spec in examples:
        recipe(spec)


@pytest.mark.parametrize("command", ["train", "compare"])
def test_help_says_how_a_variant_is_typed(command: str, monkeypatch, capsys):
    assert moestro(monkeypatch, command, "--help") == 0
    assert "NAME+VARIANT" in capsys.readouterr().out
