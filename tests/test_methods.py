"""The methods as variants of recipes: what they ask for, where they are refused, and how their fields are set."""

from dataclasses import fields
from pathlib import Path

import pytest

from moestro import Misuse
from moestro.competition.presets import PRESETS
from moestro.competition.settings import Compete
from moestro.training.fields import leaves
from moestro.training.methods import METHODS
from moestro.training.recipe import Competing
from moestro.training.recipes import RECIPES, recipe

WITH_EXPERTS = [name for name in RECIPES if name != "dense"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_every_recipe_with_experts_takes_every_method(name, method):
    base, varied = recipe(name), recipe(f"{name}+{method}")
    assert varied.model == base.model
    assert varied.training == base.training
    assert varied.losses != base.losses
    assert varied.losses.balance == base.losses.balance
    assert (varied.compete is None) == (method == "specialise")
    with pytest.raises(Misuse, match="needs a recipe with experts, and dense has none"):
        recipe(f"dense+{method}")


@pytest.mark.parametrize("preset", PRESETS)
def test_a_method_is_its_preset(preset):
    method = "compete" if preset == "ours" else f"compete-{preset}"
    aux = recipe(f"cartesian+{method}:start=0").aux_losses()
    wanted = PRESETS[preset](2)  # blocks: over their two sub-layers losses add up
    assert {name: getattr(aux, name) for name in wanted} == wanted


def test_methods_go_together_in_any_order():
    one, other = recipe("cartesian+compete+specialise"), recipe("cartesian+specialise+compete")
    assert one.losses == other.losses
    assert one.compete == other.compete
    assert one.losses.orthogonality > 0
    assert one.losses.distillation > 0


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_no_field_is_called_as_another_one(name):
    """`balance=0.05` must mean one thing: fields of one name belong to one class."""
    tree, owners = recipe(f"{name}+compete+specialise"), {}
    for path in leaves(tree):
        owner = tree
        for part in path[:-1]:
            owner = owner[part] if isinstance(part, int) else getattr(owner, part)
        owners.setdefault(path[-1], set()).add(type(owner).__name__)
    shared = {field: names for field, names in owners.items() if len(names) > 1}
    assert shared.keys() <= {"width", "kind"}  # of dense and of MoE sub-layers: one meaning
    assert recipe(f"{name}+compete:balance=0.05,scale=2").losses.balance == 0.05


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("smoe+compete+compete", "experts compete in smoe.compete already"),
        ("smoe+compete-v2-paper+compete", "one way of competing at a time"),
        ("smoe:rate=0.25", "rate is a field of competition, and smoe has none: try smoe.compete:rate="),
        ("smoe:top_k=2+compete", "variants come before the colon, as in smoe.compete:top_k="),
        ("smoe+compete:start=0.99,end=0.995,tokens=2048", "lies none of this run's 4 steps"),
    ],
)
def test_what_cannot_be_meant_is_refused(spec, message):
    with pytest.raises(Misuse, match=message):
        recipe(spec)


def test_a_part_of_a_run_becomes_steps():
    aux = recipe("smoe+compete:start=0.1,end=0.8,tokens=51200,rate=0.5").aux_losses()
    assert aux.compete == Compete(start_step=10, end_step=80, rate=0.5)
    assert recipe("smoe+compete:start=0").aux_losses().compete == Compete()
    assert recipe("smoe+compete:tokens=51200").aux_losses().compete == Compete(start_step=25)


@pytest.mark.parametrize("fields", ["by=tokens,max_layers=none", "max_layers=none,by=tokens"])
def test_fields_that_only_go_together_are_set_together(fields):
    """Steps have a cap on layers, tokens must not have one."""
    compete = recipe(f"smoe+compete-v2-code:{fields}").compete
    assert (compete.by, compete.max_layers) == ("tokens", None)
    with pytest.raises(Misuse, match="max_layers requires by = steps"):
        recipe("smoe+compete-v2-code:by=tokens")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("smoe+compete:start=0.5,end=0.2", "start and end must be shares of a run"),
        ("smoe+compete:start_step=100", "start_step and end_step are set by start and end"),
        ("smoe+compete:rate=2", "rate must be at most 1, got 2.0"),
        ("smoe+compete:response=loud", "response must be one of"),
        ("smoe:compete=true", r"compete is set by a variant, as in smoe\+compete, got 'true'"),
        ("smoe:distillation=0.1", "set compete"),
    ],
)
def test_what_cannot_work_is_refused(spec, message):
    with pytest.raises(Misuse, match=message):
        recipe(spec)


def test_the_table_of_fields_is_what_presets_set():
    text = (Path(__file__).parent.parent / "docs" / "competition.md").read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| `")
    ]
    methods = ["compete", "compete-v1-paper", "compete-v2-paper", "compete-v2-code"]
    recipes = [recipe(f"smoe+{method}") for method in methods]
    blocks = recipes[0].model.num_moe_blocks
    shown = {}
    for name, *cells, _ in rows:
        shown[name.strip("`")] = cells
    of_rule = {f.name for f in fields(Competing)} - {"seed", "start_step", "end_step"}
    assert shown.keys() == of_rule | {
        "distillation", "distillation_form", "distillation_winners", "diversity", "diversity_form"
    }  # fmt: skip
    for name, cells in shown.items():
        for found, cell in zip(recipes, cells, strict=True):
            value = getattr(found.compete if name in of_rule else found.losses, name)
            if cell.startswith("blocks / "):
                assert value == pytest.approx(blocks / int(cell.removeprefix("blocks / ")))
            elif isinstance(value, float):
                assert value == float(cell)
            else:
                assert str(value).lower() == cell
