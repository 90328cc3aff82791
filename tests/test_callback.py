"""The metrics-only callback: what it reports, where that arrives, and that training is bit for bit what it was."""

import gc
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from moestro import AuxLosses, Compete, Misuse, MoestroConfig, MoestroForCausalLM, RoutingCallback, RoutingMeter
from moestro.adapters import moe_layers, observe
from test_aux_losses import ragged_batch, tiny_model

BRIEF = {
    "max_vio",
    "max_vio_worst",
    "max_vio_batch",
    "dead_experts",
    "entropy",
    "confidence",
    "mutual_information",
    "sequence_mutual_information_excess",
    "score_square",
    "mean_score_square",
    "column_variance",
}
DETAILS = {"cosine", "cosine_square", "overlap", "overlap_shuffled"}


class Rows(Dataset):
    """The same batch, over and over."""

    def __init__(self, batch: dict[str, torch.Tensor], rows: int = 64) -> None:
        self.batch, self.rows = batch, rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: value[index % len(value)] for name, value in self.batch.items()}


class Reporter(TrainerCallback):
    """Stands for what `report_to` names: it is added before all callbacks of the user."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs) | {"step": state.global_step})


class Witness(TrainerCallback):
    """Keeps gradients and random state of every step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        self.seen.append(found | {"random state": torch.get_rng_state()})


def arguments(folder: Path, rows: int = 8, accumulation: int = 1, **kwargs: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {"max_steps": 4, "logging_steps": 2, "save_strategy": "no"}
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-3,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        **(defaults | kwargs),
    )


def trainer_of(
    model: nn.Module, args: TrainingArguments, *callbacks: TrainerCallback, batch: Any = None, **kwargs: Any
) -> Trainer:
    return Trainer(
        model=model, args=args, train_dataset=Rows(batch or ragged_batch()), callbacks=list(callbacks), **kwargs
    )


def lines_of(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def moe(logs: dict[str, Any]) -> dict[str, float]:
    return {name.removeprefix("moe/"): value for name, value in logs.items() if name.startswith("moe/")}


def hooks_of(model: nn.Module) -> int:
    own_forward = sum("forward" in m.__dict__ for m in model.modules())
    return own_forward + sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("mode", ["brief", "detailed"])
def test_figures_arrive_at_reporters_in_the_history_and_in_the_file(tmp_path: Path, mode: str):
    reporter, callback = Reporter(), RoutingCallback(mode)
    trainer = trainer_of(tiny_model(), arguments(tmp_path), reporter, callback)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    reported = [logs for logs in reporter.logs if "loss" in logs]
    lines = lines_of(tmp_path)
    names = BRIEF | (DETAILS if mode == "detailed" else set())
    assert [line["step"] for line in lines] == [2, 4]
    for line, logs, entry in zip(lines, reported, history, strict=True):
        assert set(moe(line)) == names
        assert all(type(value) is float and math.isfinite(value) for value in moe(logs).values())
        assert moe(line) == moe(logs) == moe(entry)
        assert line["loss"] == logs["loss"]
        layers = line.get("layers", {})
        assert set(layers) == ({layer.name for layer in moe_layers(trainer.model)} if mode == "detailed" else set())
        for figures in layers.values():
            assert sum(figures["load"]) == pytest.approx(1.0)
        if layers:
            worst = max(figures["max_vio_data"] for figures in layers.values())
            mean = sum(figures["max_vio_data"] for figures in layers.values()) / len(layers)
            assert (line["moe/max_vio_worst"], line["moe/max_vio"]) == (worst, pytest.approx(mean))
    assert not moe(reporter.logs[-1])  # the summary at the end: everything was told before


def test_figures_are_those_of_the_batch(tmp_path: Path):
    """The first step's, from a meter of its own on an equal model; dead experts are added up over layers."""

    def model_with_dead_experts() -> MoestroForCausalLM:
        model = tiny_model()
        for layer in moe_layers(model)[:2]:
            nn.init.zeros_(layer.router.weight)  # ties go to the same experts for all tokens
        return model

    args = arguments(tmp_path, max_steps=1, logging_steps=1)
    trainer_of(model_with_dead_experts(), args, RoutingCallback()).train()
    model, meter = model_with_dead_experts(), RoutingMeter(training=True)
    with meter.attach(model):
        model(**ragged_batch())
    figures = list(meter.figures().values())
    logged = moe(lines_of(tmp_path)[0])
    assert logged["entropy"] == pytest.approx(sum(f.entropy for f in figures) / len(figures))
    assert logged["max_vio"] == pytest.approx(sum(f.max_vio_data for f in figures) / len(figures))
    assert logged["dead_experts"] == sum(f.dead_experts for f in figures) == 4


def test_every_layer_is_logged_where_asked(tmp_path: Path):
    model, reporter = tiny_model(), Reporter()
    trainer_of(model, arguments(tmp_path), reporter, RoutingCallback(per_layer=True)).train()
    for layer in moe_layers(model):
        assert f"moe/{layer.name}/max_vio" in reporter.logs[0]


@pytest.mark.parametrize(
    ("package", "accumulation", "checkpointing"),
    [
        ("moestro", 1, False),
        ("moestro", 4, False),
        ("moestro", 4, True),
        ("qwen3_moe", 2, True),
        ("mixtral", 2, False),
        ("deepseek_v3", 2, True),
    ],
)
def test_training_is_bit_for_bit_what_it_was(tmp_path: Path, package: str, accumulation: int, checkpointing: bool):
    results = []
    for callbacks in ([], [RoutingCallback("detailed", every=2)]):
        model = tiny_model() if package == "moestro" else tiny_models.build(package).model
        witness = Witness()
        args = arguments(
            tmp_path,
            8 // accumulation,
            accumulation,
            max_steps=2,
            activation_checkpointing=checkpointing,
            activation_checkpointing_kwargs={"use_reentrant": False},
        )
        torch.manual_seed(5)
        trainer = trainer_of(model, args, witness, *callbacks)
        trainer.train()
        results.append((witness.seen, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]))
    (plain, plain_loss), (watched, watched_loss) = results
    assert watched_loss == plain_loss
    assert len(plain) == len(watched) == 2
    for before, after in zip(plain, watched, strict=True):
        assert before.keys() == after.keys()
        for name in before:
            assert torch.equal(before[name], after[name]), name
    assert moe(lines_of(tmp_path)[0])["cosine"] is not None


