"""Orthogonality of the outputs of experts that were chosen for the same token."""

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moestro.errors import Misuse
from moestro.losses.inner_products import correlation, gram, off_diagonal
from moestro.losses.per_sequence import PerSequence, full_precision, sum_per_sequence
from moestro.losses.scores import renormalised, slot_scores
from moestro.routing import LayerRecord, chosen

OrthogonalityForm = Literal["cosine", "weighted", "projection", "span"]

RIDGE = 1e-5
"""Added to each squared length in the span form, relative to that length: fp32 resolves cosines to about 1e-7."""


def orthogonality(record: LayerRecord, form: OrthogonalityForm, eps: float = 1e-6) -> PerSequence:
    """How much the outputs y_j, before weighting, of a token's experts point the same way; a group is one token.

    With G_jk = <y_j, y_k> each token contributes a sum over ordered pairs j != k of its edges, or over its edges j:

    * cosine: cos^2(y_j, y_k), blind to length; 0 for a zero vector.
    * weighted: s_j s_k cos^2(y_j, y_k) with the slots' scores, or |weight| over its sum where the router learns none.
      Scores are detached: the router does not see this loss.
    * projection: ||G_jk / (G_kk + eps) y_k||^2 = (G_jk / (G_kk + eps))^2 G_kk, the paper's. It tends to
      ||y_j||^2 cos^2(y_j, y_k) for small eps, so experts can lower it by shrinking.
    * span: squared length of y_j's projection on the span of the token's other outputs, g' (G' + RIDGE diag G')^-1 g
      with G' the others' Gram matrix and g their products with y_j. Without the ridge that is G_jj - 1 / (G^-1)_jj.

    0 where a token has one expert. `eps` is used by projection alone. cosine and weighted do not depend on the
    units of the hidden state. projection and span are in its squared units: for outputs of length 100, which real
    models have, the loss is 10^4 times that of length 1, and a few tokens of length 10^4 dominate it. Scale these two
    to the size of another loss first (`AuxLosses(scaling="relative")`), as the paper does.

    Paper: Guo et al. 2025, arXiv:2505.22323, Eq. 6.
    Departs from the paper: averaged over tokens, where its sum grows with their number. cosine and weighted are ours;
    span is what the public code computes (by Gram-Schmidt), with a ridge so that dependent vectors have gradients.
    """
    if form not in get_args(OrthogonalityForm):
        raise Misuse(f"form must be one of {', '.join(get_args(OrthogonalityForm))}, got {form!r}")
    if not eps > 0:
        raise Misuse(f"eps must be above 0, got {eps}")
    assert record.outputs is not None, "the record was made without outputs"
    products = gram(record.outputs, _used_slots(record))
    if form == "projection":
        per_token = projections(products, eps).sum((-2, -1))
    elif form == "cosine":
        per_token = off_diagonal(correlation(products).square()).sum((-2, -1))
    elif form == "weighted":
        share = slot_shares(record)
        pair = share[:, :, None] * share[:, None, :]
        per_token = (pair * off_diagonal(correlation(products).square())).sum((-2, -1))
    else:
        per_token = projections_on_span(products).sum(-1)
    return sum_per_sequence(record, per_token)


def projections(gram: Float[Tensor, "tokens k k"], eps: float) -> Float[Tensor, "tokens k k"]:
    """Squared length of each y_j's projection on each other y_k, (G_jk / (G_kk + eps))^2 G_kk; 0 for j = k."""
    squared = gram.diagonal(dim1=-2, dim2=-1)[:, None, :]
    return off_diagonal((gram / (squared + eps)).square() * squared)


def projections_on_span(gram: Float[Tensor, "tokens k k"]) -> Float[Tensor, "tokens k"]:
    """Squared length of each y_j's projection on the span of the token's other outputs, with `RIDGE`.

    In terms of cosines C and A = C + RIDGE I it is G_jj (A_jj - 1 / (A^-1)_jj). The row j of A A^-1 = I turns the
    difference into a sum without cancellation, 0 exactly where there are no others.
    """
    cosine = correlation(gram)
    ridge = RIDGE * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    inverse = torch.linalg.inv_ex(cosine + ridge).inverse  # inv would wait for the GPU to learn whether it succeeded
    share = -(off_diagonal(cosine) * inverse).sum(-1) / inverse.diagonal(dim1=-2, dim2=-1)
    return gram.diagonal(dim1=-2, dim2=-1) * share


def slot_shares(record: LayerRecord) -> Float[Tensor, "tokens k"]:
    """Return each edge's share, detached: its score, else |weight|, normalised to sum to 1; 0 in unused slots."""
    if record.routing.scores is not None:
        return slot_scores(record, "orthogonality").detach()
    unused = chosen(record.routing, record.batch) == 0
    return renormalised(full_precision(record.routing.weight.detach()).abs().masked_fill(unused, 0.0))


def _used_slots(record: LayerRecord) -> Bool[Tensor, "tokens k"] | None:
    """Edges of valid tokens; None where that is all of them, which spares a pass over the outputs."""
    everything = record.routing.edge is None and record.batch.valid is None
    return None if everything else chosen(record.routing, record.batch) > 0
