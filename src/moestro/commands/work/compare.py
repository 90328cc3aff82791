"""The work of `moestro compare`."""

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from moestro.adapters.ranks import rank
from moestro.commands.work.texts import fit, prepared
from moestro.compare import compare, with_one_dtype
from moestro.errors import TrainingFailed
from moestro.flags import DataFlags, JobFlags, RecipeFlags, RunFlags
from moestro.gate.libraries import quiet
from moestro.jobs.choice import choose
from moestro.planning import Plan
from moestro.report.printing import Visible, say
from moestro.report.sentences import failures
from moestro.report.terminal import print_comparison
from moestro.scheduling import commands
from moestro.training.owner import check_writable
from moestro.training.ranks import first_rank_first, join, on_first_rank
from moestro.training.train import Options


def print_commands(
    the_plan: Plan, folder: Path, recipe_flags: RecipeFlags, data_flags: DataFlags, run_flags: RunFlags
) -> None:
    """Print one `moestro train` command per run, for a scheduler; with a sweep, its runs only."""
    quiet()
    run_flags.check(the_plan.recipes)
    decided = with_one_dtype(the_plan, folder, Visible(stderr=True))
    for command in commands(decided, folder, recipe_flags, data_flags):
        print(command)


def compare_recipes(
    the_plan: Plan, folder: Path, *, data_flags: DataFlags, job_flags: JobFlags, run_flags: RunFlags, verbose: bool
) -> None:
    """Run a comparison in `folder` and print its table. Raise TrainingFailed, after printing, if runs failed."""
    quiet()
    run_flags.check(the_plan.recipes)
    jobs = choose(job_flags.jobs, job_flags.threads, the_plan.recipes, the_plan.runs)
    join()
    on_first_rank(lambda: check_writable(folder))
    data = first_rank_first(lambda: prepared(data_flags, the_plan.recipes[0]))
    the_plan = replace(the_plan, recipes=tuple(fit(data_flags, the_plan.recipes, data)))
    console = Visible(stderr=True)
    options = Options(report_to=run_flags.report_to)
    comparison = compare(the_plan, data, folder, console=console, options=options, jobs=jobs)
    if rank() > 0:
        return
    print_comparison(comparison, Console(), verbose=verbose)
    print()
    say(f"report: {folder / 'report.html'}")
    if failed := failures(comparison):
        raise TrainingFailed(failed)
