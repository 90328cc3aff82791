"""Time and memory of preparation by the size of the text, first and cached: docs/data.md has the table.

The text is drawn: documents of 200 to 8,000 characters from a vocabulary of 50,000 words with Zipf's frequencies, in
JSON lines of four domains. Each preparation runs in a process of its own, imports included in its peak of memory.

    python benchmarks/preparation.py [--megabytes 1 10] [--work FOLDER]
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from paired import start

VOCABULARY = 4096


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured."""

    megabytes: tuple[int, ...] = (1, 3)
    """Sizes of the text."""
    work: Path | None = None
    """Folder for texts and caches, about three times the largest text. Default: the system's for temporary files."""


def main(sizes: Sizes) -> None:
    """Print one line per size: seconds and peak MB of the first preparation and of one that finds it in the cache."""
    print("text MB | first s | first peak MB | cached s | cached peak MB | cache MB")
    with tempfile.TemporaryDirectory(dir=sizes.work) as folder:
        for size in sizes.megabytes:
            source, cache = Path(folder, "text"), Path(folder, "cache")
            write_text(source, size * 10**6)
            first, cached = (measured(source, cache) for _ in range(2))
            stored = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()) / 1e6
            figures = (*first, *cached)
            print(f"{size} | " + " | ".join(f"{figure:.1f}" for figure in (*figures, stored)), flush=True)
            shutil.rmtree(source)
            shutil.rmtree(cache)


def write_text(folder: Path, size: int) -> None:
    """Write about `size` bytes of text in four files."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    words = ["".join(draw.choice(letters, draw.integers(2, 11))) for _ in range(50_000)]
    for name in ("fiction", "law", "news", "web"):
        written = 0
        with (folder / f"{name}.jsonl").open("w") as stream:
            while written < size / 4:
                ranks = np.minimum(draw.zipf(1.3, 60_000), len(words)) - 1
                text = " ".join(map(words.__getitem__, ranks.tolist()))
                for length in draw.integers(200, 8000, 40).tolist():
                    stream.write(json.dumps({"text": text[:length]}) + "\n")
                    written += length
                    text = text[length:]


def measured(source: Path, cache: Path) -> tuple[float, float]:
    """Return the seconds of a preparation, without imports, and the peak of its process in MB."""
    command = [sys.executable, __file__, "--measure", str(source), str(cache)]
    seconds, peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-2:]
    return float(seconds), float(peak)


def measure(source: str, cache: str) -> None:
    """Prepare once and print what it took."""
    from moestro.data import prepare

    began = time.perf_counter()
    files = sorted(Path(source).iterdir())
    prepare([str(path) for path in files], tokenizer=VOCABULARY, sequence_length=512, cache_dir=Path(cache))
    seconds = time.perf_counter() - began
    print(
        seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if os.uname().sysname == "Linux" else 2**20)
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(*sys.argv[2:])
    else:
        start(main, Sizes, __doc__ or "")
