"""From what the user names to rows of tokens: read, split, tokenise, pack; cached by content."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer
from transformers import PreTrainedTokenizerBase

from moestro.data import standard_library
from moestro.data.building import LAYOUT, build, find, folder_of, gzip_bits_per_byte, identity
from moestro.data.cache import default_cache_dir
from moestro.data.corpus import HELD_OUT_FRACTION, MAX_HELD_OUT_BYTES, check_limits, load_corpus
from moestro.data.decontamination import overlap_notes
from moestro.data.inventory import inventory
from moestro.data.packing import PackedRows
from moestro.data.tokenizer import load_tokenizer, vocabulary_size
from moestro.errors import Misuse

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedData:
    """Everything that training and evaluation need to know of the data.

    Held-out bits per byte are `nll / ln 2 / held_out_bytes`, summed over the documents in question, where `nll`
    (nats) sums every prediction that `PackedRows` charges to a document: its tokens and the end-of-text token that
    closes it.
    """

    train: PackedRows
    held_out: PackedRows
    tokenizer: PreTrainedTokenizerBase
    domains: tuple[str, ...]  # the name of each `domain` id
    hash: str  # of texts, split, order and tokenizer; not of the sequence length
    description: dict[str, Any]  # what a report says of the data; JSON
    gzip_bits_per_byte: dict[str, float]  # per domain and of ALL: gzip -9 on the held-out text in the model's order
    held_out_bytes: Integer[np.ndarray, " documents"]  # of each held-out document, in UTF-8
    held_out_domain: Integer[np.ndarray, " documents"]


def prepare(
    sources: Sequence[str] = (),
    *,
    tokenizer: int | str,
    sequence_length: int,
    cache_dir: Path | None = None,
    text_column: str = "text",
    held_out_fraction: float = HELD_OUT_FRACTION,
    max_bytes: int | None = None,
    max_held_out_bytes: int = MAX_HELD_OUT_BYTES,
    block_diagonal: bool = False,
) -> PreparedData:
    """Prepare `sources` (none: the standard library) for training with rows of `sequence_length` tokens.

    `tokenizer` is the vocabulary size of a byte-level BPE to train on the train text (its first 16 Mi characters),
    or the name or folder of a tokenizer of transformers. The result is kept in `cache_dir` (default:
    `$MOESTRO_CACHE`, else `~/.cache/moestro`) under the hash of texts and tokenizer; while no file of the sources
    changes, a second call reads none of them.

    Raises:
        Misuse: as `load_corpus`, `load_tokenizer` and `check_tokenizer`; or either side holds fewer tokens than a
        row.
    """
    if sequence_length < 2:
        raise Misuse(f"sequence_length must be at least 2, got {sequence_length}")
    check_limits(held_out_fraction, max_bytes, max_held_out_bytes)
    cache = cache_dir or default_cache_dir()
    given = tokenizer if isinstance(tokenizer, int) else load_tokenizer(tokenizer)
    options = (text_column, held_out_fraction, max_bytes, max_held_out_bytes)
    listed = partial(inventory, sources, options, LAYOUT, version("moestro"), identity(given))
    load = partial(
        load_corpus,
        sources,
        text_column=text_column,
        held_out_fraction=held_out_fraction,
        max_bytes=max_bytes,
        max_held_out_bytes=max_held_out_bytes,
    )
    key, facts = find(cache, listed()) or build(cache, listed, lambda folder: load(folder=folder), given)
    folder = folder_of(cache, key)
    train, held_out = rows = [
        _open(folder, side, sequence_length, block_diagonal, sources) for side in ("train", "held_out")
    ]
    used = load_tokenizer(str(folder / "tokenizer")) if isinstance(given, int) else given
    description = _describe(sources, facts, tokenizer, used, rows)
    for note in overlap_notes(description):
        logger.warning("%s", note)
    return PreparedData(
        train=train,
        held_out=held_out,
        tokenizer=used,
        domains=tuple(facts["domains"]),
        hash=key,
        description=description,
        gzip_bits_per_byte=gzip_bits_per_byte(folder),
        held_out_bytes=held_out.document_bytes,
        held_out_domain=held_out.document_domain,
    )


def _open(folder: Path, side: str, sequence_length: int, block_diagonal: bool, sources: Sequence[str]) -> PackedRows:
    rows = PackedRows(
        folder / side, sequence_length, every_token_once=side == "held_out", block_diagonal=block_diagonal
    )
    if rows.num_tokens < sequence_length:
        raise Misuse(
            f"the {side.replace('_', '-')} text must fill at least one sequence of {sequence_length} tokens, "
            f"got {rows.num_tokens} from {' '.join(sources) or standard_library.NAME}"
        )
    return rows


def _describe(
    sources: Sequence[str],
    facts: Mapping[str, Any],
    asked: int | str,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[PackedRows],
) -> dict[str, Any]:
    counts = [_count(packed, len(facts["domains"])) for packed in rows]
    return {
        "sources": list(sources) or [standard_library.NAME],
        "corpus_hash": facts["hash"],
        "domains": {
            domain: {
                "train": counts[0][i],
                "held_out": counts[1][i],
                "left_out_bytes": facts["left_out"][domain],
                "shared_bytes": facts["shared"][domain],
                "overlap": _share([facts["leaked"].get(domain, (0, 0))]),
            }
            for i, domain in enumerate(facts["domains"])
        },
        "overlap": _share(facts["leaked"].values()),
        "missing_domains": facts["missing"],
        "duplicates_dropped": facts["duplicates"],
        "tokenizer": {
            "name": asked if isinstance(asked, str) else "byte-level BPE trained on the train text",
            "vocabulary": vocabulary_size(tokenizer),
            "end_of_text": tokenizer.eos_token,
        },
    }


def _share(counts: Iterable[Sequence[int]]) -> float:
    """Return the share of held-out characters in spans of 200 or more that occur in training text."""
    leaked, characters = np.sum([(0, 0), *counts], axis=0).tolist()
    return leaked / max(characters, 1)


def _count(packed: PackedRows, num_domains: int) -> list[dict[str, int]]:
    """Return, for each domain, its number of documents, bytes and tokens (end-of-text tokens included)."""
    domain = packed.document_domain
    weights = {"documents": np.ones_like(domain), "bytes": packed.document_bytes, "tokens": packed.document_tokens}
    sums = {name: np.bincount(domain, weight, num_domains) for name, weight in weights.items()}
    return [{name: int(values[i]) for name, values in sums.items()} for i in range(num_domains)]
