"""With losses attached any trainer logs the task's loss and every weighted auxiliary loss apart."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from moestro import AuxLosses, RoutingCallback
from test_aux_losses import ragged_batch, tiny_model
from test_callback import Reporter, arguments, trainer_of

LOSSES: dict[str, Any] = {"balance": 0.5, "orthogonality": 0.1, "router_z": 0.1}


def logged(trainer: Trainer, aux: AuxLosses | None = None) -> list[dict[str, float]]:
    """Train, and return what was logged of it."""
    with (aux or AuxLosses(**LOSSES)).attach(trainer):
        trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def apart(entry: dict[str, float]) -> dict[str, float]:
    names = {"loss_task", *(f"aux/{name}" for name in LOSSES)}
    return {name: value for name, value in entry.items() if name in names}


def by_hand(rows: int = 8) -> dict[str, float]:
    """The first step's, from the values of each pass."""
    model, aux, batch = tiny_model(), AuxLosses(**LOSSES), ragged_batch()
    items, found = (batch["labels"][:, 1:] != -100).sum(), dict.fromkeys(["loss_task", *LOSSES], 0.0)
    with aux.attach(model, add_to_loss=False):
        for part in range(0, 8, rows):
            some = {name: value[part : part + rows] for name, value in batch.items()}
            found["loss_task"] += float(model(**some, num_items_in_batch=items).loss)
            aux.total()
            for name, weight in LOSSES.items():
                found[name] += weight * float(aux.last[name])
    return {name if name == "loss_task" else f"aux/{name}": value for name, value in found.items()}


@pytest.mark.parametrize("rows", [8, 2])
@pytest.mark.parametrize("callback", [False, True])
def test_they_are_apart_and_add_up(tmp_path: Path, rows: int, callback: bool):
    reporter, callbacks = Reporter(), [RoutingCallback()] if callback else []
    args = arguments(tmp_path, rows=rows, accumulation=8 // rows, max_steps=3, logging_steps=1)
    entries = logged(trainer_of(tiny_model(), args, reporter, *callbacks))
    assert apart(entries[0]) == pytest.approx(by_hand(rows), rel=1e-4)
    for entry, logs in zip(entries, reporter.logs, strict=False):
        assert sum(apart(entry).values()) == pytest.approx(entry["loss"], rel=1e-5)
        assert apart(entry) == apart(logs)  # what `report_to` gets
    if callback:
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert [apart(line) for line in lines] == [apart(entry) for entry in entries]


def test_a_log_is_the_mean_over_its_steps(tmp_path: Path):
    each = logged(trainer_of(tiny_model(), arguments(tmp_path / "1", max_steps=4, logging_steps=1)))
    two = logged(trainer_of(tiny_model(), arguments(tmp_path / "2", max_steps=4, logging_steps=2)))
    for name in apart(two[1]):
        assert two[1][name] == pytest.approx((each[2][name] + each[3][name]) / 2, rel=1e-5), name


def test_losses_that_are_not_divided_by_the_items_add_up_too(tmp_path: Path):
    """A loss function that takes no item count: the Trainer divides by the accumulation steps."""
    trainer = trainer_of(tiny_model(), arguments(tmp_path, rows=2, accumulation=4, max_steps=2, logging_steps=1))
    trainer.model_accepts_loss_kwargs = False
    for entry in logged(trainer):
        assert sum(apart(entry).values()) == pytest.approx(entry["loss"], rel=1e-5)


def test_several_passes_are_one_term_each():
    model, aux, batch = tiny_model(), AuxLosses(**LOSSES), ragged_batch()
    with aux.attach(model, add_to_loss=False):
        for part in (0, 4):
            model(**{name: value[part : part + 4] for name, value in batch.items()})
        total = aux.total()
    assert sum(aux.weighted.values()) == pytest.approx(float(total), rel=1e-6)  # type: ignore[arg-type]


def test_evaluation_and_what_comes_after_are_as_they_were(tmp_path: Path):
    trainer = trainer_of(tiny_model(), arguments(tmp_path, max_steps=2, logging_steps=1))
    trainer.eval_dataset = trainer.train_dataset
    with AuxLosses(**LOSSES).attach(trainer):
        trainer.train()
        before = trainer.evaluate()
    assert not apart(before) and "log" not in vars(trainer)
    assert trainer.evaluate()["eval_loss"] == before["eval_loss"]


def test_resumed_training_logs_the_same(tmp_path: Path):
    args = arguments(tmp_path, max_steps=4, logging_steps=2, save_strategy="steps", save_steps=2)
    whole = logged(trainer_of(tiny_model(), args))
    again = trainer_of(tiny_model(), args)
    with AuxLosses(**LOSSES).attach(again):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert apart(again.state.log_history[-2]) == pytest.approx(apart(whole[-1]), rel=1e-5)


RANKS = """
import json, os, pathlib, sys
from test_loss_log import logged
from test_callback import arguments, trainer_of
from test_aux_losses import tiny_model
entries = logged(trainer_of(tiny_model(), arguments(sys.argv[1], rows=4, max_steps=1, logging_steps=1)))
pathlib.Path(sys.argv[1], "rank-" + os.environ["RANK"] + ".json").write_text(json.dumps(entries[0]))
"""


@pytest.mark.slow
def test_ranks_log_what_one_process_does(tmp_path: Path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent / "scripts"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    done = subprocess.run(
        [*command, str(script), str(tmp_path)], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    lines = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("rank-*.json"))]
    assert len(lines) == 2, done.stderr[-2000:]
    for line in lines:
        assert apart(line) == pytest.approx(by_hand(8), rel=1e-4)
        assert sum(apart(line).values()) == pytest.approx(line["loss"], rel=1e-4)
    torch.testing.assert_close(lines[0]["loss"], lines[1]["loss"])
