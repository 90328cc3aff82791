"""The comparison in the terminal: the report's answer and tables, on wide screens and narrow ones.

Text goes to rich as `Text`, never as markup, with its control characters made visible; where the terminal cannot show a
character (an ASCII locale, a pipe), it gets the nearest that it can.
"""

from collections.abc import Callable, Iterator, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moestro.comparison import Comparison, RecipeResult
from moestro.report import sentences
from moestro.report.numbers import fixed
from moestro.report.summary import DomainRow, Row, domain_rows, rows
from moestro.report.text import visible

_ASCII = str.maketrans({"−": "-", "±": "+-", "–": "-", "×": "x", "…": "...", "⟨": "<", "⟩": ">"})
_STYLES = {"better": "green", "worse": "red", "not answered": "dim", "too few seeds to rank": "dim"}


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print the answer, the table, the losses by domain, and what is only noise."""
    _line(console, sentences.headline(comparison), "bold")
    _line(console, f"{sentences.budget(comparison)} {sentences.held_out(comparison)}")
    if not comparison.budget.equal:
        _line(console, "The budgets are not equal: " + "; ".join(comparison.budget.differences), "bold red")
    console.print()
    results, domains = rows(comparison), domain_rows(comparison)
    names = [row.name for row in results]
    _print_in_parts(console, lambda part: _results_table(console, [results[i] for i in part]), len(names))
    _line(console, f"gzip -9 on the same text: {fixed(comparison.gzip_bits_per_byte)} bits per byte", "dim")
    console.print()
    if domains:
        _line(console, "Held-out loss by domain, nats per token", "bold")
        _print_in_parts(console, lambda part: _domain_table(console, names, domains, part), len(names))
    for result in comparison.recipes[1:]:
        _print_verdict(console, comparison, result)


def _results_table(console: Console, results: Sequence[Row]) -> Table:
    table = _table(console, "", [row.name for row in results])
    for cells in zip(*(_labelled(row) for row in results), strict=True):
        values = (_text(console, value, _STYLES.get(value, "")) for _, value in cells)
        table.add_row(_text(console, cells[0][0]), *values)
    return table


def _labelled(row: Row) -> Iterator[tuple[str, str]]:
    yield "parameters", row.total_parameters
    yield "active", row.active_parameters
    yield "FLOPs per token", row.flops_per_token
    yield "held-out loss", f"{row.loss} {row.spread}".rstrip()
    yield "perplexity", row.perplexity
    yield "bits per byte", row.bits_per_byte
    yield "difference", row.difference
    yield "95 % interval", row.interval
    yield "verdict", row.verdict
    yield "tokens/s", row.tokens_per_second
    yield "peak memory", row.peak_memory
    yield "MaxVio, batch", row.max_vio_batch
    yield "MaxVio, all text", row.max_vio_data
    yield "dead experts", row.dead_experts


def _domain_table(console: Console, names: Sequence[str], domains: Sequence[DomainRow], part: Sequence[int]) -> Table:
    table = _table(console, "domain", [names[index] for index in part])
    for domain in domains:
        cells = [domain.cells[index] for index in part]
        values = (_text(console, f"{cell.loss} {cell.loss_difference:>7}") for cell in cells)
        table.add_row(_text(console, domain.name), *values)
    return table


def _print_verdict(console: Console, comparison: Comparison, result: RecipeResult) -> None:
    found = result.difference
    if found is None:
        return
    why = sentences.reason(comparison, found)
    verdict = f"{found.verdict} ({why})" if why else found.verdict
    _line(console, f"{result.name}: {sentences.difference(comparison, result)}: {verdict}", _STYLES[found.verdict])
    _line(console, f"  {sentences.noise(comparison, result)}", "dim")


def _print_in_parts(console: Console, table: Callable[[Sequence[int]], Table], recipes: int) -> None:
    """Print a table with a column per recipe, as several tables where they do not fit side by side."""
    unbounded = console.options.update_width(100_000)
    parts: list[list[int]] = []
    for index in range(recipes):
        if parts and console.measure(table([*parts[-1], index]), options=unbounded).maximum <= console.width:
            parts[-1].append(index)
        else:
            parts.append([index])
    for part in parts:
        console.print(table(part))


def _table(console: Console, corner: str, titles: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column(_text(console, corner), overflow="fold")
    for title in titles:
        table.add_column(_text(console, title), justify="right", overflow="fold")
    return table


def _line(console: Console, text: str, style: str = "") -> None:
    console.print(_text(console, text, style))


def _text(console: Console, text: str, style: str = "") -> Text:
    text = visible(text)
    try:
        text.encode(console.encoding)
    except UnicodeEncodeError:
        text = text.translate(_ASCII).encode(console.encoding, "backslashreplace").decode(console.encoding)
    return Text(text, style=style)
