"""What a recipe is: a complete description of a training run but for data and seed, as a tree of plain values."""

import os
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal

from moestro.architecture.counting import all_experts_flops_per_token, count_parameters, training_flops_per_token
from moestro.architecture.model import Architecture, attention_sizes
from moestro.architecture.sub_layers import Composition, Dense, MoE, SubLayer
from moestro.competition.settings import Compete, check_lessons
from moestro.errors import Misuse
from moestro.gate.ranges import (
    BatchTokens,
    Decay,
    Heads,
    Layers,
    Length,
    Number,
    Positive,
    Range,
    Share,
    Tokens,
    Vocabulary,
    Weight,
    Width,
    check_fields,
)

if TYPE_CHECKING:
    import moestro.adapters.aux_losses
    import moestro.models.configuration

MOST_PARAMETERS = 10**13


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The architecture."""

    vocab_size: Vocabulary
    hidden_size: Width
    num_layers: Layers
    num_heads: Heads
    num_key_value_heads: Heads | None = None
    block: tuple[SubLayer, ...]
    """Feed-forward sub-layers of a block."""
    composition: Composition = "serial"
    """How the sub-layers of a block relate."""
    every: Layers = 1
    """Every which block has `block`; the others are dense with `dense_width`. The last block always has it."""
    dense_width: Annotated[int, Range(at_least=0, at_most=10**6)] = 0
    qk_norm: bool = True
    tie_embeddings: bool = True
    depth_scaled_init: bool = True
    initializer_range: Positive = 0.02
    """Standard deviation of initial weights."""

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def num_moe_blocks(self) -> int:
        """Number of blocks that hold MoE sub-layers."""
        return self.num_layers // self.every if any(isinstance(spec, MoE) for spec in self.block) else 0

    @property
    def num_moe_layers(self) -> int:
        """MoE sub-layers of all blocks."""
        return sum(isinstance(spec, MoE) for spec in self.block) * self.num_moe_blocks

    @property
    def blocks(self) -> tuple[tuple[SubLayer, ...], ...]:
        """The feed-forward sub-layers of every block."""
        plain = (Dense(width=self.dense_width),) if self.every > 1 else ()
        return tuple(self.block if (i + 1) % self.every == 0 else plain for i in range(self.num_layers))

    @property
    def architecture(self) -> Architecture:
        """The model's sizes; raises Misuse if they do not fit together."""
        num_key_value_heads, head_dim = attention_sizes(
            self.hidden_size, self.num_heads, self.num_key_value_heads, None
        )
        return Architecture(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_attention_heads=self.num_heads,
            num_key_value_heads=num_key_value_heads,
            head_dim=head_dim,
            blocks=self.blocks,
            composition=self.composition,
            qk_norm=self.qk_norm,
            tie_word_embeddings=self.tie_embeddings,
        )

    def validate(self) -> None:
        """Raise Misuse unless the model is valid and has at most `MOST_PARAMETERS` parameters."""
        if self.every > self.num_layers:
            raise Misuse(f"every must be at most num_layers ({self.num_layers}), got {self.every}")
        if (total := count_parameters(self.architecture).total) > MOST_PARAMETERS:
            raise Misuse(f"a model must have at most {MOST_PARAMETERS:,} parameters, got {total:,}")

    def config(
        self, sequence_length: int, end_of_text: int | None = None
    ) -> "moestro.models.configuration.MoestroConfig":
        """The model's config; `end_of_text` is the id of the token that stands between documents."""
        from moestro.models.configuration import MoestroConfig  # transformers: slow to import, and not needed to plan

        return MoestroConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_key_value_heads,
            qk_norm=self.qk_norm,
            feed_forward=[list(block) for block in self.blocks],
            composition=self.composition,
            depth_scaled_init=self.depth_scaled_init,
            initializer_range=self.initializer_range,
            max_position_embeddings=sequence_length,
            tie_word_embeddings=self.tie_embeddings,
            bos_token_id=end_of_text,
            eos_token_id=end_of_text,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """Auxiliary losses, as `moestro.AuxLosses` takes them."""

    balance: Weight = 0.0
    balance_over: Literal["sequence", "batch", "lagged"] = "lagged"
    orthogonality: Weight = 0.0
    orthogonality_form: Literal["cosine", "weighted", "projection", "span"] = "cosine"
    variance: Weight = 0.0
    variance_over: Literal["sequence", "batch", "lagged"] = "lagged"
    variance_form: Literal["column", "row"] = "column"
    variance_cap: Positive | None = None
    router_z: Weight = 0.0
    router_orthogonality: Weight = 0.0
    simbal: Weight = 0.0
    distillation: Weight = 0.0
    distillation_form: Literal["kl", "mse", "relative-mse"] = "kl"
    distillation_winners: Weight = 0.0
    diversity: Weight = 0.0
    diversity_form: Literal["pairs", "squares"] = "pairs"
    bias_rate: Weight = 0.0
    scaling: Literal["weight", "relative"] = "weight"
    warmup_steps: Number = 0

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Competing(Compete):
    """Competition for a part of a run, as `moestro.AuxLosses` takes it but for that part."""

    response: str = "l2"
    start: Share = 0.0
    end: Share = 1.0
    """Competition rests before the one and after the other share of the steps."""

    def over(self, steps: int) -> Compete:
        """The same in steps."""
        end = None if self.end == 1 else max(1, round(self.end * steps))
        return Compete(**fields_of(self) | {"start_step": round(self.start * steps), "end_step": end})


