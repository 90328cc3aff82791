"""What users type and what files are called: one line, exit 2, before any work, and nothing that steers a terminal."""

import re
from importlib.metadata import version
from pathlib import Path

import pytest
from rich.console import Console

from command_line import moestro
from moestro.errors import Misuse
from moestro.gate.mistakes import in_our_words
from moestro.gate.paths import user_path
from moestro.gate.visible import one_line, said
from moestro.report.printing import Visible

STEERS = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
BAD = [
    (["train", "smoe", "--seed", "-1"], "seed must be at least 0, got -1"),
    (["train", "smoe", "--seed", str(2**32)], "seed must be at most 4,294,967,295, got 4294967296"),
    (["train", "smoe", "--seed", "one"], "--seed must be a whole number, such as 20_000, got 'one'"),
    (["compare", "--seeds", "1e30"], "--seeds must be a whole number, such as 20_000, got '1e30'"),
    (["compare", "smoe", "--tokens", "20k"], "--tokens must be a whole number, such as 20_000, got '20k'"),
    (["compare", "smoe", "--learning-rate", "x"], "--learning-rate must be a number, got 'x'"),
    (["compare", "smoe", "--sweep", "x"], "--sweep must be one or more numbers, got 'x'"),
    (["compare", "smoe", "--dtype", "fp8"], "--dtype must be one of auto, bfloat16, float32, got 'fp8'"),
    (["compare", "smoe", "--seeds"], "--seeds needs a value"),
    (["compare", "smoe", "--data"], "--data needs at least one value"),
    (["compare", "smoe", "--set", "--seeds", "2"], "--set needs at least one value"),
    (["compare", "smoe", "--seed", "3"], "compare has no option --seed (did you mean --seeds?)"),
    (["train", "smoe", "--jobs", "1"], "train has no option --jobs (see moestro train --help)"),
    (["train", "smoe", "--seeds=4", "--batch_tokens", "5"], "train has no option --seeds (did you mean --seed?)"),
    (["comapre", "smoe"], "unknown command 'comapre' (did you mean compare?); the commands are compare, train,"),
    (["compare", "--seeds", "9" * 30], "seeds must be at most 1,000"),
    (["compare", "--first-seed", str(2**32 - 1)], "first_seed and the seeds after it must be at most 4,294,967,295"),
    (["compare", "--margin", "nan"], "margin must be a number above 0, got nan"),
    (["train", "smoe", "--report-to", "nobody"], "--report-to must be one of"),
    (["train", "smoe", "--report-to", "clearml"], "--report-to clearml needs a package that is not installed"),
    (["train", "smoe", "--set", "beta1=1"], "beta1 must be below 1, got 1.0"),
    (["train", "smoe", "--set", "hidden_size=0"], "hidden_size must be at least 1, got 0"),
    (["train", "smoe", "--set", "num_layers=0"], "num_layers must be at least 1, got 0"),
    (["train", "smoe", "--vocab-size", "10000000000"], "vocab_size must be at most 10,000,000, got 10000000000"),
    (["train", "smoe", "--vocab-size", "1000000", "--set", "hidden_size=40000"], "must fit this machine"),
    (["train", "smoe", "--nothing", "3"], "train has no option --nothing"),
    (["train", "smoe", "smoe"], "train does not know what to do with 'smoe'"),
    (["train"], "train needs a recipe, as `moestro recipes` lists them"),
    (["fly"], "fly"),
    ([], "a command must follow: one of compare, train, inspect, recipes"),
    (["inspect"], "name one checkpoint, or two to set side by side, got 0"),
    (["inspect", ""], "a path must not be empty"),
    (["inspect", "~nouser/x"], "~nouser/x cannot be used as a path"),
    (["train", "smoe", "--data", "~nouser/x"], "~nouser/x cannot be used as a path"),
    (["train", "smoe", "--data", "a" * 5000], "cannot be used as a path: File name too long"),
    (["train", "smoe", "--tokenizer", ""], "a path must not be empty"),
    (["train", "smoe", "--text-column", "a+"], "text_column must be a column's name"),
    (["inspect", "a" * 5000], "cannot be used as a path: File name too long"),
    (["inspect", "no\x1b[2Jsuch\nplace/\u202ex/y"], "no⟨U+001B⟩[2Jsuch⟨U+000A⟩place/⟨U+202E⟩x/y does not exist"),
    (["train", "smoe:\x1b]0;title\x07=3"], "unknown field"),
    (["train", "smoe", "--dtype", "\x9b31m"], "⟨U+009B⟩31m"),
    (["train", "\udcff"], "unknown recipe"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[ascii(" ".join(a))[:40] for a, _ in BAD])
def test_misuse_is_one_visible_line_before_any_work(arguments, message, monkeypatch, capsys, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    assert moestro(monkeypatch, *arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.startswith("moestro: ") and printed.err.count("\n") == 1
    assert not STEERS.search(printed.err) and len(printed.err) < 1300
    assert printed.out == "" and not any(tmp_path.iterdir())


def test_a_rank_that_is_none_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "first")
    assert moestro(monkeypatch, "recipes") == 2
    assert "RANK must be a whole number, as torchrun sets it, got 'first'" in capsys.readouterr().err


def test_a_mistake_of_an_unknown_kind_keeps_the_parser_s_words():
    assert in_our_words("Odd thing: x", ["train"], ["train"], list) == "Odd thing: x"


def test_the_version_is_printed(monkeypatch, capsys):
    assert moestro(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"moestro {version('moestro')}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["compare", "-h"]])
def test_help_is_printed(arguments, monkeypatch, capsys):
    assert moestro(monkeypatch, *arguments) == 0
    assert "usage: moestro" in capsys.readouterr().out


def test_names_of_files_reach_the_terminal_visible(monkeypatch, capsys, tmp_path: Path):
    (tmp_path / "a\x1b[31m\n\u202eb").mkdir()
    monkeypatch.chdir(tmp_path)
    assert moestro(monkeypatch, "train", "smoe", "--data", "a\x1b[31m\n\u202eb") == 2
    assert "a⟨U+001B⟩[31m⟨U+000A⟩⟨U+202E⟩b" in capsys.readouterr().err


def test_a_console_obeys_neither_markup_nor_escapes(capsys):
    Visible(stderr=True).print("[red]a[/red] [link=x]\x1b[2J\u202e[/]")
    assert capsys.readouterr().err == "[red]a[/red] [link=x]⟨U+001B⟩[2J⟨U+202E⟩[/]\n"
    Visible(stderr=True).print(Console().render_str("plain"))


def test_a_long_line_keeps_its_reason():
    line = one_line("name " + "x" * 10**6 + "\n: the reason")
    assert line.startswith("name x") and line.endswith("⟨U+000A⟩: the reason") and len(line) < 1300
    assert said(ValueError("a\n" * 10**6)) == ("a " * 120)[:239] + "…"
    assert said(KeyError()) == "KeyError"


@pytest.mark.parametrize("text", ["", "\0", "x" * 300, "~nouser", "a/" * 3000])
def test_paths_that_cannot_be_looked_up_are_refused(text: str):
    with pytest.raises(Misuse):
        user_path(text)


def test_a_link_to_itself_is_refused(tmp_path: Path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(Misuse, match="cannot be used as a path"):
        user_path(tmp_path / "loop")
    assert user_path(tmp_path / "new") == tmp_path / "new"
