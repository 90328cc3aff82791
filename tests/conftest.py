"""Every test runs with the package's type annotations, tensor shapes included, checked at every call."""

import os
import subprocess
import sys
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

# Before anything imports the package. Dynamo cannot trace the checks: tests of torch.compile use `fresh_process`.
jaxtyping.install_import_hook("moestro", "beartype.beartype")

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
    """Runs a Python script in a new interpreter, in `tmp_path`; returns its output, or fails with its errors."""

    def run(script: str) -> str:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
