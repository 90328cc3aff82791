"""The methods, as variants of any recipe with experts: `smoe+compete`, `cartesian+compete+specialise`."""

from collections.abc import Callable
from dataclasses import replace

from moestro.competition.presets import PRESETS
from moestro.errors import Misuse
from moestro.training.recipe import Competing, Recipe, fields_of


def specialise(recipe: Recipe) -> Recipe:
    """Outputs of a token's experts orthogonal, routing decided: both losses at 0.1, orthogonality by cosines."""
    need_experts(recipe, "specialise")
    losses = replace(recipe.losses, orthogonality=0.1, variance=0.1)
    return replace(recipe, losses=losses, description=f"{recipe.description}; specialised")


def compete(recipe: Recipe) -> Recipe:
    """Experts compete for some tokens of every sequence, and the router learns who won.

    Not in the first quarter: what experts answer that have not learnt anything yet can keep a router from its first
    choices, and a model on its first plateau (docs/results/compete.md).
    """
    competes = competing(recipe, "ours", "experts compete")
    assert competes.compete is not None
    return replace(competes, compete=replace(competes.compete, start=0.25))


def compete_v1_paper(recipe: Recipe) -> Recipe:
    """Competition as CompeteSMoE's first version has it (arXiv:2402.02526)."""
    return competing(recipe, "v1-paper", "experts compete as in CompeteSMoE v1")


def compete_v2_paper(recipe: Recipe) -> Recipe:
    """Competition as CompeteSMoE has it (arXiv:2505.13380)."""
    return competing(recipe, "v2-paper", "experts compete as in CompeteSMoE v2")


def compete_v2_code(recipe: Recipe) -> Recipe:
    """Competition as CompeteSMoE's public code has it."""
    return competing(recipe, "v2-code", "experts compete as in CompeteSMoE's code")


def competing(recipe: Recipe, preset: str, what: str) -> Recipe:
    """The recipe with competition by one of `moestro.competition.presets.PRESETS`."""
    need_experts(recipe, "compete")
    if recipe.compete is not None:
        raise Misuse(f"experts compete in {recipe.name} already: one way of competing at a time")
    settings = PRESETS[preset](recipe.model.num_moe_blocks)
    rule = fields_of(settings.pop("compete"))
    return replace(
        recipe,
        losses=replace(recipe.losses, **settings),
        compete=Competing(**rule),
        description=f"{recipe.description}; {what}",
    )


def need_experts(recipe: Recipe, method: str) -> None:
    """Raise Misuse where there are none."""
    if recipe.model.num_moe_layers == 0:
        raise Misuse(f"{method} needs a recipe with experts, and {recipe.name} has none")


METHODS: dict[str, Callable[[Recipe], Recipe]] = {
    "specialise": specialise,
    "compete": compete,
    "compete-v1-paper": compete_v1_paper,
    "compete-v2-paper": compete_v2_paper,
    "compete-v2-code": compete_v2_code,
}
