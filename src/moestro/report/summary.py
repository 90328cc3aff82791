"""The main table and the domain table, cell by cell as text: the report and the terminal print the same figures."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from moestro.comparison import Comparison, RecipeResult, Run
from moestro.report import sentences
from moestro.report.numbers import ABSENT, fixed, mean, memory, metric, signed


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One recipe: means over seeds, the loss with its standard deviation over seeds."""

    name: str
    description: str
    total_parameters: str
    active_parameters: str
    flops_per_token: str
    learning_rate: str
    """That a sweep chose; empty without one."""
    loss: str
    spread: str
    failed: tuple[str, ...]
    """One phrase for each failed run; means exclude them."""
    perplexity: str
    bits_per_byte: str
    difference: str
    interval: str
    verdict: str
    tokens_per_second: str
    peak_memory: str
    max_vio_batch: str
    max_vio_data: str
    dead_experts: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainCell:
    """One recipe's loss in one domain, mean over seeds, in both units, and its differences to the first recipe."""

    loss: str
    loss_difference: str
    bits_per_byte: str
    bits_difference: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainRow:
    """One domain: its size and a cell per recipe."""

    name: str
    tokens: str
    gzip: str
    cells: tuple[DomainCell, ...]


def rows(comparison: Comparison) -> tuple[Row, ...]:
    """One row per recipe, in the comparison's order."""
    return tuple(_row(comparison, result) for result in comparison.recipes)


def domain_rows(comparison: Comparison) -> tuple[DomainRow, ...]:
    """One row per domain that any run has, in the order of first appearance."""
    names = dict.fromkeys(name for r in comparison.recipes for run in r.runs for name in run.held_out.domains)
    return tuple(_domain_row(comparison, name) for name in names)


def _row(comparison: Comparison, result: RecipeResult) -> Row:
    runs = result.runs
    found, decimals = result.difference, sentences.decimals_of(comparison)
    losses = [run.held_out.loss for run in runs]
    interval = found.interval if found else None
    return Row(
        name=result.name,
        description=result.description,
        total_parameters=metric(result.total_parameters),
        active_parameters=metric(result.active_parameters),
        flops_per_token=metric(result.flops_per_token),
        learning_rate=_learning_rate(comparison, result),
        loss=fixed(mean(losses)),
        spread=f"± {fixed(statistics.stdev(losses))}" if len(losses) > 1 else "",
        perplexity=fixed(mean([run.held_out.perplexity for run in runs]), 2),
        bits_per_byte=fixed(mean([run.held_out.bits_per_byte for run in runs])),
        difference=signed(found.mean, decimals) if found else ABSENT,
        interval=f"[{signed(interval[0], decimals)}, {signed(interval[1], decimals)}]" if interval else "",
        failed=tuple(sentences.failed(result)),
        verdict=sentences.verdict(comparison, result) or "",
        tokens_per_second=fixed(mean([run.tokens_per_second for run in runs]), 0),
        peak_memory=memory(max((m for run in runs if (m := run.peak_memory_bytes) is not None), default=None)),
        max_vio_batch=_over_layers(runs, "max_vio_batch"),
        max_vio_data=_over_layers(runs, "max_vio_data"),
        dead_experts=_dead_experts(runs),
    )


def _learning_rate(comparison: Comparison, result: RecipeResult) -> str:
    """Return the learning rate that the sweep chose; empty without a sweep."""
    if comparison.sweep is None:
        return ""
    rate = comparison.sweep.chosen.get(result.name)
    return ABSENT if rate is None else f"{rate:g}"


def _over_layers(runs: Sequence[Run], name: str) -> str:
    return fixed(mean([layer.figures[name] for run in runs for layer in run.layers]), 2)


def _dead_experts(runs: Sequence[Run]) -> str:
    """Return the dead experts of the run that has most, of the experts of all layers, as in "3 of 64"."""
    experts = sum(len(layer.load) for layer in runs[0].layers) if runs else 0
    if experts == 0:
        return ABSENT
    dead = max(sum(layer.figures["dead_experts"] or 0 for layer in run.layers) for run in runs)
    return f"{dead:.0f} of {experts}"


def _domain_row(comparison: Comparison, name: str) -> DomainRow:
    tokens = next(
        run.held_out.domains[name].tokens for r in comparison.recipes for run in r.runs if name in run.held_out.domains
    )
    means = [_domain_means(result, name) for result in comparison.recipes]
    return DomainRow(
        name=name,
        tokens=metric(tokens),
        gzip=fixed(comparison.gzip_domains.get(name)),
        cells=tuple(_domain_cell(own, means[0] if index else (None, None)) for index, own in enumerate(means)),
    )


def _domain_means(result: RecipeResult, name: str) -> tuple[float | None, float | None]:
    """Loss and bits per byte of a domain, mean over the seeds."""
    found = [run.held_out.domains[name] for run in result.runs if name in run.held_out.domains]
    return mean([domain.loss for domain in found]), mean([domain.bits_per_byte for domain in found])


def _domain_cell(own: tuple[float | None, float | None], first: tuple[float | None, float | None]) -> DomainCell:
    differences = ["" if a is None or b is None else signed(a - b) for a, b in zip(own, first, strict=True)]
    return DomainCell(
        loss=fixed(own[0]),
        loss_difference=differences[0],
        bits_per_byte=fixed(own[1]),
        bits_difference=differences[1],
    )
