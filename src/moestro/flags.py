"""Flags that several commands share."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from moestro.errors import Misuse
from moestro.gate.ranges import Bytes, Range, check_fields, either, shown
from moestro.sweep import Grid
from moestro.training.estimate import check_memory
from moestro.training.recipe import Recipe
from moestro.training.recipes import recipe


@dataclass(frozen=True, kw_only=True)
class DataFlags:
    """The text."""

    data: tuple[str, ...] = ()
    """Files, folders, globs or hf:NAME; LABEL=PATH names its domain, PATH::COLUMN its text column. Default: the
    standard library of this Python."""
    text_column: str = "text"
    """Column that holds the text in JSON, CSV, TSV, Parquet and Arrow files; a+b joins two columns."""
    tokenizer: str | None = None
    """Folder or name of a tokenizer of transformers. Default: a byte-level BPE trained on the text."""
    max_bytes: Bytes | None = None
    """Largest number of training bytes of each domain. Default: no limit; 4 MiB for the default corpus."""
    max_held_out_bytes: Bytes | None = None
    """Largest number of held-out bytes of each domain (of its 5 %). Default: 256 KiB; 48 KiB for the default corpus."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not all(self.text_column.split("+")):
            raise Misuse(f"text_column must be a column's name, or several joined by +, got {shown(self.text_column)}")


@dataclass(frozen=True, kw_only=True)
class RecipeFlags:
    """Fields set for every recipe. To set a field of one recipe alone, write smoe:top_k=4."""

    size: str = "tiny"
    """tiny, small, base, large or 7b."""
    tokens: int | None = None
    """Training tokens of each run."""
    batch_tokens: int | None = None
    """Tokens per optimiser step, over all micro-batches and devices."""
    micro_batch_tokens: int | None = None
    """Tokens per forward pass on one device."""
    sequence_length: int | None = None
    """Tokens per row."""
    vocab_size: int | None = None
    """Vocabulary size of the model, and of the tokenizer trained here."""
    learning_rate: float | None = None
    """Peak learning rate."""
    dtype: Literal["auto", "float32", "bfloat16"] | None = None
    """Compute dtype; auto measures whether bfloat16 is faster on this machine."""
    compile: bool | None = None
    """Compile each decoder layer (pays in long runs)."""
    checkpointing: bool | None = None
    """Recompute activations in the backward pass: less memory, more time."""
    set: tuple[str, ...] = ()
    """Any other field of every recipe, as FIELD=VALUE."""

    def recipe(self, spec: str) -> Recipe:
        """Return the recipe that `spec` names, with these fields."""
        fields = {k: v for k, v in asdict(self).items() if v is not None and k not in ("size", "set")}
        for text in self.set:
            name, equals, value = text.partition("=")
            if not equals:
                raise Misuse(f"--set must read FIELD=VALUE, got {text!r}")
            fields[name] = value
        return recipe(spec, self.size, **fields)


@dataclass(frozen=True, kw_only=True)
class SweepFlags:
    """Learning-rate sweep."""

    sweep: Annotated[
        tyro.conf.UseAppendAction[tuple[tuple[float, ...], ...]], tyro.conf.arg(metavar="LR [LR ...]")
    ] = ()
    """Learning rates of a sweep: train every recipe at each of them first, then compare recipes at their best rates."""
    sweep_tokens: int | None = None
    """Training tokens of each run of the sweep. Default: as many as in the comparison."""
    screening_seed: int = 1000
    """Random seed of the sweep's runs; must not be one of the comparison's seeds."""

    def grid(self, specs: Sequence[str], recipe_flags: RecipeFlags) -> Grid | None:
        """Return the requested grid, or None. If --sweep is given several times, the grid holds all rates."""
        if not self.sweep:
            if self.sweep_tokens is not None:
                raise Misuse("--sweep-tokens needs --sweep")
            return None
        typed = [*recipe_flags.set, *(part for spec in specs for part in spec.partition(":")[2].split(","))]
        fields = [text.partition("=")[0].strip().rpartition(".")[2] for text in typed]
        if recipe_flags.learning_rate is not None or "learning_rate" in fields:
            raise Misuse(
                "--sweep chooses every recipe's learning_rate: list the rates there and do not set learning_rate"
            )
        rates = tuple(rate for part in self.sweep for rate in part)
        return Grid(learning_rates=rates, seed=self.screening_seed, tokens=self.sweep_tokens)


@dataclass(frozen=True, kw_only=True)
class JobFlags:
    """How the runs of a comparison share the machine."""

    jobs: Annotated[int, Range(at_least=1, at_most=1_000)] | None = None
    """Runs that train at once, each in a process of its own. Default: one per GPU or CPU core, as memory allows."""
    threads: Annotated[int, Range(at_least=1, at_most=1_000)] | None = None
    """CPU threads of each job. Default: OMP_NUM_THREADS, or 1. Rounding errors depend on it, but not on --jobs."""
    print_commands: bool = False
    """Print one command per run for a scheduler, and stop; afterwards the same comparison reads the finished runs."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class RunFlags:
    """Output."""

    out: Path | None = None
    """Folder of the results. Default: runs/ and a name made of the recipes."""
    report_to: tuple[str, ...] = ()
    """Experiment trackers that transformers knows: tensorboard, wandb, trackio ..."""
    dry_run: bool = False
    """Print parameters, FLOPs, memory and time, and stop."""

    def check(self, recipes: Sequence[Recipe]) -> None:
        """Raise Misuse, before any work, unless the trackers are installed and the models fit this machine's memory."""
        if self.report_to:
            check_trackers(self.report_to)
        check_memory(recipes)


def check_trackers(names: Sequence[str]) -> None:
    """Raise Misuse unless transformers knows these experiment trackers and their packages are installed."""
    from transformers.integrations.integration_utils import (  # slow to import, and rarely needed
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    for name in names:
        if name not in (known := [*INTEGRATION_TO_CALLBACK, "all", "none"]):
            raise Misuse(f"--report-to must be {either(known)}, got {shown(name)}")
        if name not in (*get_available_reporting_integrations(), "all", "none", "flyte"):
            raise Misuse(f"--report-to {name} needs a package that is not installed: install {name}, or leave it out")
