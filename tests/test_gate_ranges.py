"""Every field that a user fills says what it may hold; the same words answer the command line and the API."""

import dataclasses
import math
from typing import Annotated, Any, Literal

import numpy as np
import pytest

from moestro import AuxLosses, Compete, Dense, Misuse, MoE, MoestroConfig, RouterRule
from moestro.flags import DataFlags
from moestro.gate.ranges import Range, Share, check, wrong
from moestro.inspection.running import Running
from moestro.sweep import Grid
from moestro.training.recipe import Competing, Losses, Model, Training
from moestro.training.recipes import recipe

pytestmark = pytest.mark.usefixtures("unchecked")
MADE = {
    AuxLosses: {},
    Compete: {},
    Competing: {},
    Losses: {},
    RouterRule: {},
    Training: {"tokens": 4096},
    Grid: {"learning_rates": (1e-3,)},
    DataFlags: {},
    Running: {},
    Dense: {"width": 8},
    MoE: {"num_experts": 4, "top_k": 2, "width": 8},
    Model: {"vocab_size": 300, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "block": (Dense(width=8),)},
}
FIELDS = [(kind, field.name) for kind in MADE for field in dataclasses.fields(kind) if field.init]
NUMBERS = (float("nan"), float("inf"), -1, -0.5, 10**400, True, "a", "1", b"1", [1], {}, object(), 1j)


def made(which: type, /, **changed: Any) -> None:
    which(**MADE[which] | changed)


@pytest.mark.parametrize(("kind", "name"), FIELDS, ids=[f"{kind.__name__}.{name}" for kind, name in FIELDS])
def test_no_field_takes_an_object_nor_none_unless_it_says_so(kind: type, name: str):
    hint = str(typing_of(kind, name))
    if "None" not in hint:
        with pytest.raises(Misuse, match=f"^{name} must be "):
            made(kind, **{name: None})
    with pytest.raises(Misuse, match=f"^{name} must be "):
        made(kind, **{name: object()})
    if name != "response":
        with pytest.raises(Misuse, match=f"^{name} must be "):
            made(kind, **{name: lambda: 0})


def typing_of(kind: type, name: str) -> Any:
    return next(field.type for field in dataclasses.fields(kind) if field.name == name)


NUMERIC = [(kind, name) for kind, name in FIELDS if "Range" in str(typing_of(kind, name)) and name != "learning_rates"]


@pytest.mark.parametrize(("kind", "name"), NUMERIC, ids=[f"{kind.__name__}.{name}" for kind, name in NUMERIC])
@pytest.mark.parametrize("value", NUMBERS, ids=lambda value: str(type(value).__name__) + str(value)[:6])
def test_no_number_is_nan_infinite_negative_or_something_else(kind: type, name: str, value: object):
    with pytest.raises(Misuse, match=f"^{name} must be ") as refused:
        made(kind, **{name: value})
    assert len(str(refused.value)) < 200


def test_every_number_of_these_classes_has_a_range():
    without = [
        (kind.__name__, name)
        for kind, name in FIELDS
        if {"int", "float"} & set(str(typing_of(kind, name)).replace("|", " ").split())
    ]
    assert without == []


@pytest.mark.parametrize(
    ("hint", "good", "bad", "words"),
    [
        (Share, [0, 1, 0.5, np.float32(0.5), np.int64(1)], [-0.1], "at least 0"),
        (Share, [], [1.5, 2], "at most 1"),
        (Share, [], ["a", None, True, math.nan, math.inf], "a number of at least 0 and at most 1"),
        (Annotated[int, Range(above=2, below=9)], [3, np.int8(8)], [9, np.uint64(2**63)], "below 9"),
        (Annotated[int, Range(above=2, below=9)], [], [2.5, 3.0, np.float64(3)], "a whole number above 2 and below 9"),
        (Annotated[int, Range()] | None, [None, -5], ["a"], "a whole number"),
        (bool, [True, np.True_], [1, 0, "yes", None], "True or False"),
        (str, ["", "a"], [1, None, b"a"], "text"),
        (Literal["a", "b"], ["a"], ["c", 1, None, ["a"]], "a or b"),
        (Literal["a", "b", "c"] | None, ["a", None], ["d"], "one of a, b, c"),
        (tuple[Share, ...], [(), (0.5, 1)], [(0.5, 2)], "a tuple whose items are at most 1"),
        (tuple[str, ...], [("a",)], ["a", 3], "a tuple"),
        (RouterRule, [RouterRule()], ["a", None], "a RouterRule"),
    ],
)
def test_values_and_what_they_must_be(hint: Any, good: list, bad: list, words: str):
    assert [wrong(value, hint) for value in good] == [None] * len(good)
    assert {wrong(value, hint) for value in bad} <= {words}


def test_what_is_typed_is_shown_but_not_at_any_length():
    with pytest.raises(Misuse, match=r"^balance must be a number of at least 0, got 'a'$"):
        AuxLosses(balance="a")  # type: ignore[arg-type]
    with pytest.raises(Misuse, match=r"^rate must be a number above 0 and at most 1, got None$"):
        Compete(rate=None)  # type: ignore[arg-type]
    for value in ("x" * 10**6, 10**10_000):
        with pytest.raises(Misuse) as refused:
            check("top_k", value, int if isinstance(value, str) else Share)
        assert len(str(refused.value)) < 150


ABSURD = [
    "smoe:num_layers=100000",
    "smoe:num_experts=1000000000",
    "smoe:vocab_size=10000000000",
    "smoe:hidden_size=1000000,num_heads=1000,num_layers=4",
    "smoe:width=1000000,num_experts=65536",
    "smoe:num_layers=" + "9" * 5000,
    "smoe:num_layers=0",
    "smoe:hidden_size=0",
    "smoe:num_heads=0",
    "smoe:every=99",
    "smoe:every=0",
    "smoe:num_shared=100000",
    "smoe:sequence_length=1000000000",
    "smoe:batch_tokens=1000000000000",
    "smoe:weight_decay=-1",
    "smoe:max_grad_norm=nan",
    "smoe:final_learning_rate=nan",
    "smoe:final_learning_rate=1e400",
    "smoe:beta1=1",
    "smoe:beta2=-0.1",
    "smoe:learning_rate=0",
    "smoe:warmup=2",
    "smoe+compete:seed=-1",
    "smoe+compete:end=nan",
]


@pytest.mark.parametrize("spec", ABSURD, ids=[spec[:40] for spec in ABSURD])
def test_absurd_recipes_are_known_from_their_words_alone(spec: str):
    with pytest.raises(Misuse) as refused:
        recipe(spec)
    assert len(str(refused.value)) < 300
    assert spec.rpartition("=")[0].rpartition(":")[2].split("=")[0] in str(refused.value) or "parameters" in str(
        refused.value
    )


CONFIG = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in CONFIG for value in (0, -1, "a", None, True, 1.5, 10**12)]
    + [("rms_norm_eps", 0.0), ("initializer_range", math.nan), ("qk_norm", "no"), ("composition", 3)]
    + [("attention_dropout", 2.0), ("sliding_window", 0), ("head_dim", 0), ("num_key_value_heads", -1)]
    + [("feed_forward", 3), ("rope_parameters", [1]), ("tie_word_embeddings", "a")],
)
def test_a_config_refuses_in_one_line(name: str, value: object):
    with pytest.raises(Misuse, match=f"^{name} ") as refused:
        MoestroConfig(**CONFIG | {name: value})
    assert "\n" not in str(refused.value)
