"""What competition teaches: the router to prefer the winners, the winners to differ; over competing tokens alone."""

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from moestro.errors import Misuse
from moestro.losses.inner_products import correlation, gram, off_diagonal
from moestro.losses.per_sequence import PerSequence, full_precision
from moestro.routing import Competition, LayerRecord

DistillationForm = Literal["kl", "mse", "relative-mse"]
DiversityForm = Literal["pairs", "squares"]
"""Mean over the k (k - 1) pairs of winners, as the paper has it, or their sum over k squared, as the public code."""


def distillation(record: LayerRecord, form: DistillationForm = "kl", winners: float = 0.0) -> PerSequence:
    """How far the router's scores p are from the competition's target q, which is taken as given.

    * kl: sum_e q_e (log q_e - log p_e). Its gradient by the logits, p - q, is of one size for any number of experts.
    * mse: mean_e (p_e - q_e)^2 + `winners` * mean_i (p_i - q_i)^2, i over the k winners. p and q are of the size 1/E,
      so it falls with the square of the number of experts E, and its gradient with the cube.
    * relative-mse: the same of E p and E q, which are 1 where nothing is preferred.

    0 where the target is not known yet. p are the router's own scores, on the simplex.

    Paper: Nguyen et al. 2025, arXiv:2505.13380 (CompeteSMoE), L_D: mse; its public code has winners = 0.
    Departs from the paper: kl and relative-mse are ours.
    """
    if form not in get_args(DistillationForm):
        raise Misuse(f"form must be one of {', '.join(get_args(DistillationForm))}, got {form!r}")
    competition = _competition(record)
    if competition.target is None:  # with a graph all the same, for a loop in which this is the only loss
        return over_sequences(record, competition, 0.0 * proposed_scores(record)[competition.token].sum(-1))
    target = full_precision(competition.target).detach()
    if form == "kl":
        return over_sequences(record, competition, divergence(record, competition, target))
    scores = proposed_scores(record)[competition.token]
    size = record.layer.num_experts if form == "relative-mse" else 1
    squared = (size * (scores - target)).square()
    assert competition.winner is not None
    of_winners = squared.gather(-1, competition.winner).mean(-1) if winners else 0.0
    return over_sequences(record, competition, squared.mean(-1) + winners * of_winners)


def divergence(
    record: LayerRecord, competition: Competition, target: Float[Tensor, "competing experts"]
) -> Float[Tensor, " competing"]:
    """Kullback-Leibler divergence of the router's scores from the target."""
    logits = record.proposed.logits
    if record.layer.scores == "softmax" and logits is not None:  # no score is too small for it
        log_scores = full_precision(logits)[competition.token].log_softmax(-1)
    else:
        log_scores = proposed_scores(record)[competition.token].clamp_min(1e-30).log()
    return -torch.special.entr(target).sum(-1) - (target * log_scores).sum(-1)


def diversity(record: LayerRecord, form: DiversityForm = "pairs") -> PerSequence:
    """Mean cosine of two winners' outputs y_i, y_j of one token: 1/(k (k - 1)) sum_{i != j} cos(y_i, y_j).

    Signed, so that opposite outputs are best; 0 where there is one winner, and where the winners did not run.

    Paper: Nguyen et al. 2025, arXiv:2505.13380 (CompeteSMoE); the form squares is its public code's.
    """
    if form not in get_args(DiversityForm):
        raise Misuse(f"form must be one of {', '.join(get_args(DiversityForm))}, got {form!r}")
    competition = _competition(record)
    k = record.routing.expert.shape[1]
    if competition.winner is None or k == 1:
        return over_sequences(
            record, competition, 0.0 * full_precision(record.proposed.weight)[competition.token].sum(-1)
        )
    assert record.outputs is not None, "the record was made without outputs"
    outputs = record.outputs[competition.token]
    cosine = off_diagonal(correlation(gram(outputs, None))).sum((-2, -1))
    return over_sequences(record, competition, cosine / (k * (k - 1) if form == "pairs" else k * k))


def proposed_scores(record: LayerRecord) -> Float[Tensor, "tokens experts"]:
    """The router's scores before anything rerouted it, or Misuse where it learns nothing."""
    if record.proposed.scores is None:
        raise Misuse(f"distillation needs a router that learns its scores, but {record.layer.name} has none")
    return full_precision(record.proposed.scores)


def over_sequences(record: LayerRecord, competition: Competition, value: Float[Tensor, " competing"]) -> PerSequence:
    """Add up a value per competing token over each sequence's."""
    filled = competition.filled
    sequence = record.batch.sequence[competition.token]
    zeros = torch.zeros(record.batch.num_sequences, dtype=value.dtype, device=value.device)
    return PerSequence(
        sum=zeros.index_add(0, sequence, value.masked_fill(~filled, 0.0)),
        count=zeros.index_add(0, sequence, filled.to(value.dtype)),
    )


def _competition(record: LayerRecord) -> Competition:
    assert record.competition is not None, "the record was made without competition"
    return record.competition
