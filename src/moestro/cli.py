"""The command line: results on stdout, progress on stderr; exit 0 done, 1 failed, 2 misuse."""

import hashlib
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import transformers
import tyro
from rich.console import Console

from moestro.adapters.ranks import rank
from moestro.compare import compare as compare_runs
from moestro.compare import with_one_dtype
from moestro.errors import Misuse, TrainingFailed
from moestro.flags import DataFlags, JobFlags, RecipeFlags, RunFlags, SweepFlags
from moestro.gate.loading import load_model
from moestro.gate.parsing import parsed
from moestro.gate.ranges import Positive, Range, Seed, check, shown
from moestro.gate.visible import make_visible, one_line
from moestro.gate.writing import failures_as_os_errors
from moestro.inspection import describe, find, read_text
from moestro.inspection.texts import DEFAULT_MAX_BYTES as INSPECTED_BYTES
from moestro.jobs import choose
from moestro.listing import print_costs, print_plan, print_recipes
from moestro.models import MoestroForCausalLM
from moestro.models.siblings import export_stock
from moestro.planning import plan as plan_comparison
from moestro.report.printing import Visible, say
from moestro.report.routing_terminal import print_finding, print_study
from moestro.report.sentences import did_not_learn, failures
from moestro.report.terminal import print_comparison
from moestro.routing_study import Running, study_routing
from moestro.scheduling import commands
from moestro.statistics import MARGIN
from moestro.training.checkpoints import verify_if_marked
from moestro.training.estimate import estimates
from moestro.training.owner import check_writable
from moestro.training.ranks import first_rank_first, is_shared, join, on_first_rank, speaks, wait_for_all
from moestro.training.recipes import RECIPES
from moestro.training.runs import check_folder
from moestro.training.train import Interrupted, Options
from moestro.training.train import train as train_run

DEFAULT_RUNNING, DATA_FLAGS, RECIPE_FLAGS = Running(), DataFlags(), RecipeFlags()
RUN_FLAGS, SWEEP_FLAGS, JOB_FLAGS = RunFlags(), SweepFlags(), JobFlags()
"""Defaults of all flags."""


def train(
    recipe: tyro.conf.Positional[str],
    /,
    seed: int = 0,
    export_stock: bool = False,
    recipe_flags: Annotated[RecipeFlags, tyro.conf.arg(name="")] = RECIPE_FLAGS,
    data_flags: Annotated[DataFlags, tyro.conf.arg(name="")] = DATA_FLAGS,
    run_flags: Annotated[RunFlags, tyro.conf.arg(name="")] = RUN_FLAGS,
) -> None:
    """Train one recipe.

    Args:
        recipe: A recipe, as `moestro recipes` lists them; NAME+VARIANT is a variant of it, and NAME:FIELD=VALUE,...
            overrides fields.
        seed: Random seed for initial weights and data order.
        export_stock: Save the finished model as its stock transformers sibling too, where it has one.
    """
    check("seed", seed, Seed)
    chosen = recipe_flags.recipe(recipe)
    if run_flags.dry_run:
        print_costs(estimates([chosen]), "1 run")
        return
    run_flags.check([chosen])
    console = Visible(stderr=True)
    folder = run_flags.out or Path("runs") / f"{slug([recipe])}-{chosen.size}-seed-{seed}"
    join()
    on_first_rank(lambda: check_folder(folder))
    data = first_rank_first(lambda: data_flags.prepare(chosen))
    (fitted,) = data_flags.fit([chosen], data)
    run = train_run(fitted, data, folder, seed=seed, console=console, options=Options(report_to=run_flags.report_to))
    if rank() > 0:
        return
    if export_stock:
        export(folder)
    say(f"held-out loss {run.held_out.loss:.4f} nats/token, {run.held_out.bits_per_byte:.4f} bits/byte: {folder}")
    if words := did_not_learn(run):
        say(f"warning: {words}")


def compare(
    recipes: tyro.conf.Positional[tuple[str, ...]] = ("dense", "smoe", "fine-grained"),
    /,
    seeds: int = 3,
    first_seed: int = 0,
    match: Literal["tokens", "flops"] = "tokens",
    allow_unequal: bool = False,
    margin: float = MARGIN,
    sweep_flags: Annotated[SweepFlags, tyro.conf.arg(name="")] = SWEEP_FLAGS,
    recipe_flags: Annotated[RecipeFlags, tyro.conf.arg(name="")] = RECIPE_FLAGS,
    data_flags: Annotated[DataFlags, tyro.conf.arg(name="")] = DATA_FLAGS,
    job_flags: Annotated[JobFlags, tyro.conf.arg(name="")] = JOB_FLAGS,
    run_flags: Annotated[RunFlags, tyro.conf.arg(name="")] = RUN_FLAGS,
) -> None:
    """Train recipes on an equal budget, paired by seed; print the table, write comparison.json and report.html.

    Args:
        recipes: Recipes, as `moestro recipes` lists them, also as NAME+VARIANT and NAME:FIELD=VALUE,...; the first is
            what the others are compared to.
        seeds: How many seeds; three or more give an interval. 0 with --sweep: the screening alone.
        first_seed: The seeds count up from this one.
        match: What is equal between recipes, training tokens or training FLOPs.
        allow_unequal: Compare although budgets differ, and mark the table.
        margin: Recipes shown to differ by less than this, in nats per token, are called equivalent.
    """
    check("margin", margin, Positive)
    check("seeds", seeds, Annotated[int, Range(at_least=0, at_most=1_000)])
    check("first_seed", first_seed, Seed)
    check("first_seed and the seeds after it", first_seed + max(seeds, 1) - 1, Seed)
    chosen = [recipe_flags.recipe(spec) for spec in recipes]
    the_plan = plan_comparison(
        chosen,
        seeds=range(first_seed, first_seed + seeds),
        match=match,
        allow_unequal=allow_unequal,
        command=["moestro", *sys.argv[1:]],
        grid=sweep_flags.grid(recipes, recipe_flags),
        margin=margin,
    )
    if run_flags.dry_run:
        print_plan(the_plan)
        return
    run_flags.check(the_plan.recipes)
    folder = run_flags.out or Path("runs") / f"compare-{slug(recipes)}-{chosen[0].size}"
    console = Visible(stderr=True)
    if job_flags.print_commands:
        decided = with_one_dtype(the_plan, folder, console)
        for command in commands(decided, folder, recipe_flags, data_flags):
            print(command)
        return
    jobs = choose(job_flags.jobs, job_flags.threads, the_plan.recipes, the_plan.runs)
    join()
    on_first_rank(lambda: check_writable(folder))
    data = first_rank_first(lambda: data_flags.prepare(chosen[0]))
    the_plan = replace(the_plan, recipes=tuple(data_flags.fit(the_plan.recipes, data)))
    options = Options(report_to=run_flags.report_to)
    comparison = compare_runs(the_plan, data, folder, console=console, options=options, jobs=jobs)
    if rank() > 0:
        return
    print_comparison(comparison, Console())
    print()
    say(f"report: {folder / 'report.html'}")
    if failed := failures(comparison):
        raise TrainingFailed(failed)


