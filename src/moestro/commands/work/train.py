"""The work of `moestro train`."""

from pathlib import Path

from moestro.adapters.ranks import rank
from moestro.commands.work.texts import fit, prepared
from moestro.flags import DataFlags, RunFlags
from moestro.gate.libraries import quiet
from moestro.gate.loading import load_model
from moestro.gate.writing import failures_as_os_errors
from moestro.models import MoestroForCausalLM, siblings
from moestro.report.printing import Visible, say
from moestro.report.sentences import did_not_learn
from moestro.training.ranks import first_rank_first, join, on_first_rank
from moestro.training.recipe import Recipe
from moestro.training.runs import check_folder
from moestro.training.train import Options, train


def train_recipe(
    recipe: Recipe, folder: Path, *, seed: int, data_flags: DataFlags, run_flags: RunFlags, export_stock: bool
) -> None:
    """Train one recipe in `folder`, or read it if it is finished, and print its held-out loss.

    Raises Misuse before training if `export_stock` is asked for and no stock model has the recipe's shape.
    """
    quiet()
    run_flags.check([recipe])
    if export_stock:
        siblings.stock_sibling(recipe.model.config(recipe.training.sequence_length))
    console = Visible(stderr=True)
    join()
    on_first_rank(lambda: check_folder(folder))
    data = first_rank_first(lambda: prepared(data_flags, recipe))
    (fitted,) = fit(data_flags, [recipe], data)
    run = train(fitted, data, folder, seed=seed, console=console, options=Options(report_to=run_flags.report_to))
    if rank() > 0:
        return
    if export_stock:
        export(folder)
    say(f"held-out loss {run.held_out.loss:.4f} nats/token, {run.held_out.bits_per_byte:.4f} bits/byte: {folder}")
    if words := did_not_learn(run):
        say(f"warning: {words}")


def export(folder: Path) -> None:
    """Save the finished model of a run as its stock sibling in `folder`/stock. Raise Misuse if it has none."""
    finished = str(folder / "model")
    model = load_model(MoestroForCausalLM, finished, f"the finished model in {finished} cannot be read")
    with failures_as_os_errors(folder / "stock"):
        siblings.export_stock(model, folder / "stock")
