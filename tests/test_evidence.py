"""Every script, benchmark and example runs at its smallest settings, and says in one line what it cannot do."""

import gzip
import json
import logging
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models

from command_line import write_corpus
from test_attach_trl import tokenizer

__all__ = ["tokenizer"]  # a fixture

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"

TINY = "--hidden 16 --tokens 64 --sequence 32 --rounds 1 --warm-up 0"
SMALLEST = {
    "benchmarks/competition_cost.py": f"--experts 4 --top-k 2 --width 8 {TINY}",
    "benchmarks/competition_signal.py": "--experts 4 --top-k 2 --hidden 16 --width 8 --tokens 64",
    "benchmarks/experts_backend.py": f"--layers 1 --experts 4 --expert-width 8 --vocabulary 64 {TINY}",
    "benchmarks/specialise_overhead.py": f"--layers 1 --experts 4 --top-k 2 --expert-width 8 {TINY} --no-memory",
    "benchmarks/preparation.py": "--megabytes 1",
    "benchmarks/startup.py": "--repeats 1 --no-costs",
    "benchmarks/recipe_steps.py": f"--recipes smoe dense --size tiny {TINY[12:]} --no-memory",
    "examples/competition_theory.py": "--sizes 1000 3000 --experts 2 --replications 2 --em-steps 2 --steps 10",
    "scripts/stock_aux_loss.py": "--cuts 1 2",
    "scripts/paired_study.py": f"{RESULTS}/compete/runs.jsonl.gz --recipes smoe smoe+compete:balance_winners=0.05",
    "scripts/attach_every_family.py": "mixtral",
    "scripts/tiny_models.py": "mixtral",
    "scripts/verdict_simulation.py": "--seeds 3 --recipes 1 --studies 40",
}
WITH_FILES = {
    "benchmarks/recipe_screening.py",
    "benchmarks/router_ceiling.py",
    "scripts/collect_robustness.py",
    "scripts/collect_study.py",
    "scripts/held_out_text.py",
}
"""These need files, and have tests of their own."""
ELSEWHERE = {"scripts/planted_bugs.py", "scripts/hostile.py", "scripts/kill_runs.py"}
"""The first runs the tests itself; test_hostile and test_ranks run the others."""

WRONG = {
    "benchmarks/competition_cost.py": [
        ("--hidden 20", "--hidden must be a multiple of 8, got 20"),
        ("--rounds 0", "--rounds must be 1 or more, got 0"),
        ("--experts 4 64 --top-k 8", "--top-k must be at most --experts (4), got 8"),
        ("--tokens 100", "--tokens must be a multiple of --sequence (512), got 100"),
    ],
    "benchmarks/competition_signal.py": [
        ("--presets none", "--presets must be among"),
        ("--output-std nan", "--output-std must be above 0 and finite, got nan"),
    ],
    "benchmarks/experts_backend.py": [
        ("--hidden 0", "--hidden must be 1 or more, got 0"),
        ("--warm-up -1", "--warm-up must be 0 or more, got -1"),
    ],
    "benchmarks/specialise_overhead.py": [
        ("--only none", "--only must be one of nothing, balance,"),
        ("--expert-width 12", "--expert-width must be a multiple of 8, got 12"),
    ],
    "benchmarks/preparation.py": [("--megabytes 0", "--megabytes must be 1 or more, got 0")],
    "benchmarks/startup.py": [("--repeats 0", "--repeats must be 1 or more, got 0")],
    "benchmarks/recipe_screening.py": [("out none", "unknown recipe 'none'")],
    "benchmarks/recipe_steps.py": [("--recipes none", "unknown recipe 'none'")],
    "benchmarks/router_ceiling.py": [("nowhere --data a=b", "must be the folder of a saved model, got nowhere")],
    "examples/competition_theory.py": [
        ("--experts 7", "the theory's powers are known"),
        ("--sizes 1000", "--sizes must be two or more"),
        ("--replications 0", "--replications must be 1 or more, got 0"),
    ],
    "scripts/stock_aux_loss.py": [("--cuts 3", "invalid choice: 3")],
    "scripts/paired_study.py": [
        ("nowhere.gz --recipes smoe dense", "No such file"),
        (f"{RESULTS}/compete/runs.jsonl.gz --recipes smoe none", "must hold none with seed 1, 2, 3"),
    ],
    "scripts/attach_every_family.py": [("none", "packages must be among those of docs/families.md, got none")],
    "scripts/collect_robustness.py": [("nowhere", "must hold RECIPE/seed-N/routing.json, got nowhere")],
    "scripts/collect_study.py": [("nowhere here", "must hold finished runs of moestro, got nowhere")],
    "scripts/held_out_text.py": [("out --data law=nowhere.jsonl", "nowhere.jsonl")],
}

