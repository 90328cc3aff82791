"""Controls: variants of a recipe that change one thing and keep parameters and FLOPs.

They ask what composition brings beyond depth, routing and a weak baseline (docs/composition.md). Linearised, two
residual sub-layers are I + A + B + BA; only BA is new against an additive MoE.
"""

from dataclasses import replace

from moestro.architecture.counting import Count, count_parameters
from moestro.architecture.sub_layers import WIDTH_MULTIPLE, Composition, Dense, MoE
from moestro.errors import Misuse
from moestro.training.recipe import Model, Recipe


def parallel(recipe: Recipe) -> Recipe:
    """All sub-layers of a block read the same stream: I + A + B without BA."""
    return composed(recipe, "parallel", "its sub-layers in parallel")


def tied(recipe: Recipe) -> Recipe:
    """The later sub-layers take the first one's choice of experts: k paths through a block, not k times k."""
    return composed(recipe, "tied", "the second sub-layer takes the first one's choice")


def shared_pool(recipe: Recipe) -> Recipe:
    """The sub-layers choose from one pool made of all their experts (Chain-of-Experts, arXiv:2506.18945)."""
    pooled = composed(recipe, "shared-pool", "both sub-layers choose from one pool of all experts")
    size = sum(spec.num_experts for spec in moe_sub_layers(recipe))
    block = tuple(replace(spec, num_experts=size) if isinstance(spec, MoE) else spec for spec in pooled.model.block)
    return replace(pooled, model=replace(pooled.model, block=block))


def dense_first(recipe: Recipe) -> Recipe:
    """The first of two sub-layers is dense, as wide as its active experts; its idle experts move to the second."""
    _several(recipe, "dense-first")
    first, second, *others = moe_sub_layers(recipe)
    if others or first.width != second.width or first.shared_width != second.shared_width:
        raise Misuse(f"dense-first needs two MoE sub-layers of equal width, and {recipe.name} has other ones")
    dense = Dense(width=first.top_k * first.width + first.total_shared_width)
    routed = replace(second, num_experts=first.num_experts + second.num_experts - first.top_k)
    return described(recipe, replace(recipe.model, block=(dense, routed)), "the first sub-layer dense")


def halved(recipe: Recipe) -> Recipe:
    """A dense feed-forward as two of half the width in series: what depth alone brings, without experts.

    At the paper sizes every second block, where the recipes with experts have them.
    """
    (spec, *others) = recipe.model.block
    if others or not isinstance(spec, Dense):
        raise Misuse(f"halved needs blocks of one dense sub-layer, and {recipe.name} has other ones")
    half = Dense(width=spec.width // 2)
    return described(recipe, replace(recipe.model, block=(half, half)), "two of half the width in series")


def averaged(recipe: Recipe) -> Recipe:
    """Shared experts as CartesianMoE's baselines have them: averaged, and mixed in by a learned two-way softmax."""
    if not any(spec.num_shared and spec.mix == "sum" for spec in moe_sub_layers(recipe)):
        raise Misuse(f"averaged needs shared experts that are summed, and {recipe.name} has none")
    block = tuple(replace(spec, mix="convex") if isinstance(spec, MoE) else spec for spec in recipe.model.block)
    return described(recipe, replace(recipe.model, block=block), "shared experts averaged and mixed in convexly")


def deep(recipe: Recipe) -> Recipe:
    """As many residual writes as blocks of two MoE sub-layers would have, in more and thinner blocks.

    More blocks have more attention: experts get thinner until active parameters agree, then as many as total ones
    allow. Balance keeps its weight per layer, of which there are more.
    """
    model = recipe.model
    if len(model.block) != 1 or not isinstance(spec := model.block[0], MoE) or model.every > 1 or model.num_layers % 2:
        raise Misuse(
            f"deep needs an even number of blocks, each of one MoE sub-layer, and {recipe.name} has other ones"
        )
    goal, layers = count(model), 3 * model.num_layers // 2

    def with_experts(width: int, num_experts: int) -> Model:
        return replace(model, num_layers=layers, block=(replace(spec, width=width, num_experts=num_experts),))

    def miss_of_active(width: int) -> int:
        return abs(count(with_experts(width, spec.num_experts)).active - goal.active)

    width = min(range(WIDTH_MULTIPLE, spec.width + 1, WIDTH_MULTIPLE), key=miss_of_active)
    num_experts = min(
        range(spec.num_experts, 4 * spec.num_experts),
        key=lambda n: abs(count(with_experts(width, n)).total - goal.total),
    )
    losses = replace(recipe.losses, balance=recipe.losses.balance * layers / model.num_layers)
    thinner = described(recipe, with_experts(width, num_experts), "half as many blocks again, thinner experts")
    return replace(thinner, losses=losses)


def composed(recipe: Recipe, composition: Composition, what: str) -> Recipe:
    """The recipe with its sub-layers composed in another way."""
    _several(recipe, composition)
    return described(recipe, replace(recipe.model, composition=composition), what)


def described(recipe: Recipe, model: Model, what: str) -> Recipe:
    """The recipe with another model, and that said of it."""
    return replace(recipe, model=model, description=f"{recipe.description}; {what}")


def moe_sub_layers(recipe: Recipe) -> list[MoE]:
    """Those of one block."""
    return [spec for spec in recipe.model.block if isinstance(spec, MoE)]


def count(model: Model) -> Count:
    """Parameters of a model."""
    return count_parameters(model.architecture)


def _several(recipe: Recipe, variant: str) -> None:
    if len(moe_sub_layers(recipe)) < 2 or recipe.model.composition != "serial":
        raise Misuse(f"{variant} needs blocks of two MoE sub-layers in series, and {recipe.name} has other ones")