def test_a_model_whose_experts_draw_random_numbers_draws_the_same(tmp_path: Path):
    """None of transformers' do, but dropout may be in anything that wraps them."""

    class Noisy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch.rand(1)
            return nn.functional.silu(x)

    states = []
    for callbacks in ([], [RoutingCallback("detailed", every=1)]):
        model = tiny_model()
        moe_layers(model)[0].experts.act_fn = Noisy()
        torch.manual_seed(5)
        trainer_of(model, arguments(tmp_path, max_steps=2), *callbacks).train()
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_autocast_leaves_gradients_where_they_are(tmp_path: Path):
    """Weights cast while looking must not be reused by the pass: they have no gradient."""
    seen = []
    for callbacks in ([], [RoutingCallback("detailed", every=1)]):
        witness = Witness()
        torch.manual_seed(5)
        trainer_of(tiny_model(), arguments(tmp_path, bf16=True, max_steps=2), witness, *callbacks).train()
        seen.append(witness.seen)
    for before, after in zip(*seen, strict=True):
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_figures_do_not_depend_on_the_cut_of_the_batch(tmp_path: Path, checkpointing: bool):
    """Micro-batches add up, and the recomputation of a checkpointed layer is not counted again."""
    found = []
    for rows in (8, 2):
        model = tiny_model()
        args = arguments(
            tmp_path,
            rows,
            8 // rows,
            max_steps=1,
            logging_steps=1,
            activation_checkpointing=checkpointing,
            activation_checkpointing_kwargs={"use_reentrant": False},
        )
        callback = RoutingCallback()
        trainer = trainer_of(model, args, callback)
        counted: list[float] = []
        callback.on_step_end = lambda *a, c=callback, seen=counted, **k: seen.extend(  # type: ignore[method-assign]
            float(sums.tokens) for sums in c.meter.sums.values()
        )
        trainer.train()
        assert counted == [float(ragged_batch()["attention_mask"].sum())] * 3
        found.append(moe(lines_of(tmp_path)[-1]))
    for name in BRIEF - {"max_vio_batch"}:
        assert found[1][name] == pytest.approx(found[0][name], abs=1e-6), name
    assert found[1]["max_vio_batch"] > found[0]["max_vio_batch"]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("package", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss"])
def test_stock_models(tmp_path: Path, package: str, padded: bool):
    tiny = tiny_models.build(package, padded=padded)
    reporter = Reporter()
    args = arguments(tmp_path, rows=2)
    trainer_of(tiny.model, args, reporter, RoutingCallback("detailed"), batch=tiny.inputs).train()
    line = lines_of(tmp_path)[0]
    assert set(moe(reporter.logs[0])) == BRIEF | DETAILS
    assert len(line["layers"]) == len(moe_layers(tiny.model))
    assert 0 <= line["moe/overlap"] <= 1
    assert 0 < line["moe/cosine_square"] < 1


def test_outputs_looked_at_are_those_of_the_layer(tmp_path: Path):
    """Those of the sample, run beside the pass, against those that the layer itself reports when asked."""
    measured = {}
    for asked in (False, True):
        model, meter = tiny_model(), RoutingMeter(training=True)
        meter.detailed = True
        with observe(model, lambda record: None, outputs=asked), meter.attach(model):
            model(**ragged_batch())
        measured[asked] = meter.figures()
    for name, figures in measured[True].items():
        assert figures.cosine == pytest.approx(measured[False][name].cosine, abs=1e-5)
        assert figures.overlap == measured[False][name].overlap


def test_details_are_looked_at_in_the_steps_that_were_asked_for(tmp_path: Path):
    for every, expected in ((None, [0, 3]), (2, [1, 3, 5])):
        callback, steps = RoutingCallback("detailed", every=every), []

        class Note(TrainerCallback):
            def on_pre_optimizer_step(self, args: Any, state: Any, *rest: Any, seen=steps, c=callback, **kw: Any):
                if c.meter.detailed:
                    seen.append(state.global_step)

        trainer_of(tiny_model(), arguments(tmp_path, max_steps=6, logging_steps=3), Note(), callback).train()
        assert steps == expected


def test_evaluation_is_not_counted(tmp_path: Path):
    results = []
    for strategy in ("no", "steps"):
        args = arguments(tmp_path, eval_strategy=strategy, eval_steps=1, per_device_eval_batch_size=4)
        # From another batch, so that counting it would show.
        other = Rows({name: value.flip(0)[:4] for name, value in ragged_batch().items()}, rows=4)
        trainer_of(tiny_model(), args, RoutingCallback(), eval_dataset=other).train()
        results.append([moe(line) for line in lines_of(tmp_path)])
    assert results[0] == results[1]


def test_passes_without_gradients_are_not_training():
    """A reference model's passes, in DPO and GRPO, may run in training mode."""
    model, training, others = tiny_model(), RoutingMeter(training=True), RoutingMeter()
    with training.attach(model), others.attach(model), torch.no_grad():
        model(**ragged_batch())
    assert not training.figures() and len(others.figures()) == 3


def test_the_last_log_covers_what_no_other_did(tmp_path: Path):
    reporter = Reporter()
    args = arguments(tmp_path, max_steps=3, logging_steps=2)
    trainer_of(tiny_model(), args, reporter, RoutingCallback()).train()
    assert [line["step"] for line in lines_of(tmp_path)] == [2, 3]
    assert "train_loss" in reporter.logs[-1]
    assert set(moe(reporter.logs[-1])) == BRIEF


def test_a_resumed_run_goes_on_in_its_file(tmp_path: Path):
    args = arguments(tmp_path, max_steps=4, logging_steps=1, save_strategy="steps", save_steps=2)
    trainer_of(tiny_model(), args, RoutingCallback()).train()
    whole = lines_of(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "moe/max')  # a write that broke off
    reporter = Reporter()
    trainer_of(tiny_model(), args, reporter, RoutingCallback()).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-2")
    )
    resumed = lines_of(tmp_path)
    assert [line["step"] for line in resumed] == [1, 2, 3, 4]
    assert [logs["step"] for logs in reporter.logs if moe(logs)] == [3, 4]
    for before, after in zip(whole, resumed, strict=True):
        assert moe(after) == pytest.approx(moe(before))
    trainer_of(tiny_model(), args, RoutingCallback()).train()
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 3, 4]


