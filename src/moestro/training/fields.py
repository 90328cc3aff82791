"""Setting a field deep inside a tree of frozen dataclasses by its name, as typed on the command line."""

import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from difflib import get_close_matches
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from moestro.errors import Misuse
from moestro.gate.ranges import shown
from moestro.gate.visible import shortened


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean ...?)` where something known is close to `name`, else nothing."""
    close = get_close_matches(shortened(name, 100), list(known), n=1, cutoff=0.5)
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


def override(tree: Any, values: Mapping[str, Any]) -> Any:
    """The tree with every field of these names set (`a.b`: fields `b` below `a`). Text is parsed by the field's type.

    All are set at once: what one of them rules out may be what another allows. Raises Misuse with the nearest name
    where there is no such field, and where the text is not of its type.
    """
    # `name`, `size`, `kind` and `description` say what a recipe is; changing them alone would be a lie.
    paths = [path for path in leaves(tree) if path[-1] not in ("name", "size", "kind", "description")]
    found = {path: (name, value) for name, value in values.items() for path in named(paths, name)}
    return with_fields(tree, found)


def named(paths: Sequence[tuple], name: str) -> list[tuple]:
    """Return the paths that end in the dotted `name`. Raise Misuse, with the nearest name, if there is none."""
    wanted = tuple(name.split("."))
    found = [path for path in paths if tuple(part for part in path if isinstance(part, str))[-len(wanted) :] == wanted]
    if not found:
        known = sorted({path[-1] for path in paths})
        raise Misuse(f"unknown field {shown(name)}{nearest(wanted[-1], known)}; fields: {', '.join(known)}")
    return found


def with_fields(tree: Any, found: Mapping[tuple, tuple[str, Any]]) -> Any:
    """A copy of the tree whose fields at these paths have these values, called by these names."""
    below: dict[Any, dict[tuple, tuple[str, Any]]] = {}
    for (head, *rest), named_value in found.items():
        below.setdefault(head, {})[tuple(rest)] = named_value
    if isinstance(tree, tuple):
        return tuple(with_fields(entry, below.get(index, {})) for index, entry in enumerate(tree))
    hints = get_type_hints(type(tree))
    return replace(
        tree,
        **{
            head: parsed(*deeper[()], hints[head]) if () in deeper else with_fields(getattr(tree, head), deeper)
            for head, deeper in below.items()
        },
    )


def parsed(name: str, value: Any, hint: Any) -> Any:
    """A value of type `hint`, of text where it is that."""
    return parse(value, hint, name) if isinstance(value, str) else value


def parse(text: str, hint: Any, name: str) -> Any:
    """`text` as a value of type `hint`."""
    if get_origin(hint) in (Union, types.UnionType):
        if text.lower() == "none" and type(None) in get_args(hint):
            return None
        (hint,) = [kind for kind in get_args(hint) if kind is not type(None)]
    if is_dataclass(hint):
        raise Misuse(f"{name} is set by a variant, as in smoe+{name}, got {shown(text)}")
    if get_origin(hint) is Literal:
        if text not in get_args(hint):
            raise Misuse(f"{name} must be {' or '.join(map(str, get_args(hint)))}, got {shown(text)}")
        return text
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise Misuse(f"{name} must be true or false, got {shown(text)}")
        return text.lower() == "true"
    try:
        number = float(text) if hint is float else int(text) if hint is int else text
    except ValueError:
        kind = "a number" if hint is float else "a whole number"
        raise Misuse(f"{name} must be {kind}, got {shown(text)}") from None
    return number