def recipes(recipe_flags: Annotated[RecipeFlags, tyro.conf.arg(name="")] = RECIPE_FLAGS) -> None:
    """List the recipes, what they cost at one size, and the variants of them."""
    print_recipes([recipe_flags.recipe(name) for name in RECIPES])


def inspect(
    checkpoints: tyro.conf.Positional[tuple[str, ...]],
    /,
    data: tuple[str, ...] = (),
    text_column: str = "text",
    max_bytes: int = INSPECTED_BYTES,
    out: Path | None = None,
    running: Annotated[Running, tyro.conf.arg(name="")] = DEFAULT_RUNNING,
) -> None:
    """Say what a checkpoint is and which losses apply; with --data, report how it routes a text. Two: side by side.

    Args:
        checkpoints: One or two: a folder, a run of `moestro train`, an adapter of PEFT, or a name on the hub.
        data: Files, folders, globs or hf:NAME; LABEL=PATH names its domain, PATH::COLUMN its text column.
        text_column: Column that holds the text in .jsonl, .csv and .parquet; a+b joins two.
        max_bytes: Use at most this much of each domain.
        out: Folder of report.html and routing.json. Default: runs/inspect- and the checkpoints' names.
    """
    if running.robustness and not data:
        raise Misuse("--robustness needs a text to run the model on: name it with --data")
    found = find(checkpoints)
    for checkpoint in found:
        verify_if_marked(Path(checkpoint.place))
    text = read_text(data, text_column=text_column, max_bytes=max_bytes) if data else None
    findings = [describe(checkpoint) for checkpoint in found]
    console = Console()
    for finding in findings:
        print_finding(finding, console)
    if text is None:
        return
    folder = out or Path("runs") / f"inspect-{slug([checkpoint.name for checkpoint in found])}"
    result = study_routing(found, findings, text, running, folder, command=shlex.join(["moestro", *sys.argv[1:]]))
    print_study(result, console)
    print()
    say(f"report: {folder / 'report.html'}")


def export(folder: Path) -> None:
    """Save the finished model of a run as its stock sibling."""
    finished = str(folder / "model")
    model = load_model(MoestroForCausalLM, finished, f"the finished model in {finished} cannot be read")
    with failures_as_os_errors(folder / "stock"):
        export_stock(model, folder / "stock")


def slug(recipes: tuple[str, ...] | list[str]) -> str:
    """A folder name made of recipe specs."""
    name = "-vs-".join("".join(c if c.isalnum() or c in "+-=.," else "_" for c in spec) for spec in recipes)
    if len(name.encode()) <= 160:
        return name
    return f"{name[:40]}-{hashlib.blake2b(name.encode(), digest_size=8).hexdigest()}"  # file names have 255 bytes


def main() -> None:
    """The `moestro` program."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    commands = {"compare": compare, "train": train, "inspect": inspect, "recipes": recipes}
    make_visible()
    try:
        check_launcher()
        parsed(commands, __doc__ or "")()
    except Misuse as error:
        fail(error, 2)
    except TrainingFailed as error:
        fail(error, 1)
    except OSError as error:
        fail(error, 1)
    except Interrupted as stop:
        fail(stop, 130)
    except KeyboardInterrupt:
        stop = Interrupted("stopped at once; the same command goes on from the last checkpoint, if there is one")
        fail(stop, 130)


def check_launcher() -> None:
    """Raise Misuse if a launcher's environment variable, such as RANK, is not a whole number."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        if not (value := os.environ.get(name, "0")).isdecimal():
            raise Misuse(f"{name} must be a whole number, as torchrun sets it, got {shown(value)}")


def told(error: Exception) -> str:
    """Return the message of an error; for an OSError, the reason and the file."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.strerror}: {error.filename}"
    return str(error)


def fail(error: Exception, code: int) -> None:
    """Print one line on stderr, on one rank, and end with `code`."""
    if speaks(error):
        print(f"moestro: {one_line(told(error))}", file=sys.stderr)
        sys.stderr.flush()
    if is_shared(error):
        wait_for_all()  # the launcher kills all ranks when one exits, perhaps before the message is printed
    # Other threads (progress, data) must not turn a plain message into a traceback at exit.
    os._exit(code) if code == 130 else sys.exit(code)


if __name__ == "__main__":
    main()
