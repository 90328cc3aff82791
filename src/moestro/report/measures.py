"""What the numbers of a layer's routing are called. A number that is not known here gets its own name, spaced."""

from dataclasses import dataclass

from moestro.inspection import RoutingStudy


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """One number per layer."""

    field: str
    """Its name in `moestro.metrics.RoutingFigures`."""
    title: str
    unit: str = ""
    decimals: int = 3
    summed: bool = False
    """Over layers; otherwise layers are averaged."""
    meaning: str = ""


KNOWN = (
    Measure(
        field="max_vio_batch",
        title="MaxVio",
        unit="batch",
        decimals=2,
        meaning="How far the busiest expert is above an even load, within a batch (mean over batches): 0 is even, 1 is "
        "twice its share. It depends on the size of the batch.",
    ),
    Measure(field="max_vio_data", title="MaxVio", unit="all text", decimals=2, meaning="The same over the whole text."),
    Measure(
        field="dead_experts",
        title="dead experts",
        decimals=0,
        summed=True,
        meaning="Experts that no token of the text chose. In sum over layers.",
    ),
    Measure(
        field="entropy",
        title="entropy",
        unit="nats",
        meaning="Mean entropy of a token's scores over experts: 0 when the router is certain, the logarithm of the "
        "number of experts when it does not care.",
    ),
    Measure(field="confidence", title="confidence", meaning="Mean score of a token's first choice, between 0 and 1."),
    Measure(
        field="mutual_information",
        title="token–expert information",
        unit="nats",
        meaning="How much the token says about the expert: entropy of the mean scores minus mean entropy.",
    ),
    Measure(
        field="domain_mutual_information",
        title="domain–expert information",
        unit="nats",
        meaning="How much the domain says about the expert, from the counts of choices; a little above 0 by chance "
        "alone where tokens are few.",
    ),
)


def measures(study: RoutingStudy) -> list[Measure]:
    """Every number that any layer of the study has, the known ones first."""
    present = dict.fromkeys(name for found in study.checkpoints for layer in found.layers for name in layer.figures)
    known = [measure for measure in KNOWN if measure.field in present]
    others = [Measure(field=name, title=name.replace("_", " ")) for name in present if name not in names_of(KNOWN)]
    return known + others


def names_of(listed: tuple[Measure, ...]) -> set[str]:
    """The fields that are listed."""
    return {measure.field for measure in listed}
