"""Remove from held-out text the passages that also occur in training text.

Equal passages are found in any pair of documents: a document within another, a shared preamble, a licence, windows of
one long document. They are cut out of the held-out side, which is small; training text is not changed. So a document's
side still depends on its content alone, and boilerplate cannot join the whole corpus into one group.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Bool

from moestro.data.overlap import SPAN, Windows, inked, search
from moestro.data.sources import Document

MAX_OVERLAP = 0.01  # share of held-out text; a larger overlap makes losses look too good
_NEAR = 50  # characters that are not white space
_ALIKE = 0.5  # a near-duplicate has a larger share of its characters in `_NEAR` windows of training text
_MIN_REST = 50  # characters; a shorter remainder between two cuts is dropped


def unseen_parts(documents: Sequence[Document], train: Iterable[str]) -> list[list[Document]]:
    """Cut passages of `train` out of each document; return the remaining parts of each, in order.

    A span of 200 characters or more that occurs in training text is cut out, and so is a remainder of fewer than 50
    characters beside it. Then near-duplicates are dropped: parts with more than half of their characters in shorter
    passages of training text (50 characters without white space). Parts of white space alone are dropped too.
    """
    texts = [document.text for document in documents]
    exact, near = Windows(texts, SPAN), Windows(texts, _NEAR, spaces=False)
    search(train, exact, near)
    return [list(_parts(*each)) for each in zip(documents, exact.covered(), near.covered(), strict=True)]


def leaked_characters(documents: Sequence[Document], train: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Return, per domain, the characters in spans of 200 or more that occur in `train`, and all characters."""
    windows = Windows([document.text for document in documents], SPAN)
    search(train, windows)
    counts: dict[str, tuple[int, int]] = {}
    for document, covered in zip(documents, windows.covered(), strict=True):
        leaked, total = counts.get(document.domain, (0, 0))
        counts[document.domain] = leaked + int(covered.sum()), total + len(covered)
    return counts


def overlap_notes(description: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each domain, and one for all text, if more than 1 % of held-out text overlaps."""
    shares = {"": description["overlap"]} | {
        f"domain {name}: ": domain["overlap"] for name, domain in description["domains"].items()
    }
    return [
        f"{where}{share:.1%} of the held-out text also occurs in training text, in spans of {SPAN} characters or more"
        for where, share in shares.items()
        if share > MAX_OVERLAP
    ]


def _parts(
    document: Document, exact: Bool[np.ndarray, " characters"], near: Bool[np.ndarray, " _inked"]
) -> Iterator[Document]:
    inked_before = np.concatenate([[0], np.cumsum(inked(document.text))])
    edges = np.flatnonzero(np.diff(np.concatenate([[True], exact, [True]]).astype(np.int8)))
    for start, end in edges.reshape(-1, 2):
        whole = end - start == len(exact)
        alike = near[inked_before[start] : inked_before[end]]
        if (whole or end - start >= _MIN_REST) and len(alike) and alike.mean() <= _ALIKE:
            place = f"{document.source}[{start}:{end}]"
            yield document if whole else replace(document, text=document.text[start:end], source=place)