Run = Callable[..., int]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Runs a script as `python SCRIPT ARGUMENTS` would, in this process: torch is loaded already."""
    logger = logging.getLogger("moestro")
    level = logger.level  # which a script may change for its own process

    def run(script: str, *arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", [str(ROOT / script), *arguments])
        monkeypatch.syspath_prepend(str((ROOT / script).parent))
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as end:
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
                return 1
            return int(end.code or 0)
        return 0

    yield run
    logger.setLevel(level)


SLOW = {"benchmarks/preparation.py", "scripts/stock_aux_loss.py", "scripts/attach_every_family.py"}


@pytest.mark.parametrize("script", [pytest.param(s, marks=pytest.mark.slow) if s in SLOW else s for s in SMALLEST])
@pytest.mark.filterwarnings("ignore")
def test_it_runs(script: str, run: Run, capsys: pytest.CaptureFixture[str]):
    assert run(script, *SMALLEST[script].split()) == 0
    printed = capsys.readouterr().out
    assert printed.strip()
    if script == "scripts/stock_aux_loss.py":
        stock, sequence, lagged = map(float, re.findall(r"2 x 8 +([\d.]+) +([\d.]+) +([\d.]+)", printed)[0])
        assert stock > 1.5 and abs(sequence - 1) < 2e-3 and abs(lagged - 1) < 2e-3


@pytest.mark.parametrize(("script", "arguments", "said"), [(s, a, m) for s, cases in WRONG.items() for a, m in cases])
def test_misuse_is_one_line_before_the_work(
    script: str, arguments: str, said: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert run(script, *arguments.split()) in (1, 2)
    captured = capsys.readouterr()
    *usage, last = captured.err.strip().splitlines()
    assert said in last
    assert not usage or script == "scripts/stock_aux_loss.py"  # argparse shows its usage too
    assert not list(tmp_path.iterdir())


def test_no_script_is_left_out():
    there = {
        str(path.relative_to(ROOT))
        for folder in ("scripts", "benchmarks", "examples")
        for path in (ROOT / folder).rglob("*.py")
        if "__main__" in path.read_text()
    }
    assert there - ELSEWHERE == {*SMALLEST, *WITH_FILES}


@pytest.mark.slow
def test_peak_memory_is_measured_in_a_process_of_its_own(run: Run, capsys: pytest.CaptureFixture[str]):
    small = SMALLEST["benchmarks/recipe_steps.py"].replace("--no-memory", "--memory").replace("smoe dense", "dense")
    assert run("benchmarks/recipe_steps.py", *small.split()) == 0
    assert float(re.findall(r"\| ([\d.]+) \|$", capsys.readouterr().out.strip())[0]) > 0.1


def test_recipes_are_screened(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    text = write_corpus(tmp_path / "text", documents=8)
    small = "batch_tokens=64,sequence_length=32,hidden_size=16,num_layers=1,num_heads=2,width=8,vocab_size=300"
    specs = [f"smoe:{small}", f"dense:{small}"]
    for _ in range(2):  # the second time from the finished runs
        assert (
            run("benchmarks/recipe_screening.py", str(tmp_path / "out"), *specs, "--tokens", "256", "--data", str(text))
            == 0
        )
        rows = capsys.readouterr().out.splitlines()[1:]
        assert [row.split()[-1] for row in rows] == specs
        assert all(1 < float(row.split()[1]) < 9 for row in rows)


def test_a_study_is_collected(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with gzip.open(RESULTS / "compete" / "runs.jsonl.gz", "rt") as file:
        runs = [json.loads(next(file)) for _ in range(2)]
    for index, whole in enumerate(runs):
        own = dict(whole)
        (folder := tmp_path / "study" / f"seed-{index}").mkdir(parents=True)
        for name in ("environment", "summary"):
            (folder / f"{name}.json").write_text(json.dumps(own.pop(name)))
        (folder / "run.json").write_text(json.dumps(own))
    assert run("scripts/collect_study.py", str(tmp_path / "study"), str(tmp_path / "out")) == 0
    with gzip.open(tmp_path / "out" / "runs.jsonl.gz", "rt") as file:
        assert sorted(file.read().splitlines()) == sorted(json.dumps(whole, sort_keys=True) for whole in runs)
    printed = capsys.readouterr().out
    assert all(f"| {whole['summary']['held_out']['loss']:.4f} |" in printed for whole in runs)


def test_robustness_is_collected(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for seed, rise in enumerate((0.1, 0.3)):
        (folder := tmp_path / "smoe" / f"seed-{seed}").mkdir(parents=True)
        test = {"kind": "noise", "amount": 0.5, "scope": {"label": "all"}, "rise": rise}
        (folder / "routing.json").write_text(json.dumps({"checkpoints": [{"robustness": {"tests": [test]}}]}))
    assert run("scripts/collect_robustness.py", str(tmp_path)) == 0
    assert "| noise | 0.5 | all | 0.200 ± 0.141 |" in capsys.readouterr().out


def test_held_out_text_is_written(run: Run, tmp_path: Path):
    lines = [
        json.dumps({"text": f"Document {index} says something of its own, {index * 7919}."}) for index in range(60)
    ]
    (tmp_path / "law.jsonl").write_text("\n".join(lines))
    source = f"law={tmp_path / 'law.jsonl'}"
    assert run("scripts/held_out_text.py", str(tmp_path / "out"), "--data", source) == 0
    written = (tmp_path / "out" / "law.jsonl").read_text().splitlines()
    assert 0 < len(written) < 60 and all(line in lines for line in written)


def test_routers_are_fitted(run: Run, tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]):
    tiny_models.build("mixtral").model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "law.jsonl").write_text(
        "\n".join(json.dumps({"text": ("w1 w2 w3 w4 " * 40).strip()}) for _ in range(4))
    )
    sizes = "--tokens 64 --measured 32 --sequence 16 --epochs 1 --batch 16 --hidden 8"
    arguments = [str(tmp_path / "model"), "--data", f"law={tmp_path / 'law.jsonl'}", *sizes.split()]
    assert run("benchmarks/router_ceiling.py", *arguments) == 0
    assert "| mean |" in capsys.readouterr().out
