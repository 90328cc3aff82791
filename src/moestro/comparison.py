"""What a comparison found: plain records and the one JSON file that holds them.

`compare` writes these, the report and the terminal table read them, and so does any later script. Losses are in nats
per token, bits per byte are log2 over the bytes of the text that was predicted, sizes are in bytes, times in seconds.
Every number is finite; what could not be measured is None, `null` in the file (JSON has no NaN).
"""

import json
import math
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from moestro.errors import Misuse
from moestro.statistics import Difference, DocumentBootstrap

Kind = TypeVar("Kind")
_JSON = {dict: "object", list: "array", str: "string", int: "integer", float: "number", bool: "boolean"}


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


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """One point of a learning curve."""

    step: int
    tokens: int
    loss: float
    """Training loss, without auxiliary losses."""
    held_out_loss: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerStatistics:
    """How one MoE layer of a finished run routed the held-out text."""

    name: str
    load: tuple[float, ...]
    """Per expert, its fraction of all choices over the data set; sums to 1."""
    domain_load: dict[str, tuple[float, ...]]
    """Per domain, the same over that domain's tokens."""
    max_vio_batch: float | None
    """Largest load over the mean load, minus 1, within one batch; mean over batches."""
    max_vio_data: float | None
    """The same over the whole data set."""
    dead_experts: int
    """Experts that no token chose."""
    entropy: float | None
    """Mean entropy of a token's routing scores, in nats."""
    confidence: float | None
    """Mean of a token's largest routing score."""
    mutual_information: float | None
    """Between token and expert, in nats, from the routing scores."""
    domain_mutual_information: float | None = None
    """Between domain and expert, in nats, from the choices."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeResult:
    """All runs of one recipe, and what they say against the first recipe."""

    name: str
    description: str
    total_parameters: int
    active_parameters: int
    flops_per_token: float
    """Of training, forward and backward, at the training sequence length."""
    runs: tuple[Run, ...]
    difference: Difference | None = None
    """To the first recipe; None for the first."""
    document_bootstrap: DocumentBootstrap | None = None


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

    def __post_init__(self) -> None:
        if not self.recipes:
            raise Misuse("a comparison must hold at least one recipe")
        for recipe in self.recipes:
            if tuple(run.seed for run in recipe.runs) != self.seeds or not self.seeds:
                raise Misuse(
                    f"every recipe must have one run per seed {list(self.seeds)}, in that order; "
                    f"{recipe.name} has {[run.seed for run in recipe.runs]}"
                )


def write_comparison(comparison: Comparison, path: Path) -> None:
    """Write the comparison as JSON.

    Raises:
        ValueError: a number is not finite (says which).
    """
    path.write_text(dumps(comparison), encoding="utf-8")


def read_comparison(path: Path) -> Comparison:
    """Read what `write_comparison` wrote.

    Raises:
        Misuse: the file is not JSON, or not of that shape (says where).
        OSError: the file cannot be read.
    """
    try:
        return loads(path.read_text(encoding="utf-8"))
    except Misuse as error:
        raise Misuse(f"{path}: {error}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise Misuse(f"{path} must hold JSON: {error}") from None


def dumps(comparison: Comparison) -> str:
    """The comparison as JSON text, one field a line, numbers in full precision."""
    return json.dumps(_encoded(comparison, "comparison"), indent=1, ensure_ascii=True, allow_nan=False) + "\n"


def loads(text: str) -> Comparison:
    """The comparison that `dumps` made `text` of."""
    return _decoded(Comparison, json.loads(text), "comparison")


def _encoded(value: object, at: str) -> object:
    if is_dataclass(value):
        return {f.name: _encoded(getattr(value, f.name), f"{at}.{f.name}") for f in fields(value)}
    if isinstance(value, dict):
        return {name: _encoded(item, f"{at}[{name!r}]") for name, item in value.items()}
    if isinstance(value, tuple):
        return [_encoded(item, f"{at}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{at} must be finite (None where it is unknown), got {value}")
    return value


def _decoded(kind: Any, value: Any, at: str) -> Any:
    """`value`, which came from JSON, as the annotated type `kind`."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        present = next(a for a in arguments if a is not NoneType)
        return None if value is None else _decoded(present, value, at)
    if is_dataclass(kind):
        return _decoded_record(kind, _checked(dict, value, at), at)
    if origin is dict:
        return {k: _decoded(arguments[1], item, f"{at}[{k!r}]") for k, item in _checked(dict, value, at).items()}
    if origin is tuple:
        return _decoded_tuple(arguments, _checked(list, value, at), at)
    if origin is Literal:
        if value not in arguments:
            raise Misuse(f"{at} must be one of {', '.join(map(repr, arguments))}, got {value!r}")
        return value
    if kind is float and type(value) is int:
        return float(value)
    if kind is float and not math.isfinite(_checked(float, value, at)):
        raise Misuse(f"{at} must be finite or null, got {value}")
    return _checked(kind, value, at)


def _decoded_record(kind: Any, value: dict[str, Any], at: str) -> Any:
    hints = get_type_hints(kind)
    required = {f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}
    wrong = (required - value.keys()) | (value.keys() - hints.keys())
    if wrong:
        raise Misuse(f"{at} must have the fields {', '.join(hints)}; missing or unknown: {', '.join(sorted(wrong))}")
    return kind(**{name: _decoded(hints[name], item, f"{at}.{name}") for name, item in value.items()})


def _decoded_tuple(arguments: tuple[Any, ...], value: list[Any], at: str) -> tuple[Any, ...]:
    if arguments[-1] is Ellipsis:
        arguments = (arguments[0],) * len(value)
    if len(value) != len(arguments):
        raise Misuse(f"{at} must have {len(arguments)} items, got {len(value)}")
    pairs = zip(arguments, value, strict=True)
    return tuple(_decoded(argument, item, f"{at}[{index}]") for index, (argument, item) in enumerate(pairs))


def _checked(kind: type[Kind], value: object, at: str) -> Kind:
    if type(value) is not kind:
        raise Misuse(f"{at} must be a JSON {_JSON[kind]}, got {_JSON.get(type(value), 'null')}")
    return value
