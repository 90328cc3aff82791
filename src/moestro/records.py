"""Records on disk: frozen dataclasses as JSON and back, strictly, and files that are whole or not there."""

import json
import math
import os
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from moestro.errors import Misuse

Kind = TypeVar("Kind")
_JSON = {dict: "object", list: "array", str: "string", int: "integer", float: "number", bool: "boolean"}


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader, or a crash, sees the old contents or the new, never a part."""
    temporary = path.with_name(path.name + ".part")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_record(record: object, path: Path) -> None:
    """Write a record as JSON.

    Raises:
        ValueError: a number is not finite (says which).
    """
    write_atomically(path, dumps(record))


def read_record(kind: type[Kind], path: Path) -> Kind:
    """Read a record of type `kind` that `write_record` wrote.

    Raises:
        Misuse: the file is not JSON, or not of that shape (says where).
        OSError: the file cannot be read.
    """
    try:
        return loads(kind, path.read_text(encoding="utf-8"))
    except Misuse as error:
        raise Misuse(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:  # ValueError also for a number of more than 4,300 digits
        raise Misuse(f"{path} must hold JSON: {error}") from None


def dumps(record: object) -> str:
    """A record as JSON text, one field a line, numbers in full precision."""
    name = type(record).__name__.lower()
    return json.dumps(_encoded(record, name), indent=1, ensure_ascii=True, allow_nan=False) + "\n"


def loads(kind: type[Kind], text: str) -> Kind:
    """The record that `dumps` made `text` of."""
    return _decoded(kind, json.loads(text), kind.__name__.lower())


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
