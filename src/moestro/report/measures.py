"""What the numbers of a layer's routing are called. A number that is not known here gets its own name, spaced."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from moestro.report.numbers import mean


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """One number per layer."""

    field: str
    """Its name among a layer's numbers."""
    title: str
    unit: str = ""
    decimals: int = 3
    summed: bool = False
    """Over layers; otherwise layers are averaged."""
    least: float = 0.0
    """Figures reach at least this far from 0, so that what is next to nothing looks so."""
    meaning: str = ""
    chance: str | None = None
    """The field that holds what chance alone would give."""


KNOWN = (
    Measure(
        field="max_vio_batch",
        least=0.5,
        title="MaxVio",
        unit="batch",
        decimals=2,
        meaning="How far the busiest expert is above an even load, within a batch (mean over batches): 0 is even, 1 is "
        "twice its share. It depends on the size of the batch.",
    ),
    Measure(
        field="max_vio_data",
        title="MaxVio",
        least=0.5,
        unit="all text",
        decimals=2,
        meaning="The same over the whole text.",
    ),
    Measure(
        field="dead_experts",
        title="dead experts",
        least=2.0,
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
        least=0.02,
        title="token–expert information",
        unit="nats",
        meaning="How much the token says about the expert: entropy of the mean scores minus mean entropy.",
    ),
    Measure(
        field="domain_mutual_information",
        least=0.02,
        title="domain–expert information",
        unit="nats",
        meaning="How much the domain says about the expert, from the counts of choices.",
    ),
    Measure(
        field="sequence_mutual_information",
        least=0.02,
        title="sequence–expert information",
        unit="nats",
        meaning="How much the sequence says about the expert, from the counts of choices.",
    ),
    Measure(
        field="score_square",
        title="decidedness",
        unit="E‖s‖²",
        meaning="Mean squared length of the scores s of a token's own experts, scaled to sum 1: 1 when one expert "
        "takes all, 1 / top_k when they share alike.",
    ),
    Measure(
        field="mean_score_square",
        title="imbalance",
        unit="‖E s‖²",
        meaning="Squared length of the mean of s: 1 / number of experts when balanced, 1 when one expert takes all.",
    ),
    Measure(
        field="column_variance",
        title="column variance",
        unit="E‖s‖² − ‖E s‖²",
        meaning="Variance of s over tokens, summed over experts: 0 when every token goes the same way.",
    ),
    Measure(
        field="cosine",
        least=0.1,
        title="cosine of outputs",
        meaning="Mean cosine between the outputs of two experts of one token, on a sample: 1 when experts do the same.",
    ),
    Measure(
        field="cosine_square",
        least=0.1,
        title="cosine² of outputs",
        meaning="Mean square of that cosine: about 1 / hidden size for random directions.",
    ),
    Measure(
        field="overlap",
        title="overlap",
        meaning="Mean share of a token's nearest tokens, by the layer's input, whose first expert is another one.",
    ),
    Measure(
        field="pair_information",
        least=0.02,
        title="pair information",
        unit="nats",
        meaning="Of a block's later MoE layers: how much the choice of the layer before says about this one's.",
    ),
    Measure(
        field="composed",
        least=0.1,
        title="composed term",
        meaning="Of a block's later MoE layers: how far what stands before it in the block moves its output, over the "
        "output's size without that.",
    ),
    Measure(
        field="rerouted",
        least=0.1,
        title="rerouted",
        meaning="Of a block's later MoE layers: share of its choices that what stands before it in the block changes.",
    ),
    Measure(
        field="agreement",
        title="agreement",
        unit="with competition",
        meaning="Share of the experts that would win a token in a competition of all that the router chose too, on a "
        "sample. Chance is here the best fixed choice for all tokens.",
    ),
    Measure(
        field="corrected_agreement",
        title="agreement above fixed",
        unit="share of the rest",
        meaning="How far agreement is above that of the best fixed choice, as a share of what is left above that: 0 "
        "for a router that sees nothing, 1 for one that knows all winners.",
    ),
    Measure(
        field="regret",
        least=0.02,
        title="regret",
        meaning="Share of the winners' responses, each over its expert's mean, that the router's choice loses.",
    ),
    Measure(
        field="competed",
        title="competing at test",
        unit="nats",
        meaning="Loss on a part of the held-out text if all experts competed for every token, less the router's: what "
        "a router that knew all winners would gain or lose.",
    ),
    Measure(
        field="target_entropy",
        title="entropy of the target",
        unit="of an even one",
        meaning="Of what competition would teach the router: 1 where it says nothing.",
    ),
    Measure(
        field="spread",
        title="spread of responses",
        meaning="Standard deviation over experts of a token's responses, each over its expert's mean: 0 where all "
        "answer alike and competition has nothing to say.",
    ),
    Measure(
        field="winners_max_vio",
        least=0.5,
        title="MaxVio of winners",
        decimals=2,
        meaning="How far the expert that would win most, were wins not balanced, is above an even share: large where "
        "competition collapses.",
    ),
    Measure(
        field="response",
        title="response",
        meaning="Mean over tokens and experts of how strongly an expert answers, by default the length of its output.",
    ),
)
CHANCE = "_shuffled"
"""What a field's name ends in that holds the value which chance alone would give to another."""


def over_layers(layers: Iterable[Mapping[str, float | None]], name: str | None, *, summed: bool) -> float | None:
    """The mean (or sum) over layers of one of their numbers; None where no layer has it."""
    values = [value for layer in layers if name and (value := layer.get(name)) is not None]
    return math.fsum(values) if summed and values else mean(values)


def measures(layers: Iterable[Mapping[str, float | None]]) -> list[Measure]:
    """Every measure that any of the layers has a number of, the known ones first."""
    present = dict.fromkeys(name for layer in layers for name, value in layer.items() if value is not None)
    own = [name for name in present if not (name.endswith(CHANCE) and name.removesuffix(CHANCE) in present)]
    known = {measure.field: measure for measure in KNOWN}
    listed = [name for name in known if name in own] + [name for name in own if name not in known]
    found = [known.get(name) or Measure(field=name, title=name.replace("_", " ")) for name in listed]
    return [replace(m, chance=m.field + CHANCE if m.field + CHANCE in present else None) for m in found]
