"""`train`: from a recipe, data, a seed and a folder to a finished run; or, called again, on from where it stopped."""

import math
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PrinterCallback, TrainingArguments, default_data_collator

from moestro.adapters import AuxLosses
from moestro.adapters.experts_dtype import experts_dtypes
from moestro.adapters.load_meter import LoadMeter
from moestro.comparison import Run
from moestro.data.preparation import PreparedData
from moestro.data.tokenizer import vocabulary_size
from moestro.errors import Diverged, Interrupted, Misuse
from moestro.evaluation import held_out
from moestro.models import AUTOCAST_MM, PADDED_MM, SHORT_SDPA, MoestroForCausalLM
from moestro.training.checkpoints import step_of
from moestro.training.finish import read_finished, write_results
from moestro.training.held_out import HeldOutCurve, held_out_evaluation, learning_curve, with_chance
from moestro.training.initialise import initialise
from moestro.training.intervals import CHECKPOINTS, CURVE_POINTS, every, steps_per_log
from moestro.training.memory import forget_peak, peak_memory_bytes
from moestro.training.owner import owned
from moestro.training.precision import faster_dtype
from moestro.training.progress import MetricsFile, ProgressBars, Progressed, ProgressReports
from moestro.training.ranks import agree_on, join, on_first_rank, shared
from moestro.training.recipe import Recipe
from moestro.training.resume import resume_point
from moestro.training.runs import (
    CHOICES,
    METRICS,
    RUN,
    SUMMARY,
    check_folder,
    check_identity,
    describe_run,
    open_run,
    read_description,
)
from moestro.training.trainer import Interruption, PretrainingTrainer


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What does not change a run's result."""

    report_to: tuple[str, ...] = ()
    show: Callable[[Progressed], None] | None = None
    """Shows the progress of the run; None: a bar on the console."""


def only_on_first_rank(console: Console) -> Console:
    """The console, silent on all ranks but the first."""
    return console if int(os.environ.get("RANK", "0")) == 0 else Console(quiet=True)


def recorded_dtype(recipe: Recipe, folder: Path) -> Recipe:
    """`dtype=auto` as an earlier start of the run in this folder decided it: a resumed run must not decide again."""
    if recipe.training.dtype != "auto" or not (folder / RUN).exists():
        return recipe
    dtype = read_description(folder / RUN)["recipe"]["training"]["dtype"]
    return replace(recipe, training=replace(recipe.training, dtype=dtype))


def resolve_dtype(recipe: Recipe, console: Console, device: torch.device) -> Recipe:
    """`dtype=auto` decided by a measurement on this machine, which is said."""
    if recipe.training.dtype != "auto":
        return recipe
    dtype, ratio = faster_dtype(device)
    name = str(dtype).removeprefix("torch.")
    console.print(f"dtype {name}: bfloat16 matrix products run at {ratio:.1f}x the speed of float32 here", markup=False)
    return replace(recipe, training=replace(recipe.training, dtype=name))


def train(recipe: Recipe, data: PreparedData, folder: Path, *, seed: int, console: Console, options: Options) -> Run:
    """Train, evaluate and write the run's folder; a finished run is only read, an unfinished one resumed.

    With several ranks the first one decides and writes; all return the same run.

    Raises:
        Misuse: the folder holds other files, another run or a corrupt checkpoint, or is in use by another process.
        Diverged: a loss or a parameter is not finite.
        Interrupted: after Ctrl-C.
        OSError: a file cannot be written.
    """
    join()
    console = only_on_first_rank(console)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_first_rank(lambda: check_folder(folder))
    recipe = on_first_rank(lambda: resolve_dtype(recorded_dtype(recipe, folder), console, device))
    agree_on(data.hash, "the text's hash")
    description = describe_run(recipe, data, seed)
    if (finished := on_first_rank(lambda: finished_run(folder, description, console))) is not None:
        return finished
    with owned(folder):
        on_first_rank(lambda: open_run(folder, description))
        return train_on(recipe, data, folder, seed=seed, console=console, options=options)


def finished_run(folder: Path, description: dict[str, Any], console: Console) -> Run | None:
    """Return the run if the folder holds it finished, else None. No lock is needed, because nothing is written."""
    if (folder / RUN).exists() and (folder / SUMMARY).exists():
        check_identity(folder, description)
        return read_finished(folder, console)
    return None


def train_on(recipe: Recipe, data: PreparedData, folder: Path, *, seed: int, console: Console, options: Options) -> Run:
    """Resume the run in the folder, or start it, and finish it."""
    steps = recipe.training.steps
    model = build_model(recipe, data, seed)
    trainer, interruption = build_trainer(model, recipe, data, folder, seed=seed, console=console, options=options)
    say_experts_dtype(model, recipe, console)
    resume = on_first_rank(lambda: resume_point(folder, steps, console))
    start, peak_is_known = time.perf_counter(), forget_peak()
    if resume is not None and step_of(resume) == steps:
        trainer.restore(resume)  # the Trainer would train one step too many
    else:
        with ExitStack() as stack:
            if trainer.meter is not None:  # a dense model has neither
                stack.enter_context(trainer.aux.attach(trainer))
                stack.enter_context(trainer.meter.attach(model))
            stack.enter_context(interruption.listening())
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    if interruption.requested and trainer.state.global_step < steps:
        step = trainer.state.global_step
        raise shared(Interrupted(f"stopped at step {step}; the same command goes on from there"))
    seconds = time.perf_counter() - start
    memory = peak_memory_bytes() if peak_is_known else None
    return finish(trainer, model, recipe, data, folder, seed=seed, seconds=seconds, memory=memory)


