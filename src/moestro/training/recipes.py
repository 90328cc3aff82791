"""The named recipes, and the variants of them. A variant is a function from recipe to recipe.

`smoe` at size `tiny` is `recipe("smoe", "tiny")`; on the command line `smoe:top_k=4,learning_rate=1e-3` overrides
single fields, `cartesian+parallel` is a variant, and flags override fields of every recipe.
"""

from collections.abc import Callable
from dataclasses import replace

from moestro.architecture.router_rule import RouterRule
from moestro.architecture.sub_layers import Dense, MoE, SubLayer
from moestro.errors import Misuse
from moestro.gate.ranges import shown
from moestro.training import controls
from moestro.training.fields import nearest, override
from moestro.training.methods import METHODS
from moestro.training.recipe import Competing, Losses, Model, Recipe
from moestro.training.sizes import SIZES


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
        initializer_range=size.initializer_range,
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


def cartesian_paper(size: str) -> Recipe:
    """CartesianMoE (arXiv:2410.16077) as published: two MoE sub-layers in series, shared experts mixed in convexly."""
    half = MoE(num_experts=16, top_k=2, width=SIZES[size].width // 2, num_shared=1, mix="convex")
    description = "two sub-layers of 16 half-width experts and a shared one in series, top-2 each, mixed convexly"
    return build("cartesian-paper", size, description, half, half, losses=Losses(balance=balance(size, 1e-2)))


def cartesian(size: str) -> Recipe:
    """CartesianMoE with shared experts summed, as in DeepSeekMoE; measured against the paper's in docs/results."""
    half = MoE(num_experts=16, top_k=2, width=SIZES[size].width // 2, num_shared=1)
    description = "two sub-layers of 16 half-width experts and a shared one in series, top-2 each, summed"
    return build("cartesian", size, description, half, half, losses=Losses(balance=balance(size, 1e-2)))


RECIPES: dict[str, Callable[[str], Recipe]] = {
    "dense": dense,
    "smoe": smoe,
    "fine-grained": fine_grained,
    "deepseek-v3": deepseek_v3,
    "cartesian-paper": cartesian_paper,
    "cartesian": cartesian,
}
VARIANTS: dict[str, Callable[[Recipe], Recipe]] = {
    "parallel": controls.parallel,
    "tied": controls.tied,
    "shared-pool": controls.shared_pool,
    "dense-first": controls.dense_first,
    "halved": controls.halved,
    "averaged": controls.averaged,
    "deep": controls.deep,
    **METHODS,
}
"""Applied by `recipe+variant`."""


OF_COMPETITION = Competing.__dataclass_fields__.keys() - {"seed"}
"""Fields that only a recipe with competition has."""


def recipe(spec: str, size: str = "tiny", **overrides: object) -> Recipe:
    """The recipe that `name+variant:field=value,field=value` describes, at one size; `overrides` come first."""
    if size not in SIZES:
        raise Misuse(f"unknown size {shown(size)}{nearest(size, SIZES)}; sizes: {', '.join(SIZES)}")
    path, _, fields = spec.partition(":")
    name, *variants = path.split("+")
    if name not in RECIPES:
        raise Misuse(f"unknown recipe {shown(name)}{nearest(name, RECIPES)}; recipes: {', '.join(RECIPES)}")
    result = RECIPES[name](size)
    for variant in variants:
        if variant not in VARIANTS:
            raise Misuse(
                f"unknown variant {shown(variant)}{nearest(variant, VARIANTS)}; variants: {', '.join(VARIANTS)}"
            )
        result = replace(VARIANTS[variant](result), name=f"{result.name}+{variant}")
    values = dict(overrides)
    for part in filter(None, fields.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise Misuse(f"an override must read field=value, got {shown(part)} in {shown(spec)}")
        if (late := value.partition("+")[2]) in VARIANTS:
            raise Misuse(f"variants come before the colon, as in {name}+{late}:{key}=..., got {shown(spec)}")
        values[key.strip()] = value.strip()
    needless = [key for key in values if result.compete is None and key in OF_COMPETITION]
    if needless:
        raise Misuse(
            f"{needless[0]} is a field of competition, and {path} has none: try {path}+compete:{needless[0]}=..."
        )
    return replace(override(result, values), name=spec).validate()