def test_a_file_of_ones_own(tmp_path: Path):
    trainer_of(tiny_model(), arguments(tmp_path), RoutingCallback(file=tmp_path / "new" / "routing.jsonl")).train()
    assert len(lines_of(tmp_path / "new", "routing.jsonl")) == 2
    assert not (tmp_path / "metrics.jsonl").exists()


def test_the_model_is_left_as_it_was(tmp_path: Path):
    model = tiny_model()
    before = hooks_of(model)
    trainer_of(model, arguments(tmp_path), RoutingCallback()).train()
    assert hooks_of(model) == before


class BreakOff(TrainerCallback):
    def __init__(self) -> None:
        self.at: int | None = 3

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.at:
            raise RuntimeError("broke off")


def test_training_that_broke_off_can_be_begun_anew(tmp_path: Path):
    """The same callback counts once; one that is gone leaves the model as it was."""
    model, broken = tiny_model(), BreakOff()
    before = hooks_of(model)
    trainer = trainer_of(model, arguments(tmp_path), RoutingCallback(), broken)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="broke off"):
            trainer.train()
    broken.at = None
    trainer.train()
    assert [line["step"] for line in lines_of(tmp_path)] == [2, 4]
    assert hooks_of(model) == before

    broken.at = 3
    with pytest.raises(RuntimeError, match="broke off"):
        trainer.train()
    assert hooks_of(model) > before
    del trainer
    gc.collect()
    assert hooks_of(model) == before


