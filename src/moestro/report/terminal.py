"""The comparison in the terminal: the report's answer and tables, on wide screens and narrow ones."""

from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console
from rich.table import Table

from moestro.comparison import Comparison, RecipeResult
from moestro.report import sentences
from moestro.report.learning_rates import RateTable, rate_table
from moestro.report.numbers import ABSENT, fixed
from moestro.report.printing import in_parts, line, table, text
from moestro.report.summary import DomainRow, Row, domain_rows, rows

_STYLES: dict[str, str] = {
    "better": "green",
    "worse": "red",
    "equivalent": "cyan",
    "not answered": "dim",
    "too few seeds to rank": "dim",
    "failed": "bold red",
}


def print_comparison(comparison: Comparison, console: Console, *, verbose: bool = False) -> None:
    """Print the answer, one table and one line per recipe.

    `verbose` adds every figure of each recipe, the losses by learning rate and by domain, what new studies of this size
    would detect, and the rule of the verdicts.
    """
    line(console, sentences.headline(comparison), "bold")
    line(console, f"{sentences.budget(comparison)} {sentences.held_out(comparison)}")
    if not comparison.budget.equal:
        line(console, "The budgets are not equal: " + "; ".join(comparison.budget.differences), "bold red")
    for warning in sentences.warnings(comparison):
        line(console, warning, "bold yellow")
    console.print()
    results = rows(comparison)
    names = [row.name for row in results]
    if verbose:
        in_parts(console, lambda part: _results_table(console, [results[i] for i in part]), len(names))
    else:
        _print_answers(console, results)
    line(console, f"gzip -9 on the same text: {fixed(comparison.gzip_bits_per_byte)} bits per byte", "dim")
    console.print()
    if comparison.sweep is not None:
        _print_sweep(comparison, console, names, verbose=verbose)
    if verbose and (domains := domain_rows(comparison)):
        line(console, "Held-out loss by domain, nats per token", "bold")
        in_parts(console, lambda part: _domain_table(console, names, domains, part), len(names))
    for result in comparison.recipes:
        _print_verdict(console, comparison, result, verbose=verbose)
    if verbose and any(result.difference and result.difference.interval for result in comparison.recipes):
        line(console, f"{sentences.rule(comparison)} {sentences.beside_intervals(comparison)}", "dim")


def _print_sweep(comparison: Comparison, console: Console, names: Sequence[str], *, verbose: bool) -> None:
    if verbose and (rates := rate_table(comparison)):
        line(console, "Held-out loss by learning rate, * at its best", "bold")
        in_parts(console, lambda part: _rates_table(console, names, rates, part), len(names))
    line(console, sentences.sweep(comparison))
    if warning := sentences.edge(comparison):
        line(console, warning, "yellow")
    console.print()


def _print_answers(console: Console, results: Sequence[Row]) -> None:
    """Print one row per recipe, in as many columns as fit, the most important first; name those that do not fit."""
    columns = {
        "held-out loss": [f"{row.loss} {row.spread}".rstrip() for row in results],
        "verdict": [row.verdict for row in results],
        "bits/byte": [row.bits_per_byte for row in results],
        "failed": [str(len(row.failed)) if row.failed else "" for row in results],
        "learning rate": [row.learning_rate for row in results],
        "difference": [row.difference for row in results],
        "dead experts": [row.dead_experts for row in results],
        "tokens/s": [row.tokens_per_second for row in results],
        "MaxVio": [row.max_vio_data for row in results],
    }
    columns = {title: cells for title, cells in columns.items() if any(cell not in ("", ABSENT) for cell in cells)}
    shown: list[str] = []
    unbounded = console.options.update_width(100_000)
    for title in columns:
        made = _columns_table(console, results, {name: columns[name] for name in (*shown, title)})
        if console.measure(made, options=unbounded).maximum <= console.width or not shown:
            shown.append(title)
    console.print(_columns_table(console, results, {name: columns[name] for name in shown}))
    if left_out := [title for title in columns if title not in shown]:
        line(console, f"The terminal is too narrow for {', '.join(left_out)}: see --verbose, or the report.", "dim")


def _columns_table(console: Console, results: Sequence[Row], columns: Mapping[str, Sequence[str]]) -> Table:
    made = table(console, "recipe", list(columns))
    for index, row in enumerate(results):
        cells = [cells[index] for cells in columns.values()]
        made.add_row(text(console, row.name), *(text(console, cell, _STYLES.get(cell, "")) for cell in cells))
    return made


def _results_table(console: Console, results: Sequence[Row]) -> Table:
    made = table(console, "", [row.name for row in results])
    failed = any(row.failed for row in results)
    for cells in zip(*(_labelled(row, failed) for row in results), strict=True):
        values = (text(console, value, _STYLES.get(value, "")) for _, value in cells)
        made.add_row(text(console, cells[0][0]), *values)
    return made


def _labelled(row: Row, failed: bool) -> Iterator[tuple[str, str]]:
    yield "parameters", row.total_parameters
    yield "active", row.active_parameters
    yield "FLOPs per token", row.flops_per_token
    if row.learning_rate:
        yield "learning rate", row.learning_rate
    yield "held-out loss", f"{row.loss} {row.spread}".rstrip()
    yield "perplexity", row.perplexity
    yield "bits per byte", row.bits_per_byte
    yield "difference", row.difference
    yield "95 % interval", row.interval
    yield "verdict", row.verdict
    if failed:
        yield "failed runs", str(len(row.failed))
    yield "tokens/s", row.tokens_per_second
    yield "peak memory", row.peak_memory
    yield "MaxVio, batch", row.max_vio_batch
    yield "MaxVio, all text", row.max_vio_data
    yield "dead experts", row.dead_experts


def _rates_table(console: Console, names: Sequence[str], rates: RateTable, part: Sequence[int]) -> Table:
    made = table(console, "learning rate", [names[index] for index in part])
    for at, rate in enumerate(rates.rates):
        cells = [rates.rows[index][at] for index in part]
        values = (text(console, f"* {cell.loss}" if cell.best else cell.loss) for cell in cells)
        made.add_row(text(console, rate), *values)
    return made


def _domain_table(console: Console, names: Sequence[str], domains: Sequence[DomainRow], part: Sequence[int]) -> Table:
    made = table(console, "domain", [names[index] for index in part])
    for domain in domains:
        cells = [domain.cells[index] for index in part]
        values = (text(console, f"{cell.loss} {cell.loss_difference:>7}") for cell in cells)
        made.add_row(text(console, domain.name), *values)
    return made


def _print_verdict(console: Console, comparison: Comparison, result: RecipeResult, *, verbose: bool) -> None:
    if (verdict := sentences.verdict(comparison, result)) is None:
        return
    why = sentences.reason(comparison, result)
    said = f"{verdict} ({why})" if why else verdict
    line(console, f"{result.name}: {sentences.difference(comparison, result)}: {said}", _STYLES[verdict])
    if verbose and (noise := sentences.noise(comparison, result)):
        line(console, f"  {noise}", "dim")
