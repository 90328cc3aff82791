"""placeholder by the founder: the helper that owns this file replaces it."""

import torch.nn.functional as F


def chunked_cross_entropy(hidden, weight, labels, *, num_items, ignore_index=-100, chunk=512):
    return (
        F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum", ignore_index=ignore_index)
        / num_items
    )