def test_auxiliary_losses_beside_it(tmp_path: Path):
    """Both listen; losses that ask for outputs spare the callback a run of the experts."""
    aux = AuxLosses(balance=0.1, orthogonality=0.1)
    trainer = trainer_of(tiny_model(), arguments(tmp_path), RoutingCallback("detailed"))
    with aux.attach(trainer):
        trainer.train()
    assert set(moe(lines_of(tmp_path)[0])) == BRIEF | DETAILS


def test_refusals(tmp_path: Path, unchecked: None):
    dense = MoestroForCausalLM(MoestroConfig(vocab_size=64, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    with pytest.raises(Misuse, match="has no experts"):
        trainer_of(dense, arguments(tmp_path), RoutingCallback()).train()
    with pytest.raises(Misuse, match="mode must be one of brief, detailed, got 'long'"):
        RoutingCallback("long")  # type: ignore[arg-type]
    with pytest.raises(Misuse, match="every must be at least 1, got 0"):
        RoutingCallback("detailed", every=0)
    with pytest.raises(Misuse, match='needs mode="detailed"'):
        RoutingCallback(every=3)


def test_figures_that_are_not_finite_are_null_in_the_file(tmp_path: Path):
    callback = RoutingCallback()

    class Poison(TrainerCallback):
        def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
            for sums in callback.meter.sums.values():
                sums.entropy.fill_(float("nan"))

    trainer_of(tiny_model(), arguments(tmp_path, rows=4, accumulation=2), Poison(), callback).train()
    assert all(line["moe/entropy"] is None for line in lines_of(tmp_path))


def test_competition_is_logged_where_experts_compete(tmp_path: Path):
    trainer = trainer_of(tiny_model(), arguments(tmp_path), callback := RoutingCallback(per_layer=True))
    with AuxLosses(distillation=0.1, compete=Compete(rate=0.5)).attach(trainer):
        trainer.train()
    assert callback.meter.sums == {}
    for line in lines_of(tmp_path):
        assert moe(line).keys() >= BRIEF | {"competing", "agreement"}
        assert 0 <= line["moe/agreement"] <= 1
        assert line["moe/competing"] == line["moe/model.layers.1.feed_forward.0/competing"] > 0


RANKS = """
import json
import os
import sys
from pathlib import Path
import torch.distributed as dist
from moestro import RoutingCallback, RoutingMeter
from test_callback import arguments, ragged_batch, tiny_model, trainer_of

model, folder, ranks = tiny_model(), Path(sys.argv[1]), int(sys.argv[2])
trainer_of(model, arguments(folder, rows=8 // ranks), RoutingCallback("detailed")).train()
meter = RoutingMeter()
with meter.attach(model.eval()):
    if not dist.is_initialized() or dist.get_rank() == 0:
        model(**ragged_batch())
entropies = [figures.entropy for figures in meter.figures().values()]  # a rank without a batch takes part
Path(folder, f"rank-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(entropies))  # two ranks' prints mix
if dist.is_initialized():
    dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_ranks_report_what_one_does(tmp_path: Path):
    (tmp_path / "ranks.py").write_text(RANKS)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    here = Path(__file__).parent
    places = os.pathsep.join([str(here), str(here.parent / "scripts")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": places}
    said, lines = [], []
    for ranks, launcher in (
        (1, []),
        (2, ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]),
    ):
        folder = tmp_path / str(ranks)
        command = [sys.executable, *launcher, str(tmp_path / "ranks.py"), str(folder), str(ranks)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        entropies = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]
        assert all(len(each) == 3 and each == entropies[0] for each in entropies)  # one per layer, on every rank
        said.append(entropies[0])
        lines.append(lines_of(folder))
    assert said[1] == pytest.approx(said[0], abs=1e-4)
    assert [line["step"] for line in lines[1]] == [2, 4]  # written by one rank
    for one, two in zip(*lines, strict=True):
        for name in BRIEF - {"max_vio_batch"}:  # a batch is what one rank sees
            assert two[f"moe/{name}"] == pytest.approx(one[f"moe/{name}"], abs=1e-4), name