def fields_of(rule: Compete) -> dict[str, Any]:
    """What `Compete` takes, of a rule or what is made of one."""
    return {f.name: getattr(rule, f.name) for f in fields(Compete)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """Budget, optimiser and numerics."""

    tokens: Tokens
    """Training tokens, rounded down to whole steps."""
    batch_tokens: BatchTokens = 2048
    """Tokens per optimiser step, over all micro-batches and devices."""
    micro_batch_tokens: BatchTokens | None = None
    """Tokens that go through the model at once on one device; None: `batch_tokens` divided by the devices."""
    sequence_length: Length = 256
    learning_rate: Positive = 3e-3
    final_learning_rate: Share = 0.1
    """Where the cosine ends, as a share of `learning_rate`."""
    warmup: Share = 0.1
    """Share of the steps that warm up linearly."""
    weight_decay: Weight = 0.1
    """On matrices only: norms, biases and embeddings are not decayed."""
    beta1: Decay = 0.9
    beta2: Decay = 0.95
    max_grad_norm: Weight = 1.0
    """Largest gradient norm; longer gradients are clipped to it. 0: no clipping."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 (autocast over fp32 weights) where this machine gains from it by a measurement at start."""
    compile: bool = False
    checkpointing: bool = False
    """Recompute activations in the backward pass (non-reentrant)."""
    block_diagonal: bool = False
    """Whether attention stays within documents of a packed row, with positions reset."""

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return self.tokens // self.batch_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A complete description of a training run, but for data and seed."""

    name: str
    size: str
    description: str
    model: Model
    losses: Losses = field(default_factory=Losses)
    compete: Competing | None = None
    training: Training

    def __post_init__(self) -> None:
        check_fields(self)

    def training_flops(self) -> int:
        """Return the training FLOPs per token, averaged over the run: forward, backward and competition's answers.

        For competition by tokens, each row counts as one sequence. If packed documents are kept apart
        (`block_diagonal`), a few more tokens compete than are counted here.
        """
        length, steps = self.training.sequence_length, self.training.steps
        architecture = self.model.architecture
        flops = training_flops_per_token(architecture, length)
        if self.compete is None:
            return flops
        rule = self.compete.over(steps)
        competing = sum(not rule.rests(step) for step in range(steps)) / steps
        share = competing * rule.share(self.model.num_moe_layers, length)
        return flops + round(share * all_experts_flops_per_token(architecture))

    def aux_losses(self) -> "moestro.adapters.aux_losses.AuxLosses":
        """What is attached in training."""
        from moestro.adapters.aux_losses import AuxLosses  # torch and transformers: not needed to plan

        rule = self.compete.over(self.training.steps) if self.compete else None
        return AuxLosses(**asdict(self.losses), compete=rule)

    def _refuse_uneven_ranks(self, ranks: int) -> None:
        """Raise Misuse unless the rows of a batch divide evenly among the ranks."""
        t = self.training
        if t.micro_batch_tokens is None and t.batch_tokens % (t.sequence_length * ranks):
            raise Misuse(
                f"batch_tokens must be a multiple of {t.sequence_length * ranks} (sequence_length {t.sequence_length} "
                f"times the {ranks} devices), got {t.batch_tokens}"
            )
        if t.micro_batch_tokens is not None and t.batch_tokens % (t.micro_batch_tokens * ranks):
            raise Misuse(
                f"micro_batch_tokens times the {ranks} devices must divide batch_tokens ({t.batch_tokens}), got "
                f"{t.micro_batch_tokens}"
            )

    def validate(self) -> "Recipe":
        """Raise Misuse unless the recipe can run on the ranks that the launcher started (WORLD_SIZE)."""
        t = self.training
        for name in ("batch_tokens", "micro_batch_tokens"):
            if (value := getattr(t, name)) is not None and (value < t.sequence_length or value % t.sequence_length):
                raise Misuse(f"{name} must be a multiple of sequence_length ({t.sequence_length}), got {value}")
        if t.micro_batch_tokens is not None and t.batch_tokens % t.micro_batch_tokens:
            raise Misuse(f"micro_batch_tokens must divide batch_tokens ({t.batch_tokens}), got {t.micro_batch_tokens}")
        self._refuse_uneven_ranks(int(os.environ.get("WORLD_SIZE", "1")))
        if t.steps < 1:
            raise Misuse(f"tokens must be at least batch_tokens ({t.batch_tokens}), got {t.tokens}")
        if self.losses.bias_rate and not any(
            isinstance(spec, MoE) and spec.router.selection_bias for spec in self.model.block
        ):
            raise Misuse("bias_rate needs a router with a selection bias, and this recipe has none: set it to 0")
        if self.compete is not None and (self.compete.start_step, self.compete.end_step) != (0, None):
            raise Misuse("start_step and end_step are set by start and end, as shares of the run")
        if self.compete is not None and not self.compete.start < self.compete.end:
            raise Misuse(
                f"start and end must be shares of a run, the one before the other, "
                f"got {self.compete.start} and {self.compete.end}"
            )
        if self.compete is not None and round(self.compete.start * t.steps) >= round(self.compete.end * t.steps):
            raise Misuse(
                f"nobody would ever compete: between start ({self.compete.start}) and end ({self.compete.end}) lies "
                f"none of this run's {t.steps} steps"
            )
        rule = self.compete.over(t.steps) if self.compete else None
        check_lessons(rule, distillation=self.losses.distillation, diversity=self.losses.diversity)
        self.model.validate()
        return self
