"""Train variants of a recipe with one seed and print what each learnt in how much time.

Bits per byte compare variants with different vocabularies. The seed is that of screening runs, which no comparison's
interval contains. Finished runs are read again, so a stopped screening goes on where it stopped. With --seconds, every
variant trains for about as long: its speed is measured in 40 steps, and its tokens are set accordingly. Seconds are
processor seconds of training steps alone: with one thread, what a quiet machine would take.

    python benchmarks/recipe_screening.py FOLDER RECIPE[:FIELD=VALUE,...] ... [--data ...] [--size tiny] [--tokens N]
"""

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from moestro.commands.work.texts import prepared
from moestro.data.building import ALL
from moestro.data.preparation import PreparedData
from moestro.errors import Misuse, TrainingFailed
from moestro.flags import DataFlags
from moestro.training.recipe import Recipe
from moestro.training.recipes import recipe
from moestro.training.runs import RUN, read_description
from moestro.training.train import Options, train

SPEED_STEPS = 40
"""Steps in which the speed of a variant is measured."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--data", nargs="*", default=())
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--seconds", type=float, help="train each variant for about so long, whatever --tokens says")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    try:
        screen(parser.parse_args())
    except Misuse as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def screen(given: argparse.Namespace) -> None:
    """Train each recipe and print its line."""
    torch.set_num_threads(given.threads)
    time.perf_counter = time.process_time  # the trainer's clock
    flags = DataFlags(data=tuple(given.data))
    console = Console(file=sys.stderr)
    tokens = {} if given.tokens is None else {"tokens": given.tokens}
    print(f"{'nats':>7} {'bits/byte':>9} {'gzip':>6} {'seconds':>7} {'tokens/s':>8}  recipe", flush=True)
    for spec in given.recipes:
        chosen = recipe(spec, given.size, **tokens)
        data = prepared(flags, chosen)
        budget = f"seconds={given.seconds:g}" if given.seconds else f"tokens={chosen.training.tokens}"
        folder = given.folder / f"{spec},{budget},size={given.size}"
        if given.seconds:
            chosen = for_seconds(chosen, data, folder, given.seconds, given.seed)
        try:
            run = train(chosen, data, folder, seed=given.seed, console=console, options=Options())
        except TrainingFailed as failure:
            print(f"{spec}: {failure}", flush=True)
            continue
        speed, gzip = run.tokens_per_second or 0.0, data.gzip_bits_per_byte[ALL]
        found = f"{run.held_out.loss:7.4f} {run.held_out.bits_per_byte:9.4f} {gzip:6.3f}"
        print(f"{found} {chosen.training.tokens / speed:7.1f} {speed:8,.0f}  {spec}", flush=True)


def for_seconds(chosen: Recipe, data: PreparedData, folder: Path, seconds: float, seed: int) -> Recipe:
    """Return the recipe with the tokens that it trains on in so many seconds, as an earlier start decided it."""
    if (folder / RUN).exists():
        tokens = read_description(folder / RUN)["recipe"]["training"]["tokens"]
    else:
        short = with_tokens(chosen, SPEED_STEPS * chosen.training.batch_tokens)
        with tempfile.TemporaryDirectory() as place:
            run = train(short, data, Path(place) / "run", seed=seed, console=Console(quiet=True), options=Options())
        tokens = round(seconds * (run.tokens_per_second or 1))
    return with_tokens(chosen, max(tokens, chosen.training.batch_tokens))


def with_tokens(chosen: Recipe, tokens: int) -> Recipe:
    """Return the recipe with another budget."""
    return replace(chosen, training=replace(chosen.training, tokens=tokens))


if __name__ == "__main__":
    main()
