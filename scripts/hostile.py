"""Draw hostile command lines, files, checkpoints and arguments, and demand one clean line for each.

Each draw ends with exit code 0, 1, 2 or 130, or reaches training; prints at most one line of complaint, with nothing in
it that steers a terminal; takes bounded time and memory; and runs none of the code that its files hold. Prints each
failure, and a table by kind at the end; exit 1 if there is a failure. A draw is a function of seed and number alone,
and --log lets a second start go on where the first stopped.

    python scripts/hostile.py [--draws 2000] [--seed 0] [--kinds command,data] [--log FILE] [--only NUMBER]
"""

import argparse
import json
import os
import random
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from hostile_files import adapter, checkpoint, corpus, run_folder, tokenizer_folder
from hostile_run import Case, Outcome, attempt, prepared
from hostile_words import arguments, command, environment, spec

Draw = Callable[[random.Random, Path], Case]
KINDS: dict[str, Draw] = {
    "command line": command,
    "recipe": spec,
    "data": corpus,
    "tokenizer": tokenizer_folder,
    "checkpoint": checkpoint,
    "adapter": adapter,
    "run folder": run_folder,
    "environment": environment,
    "arguments": arguments,
}


def outcome(number: int, seed: int, kinds: list[str]) -> tuple[str, Outcome]:
    """Make one draw in a folder of its own."""
    draw = random.Random(f"{seed} {number}")
    kind = kinds[number % len(kinds)]
    with tempfile.TemporaryDirectory(prefix="hostile-") as name:
        return kind, attempt(KINDS[kind](draw, Path(name)), Path(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--draws", type=int, default=2000, help="how many draws, at least 1")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws")
    parser.add_argument("--kinds", default=",".join(KINDS), help="kinds of draws, joined by commas")
    parser.add_argument("--log", type=Path, help="file of one line per draw; what it holds is not drawn again")
    parser.add_argument("--only", type=int, help="number of the one draw to make")
    options = parser.parse_args()
    kinds = [kind for kind in options.kinds.split(",") if kind]
    if options.draws < 1 or not kinds or not set(kinds) <= KINDS.keys():
        parser.error(f"--draws must be at least 1, and --kinds some of {','.join(KINDS)}")
    lines = options.log.read_text().splitlines() if options.log and options.log.exists() else []
    done = {line["number"]: line for line in map(json.loads, lines)}
    prepared()
    for number in [options.only] if options.only is not None else range(options.draws):
        if number in done:
            continue
        kind, result = outcome(number, options.seed, kinds)
        done[number] = {"number": number, "kind": kind, "failed": result.problem, "ended": result.ended}
        if result.problem:
            print(f"draw {number}, {kind}: {result.problem}: {result.case}", flush=True)
        if options.log:
            with options.log.open("a") as log:
                log.write(json.dumps(done[number]) + "\n")
    table(list(done.values()))
    raise SystemExit(any(line["failed"] for line in done.values()))


def table(lines: list[dict]) -> None:
    """Print how the draws of each kind ended."""
    endings = sorted({line["ended"] for line in lines})
    print(f"{'kind':<14}" + "".join(f"{ending:>12}" for ending in endings) + f"{'failed':>12}")
    for kind in sorted({line["kind"] for line in lines}):
        mine = [line for line in lines if line["kind"] == kind]
        counts = Counter(line["ended"] for line in mine)
        failed = sum(bool(line["failed"]) for line in mine)
        print(f"{kind:<14}" + "".join(f"{counts[ending]:>12}" for ending in endings) + f"{failed:>12}")
    print(f"{sum(bool(line['failed']) for line in lines)} of {len(lines)} draws failed")


if __name__ == "__main__":
    main()
