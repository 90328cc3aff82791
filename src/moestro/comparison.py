"""What a comparison found: plain records and the one JSON file that holds them.

`compare` writes these, the report and the terminal table read them, and so does any later script. Losses are in nats
per token, bits per byte are log2 over the bytes of the text that was predicted, sizes are in bytes, times in seconds.
Every number is finite; what could not be measured is None, `null` in the file (JSON has no NaN).
"""

from dataclasses import dataclass, field
from typing import Literal

from moestro.difference import Difference, DocumentBootstrap
from moestro.errors import Misuse

SETTLED_STEPS = 100
"""Optimiser steps after which a run must beat the loss of token frequencies."""
LEAST_LEARNT = 0.01
"""Nats per token by which a run must beat chance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What every recipe was given, and whether it was the same for all."""

    match: Literal["tokens", "flops"]
    """What was made equal; with "flops", `tokens` and `steps` are the first recipe's."""
    tokens: int
    """Training tokens of one run."""
    steps: int
    batch_tokens: int
    sequence_length: int
    dtype: str
    parameters: int
    """Active parameters that the recipes were sized to; each recipe's own number is in its result."""
    equal: bool
    differences: tuple[str, ...] = ()
    """Where `equal` is False: what differs, one sentence each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """The text that was trained on and held out."""

    sources: tuple[str, ...]
    """As the user named them, or the name of the default corpus."""
    hash: str
    """Identifies the documents, their domains and the split."""
    tokenizer: str
    train_tokens: int
    held_out_tokens: int
    held_out_bytes: int
    held_out_documents: int
    overlap: float | None = None
    """Share of held-out characters in spans of 200 or more that training text also contains. None in older records."""
    notes: tuple[str, ...] = ()
    """What the reader must know, such as a domain that is missing on this machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainLoss:
    """The held-out loss within one domain."""

    loss: float
    bits_per_byte: float
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """The endpoint: the loss of a finished run on the held-out text."""

    loss: float
    perplexity: float | None
    """exp(loss); None where that overflows."""
    bits_per_byte: float
    domains: dict[str, DomainLoss]
    uniform: float | None = None
    """Loss of the uniform distribution over the vocabulary. None in older records."""
    unigram: float | None = None
    """Loss of the unigram model of the training text. None in older records."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """One point of a learning curve."""

    step: int
    tokens: int
    loss: float
    """Training loss, without auxiliary losses."""
    held_out_loss: float | None = None
    competition: dict[str, float] = field(default_factory=dict)
    """On held-out text, means over MoE layers: `agreement`, `static_agreement`, `regret`, `target_entropy`, `response`,
    as `AgreementFigures` has them, and `changed`: the share of experts chosen that were others at the point before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerStatistics:
    """How one MoE layer of a model routed a text."""

    name: str
    label: str
    """Its block's number, and which of the block's MoE layers it is where there are several: "3", "3.1"."""
    load: tuple[float, ...]
    """Share of all choices per expert; sums to 1."""
    domain_load: dict[str, tuple[float, ...]]
    """The same within each domain."""
    figures: dict[str, float | None]
    """Every number of a layer that `moestro.evaluation.layer_statistics` knows of, by its name."""
    pairs: tuple[tuple[float, ...], ...] | None = None
    """Share of all pairs of an expert of the MoE layer before it in its block (rows) and one of its own; sums to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompetedLoss:
    """The loss on a part of the held-out text, and what it would be if experts competed for every token there.

    None where it is not finite.
    """

    tokens: int
    router: float | None
    competition: float | None

    @property
    def gain(self) -> float | None:
        """What competing at test adds to the loss."""
        known = self.router is not None and self.competition is not None
        return self.competition - self.router if known else None  # type: ignore[operator]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One recipe trained with one seed."""

    seed: int
    held_out: HeldOut
    tokens_per_second: float | None
    peak_memory_bytes: int | None
    seconds: float | None
    curve: tuple[CurvePoint, ...]
    layers: tuple[LayerStatistics, ...] = ()
    """The MoE layers from the first block to the last; empty for a dense model."""
    competed: CompetedLoss | None = None
    """None for a dense model."""
    steps: int | None = None
    """Optimiser steps really taken; None in summaries of earlier versions."""
    tokens: int | None = None
    """Tokens really trained on, repetitions included; None in summaries of earlier versions."""

    @property
    def chance(self) -> float | None:
        """The loss that a run of this length must beat: `unigram` from 100 steps on, `uniform` before.

        Healthy runs fall below `unigram` well before 100 steps.
        """
        return self.held_out.unigram if (self.steps or 0) >= SETTLED_STEPS else self.held_out.uniform

    @property
    def learnt_nothing(self) -> bool:
        """True if the held-out loss is not at least 0.01 nats below chance; False if chance is unknown."""
        return self.chance is not None and self.held_out.loss > self.chance - LEAST_LEARNT

    @property
    def trained_tokens(self) -> int | None:
        """`tokens`; for older summaries the tokens at the last point of the learning curve; None without a curve."""
        return self.tokens if self.tokens is not None or not self.curve else self.curve[-1].tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedRun:
    """A run of one recipe and seed that failed."""

    seed: int
    reason: str
    step: int | None = None
    """The step at which it diverged, from 1; None where it failed for another reason."""
    cause: Literal["training", "machine"] = "training"
    """Training failed and would fail again, or the machine stopped it (disk full, process killed)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeResult:
    """All runs of one recipe, and what they say against the first recipe."""

    name: str
    description: str
    total_parameters: int
    active_parameters: int
    flops_per_token: float
    """Of training, forward and backward, at the training sequence length; with the answers of experts that compete."""
    competes: bool = False
    """Whether experts competed while it trained."""
    runs: tuple[Run, ...]
    """Finished runs, in the order of the comparison's seeds."""
    failed: tuple[FailedRun, ...] = ()
    """Failed runs, in the same order."""
    difference: Difference | None = None
    """Difference to the first recipe; None for the first itself, and without a seed that both finished."""
    document_bootstrap: DocumentBootstrap | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Screened:
    """One recipe at one learning rate."""

    learning_rate: float
    loss: float | None
    """On the held-out text; None where training failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """How each recipe's learning rate was chosen: the same grid for all, on a seed that no interval contains."""

    seed: int
    tokens: dict[str, int]
    """Training tokens of each recipe's screening runs."""
    screened: dict[str, tuple[Screened, ...]]
    chosen: dict[str, float]
    """Best learning rate of each recipe; recipes that failed at every rate are absent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Recipes trained on one budget, measured on the same held-out text; the others are compared to the first."""

    version: str
    """moestro's."""
    created: str
    """ISO 8601 with time zone."""
    command: str
    """What to type to get this again."""
    budget: Budget
    data: Data
    gzip_bits_per_byte: float
    """gzip -9 on the held-out text."""
    gzip_domains: dict[str, float] = field(default_factory=dict)
    """The same per domain, where it is known."""
    environment: dict[str, str]
    """Versions and hardware."""
    seeds: tuple[int, ...]
    recipes: tuple[RecipeResult, ...]
    sweep: Sweep | None = None
    """How learning rates were chosen; None where the recipes said them."""

    def __post_init__(self) -> None:
        if not self.recipes:
            raise Misuse("a comparison must hold at least one recipe")
        for recipe in self.recipes:
            finished, failed = ([run.seed for run in runs] for runs in (recipe.runs, recipe.failed))
            expected = [seed for seed in self.seeds if seed not in failed]
            if not self.seeds or finished != expected or failed != [s for s in self.seeds if s not in finished]:
                raise Misuse(
                    f"every recipe must have one run per seed {list(self.seeds)}, in that order; "
                    f"{recipe.name} has {finished}" + (f", and failed with {failed}" if failed else "")
                )
            if self.sweep is not None and recipe.name not in self.sweep.chosen and recipe.runs:
                raise Misuse(f"a sweep must hold every recipe of its comparison, and lacks {recipe.name}")
