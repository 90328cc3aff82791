"""The tables of a routing study, cell by cell as text: the report and the terminal print the same figures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from moestro.comparison import DomainLoss, HeldOut, LayerStatistics
from moestro.inspection.findings import Finding
from moestro.inspection.measuring import Measured, RoutingStudy
from moestro.report.measures import Measure, measures, over_layers
from moestro.report.numbers import ABSENT, fixed, metric, signed


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A name, a cell per checkpoint, and the second minus the first where that means something."""

    name: str
    cells: tuple[str, ...]
    chance: tuple[str, ...] = ()
    """What chance alone would give; empty where that is not known."""
    detail: str = ""
    difference: str = ""


def fact_rows(findings: Sequence[Finding]) -> tuple[Row, ...]:
    """What the checkpoints are."""
    named: list[tuple[str, Callable[[Finding], str]]] = [
        ("class", lambda f: f.model_class),
        ("package", lambda f: f.package),
        ("parameters", lambda f: metric(f.parameters)),
        ("active", lambda f: metric(f.active_parameters)),
        ("MoE layers", lambda f: f"{f.num_moe_layers} in {f.num_blocks} blocks"),
        ("experts", lambda f: kinds(f)),
        ("own balance loss", lambda f: f.own_balance),
        ("router", lambda f: f.router),
    ]
    if any(finding.base for finding in findings):
        named.insert(0, ("adapter of", lambda f: f.base or ABSENT))
    return tuple(Row(name=name, cells=tuple(say(finding) for finding in findings)) for name, say in named)


def kinds(finding: Finding) -> str:
    """All kinds of MoE layers of a model in words."""
    return "; ".join(kind_words(finding, index) for index in range(len(finding.kinds)))


def kind_words(finding: Finding, index: int) -> str:
    """One kind of MoE layers: "layers 1 to 26: 64 experts, 6 per token, softmax"."""
    kind = finding.kinds[index]
    words = [f"{kind.num_experts} experts, {kind.top_k} per token", kind.scores or "choice by a table, not learned"]
    words += ["selection bias"] if kind.selection_bias else []
    words += [f"shared: {', '.join(kind.shared_experts)}"] if kind.shared_experts else []
    return f"{kind.where}: {', '.join(words)}"


def prediction_rows(study: RoutingStudy) -> tuple[Row, ...]:
    """Loss, perplexity and bits per byte on all of the text."""
    found = [checkpoint.prediction for checkpoint in study.checkpoints]
    named: list[tuple[str, Callable[[HeldOut], float | None], int, bool]] = [
        ("loss", lambda p: p.loss, 3, study.same_tokens),
        ("perplexity", lambda p: p.perplexity, 2, study.same_tokens),
        ("bits per byte", lambda p: p.bits_per_byte, 3, True),
    ]
    return tuple(
        row(name, [value(p) for p in found], decimals, comparable=comparable)
        for name, value, decimals, comparable in named
    )


def domain_rows(study: RoutingStudy) -> tuple[Row, ...]:
    """Bits per byte in every domain: comparable whatever the tokenizers."""

    def bits(checkpoint: Measured, domain: str) -> float | None:
        found: DomainLoss | None = checkpoint.prediction.domains.get(domain)
        return None if found is None else found.bits_per_byte

    return tuple(
        row(
            domain, [bits(checkpoint, domain) for checkpoint in study.checkpoints], 3, detail=amount_read(study, domain)
        )
        for domain in study.domains
    )


def amount_read(study: RoutingStudy, domain: str) -> str:
    """Say how much of a domain was read, as in "12 documents, 34.1k bytes, 1.20M left out"."""
    size = study.domains[domain]
    words = f"{size.documents:,} document{'' if size.documents == 1 else 's'}, {metric(size.bytes)} bytes"
    return words + (f", {metric(size.left_out_bytes)} left out" if size.left_out_bytes else "")


def study_measures(study: RoutingStudy) -> list[Measure]:
    """Every measure that any layer of the study has a number of."""
    return measures([layer.figures for found in study.checkpoints for layer in found.layers])


def measure_rows(study: RoutingStudy) -> tuple[Row, ...]:
    """Every measure over all layers of each checkpoint."""
    layers = [found.layers for found in study.checkpoints]
    return tuple(measure_row(measure, layers) for measure in study_measures(study))


def measure_row(measure: Measure, layers: Sequence[Sequence[LayerStatistics]]) -> Row:
    """One measure over the given layers of each checkpoint."""
    figures = [[layer.figures for layer in own] for own in layers]
    made = row(
        measure.title,
        [over_layers(own, measure.field, summed=measure.summed) for own in figures],
        measure.decimals,
        detail=measure.unit,
    )
    if measure.chance is None:
        return made
    chance = [over_layers(own, measure.chance, summed=measure.summed) for own in figures]
    return replace(made, chance=tuple(fixed(value, measure.decimals) for value in chance))


def layer_rows(study: RoutingStudy) -> tuple[tuple[str, tuple[Row, ...]], ...]:
    """Per layer (by label): its number of experts and its measures. Layers of one label stand side by side."""
    return tuple((label, tuple(layer_cells(study, label))) for label in all_labels(study))


def layer_cells(study: RoutingStudy, label: str) -> list[Row]:
    """The rows of one layer."""
    found = [by_label(checkpoint).get(label) for checkpoint in study.checkpoints]
    experts = [None if layer is None else float(len(layer.load)) for layer in found]
    layers = [() if layer is None else (layer,) for layer in found]
    return [row("experts", experts, 0), *(measure_row(measure, layers) for measure in study_measures(study))]


def all_labels(study: RoutingStudy) -> list[str]:
    """The labels of all MoE layers of all checkpoints, in the order of blocks."""
    found = {layer.label for checkpoint in study.checkpoints for layer in checkpoint.layers}
    return sorted(found, key=lambda label: [int(part) for part in label.split(".")])


def by_label(checkpoint: Measured) -> dict[str, LayerStatistics]:
    """The layers of a checkpoint by label."""
    return {layer.label: layer for layer in checkpoint.layers}


def row(name: str, values: Sequence[float | None], decimals: int, *, detail: str = "", comparable: bool = True) -> Row:
    """A row of numbers, with the difference of two."""
    cells = tuple(fixed(value, decimals) for value in values)
    if len(values) != 2:
        return Row(name=name, cells=cells, detail=detail)
    first, second = values
    known = comparable and first is not None and second is not None
    return Row(
        name=name,
        cells=cells,
        detail=detail,
        difference=signed(second - first, decimals) if known else ABSENT,  # type: ignore[operator]
    )
