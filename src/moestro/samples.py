"""What is looked at in some of a layer's tokens, as all would cost too much: outputs' cosines, neighbours' experts."""

from dataclasses import fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moestro.losses import gram
from moestro.losses.inner_products import correlation, off_diagonal
from moestro.routing import Batch, LayerRecord, chosen

NEIGHBOURS = 10
"""K of the overlap; where there are fewer other points, all of them."""


def sample_places(record: LayerRecord, number: int) -> Int[Tensor, " some"]:
    """Indices of at most `number` of the record's valid tokens, drawn by how many valid ones there are."""
    valid = torch.ones_like(record.batch.sequence) if record.batch.valid is None else record.batch.valid
    token = valid.nonzero()[:, 0]
    order = torch.randperm(len(token), generator=torch.Generator().manual_seed(0))[:number]
    return token[order.sort().values.to(token.device)]


def subset(record: LayerRecord, token: Int[Tensor, " some"]) -> LayerRecord:
    """The record of some of its tokens, all of which must be valid."""
    routing, batch = record.routing, record.batch
    of_some = replace(
        routing,
        **{f.name: value[token] for f in fields(routing) if (value := getattr(routing, f.name)) is not None},
    )
    return replace(
        record,
        batch=Batch(sequence=batch.sequence[token], num_sequences=batch.num_sequences),
        hidden=record.hidden[token],
        proposed=of_some,
        routing=of_some,
        outputs=None if record.outputs is None else record.outputs[token],
        competition=None,
    )


def cosine_sums(sample: LayerRecord | None, one: Float[Tensor, ""]) -> dict[str, Tensor]:
    """Sums of the cosine of two experts' outputs, over the ordered pairs of each token's edges; 0 for a zero vector."""
    if sample is None or sample.outputs is None:
        return {"pairs": one * 0, "cosine": one * 0, "cosine_square": one * 0}
    used = chosen(sample.routing, sample.batch) > 0
    cosine = off_diagonal(correlation(gram(sample.outputs, used)))
    edges = used.sum(-1, dtype=torch.float64)
    return {
        "pairs": (edges * (edges - 1)).sum(),
        "cosine": cosine.sum(dtype=torch.float64),
        "cosine_square": cosine.square().sum(dtype=torch.float64),
    }


def overlap_sums(sample: LayerRecord | None, one: Float[Tensor, ""]) -> dict[str, Tensor]:
    """Sums over tokens of the share of nearest neighbours with another first expert, now and with labels shuffled."""
    nothing = {"points": one * 0, "overlap": one * 0, "overlap_shuffled": one * 0}
    if sample is None:
        return nothing
    used = chosen(sample.routing, sample.batch) > 0
    keep = used.any(-1)
    point = sample.hidden[keep].float()
    if len(point) < 2:
        return nothing
    label = sample.routing.expert.gather(1, first_slot(sample, used))[keep, 0]
    count = torch.bincount(label, minlength=sample.layer.num_experts).double()
    same = (count * (count - 1)).sum() / (len(point) - 1)  # expected neighbours with the same label, over all points
    return {
        "points": one * len(point),
        "overlap": foreign_neighbours(point, label).sum(dtype=torch.float64),
        "overlap_shuffled": len(point) - same,
    }


def first_slot(record: LayerRecord, used: Bool[Tensor, "tokens k"]) -> Int[Tensor, "tokens 1"]:
    """The edge of largest weight: not every router puts it first."""
    return record.routing.weight.float().masked_fill(~used, float("-inf")).argmax(-1, keepdim=True)


def foreign_neighbours(point: Float[Tensor, "points dim"], label: Int[Tensor, " points"]) -> Float[Tensor, " points"]:
    """Each point's share of its `NEIGHBOURS` nearest others (Euclidean) that carry another label."""
    with torch.autocast(point.device.type, enabled=False):
        # cdist takes differences of squared lengths: around the mean these are small, and little is cancelled.
        centred = point - point.mean(0)
        distance = torch.cdist(centred, centred)
    distance.fill_diagonal_(float("inf"))
    nearest = distance.topk(min(NEIGHBOURS, len(point) - 1), largest=False).indices
    return (label[nearest] != label[:, None]).double().mean(-1)
