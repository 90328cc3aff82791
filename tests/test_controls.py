"""Variants of recipes: each changes one thing, keeps parameters and FLOPs, and refuses what it cannot vary."""

from dataclasses import replace

import pytest

from moestro import Dense, Misuse, MoE
from moestro.architecture.counting import Count, count_parameters
from moestro.planning import TOLERANCE
from moestro.training.methods import METHODS
from moestro.training.recipe import Recipe
from moestro.training.recipes import RECIPES, VARIANTS, recipe

TAKES = {
    "parallel": {"cartesian", "cartesian-paper"},
    "tied": {"cartesian", "cartesian-paper"},
    "shared-pool": {"cartesian", "cartesian-paper"},
    "dense-first": {"cartesian", "cartesian-paper"},
    "halved": {"dense"},
    "averaged": {"smoe", "fine-grained", "deepseek-v3", "cartesian"},
    "deep": {"smoe", "fine-grained", "deepseek-v3"},
}
"""The recipes that each variant can vary; it refuses the others."""

PAIRS = [(name, variant) for variant, names in TAKES.items() for name in sorted(names)]
EVERY_SPEC = [*RECIPES, *(f"{name}+{variant}" for name, variant in PAIRS)]
SIZES = pytest.mark.parametrize("size", ["tiny", "small"])


def parameters(of: Recipe) -> Count:
    return count_parameters(of.model.architecture)


def moe_sub_layers(of: Recipe) -> list[MoE]:
    return [spec for spec in of.model.block if isinstance(spec, MoE)]


def test_every_variant_is_tried():
    assert TAKES.keys() == VARIANTS.keys() - METHODS.keys()


@SIZES
@pytest.mark.parametrize(("name", "variant"), PAIRS)
def test_a_variant_costs_what_its_recipe_does(name, variant, size):
    """Parameters as `compare` wants them, and FLOPs; more blocks have more attention, so `deep` costs more."""
    base, varied = recipe(name, size), recipe(f"{name}+{variant}", size)
    assert parameters(varied).total == pytest.approx(parameters(base).total, rel=TOLERANCE)
    assert parameters(varied).active == pytest.approx(parameters(base).active, rel=TOLERANCE)
    ratio = varied.training_flops() / base.training_flops()
    least = {"tiny": 1.01, "small": 1.05}[size]  # most FLOPs of tiny are its head's
    assert least < ratio < 1.1 if variant == "deep" else abs(ratio - 1) < 0.01


@pytest.mark.parametrize(("name", "variant"), PAIRS)
def test_a_variant_changes_the_model_and_says_so(name, variant):
    base, varied = recipe(name), recipe(f"{name}+{variant}")
    assert varied.model != base.model
    assert varied.training == base.training
    assert varied.name == f"{name}+{variant}"
    assert varied.description.startswith(f"{base.description}; ")


@SIZES
@pytest.mark.parametrize("name", sorted(TAKES["deep"]))
def test_deep_writes_as_often_as_cartesian_and_weighs_balance_alike(name, size):
    base, deep = recipe(name, size), recipe(f"{name}+deep", size)
    writes = [of.model.config(2).residual_writes for of in (deep, recipe("cartesian", size), base)]
    assert writes[0] == writes[1] == 1.5 * writes[2]
    assert deep.losses.balance / deep.model.num_layers == pytest.approx(base.losses.balance / base.model.num_layers)


@pytest.mark.parametrize("name", sorted(TAKES["tied"]))
def test_what_each_variant_of_two_sub_layers_is(name):
    base = recipe(name)
    first, second = moe_sub_layers(base)
    for variant in ("parallel", "tied", "shared-pool"):
        assert recipe(f"{name}+{variant}").model.composition == variant
    for variant in ("parallel", "tied"):
        assert recipe(f"{name}+{variant}").model.block == base.model.block
    pooled = moe_sub_layers(recipe(f"{name}+shared-pool"))
    assert [spec.num_experts for spec in pooled] == [first.num_experts + second.num_experts] * 2
    dense, routed = recipe(f"{name}+dense-first").model.block
    assert isinstance(dense, Dense) and dense.width == (first.top_k + 1) * first.width
    assert isinstance(routed, MoE) and routed.num_experts == 30


def test_halved_and_averaged():
    (whole,), halves = recipe("dense").model.block, recipe("dense+halved").model.block
    assert [half.width for half in halves] == [whole.width // 2] * 2
    assert [spec.mix for spec in moe_sub_layers(recipe("fine-grained+averaged"))] == ["convex"]
    assert recipe("cartesian+averaged").model == recipe("cartesian-paper").model


SEVERAL = "needs blocks of two MoE sub-layers in series, and {} has other ones"
REFUSALS = {
    **dict.fromkeys(["parallel", "tied", "shared-pool", "dense-first"], SEVERAL),
    "halved": "needs blocks of one dense sub-layer, and {} has other ones",
    "averaged": "needs shared experts that are summed, and {} has none",
    "deep": "needs an even number of blocks, each of one MoE sub-layer, and {} has other ones",
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("variant", TAKES)
def test_what_a_variant_cannot_vary_is_refused(name, variant):
    if name in TAKES[variant]:
        return
    with pytest.raises(Misuse) as refusal:
        recipe(f"{name}+{variant}")
    assert str(refusal.value) == f"{variant} {REFUSALS[variant].format(name)}"


@pytest.mark.parametrize("variant", ["parallel", "tied", "shared-pool", "dense-first"])
@pytest.mark.parametrize("first", ["parallel", "tied", "shared-pool"])
def test_a_block_is_composed_once(first, variant):
    """A second variant would undo the first, or add up a pool twice."""
    with pytest.raises(Misuse) as refusal:
        recipe(f"cartesian+{first}+{variant}")
    assert str(refusal.value) == f"{variant} {SEVERAL.format(f'cartesian+{first}')}"


def test_variants_that_do_not_meet_go_together():
    both = recipe("cartesian+parallel+averaged")
    assert both.model.composition == "parallel"
    assert [spec.mix for spec in moe_sub_layers(both)] == ["convex", "convex"]


def test_deep_needs_an_even_number_of_blocks_all_alike():
    base = recipe("smoe")
    odd = replace(base, model=replace(base.model, num_layers=3))
    for other in (odd, recipe("smoe", "base")):  # paper sizes have dense blocks between
        with pytest.raises(Misuse, match=f"^deep {REFUSALS['deep'].format('smoe')}$"):
            VARIANTS["deep"](other)


def test_an_unknown_variant_is_refused_with_the_nearest():
    with pytest.raises(Misuse, match=r"unknown variant 'tide' \(did you mean 'tied'\?\); variants: parallel, tied"):
        recipe("cartesian+tide")


def test_dense_first_needs_halves_of_equal_width():
    base = recipe("cartesian")
    first, second = moe_sub_layers(base)
    for other in ((first, replace(second, width=8)), (first, second, second)):
        with pytest.raises(Misuse, match="dense-first needs two MoE sub-layers of equal width, and cartesian has"):
            VARIANTS["dense-first"](replace(base, model=replace(base.model, block=other)))
