"""Setting a field deep inside a tree of frozen dataclasses by its name, as typed on the command line."""

import types
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass, replace
from difflib import get_close_matches
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from moestro.errors import Misuse


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean ...?)` where something known is close to `name`, else nothing."""
    close = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def leaves(tree: Any, path: tuple = ()) -> Iterator[tuple]:
    """Paths of all fields: names of dataclass fields and indices of tuples."""
    for f in fields(tree):
        value = getattr(tree, f.name)
        if is_dataclass(value):
            yield from leaves(value, (*path, f.name))
        elif isinstance(value, tuple) and value and all(is_dataclass(entry) for entry in value):
            for index, entry in enumerate(value):
                yield from leaves(entry, (*path, f.name, index))
        else:
            yield (*path, f.name)


def override(tree: Any, name: str, value: Any) -> Any:
    """The tree with every field called `name` set (`a.b`: fields `b` below `a`). Text is parsed by the field's type.

    Raises Misuse with the nearest name where there is no such field, and where the text is not of its type.
    """
    wanted = tuple(name.split("."))
    # `name`, `size`, `kind` and `description` say what a recipe is; changing them alone would be a lie.
    paths = [path for path in leaves(tree) if path[-1] not in ("name", "size", "kind", "description")]
    words = {path: tuple(part for part in path if isinstance(part, str)) for path in paths}
    found = [path for path in paths if words[path][-len(wanted) :] == wanted]
    if not found:
        known = sorted({path[-1] for path in paths})
        raise Misuse(f"unknown field {name!r}{nearest(wanted[-1], known)}; fields: {', '.join(known)}")
    for path in found:
        tree = set_path(tree, path, name, value)
    return tree


def set_path(tree: Any, path: tuple, name: str, value: Any) -> Any:
    """A copy of the tree with the field at `path` set."""
    head, *rest = path
    if isinstance(tree, tuple):
        return tuple(set_path(entry, tuple(rest), name, value) if i == head else entry for i, entry in enumerate(tree))
    if rest:
        return replace(tree, **{head: set_path(getattr(tree, head), tuple(rest), name, value)})
    hint = get_type_hints(type(tree))[head]
    return replace(tree, **{head: parse(value, hint, name) if isinstance(value, str) else value})


def parse(text: str, hint: Any, name: str) -> Any:
    """`text` as a value of type `hint`."""
    if get_origin(hint) in (Union, types.UnionType):
        if text.lower() == "none" and type(None) in get_args(hint):
            return None
        (hint,) = [kind for kind in get_args(hint) if kind is not type(None)]
    if is_dataclass(hint):
        raise Misuse(f"{name} is set by a variant, as in smoe+{name}, got {text!r}")
    if get_origin(hint) is Literal:
        if text not in get_args(hint):
            raise Misuse(f"{name} must be {' or '.join(map(str, get_args(hint)))}, got {text!r}")
        return text
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise Misuse(f"{name} must be true or false, got {text!r}")
        return text.lower() == "true"
    try:
        number = float(text) if hint is float else int(text) if hint is int else text
    except ValueError:
        kind = "a number" if hint is float else "a whole number"
        raise Misuse(f"{name} must be {kind}, got {text!r}") from None
    return number
