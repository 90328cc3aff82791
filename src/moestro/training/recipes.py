"""Recipes: complete, named descriptions of a training run. Plain values; a method is a function from recipe to recipe.

`smoe` at size `tiny` is `recipe("smoe", "tiny")`; on the command line `smoe:top_k=4,learning_rate=1e-3` overrides
single fields, and flags override fields of every recipe.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from moestro.adapters import AuxLosses
from moestro.errors import Misuse
from moestro.models.configuration import Dense, MoE, MoestroConfig, SubLayer
from moestro.routers import RouterRule
from moestro.training.fields import nearest, override


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The architecture."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int | None = None
    block: tuple[SubLayer, ...]
    """Feed-forward sub-layers of a block."""
    every: int = 1
    """Every which block has `block`; the others are dense with `dense_width`. The last block always has it."""
    dense_width: int = 0
    qk_norm: bool = True
    tie_embeddings: bool = True

    def config(self, sequence_length: int, end_of_text: int | None = None) -> MoestroConfig:
        """The model's config; `end_of_text` is the id of the token that stands between documents."""
        plain = (Dense(width=self.dense_width),) if self.every > 1 else ()
        blocks = [self.block if (i + 1) % self.every == 0 else plain for i in range(self.num_layers)]
        return MoestroConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_key_value_heads,
            qk_norm=self.qk_norm,
            feed_forward=[list(block) for block in blocks],
            max_position_embeddings=sequence_length,
            tie_word_embeddings=self.tie_embeddings,
            bos_token_id=end_of_text,
            eos_token_id=end_of_text,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """Auxiliary losses, as `moestro.AuxLosses` takes them."""

    balance: float = 0.0
    balance_over: Literal["sequence", "batch", "lagged"] = "lagged"
    orthogonality: float = 0.0
    orthogonality_form: Literal["projection", "cosine", "weighted", "span"] = "projection"
    variance: float = 0.0
    variance_over: Literal["sequence", "batch", "lagged"] = "lagged"
    variance_form: Literal["column", "row"] = "column"
    variance_cap: float | None = None
    router_z: float = 0.0
    router_orthogonality: float = 0.0
    simbal: float = 0.0
    bias_rate: float = 0.0
    scaling: Literal["weight", "relative"] = "weight"
    warmup_steps: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """Budget, optimiser and numerics."""

    tokens: int
    """Training tokens, rounded down to whole steps."""
    batch_tokens: int = 2048
    """Tokens per optimiser step, over all micro-batches and devices."""
    micro_batch_tokens: int | None = None
    """Tokens that go through the model at once on one device; None: `batch_tokens` divided by the devices."""
    sequence_length: int = 256
    learning_rate: float = 3e-3
    final_learning_rate: float = 0.1
    """Where the cosine ends, as a share of `learning_rate`."""
    warmup: float = 0.1
    """Share of the steps that warm up linearly."""
    weight_decay: float = 0.1
    """On matrices only: norms, biases and embeddings are not decayed."""
    beta1: float = 0.9
    beta2: float = 0.95
    max_grad_norm: float = 1.0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 (autocast over fp32 weights) where this machine gains from it by a measurement at start."""
    compile: bool = False
    checkpointing: bool = False
    """Recompute activations in the backward pass (non-reentrant)."""
    block_diagonal: bool = False
    """Whether attention stays within documents of a packed row, with positions reset."""

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
    training: Training

    def validate(self) -> "Recipe":
        """Raise Misuse unless it can run."""
        t = self.training
        if t.sequence_length < 2:
            raise Misuse(f"sequence_length must be at least 2, got {t.sequence_length}")
        for name in ("batch_tokens", "micro_batch_tokens"):
            if (value := getattr(t, name)) is not None and (value < t.sequence_length or value % t.sequence_length):
                raise Misuse(f"{name} must be a multiple of sequence_length ({t.sequence_length}), got {value}")
        if t.micro_batch_tokens is not None and t.batch_tokens % t.micro_batch_tokens:
            raise Misuse(f"micro_batch_tokens must divide batch_tokens ({t.batch_tokens}), got {t.micro_batch_tokens}")
        if t.steps < 1:
            raise Misuse(f"tokens must be at least batch_tokens ({t.batch_tokens}), got {t.tokens}")
        if not t.learning_rate > 0:
            raise Misuse(f"learning_rate must be above 0, got {t.learning_rate}")
        if not 0 <= t.warmup <= 1:
            raise Misuse(f"warmup must lie between 0 and 1, got {t.warmup}")
        if t.dtype not in ("auto", "float32", "bfloat16"):
            raise Misuse(f"dtype must be auto, float32 or bfloat16, got {t.dtype!r}")
        if self.losses.bias_rate and not any(
            isinstance(spec, MoE) and spec.router.selection_bias for spec in self.model.block
        ):
            raise Misuse("bias_rate needs a router with a selection bias, and this recipe has none: set it to 0")
        AuxLosses(**asdict(self.losses))  # it knows what its fields must be
        self.model.config(t.sequence_length)
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """What recipes of one size share. `width` is D, the inner width of a full expert."""

    hidden_size: int
    num_layers: int
    num_heads: int
    width: int
    dense_width: int
    """Of the dense recipe."""
    every: int = 1
    vocab_size: int
    paper: bool = False
    """Paper sizes have untied embeddings and no query-key norm, as in CartesianMoE's table."""
    training: Training


PAPER_TRAINING = Training(
    tokens=100_000_000_000,
    batch_tokens=2048 * 512,
    micro_batch_tokens=2048 * 4,
    sequence_length=2048,
    learning_rate=3e-4,
    warmup=0.01,
)