def build_model(recipe: Recipe, data: PreparedData, seed: int) -> MoestroForCausalLM:
    """The recipe's model with its initial weights."""
    vocabulary = vocabulary_size(data.tokenizer)
    if vocabulary > recipe.model.vocab_size:
        raise Misuse(f"vocab_size must hold the tokenizer's {vocabulary} tokens, got {recipe.model.vocab_size}")
    end_of_text = data.tokenizer.eos_token_id
    assert isinstance(end_of_text, int)
    model = MoestroForCausalLM(recipe.model.config(recipe.training.sequence_length, end_of_text))
    initialise(model, seed)
    model.chunked_loss = True
    if recipe.training.dtype == "bfloat16":  # transformers' default backend would run experts in fp32
        on_gpu = torch.cuda.is_available()
        model.set_experts_implementation(AUTOCAST_MM if on_gpu else PADDED_MM)
        model.set_attn_implementation("sdpa" if on_gpu else SHORT_SDPA)
    if recipe.training.compile:
        # Layers differ in who listens to them, so each has graphs of its own: for the first micro-batch of a step and
        # the others, before responses have a scale and after, in steps in which it competes and in others.
        torch._dynamo.config.recompile_limit = 8 * len(model.model.layers)
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    return model


def say_experts_dtype(model: MoestroForCausalLM, recipe: Recipe, console: Console) -> None:
    """Print the dtype of the experts' matrix products, which a backend may choose regardless of autocast."""
    if not model.config.has_experts:
        return
    with torch.autocast(model.device.type, torch.bfloat16, enabled=recipe.training.dtype == "bfloat16"):
        found = sorted(str(dtype).removeprefix("torch.") for dtype in experts_dtypes(model))
    backend = model.config._experts_implementation
    console.print(f"experts run in {' and '.join(found)} ({backend})", markup=False)


def build_trainer(
    model: MoestroForCausalLM,
    recipe: Recipe,
    data: PreparedData,
    folder: Path,
    *,
    seed: int,
    console: Console,
    options: Options,
) -> tuple[PretrainingTrainer, Interruption]:
    """The trainer with its losses, meters and callbacks, and what listens for Ctrl-C."""
    aux, interruption = recipe.aux_losses(), Interruption()
    points = every(recipe.training.steps, CURVE_POINTS)
    trainer = PretrainingTrainer(
        model=model,
        args=training_arguments(recipe, folder, seed, options),
        train_dataset=data.train,
        data_collator=default_data_collator,
        aux=aux if model.config.has_experts else AuxLosses(),
        meter=LoadMeter() if model.config.has_experts else None,
        tokens_per_step=recipe.training.batch_tokens,
        held_out=HeldOutCurve(model, recipe, data, folder / CHOICES, every=points),
        held_out_every=points,
        callbacks=[
            interruption,
            MetricsFile(folder / METRICS),
            ProgressReports(f"{recipe.name} seed {seed}", options.show or ProgressBars(console).show),
        ],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, interruption


def training_arguments(recipe: Recipe, folder: Path, seed: int, options: Options) -> TrainingArguments:
    """The recipe in the Trainer's words."""
    t = recipe.training
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    micro = t.micro_batch_tokens or t.batch_tokens // ranks
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=t.steps,
        per_device_train_batch_size=micro // t.sequence_length,
        gradient_accumulation_steps=t.batch_tokens // (micro * ranks),
        dataloader_drop_last=True,
        optim="adamw_torch_fused",
        learning_rate=t.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": t.final_learning_rate},
        warmup_steps=round(t.warmup * t.steps),
        weight_decay=t.weight_decay,
        adam_beta1=t.beta1,
        adam_beta2=t.beta2,
        max_grad_norm=t.max_grad_norm,
        bf16=t.dtype == "bfloat16",
        activation_checkpointing=t.checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if t.checkpointing else None,
        seed=seed,
        data_seed=seed,
        logging_steps=steps_per_log(t.steps),
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=every(t.steps, CHECKPOINTS),
        save_total_limit=2,
        report_to=list(options.report_to) or "none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
    )


def finish(
    trainer: PretrainingTrainer,
    model: MoestroForCausalLM,
    recipe: Recipe,
    data: PreparedData,
    folder: Path,
    *,
    seed: int,
    seconds: float,
    memory: int | None,
) -> Run:
    """Evaluate on all ranks; write the model, held-out losses and, last, the summary on the first rank."""
    evaluation = held_out_evaluation(model, recipe, data)

    def write() -> Run:
        if not math.isfinite(evaluation.loss):
            step = trainer.state.global_step
            raise Diverged(f"the held-out loss is {evaluation.loss} after the last step, {step}", step=step)
        losses = held_out(evaluation, data.held_out_bytes, data.held_out_domain, data.domains)
        run = Run(
            seed=seed,
            held_out=with_chance(losses, recipe, data),
            tokens_per_second=trainer.tokens_per_second() or None,
            peak_memory_bytes=memory,
            seconds=seconds,
            curve=learning_curve(folder / METRICS),
            layers=evaluation.layers,
            competed=evaluation.competed,
            steps=trainer.state.global_step,
            tokens=trainer.tokens_seen,
        )
        return write_results(folder, model, data.tokenizer, evaluation, run)

    return on_first_rank(write)
