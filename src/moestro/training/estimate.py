"""What a run will cost, from its recipe alone: nothing is built, so a 7B model can be planned on a laptop."""

from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from moestro.architecture.counting import count_parameters
from moestro.architecture.sub_layers import Dense, MoE
from moestro.competition.amounts import rows_at_once
from moestro.errors import Misuse
from moestro.training.recipe import Recipe

PROBE = 768
"""Side of the square matrix products that measure this machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Counts are exact; memory is estimated; time is a lower bound."""

    name: str
    size: str
    description: str
    parameters: int
    active_parameters: int
    training_flops: int
    """Per token, forward and backward."""
    tokens: int
    sequence_length: int
    memory_bytes: float
    seconds: float
    dtype: str
    device_flops: float

    @property
    def duration(self) -> str:
        """The estimated time as text, in seconds, minutes, hours or days."""
        for unit, length in (("days", 86_400), ("h", 3600), ("min", 60)):
            if self.seconds >= 2 * length:
                return f"{self.seconds / length:,.1f} {unit}"
        return f"{self.seconds:.0f} s"


def estimates(recipes: Sequence[Recipe], runs: float | int = 1) -> list[Estimate]:
    """The cost of `runs` runs of each recipe on this machine."""
    import torch  # slow to import: first come the words, then their cost

    from moestro.training.precision import faster_dtype, product_seconds

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    auto = faster_dtype(device)[0]
    dtypes = [auto if r.training.dtype == "auto" else getattr(torch, r.training.dtype) for r in recipes]
    speed = {dtype: 2 * PROBE**3 / product_seconds(dtype, device, size=PROBE) for dtype in set(dtypes)}
    return [
        estimate(recipe, runs, str(dtype).removeprefix("torch."), speed[dtype])
        for recipe, dtype in zip(recipes, dtypes, strict=True)
    ]


def check_memory(recipes: Sequence[Recipe]) -> None:
    """Raise Misuse if a recipe's weights, gradients and AdamW state alone exceed this machine's memory."""
    import torch

    cuda = torch.cuda.is_available()
    memory = torch.cuda.mem_get_info()[1] if cuda else psutil.virtual_memory().total
    for recipe in recipes:
        needed = 16 * count_parameters(recipe.model.architecture).total
        if needed > memory:
            raise Misuse(
                f"{recipe.name} must fit this machine's {memory / 1e9:,.1f} GB: its weights, gradients and AdamW alone "
                f"take {needed / 1e9:,.1f} GB (plan it with --dry-run)"
            )


def estimate(recipe: Recipe, runs: float | int, dtype: str, speed: float) -> Estimate:
    """The cost of one recipe at `speed` FLOPs per second."""
    t = recipe.training
    count = count_parameters(recipe.model.architecture)
    width = 2 if dtype == "bfloat16" else 4
    return Estimate(
        name=recipe.name,
        size=recipe.size,
        description=recipe.description,
        parameters=count.total,
        active_parameters=count.active,
        training_flops=recipe.training_flops(),
        tokens=t.tokens,
        sequence_length=t.sequence_length,
        memory_bytes=memory_bytes(recipe, width),
        seconds=runs * t.tokens * recipe.training_flops() / speed,
        dtype=dtype,
        device_flops=speed,
    )


def memory_bytes(recipe: Recipe, width: int = 4) -> float:
    """Return the memory of one run in bytes.

    It counts weights, gradients and AdamW's state in fp32; activations and competition's answers have `width` bytes per
    number.
    """
    count = count_parameters(recipe.model.architecture)
    return 16 * count.total + activation_bytes(recipe, width) + answers_bytes(recipe, width)


def activation_bytes(recipe: Recipe, width: int) -> float:
    """Activations kept for the backward pass of one micro-batch, `width` bytes each, counted tensor by tensor.

    Per block about 12 of the model's width for attention and norms; per token and SwiGLU network its input, the gate,
    up and product activations, and its output. With checkpointing, one block at a time and the blocks' inputs.
    """
    t, model = recipe.training, recipe.model
    tokens = t.micro_batch_tokens or t.batch_tokens
    blocks = []
    for block in model.blocks:
        per_token = 12 * model.hidden_size
        for spec in block:
            networks = [(1, spec.width)] if isinstance(spec, Dense) else [(spec.top_k, spec.width)]
            if not isinstance(spec, Dense) and spec.num_shared:
                networks.append((1, spec.total_shared_width))
            per_token += sum(n * (3 * inner + 2 * model.hidden_size) for n, inner in networks)
        blocks.append(per_token)
    kept = max(blocks) + len(blocks) * model.hidden_size if t.checkpointing else sum(blocks)
    return float(tokens * width * kept)


def answers_bytes(recipe: Recipe, width: int) -> float:
    """Return the bytes that competition holds at once, at `width` bytes per number.

    These are the answers of all experts of one layer, for one part of the tokens at a time. With `through_weights` or
    the diversity loss, each token's chosen outputs are kept too, in all layers that compete in one step (in one layer,
    if activations are recomputed).
    """
    rule, t, model = recipe.compete, recipe.training, recipe.model
    if rule is None:
        return 0.0
    tokens = t.micro_batch_tokens or t.batch_tokens
    competing = tokens * (rule.rate if rule.by == "tokens" else 1.0)
    specs = [spec for spec in model.block if isinstance(spec, MoE)]
    answers = max(
        min(competing, rows_at_once(spec.num_experts, model.hidden_size))
        * spec.num_experts
        * (2 * model.hidden_size + 3 * spec.width)
        for spec in specs
    )
    kept = 0.0
    if rule.through_weights or recipe.losses.diversity:
        layers = model.num_moe_layers
        if rule.by == "steps":
            layers = max(1, round(rule.share(layers, t.sequence_length) * layers))
        layers = 1 if t.checkpointing else layers
        kept = layers * tokens * max(spec.top_k for spec in specs) * model.hidden_size
    return width * (answers + kept)
