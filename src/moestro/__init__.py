"""moestro: train mixture-of-experts models whose experts really specialise, and prove it.

`moestro.api` lists the public names. It is imported when the first of them is used, not before: it imports torch and
transformers, and the command line prints help and refuses mistakes without them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moestro.api import *  # noqa: F403

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Return a public name (PEP 562)."""
    if name == "__all__":
        return list(_public())
    if name.startswith("_") or name not in (public := _public()):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return public[name]


def __dir__() -> list[str]:
    """Return all public names."""
    return [*_public(), "__version__"]


def _public() -> dict[str, Any]:
    return {name: value for name, value in vars(import_module("moestro.api")).items() if not name.startswith("_")}
