"""From what the user names to rows of tokens: read, split, tokenise, pack; cached by content."""

import gzip
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from jaxtyping import Integer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from moestro.data import standard_library
from moestro.data.cache import cached_folder, default_cache_dir
from moestro.data.corpus import HELD_OUT_FRACTION, MAX_HELD_OUT_BYTES, Corpus, load_corpus
from moestro.data.decontamination import overlap_notes
from moestro.data.packing import PackedRows, write_stream
from moestro.data.progress import watched
from moestro.data.sources import Document
from moestro.data.tokenizer import check_tokenizer, encode, load_tokenizer, train_tokenizer
from moestro.errors import Misuse

logger = logging.getLogger(__name__)

LAYOUT = 2  # raise when what is written to the cache, or how it is computed, changes
TOKENIZER_TEXT = 16 * 1024 * 1024  # characters of train text that a tokenizer is trained on
_BATCH = 512  # documents tokenised at once


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
    gzip_bits_per_byte: dict[str, float]  # per domain and "all": gzip -9 on the held-out text in the model's order
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
    `$MOESTRO_CACHE`, else `~/.cache/moestro`) under the hash of texts and tokenizer; a second call only reads and
    hashes the texts.

    Raises:
        Misuse: as `load_corpus`, `load_tokenizer` and `check_tokenizer`; or either side holds fewer tokens than a
        row.
    """
    if sequence_length < 2:
        raise Misuse(f"sequence_length must be at least 2, got {sequence_length}")
    corpus = load_corpus(
        sources,
        text_column=text_column,
        held_out_fraction=held_out_fraction,
        max_bytes=max_bytes,
        max_held_out_bytes=max_held_out_bytes,
    )
    given = tokenizer if isinstance(tokenizer, int) else load_tokenizer(tokenizer)
    key = _key(corpus, given)
    folder = (cache_dir or default_cache_dir()) / "data" / key[:32]
    cached_folder(folder, lambda place: _build(place, corpus, given))
    train, held_out = rows = [
        _open(folder, side, sequence_length, block_diagonal, sources) for side in ("train", "held_out")
    ]
    used = load_tokenizer(str(folder / "tokenizer")) if isinstance(given, int) else given
    description = _describe(sources, corpus, tokenizer, used, rows)
    for note in overlap_notes(description):
        logger.warning("%s", note)
    return PreparedData(
        train=train,
        held_out=held_out,
        tokenizer=used,
        domains=corpus.domains,
        hash=key,
        description=description,
        gzip_bits_per_byte=json.loads((folder / "gzip.json").read_text()),
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


def _key(corpus: Corpus, tokenizer: PreTrainedTokenizerBase | int) -> str:
    identity = tokenizer if isinstance(tokenizer, int) else _identity(tokenizer)
    return hashlib.sha256(repr((LAYOUT, TOKENIZER_TEXT, corpus.hash, identity)).encode()).hexdigest()


def _identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the tokenizer does, wherever it was loaded from."""
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        content = tokenizer.backend_tokenizer.to_str()
    else:
        content = repr((type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())))
    return f"{tokenizer.eos_token_id} {content}"


def _build(folder: Path, corpus: Corpus, tokenizer: PreTrainedTokenizerBase | int) -> None:
    """Fill a cache folder: both streams of tokens, gzip's figures, and the tokenizer if it is trained here."""
    train = tuple(corpus.train)
    if isinstance(tokenizer, int):
        tokenizer = train_tokenizer(_training_text(train), tokenizer)
        tokenizer.save_pretrained(folder / "tokenizer")
    check_tokenizer(tokenizer, [document.text for document in (*train, *corpus.held_out)])
    for side, documents in (("train", train), ("held_out", corpus.held_out)):
        write_stream(
            folder / side,
            list(_tokenise(tokenizer, documents)),
            end_of_text=cast(int, tokenizer.eos_token_id),
            vocabulary=len(tokenizer),
            domain=[corpus.domains.index(document.domain) for document in documents],
            num_bytes=[len(document.text.encode()) for document in documents],
        )
    (folder / "gzip.json").write_text(json.dumps(_gzip_bits_per_byte(corpus)))


def _training_text(documents: Sequence[Document]) -> Iterator[str]:
    room = TOKENIZER_TEXT
    for document in documents:
        yield document.text[:room]
        room -= len(document.text)
        if room <= 0:
            return


def _tokenise(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]
) -> Iterator[Integer[np.ndarray, " tokens"]]:
    batches = (documents[start : start + _BATCH] for start in range(0, len(documents), _BATCH))
    tokens = (ids for batch in batches for ids in encode(tokenizer, [document.text for document in batch]))
    return watched(tokens, "tokenising documents", total=len(documents))


def _gzip_bits_per_byte(corpus: Corpus) -> dict[str, float]:
    """What gzip -9 makes of the held-out text: the floor that a language model should beat."""
    texts = {domain: [d.text for d in corpus.held_out if d.domain == domain] for domain in corpus.domains}
    texts["all"] = [document.text for document in corpus.held_out]
    joined = {name: "".join(parts).encode() for name, parts in texts.items() if parts}
    return {name: 8 * len(gzip.compress(data, 9, mtime=0)) / len(data) for name, data in joined.items()}


def _describe(
    sources: Sequence[str],
    corpus: Corpus,
    asked: int | str,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[PackedRows],
) -> dict[str, Any]:
    counts = [_count(packed, len(corpus.domains)) for packed in rows]
    return {
        "sources": list(sources) or [standard_library.NAME],
        "corpus_hash": corpus.hash,
        "domains": {
            domain: {
                "train": counts[0][i],
                "held_out": counts[1][i],
                "left_out_bytes": corpus.left_out[domain],
                "shared_bytes": corpus.shared[domain],
                "overlap": _share([corpus.leaked.get(domain, (0, 0))]),
            }
            for i, domain in enumerate(corpus.domains)
        },
        "overlap": _share(corpus.leaked.values()),
        "missing_domains": list(corpus.missing),
        "duplicates_dropped": corpus.duplicates,
        "tokenizer": {
            "name": asked if isinstance(asked, str) else "byte-level BPE trained on the train text",
            "vocabulary": len(tokenizer),
            "end_of_text": tokenizer.eos_token,
        },
    }


def _share(counts: Iterable[tuple[int, int]]) -> float:
    """Held-out characters in passages of 200 or more that training text has too, as a share of all."""
    leaked, characters = np.sum([(0, 0), *counts], axis=0).tolist()
    return leaked / max(characters, 1)


def _count(packed: PackedRows, num_domains: int) -> list[dict[str, int]]:
    """Documents, bytes and tokens (end-of-text tokens included) of each domain."""
    domain = packed.document_domain
    weights = {"documents": np.ones_like(domain), "bytes": packed.document_bytes, "tokens": packed.document_tokens}
    sums = {name: np.bincount(domain, weight, num_domains) for name, weight in weights.items()}
    return [{name: int(values[i]) for name, values in sums.items()} for i in range(num_domains)]
