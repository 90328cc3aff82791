"""Running `moestro` as a user would: in this process where that is enough, else in one that can be killed."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

SMALL = ["--sequence-length", "32", "--batch-tokens", "128", "--vocab-size", "300", "--dtype", "float32"]
SMALL += ["--set", "hidden_size=16", "num_layers=2", "num_heads=2", "width=8"]
WORDS = [
    "expert",
    "router",
    "token",
    "gate",
    "balance",
    "load",
    "sparse",
    "dense",
    "layer",
    "block",
    "shared",
    "choice",
    "weight",
    "bias",
    "score",
]


def write_corpus(folder: Path, domains: int = 2, documents: int = 24) -> Path:
    """A small corpus with some structure to learn: each domain has its own words."""
    draw = random.Random(0)
    for domain in range(domains):
        place = folder / f"domain{domain}"
        place.mkdir(parents=True)
        for index in range(documents):
            words = draw.choices(WORDS[domain::domains], k=150)
            (place / f"{index}.txt").write_text(" ".join(words))
    return folder


def sources(folder: Path) -> list[str]:
    return ["--data", *(str(path) for path in sorted(folder.iterdir()))]


def moestro(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """`moestro ARGUMENTS` in this process (runs of a comparison too, unless --jobs says otherwise); its exit code."""
    from moestro.cli import main

    if arguments[:1] == ("compare",) and "--jobs" not in arguments and "--help" not in arguments:
        arguments = (*arguments, "--jobs", "1")
    monkeypatch.setattr(sys, "argv", ["moestro", *arguments])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def start(*arguments: str, prelude: str = "") -> subprocess.Popen:
    """`moestro ARGUMENTS` in a process of its own, after running the Python code `prelude` in it."""
    code = f"import sys; sys.argv = ['moestro', *{list(arguments)!r}]\n{prelude}\nfrom moestro.cli import main\nmain()"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code], stdout=pipe, stderr=pipe, text=True, env=environment)
