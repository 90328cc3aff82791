"""Information that labels of tokens hold about the experts that they choose, in nats, from counts."""

import torch
from jaxtyping import Float
from torch import Tensor


def total_entropy(count: Float[Tensor, "rows columns"]) -> Float[Tensor, ""]:
    """Sum over rows of the row's count times its entropy in nats: it adds up over batches."""
    total = count.sum(-1)
    return torch.xlogy(total, total).sum() - torch.xlogy(count, count).sum()


def mutual_information(count: Float[Tensor, "rows columns"]) -> Float[Tensor, ""]:
    """Mutual information of rows and columns of a table of counts, in nats."""
    joint = count / count.sum().clamp_min(1)
    entropy = torch.special.entr
    return entropy(joint.sum(0)).sum() + entropy(joint.sum(1)).sum() - entropy(joint).sum()


EXACT_BELOW, TERMS = 50.0, 160
"""Cells with smaller expected counts are summed exactly, term by term: 160 is 15 standard deviations above 50."""


def expected_mutual_information(
    tokens: Float[Tensor, " labels"],
    times: Float[Tensor, " labels"],
    chosen_by: Float[Tensor, " experts"],
    *,
    among: Float[Tensor, ""] | None = None,
) -> Float[Tensor, ""]:
    """Mutual information of label and expert, in nats per choice, expected over all ways to deal labels to tokens.

    `times` labels have `tokens` tokens each; `chosen_by` tokens chose each expert (each of them once). There are
    `among` tokens in all; None: as many as labels were dealt, one to each token. A token's choices, and its labels
    where it has several, stay together, so the tokens of one label that chose an expert are n ~ hypergeometric, m its
    mean, and the expectation is sum over labels and experts of E[n log(n / m)] / pairs of a label and a choice. With
    one label and one choice per token it is the "expected mutual information" of the adjusted mutual information
    score. From `EXACT_BELOW` on E[n log(n / m)] is variance / 2m, within 0.4 %.
    """
    labels = (tokens * times).sum()
    everything = labels if among is None else among
    choices = chosen_by.sum() * labels / everything.clamp_min(1)
    if everything < 2 or choices == 0:
        return torch.zeros_like(choices)
    draws, hits = torch.broadcast_tensors(tokens[:, None], chosen_by.clamp_max(everything)[None])
    mean = (draws * hits / everything).clamp_min(1e-300)
    value = (1 - hits / everything) * (everything - draws) / (everything - 1) / 2
    small = mean < EXACT_BELOW
    value = value.masked_scatter(small, _exactly(draws[small], hits[small], everything, mean[small]))
    return (times[:, None] * value).sum() / choices


def _exactly(
    draws: Float[Tensor, " cells"],
    hits: Float[Tensor, " cells"],
    everything: Float[Tensor, ""],
    mean: Float[Tensor, " cells"],
) -> Float[Tensor, " cells"]:
    """E[n log(n / mean)] where n of `draws` tokens are among the `hits` of `everything`."""
    draws, hits, mean = draws[:, None], hits[:, None], mean[:, None]
    n = torch.arange(TERMS + 1, dtype=mean.dtype, device=mean.device)
    possible = (n <= hits) & (n <= draws) & (draws - n <= everything - hits)
    log_p = _log_choose(hits, n) + _log_choose(everything - hits, draws - n) - _log_choose(everything, draws)
    p = log_p.masked_fill(~possible, float("-inf")).exp()
    return (p * torch.xlogy(n, n / mean)).sum(-1)


def _log_choose(n: Float[Tensor, "..."], k: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Log of n over k; anything where that is impossible."""
    return torch.lgamma(n + 1) - torch.lgamma(k.clamp_min(0) + 1) - torch.lgamma((n - k).clamp_min(0) + 1)
