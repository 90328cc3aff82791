"""What inspection found, in the terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from moestro.inspection.findings import Finding
from moestro.inspection.measuring import RoutingStudy
from moestro.report import routing_robustness as robustness
from moestro.report import routing_sentences as say
from moestro.report.printing import in_parts, line, table, text
from moestro.report.routing_summary import (
    Row,
    domain_rows,
    fact_rows,
    kind_words,
    layer_rows,
    measure_rows,
    prediction_rows,
)


def print_finding(finding: Finding, console: Console) -> None:
    """One checkpoint: what it is, which losses apply, what to write to train its routers."""
    line(console, finding.name, "bold")
    for row in fact_rows([finding]):
        if row.name == "experts":
            for index in range(len(finding.kinds)):
                entry(console, row.name if index == 0 else "", kind_words(finding, index))
        else:
            entry(console, row.name, row.cells[0])
    console.print()
    print_losses(finding, console)
    line(console, "LoRA on routers and experts (lora_dropout must be 0)", "dim")
    code(console, finding.lora)
    line(console, "Auxiliary losses in a trainer", "dim")
    for words in finding.attach:
        code(console, words)
    console.print()


def entry(console: Console, name: str, words: str) -> None:
    """One line of a list of facts."""
    console.print(text(console, f"  {name:<17}").append_text(text(console, words)), soft_wrap=True)


def code(console: Console, words: str) -> None:
    """A line to copy: never broken."""
    console.print(text(console, f"  {words}", "cyan"), soft_wrap=True)


def print_losses(finding: Finding, console: Console) -> None:
    """A line per auxiliary loss: where it applies, and why it does not elsewhere."""
    for loss in finding.losses:
        mark = text(console, f"  {loss.loss:<21}", "" if loss.applies_at else "dim")
        words = f"applies at {loss.applies_at}" if loss.applies_at else "does not apply: it"
        reasons = "; ".join(loss.obstacles)
        joined = f"{words} ({reasons})" if loss.applies_at and reasons else f"{words} {reasons}".rstrip()
        console.print(mark.append_text(text(console, joined, "" if loss.applies_at else "dim")), soft_wrap=True)
    console.print()


def print_study(study: RoutingStudy, console: Console) -> None:
    """How the checkpoints route the text."""
    line(console, say.text_read(study))
    for note in (say.left_out(study), say.tokens_differ(study)):
        if note:
            line(console, note)
    names = [checkpoint.finding.name for checkpoint in study.checkpoints]
    print_rows(console, "nats per token; bits", names, prediction_rows(study))
    print_rows(console, "bits per byte by domain", names, domain_rows(study))
    print_rows(console, "routing, over all layers", names, measure_rows(study))
    for index, checkpoint in enumerate(study.checkpoints):
        line(console, f"{names[index]}: {say.summary(checkpoint)}")
        for note in checkpoint.notes:
            line(console, f"  {note}", "dim")
        print_layers(study, index, console)
    if robustness.tested(study):
        print_robustness(study, names, console)


def print_robustness(study: RoutingStudy, names: Sequence[str], console: Console) -> None:
    """What perturbed routing does to the loss."""
    print_rows(console, "rise of the loss (perplexity)", names, robustness.robustness_rows(study))
    for name, checkpoint in zip(names, study.checkpoints, strict=True):
        line(console, f"{name}: {' '.join(robustness.findings(checkpoint))}")
    line(console, robustness.METHOD, "dim")


def print_rows(console: Console, corner: str, names: Sequence[str], rows: Sequence[Row]) -> None:
    """A table with a column per checkpoint, and their difference."""
    difference = ["difference"] if len(names) == 2 else []
    made = table(console, corner, [*names, *difference])
    for row in rows:
        cells = [*shown(row), *([row.difference] if difference else [])]
        made.add_row(text(console, titled(row)), *(text(console, cell) for cell in cells))
    console.print(made)


def print_layers(study: RoutingStudy, index: int, console: Console) -> None:
    """Every measure of every layer of one checkpoint, in as many tables as it takes."""
    own = {layer.label for layer in study.checkpoints[index].layers}
    layers = [(label, rows) for label, rows in layer_rows(study) if label in own]

    def some(part: Sequence[int]) -> Table:
        made = table(console, "layer", [layers[i][0] for i in part])
        for number, row in enumerate(layers[0][1]):
            made.add_row(text(console, titled(row)), *(text(console, shown(layers[i][1][number])[index]) for i in part))
        return made

    in_parts(console, some, len(layers))


def titled(row: Row) -> str:
    """A row's name and detail."""
    name = f"{row.name}, {row.detail}" if row.detail else row.name
    return f"{name} (chance)" if row.chance else name


def shown(row: Row) -> tuple[str, ...]:
    """A row's cells, with what chance would give behind them."""
    if not row.chance:
        return row.cells
    return tuple(f"{cell} ({chance})" for cell, chance in zip(row.cells, row.chance, strict=True))
