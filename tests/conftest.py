"""Every test runs with the package's type annotations, tensor shapes included, checked at every call."""

import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import hypothesis
import jaxtyping
import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# What the package imports while the hook below is at work is compiled anew in every run: import the large part before.
for heavy in ("generation.utils", "models.mixtral.modeling_mixtral", "models.qwen3_moe.modeling_qwen3_moe"):
    import_module(f"transformers.{heavy}")

SOURCE = Path(__file__).parent.parent / "src"
UNCHECKED = {"moestro.models.configuration"}  # transformers' @strict checks types there, and wraps __init__ its own way


def checked_modules() -> list[str]:
    """Every module of the package but the packages' own files, whose names would take in all below them."""
    files = [path for path in sorted(SOURCE.rglob("*.py")) if path.name != "__init__.py"]
    return [
        name for path in files if (name := ".".join(path.relative_to(SOURCE).with_suffix("").parts)) not in UNCHECKED
    ]


# Before anything imports the package. Dynamo cannot trace the checks: tests of torch.compile use `run_fresh`.
jaxtyping.install_import_hook(checked_modules(), "beartype.beartype")

# The same examples on every machine and in every run, so that CI never fails by luck.
hypothesis.settings.register_profile("moestro", deadline=None, max_examples=20, derandomize=True, database=None)
hypothesis.settings.load_profile("moestro")

# One thread per pytest-xdist worker, and sums in the same order everywhere.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Annotations are not checked: for showing what the package itself says to values of a wrong type."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture
def fresh_process(tmp_path: Path) -> Callable[[str], str]:
    """Runs a Python script in a new interpreter, in `tmp_path`, and returns its output."""
    from agreement import run_fresh  # it imports the package, which must wait for the hook

    return lambda script: run_fresh(script, tmp_path)