SIZES = {
    "tiny": Size(
        hidden_size=128,
        num_layers=4,
        num_heads=4,
        width=128,
        dense_width=3 * 128,
        vocab_size=4096,
        training=Training(tokens=250_000, batch_tokens=2048, sequence_length=256, learning_rate=2e-3),
    ),
    "small": Size(
        hidden_size=256,
        num_layers=6,
        num_heads=4,
        width=256,
        dense_width=3 * 256,
        vocab_size=8192,
        training=Training(tokens=4_000_000, batch_tokens=4096, sequence_length=512, learning_rate=3e-3),
    ),
    "base": Size(
        hidden_size=768,
        num_layers=12,
        num_heads=12,
        width=3072,
        dense_width=3072,
        every=2,
        vocab_size=32_000,
        paper=True,
        training=PAPER_TRAINING,
    ),
    "large": Size(
        hidden_size=1024,
        num_layers=24,
        num_heads=16,
        width=4096,
        dense_width=4096,
        every=2,
        vocab_size=32_000,
        paper=True,
        training=PAPER_TRAINING,
    ),
    "7b": Size(
        hidden_size=2048,
        num_layers=16,
        num_heads=16,
        width=4096,
        dense_width=4096,
        vocab_size=32_000,
        paper=True,
        training=PAPER_TRAINING,
    ),
}


def build(name: str, size_name: str, description: str, *block: SubLayer, losses: Losses | None = None) -> Recipe:
    """A recipe of one size whose blocks hold the given feed-forward sub-layers."""
    size = SIZES[size_name]
    model = Model(
        vocab_size=size.vocab_size,
        hidden_size=size.hidden_size,
        num_layers=size.num_layers,
        num_heads=size.num_heads,
        block=block,
        every=size.every,
        dense_width=size.dense_width,
        qk_norm=not size.paper,
        tie_embeddings=not size.paper,
    )
    return Recipe(
        name=name,
        size=size_name,
        description=description,
        model=model,
        losses=losses or Losses(),
        training=size.training,
    )


def balance(size: str, per_layer: float) -> float:
    """The weight of a balance loss that papers give per layer: theirs add up over layers, ours is their mean."""
    return per_layer * (SIZES[size].num_layers // SIZES[size].every)


def dense(size: str) -> Recipe:
    """No experts; as wide as the other recipes' active experts together (paper sizes: as wide as one expert)."""
    width = SIZES[size].dense_width
    return build("dense", size, f"dense feed-forward of width {width}", Dense(width=width))


def smoe(size: str) -> Recipe:
    """Softmax, top-2 of 16, one shared expert: the SMoE-Share baseline of CartesianMoE (arXiv:2410.16077)."""
    block = MoE(num_experts=16, top_k=2, width=SIZES[size].width, num_shared=1)
    return build(
        "smoe", size, "top-2 of 16 experts and a shared one", block, losses=Losses(balance=balance(size, 1e-2))
    )


def fine_grained(size: str) -> Recipe:
    """DeepSeekMoE (arXiv:2401.06066): twice the experts at half the width, twice the k, shared experts summed."""
    block = MoE(num_experts=32, top_k=4, width=SIZES[size].width // 2, num_shared=2)
    description = "top-4 of 32 half-width experts and two shared ones, summed"
    return build("fine-grained", size, description, block, losses=Losses(balance=balance(size, 1e-2)))


def deepseek_v3(size: str) -> Recipe:
    """DeepSeek-V3 (arXiv:2412.19437): fine-grained, sigmoid scores, loss-free balance by a selection bias."""
    rule = RouterRule(scores="sigmoid", selection_bias=True)
    block = MoE(num_experts=32, top_k=4, width=SIZES[size].width // 2, num_shared=2, router=rule)
    description = "fine-grained with sigmoid scores and loss-free balance"
    losses = Losses(balance=balance(size, 1e-4), balance_over="sequence", bias_rate=1e-3)
    return build("deepseek-v3", size, description, block, losses=losses)


RECIPES: dict[str, Callable[[str], Recipe]] = {
    "dense": dense,
    "smoe": smoe,
    "fine-grained": fine_grained,
    "deepseek-v3": deepseek_v3,
}
METHODS: dict[str, Callable[[Recipe], Recipe]] = {}
"""Functions from recipe to recipe, applied by `recipe+method`."""


def recipe(spec: str, size: str = "tiny", **overrides: object) -> Recipe:
    """The recipe that `name+method:field=value,field=value` describes, at one size; `overrides` come first."""
    if size not in SIZES:
        raise Misuse(f"unknown size {size!r}{nearest(size, SIZES)}; sizes: {', '.join(SIZES)}")
    path, _, fields = spec.partition(":")
    name, *methods = path.split("+")
    if name not in RECIPES:
        raise Misuse(f"unknown recipe {name!r}{nearest(name, RECIPES)}; recipes: {', '.join(RECIPES)}")
    result = RECIPES[name](size)
    for method in methods:
        if method not in METHODS:
            known = f"; methods: {', '.join(METHODS)}" if METHODS else ""
            raise Misuse(f"unknown method {method!r}{nearest(method, METHODS)}{known}")
        result = METHODS[method](result)
    for key, value in overrides.items():
        result = override(result, key, value)
    for part in filter(None, fields.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise Misuse(f"an override must read field=value, got {part!r} in {spec!r}")
        result = override(result, key.strip(), value.strip())
    return replace(result, name=spec).validate()
