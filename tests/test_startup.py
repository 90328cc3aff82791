"""Help and refusals of mistyped words come at once: they import none of the libraries that take seconds to import."""

import os
import subprocess
import sys

import pytest

HEAVY = {"datasets", "jaxtyping", "numpy", "pandas", "scipy", "torch", "transformers"}
SHELL = """
import atexit, sys
atexit.register(lambda: print("imported:", *sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr))
from moestro.cli import main
main()
"""
HELP = [["--help"], ["train", "--help"], ["compare", "--help"], ["inspect", "--help"], ["recipes", "--help"]]
MISUSES = [
    ([], "a command must follow"),
    (["comapre"], "did you mean compare?"),
    (["compare", "smoe", "--token", "5"], "did you mean --tokens?"),
    (["compare", "smoe", "--tokens", "20k"], "--tokens must be a whole number"),
    (["fly"], "fly"),
    (["train", "smoe", "--nothing"], "--nothing"),
    (["train", "smo"], "unknown recipe 'smo' (did you mean 'smoe'?)"),
    (["train", "smoe+competes"], "unknown variant 'competes'"),
    (["train", "smoe", "--size", "huge"], "unknown size 'huge'"),
    (["train", "smoe:nothing=1"], "unknown field 'nothing'"),
    (["train", "smoe:top_k=two"], "top_k must be a whole number, got 'two'"),
    (["train", "smoe:top_k=17"], "top_k must lie between 1 and num_experts (16), got 17"),
    (["train", "smoe:num_heads=3"], "num_attention_heads must divide hidden_size (128), got 3"),
    (["train", "cartesian+tied", "--set", "top_k=0"], "top_k must be at least 1, got 0"),
    (["train", "smoe:diversity=0.1"], "distillation and diversity learn from competition"),
    (["train", "smoe+compete:rate=2"], "rate must be at most 1, got 2.0"),
    (["train", "smoe", "--seed", "-1"], "seed must be at least 0, got -1"),
    (["train", "smoe", "--tokens", "10"], "tokens must be at least batch_tokens (512), got 10"),
    (["train", "smoe", "--max-bytes", "0"], "max_bytes must be at least 1, got 0"),
    (["train", "smoe", "--set", "width=800000", "num_experts=60000", "num_layers=2000"], "at most 10,000,000,000,000"),
    (["compare", "smoe", "smoe"], "every recipe must be named once, got 'smoe' 2 times"),
    (["compare", "smoe", "dense:tokens=9999"], "budgets must be equal: tokens differ"),
    (["compare", "smoe", "--margin", "nan"], "margin must be a number above 0, got nan"),
    (["compare", "--sweep", "1e-3", "--learning-rate", "1e-3"], "--sweep chooses every recipe's learning_rate"),
    (["compare", "smoe", "--jobs", "0"], "jobs must be at least 1, got 0"),
    (["recipes", "--size", "huge"], "unknown size 'huge'"),
    (["inspect"], "name one checkpoint, or two to set side by side, got 0"),
    (["inspect", "a", "--robustness"], "--robustness needs a text"),
    (["inspect", "a", "--batch-tokens", "0"], "batch_tokens must be at least 1, got 0"),
]


def moestro(*arguments: str) -> tuple[int, str, str, set[str]]:
    """Exit code, stdout and stderr of `moestro ARGUMENTS` in a process of its own, and what that imported."""
    ended = subprocess.run(
        [sys.executable, "-c", SHELL, *arguments], capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"}
    )
    said, _, imported = ended.stderr.rpartition("imported:")
    return ended.returncode, ended.stdout, said, set(imported.split())


@pytest.mark.parametrize("arguments", HELP, ids=" ".join)
def test_help_imports_nothing_heavy(arguments: list[str]):
    code, printed, _, imported = moestro(*arguments)
    assert code == 0 and "usage:" in printed
    assert "moestro" in imported and not imported & HEAVY


@pytest.mark.parametrize(("arguments", "message"), MISUSES, ids=[" ".join(a) for a, _ in MISUSES])
def test_a_misuse_that_the_words_show_imports_nothing_heavy(arguments: list[str], message: str):
    code, printed, said, imported = moestro(*arguments)
    assert code == 2 and printed == ""
    assert message in said and said.count("\n") == 1
    assert "moestro" in imported and not imported & HEAVY


def test_costs_are_known_without_transformers():
    """torch measures the machine; nothing else is needed to plan."""
    code, printed, _, imported = moestro("compare", "smoe", "cartesian+compete", "--dry-run")
    assert code == 0 and "FLOPs are per token of training" in printed
    assert imported & HEAVY <= {"torch", "numpy"}


def test_the_public_names_are_there_before_they_are_imported():
    script = """
import moestro, sys
assert "torch" not in sys.modules
assert {"AuxLosses", "MoestroForCausalLM", "Misuse", "__version__"} <= set(dir(moestro))
assert moestro.Misuse is __import__("moestro.errors").errors.Misuse
try:
    moestro.nothing
except AttributeError as error:
    assert str(error) == "module 'moestro' has no attribute 'nothing'"
else:
    raise AssertionError
from moestro import *
assert RouterRule is moestro.RouterRule
"""
    subprocess.run([sys.executable, "-c", script], check=True)
