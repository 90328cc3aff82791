"""The text that a model is looked at with: all that was named, up to a limit per domain, in one shuffled stream."""

import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Integer
from transformers import PreTrainedTokenizerBase

from moestro.data.chats import rendered
from moestro.data.packing import PackedRows, write_stream
from moestro.data.progress import watched
from moestro.data.sources import Document, read_source
from moestro.data.tokenizer import check_tokenizer, encode, vocabulary_size
from moestro.errors import Misuse
from moestro.inspection.running import DEFAULT_MAX_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """Documents, each text once, in the order of their hashes: a shuffle that mixes the domains."""

    sources: tuple[str, ...]
    documents: tuple[Document, ...]
    domains: tuple[str, ...]
    left_out: dict[str, int]
    """Bytes of each domain beyond the limit."""

    @property
    def document_domain(self) -> np.ndarray:
        """Index of each document's domain."""
        return np.array([self.domains.index(document.domain) for document in self.documents], dtype=np.int64)

    @property
    def document_bytes(self) -> np.ndarray:
        """Bytes of each document in UTF-8."""
        return np.array([len(document.text.encode()) for document in self.documents], dtype=np.int64)


def read_text(sources: Sequence[str], *, text_column: str = "text", max_bytes: int | None = None) -> Text:
    """Read `sources` (as `moestro.data.read_source` does), at most `max_bytes` of each domain.

    Nothing is held out: the text is for looking at, and what the checkpoint was trained on is unknown. A domain's share
    is taken in the order of hashes, a random sample of its documents; the last document is cut to fit.
    """
    limit = DEFAULT_MAX_BYTES if max_bytes is None else max_bytes
    if limit < 1:
        raise Misuse(f"max_bytes must be at least 1, got {limit}")
    found = [document for spec in sources for document in read_source(spec, text_column=text_column)]
    distinct = {fingerprint(d): d for d in reversed(list(watched(found, "reading documents", total=len(found))))}
    shuffled = [distinct[key] for key in sorted(distinct)]
    domains = tuple(sorted({document.domain for document in shuffled}))
    kept: list[Document] = []
    left_out = {}
    for domain in domains:
        sample, left_out[domain] = within(limit, [d for d in shuffled if d.domain == domain])
        kept += sample
    kept.sort(key=fingerprint)
    return Text(sources=tuple(sources), documents=tuple(kept), domains=domains, left_out=left_out)


def fingerprint(document: Document) -> bytes:
    """The hash of a document's text."""
    return hashlib.blake2b(document.text.encode(), digest_size=16).digest()


def within(limit: int, documents: Iterable[Document]) -> tuple[list[Document], int]:
    """The first documents that fit into `limit` bytes, the last one cut, and how many bytes are left out."""
    kept, room, left_out = [], limit, 0
    for document in documents:
        whole = document.text.encode()
        part = whole[:room].decode(errors="ignore")
        size = len(part.encode())
        if part.strip():
            kept.append(document if size == len(whole) else replace(document, text=part, chat=()))
        room = room - size if size == len(whole) else 0
        left_out += len(whole) - size
    return kept, left_out


def _encode(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]
) -> Iterator[Integer[np.ndarray, " tokens"]]:
    """Yield each document's token ids; chats in the tokenizer's template, or in their plain form if it has none."""
    templated = tokenizer.chat_template is not None
    chats = [rendered(tokenizer, d.chat, d.source) for d in documents if d.chat and templated]
    others = [d.text for d in documents if not (d.chat and templated)]
    ids = encode(tokenizer, others), encode(tokenizer, chats, special_tokens=True)
    for document in documents:
        yield next(ids[bool(document.chat and templated)])


@contextmanager
def packed(
    text: Text, tokenizer: PreTrainedTokenizerBase, sequence_length: int | None, longest: int
) -> Iterator[PackedRows]:
    """The text as rows of tokens, on disk until the context ends.

    `sequence_length` None means `longest`, or all of a shorter text in one row.
    """
    texts = [document.text for document in text.documents]
    check_tokenizer(tokenizer, texts)
    tokens = list(watched(_encode(tokenizer, text.documents), "tokenising documents", total=len(texts)))
    total = sum(map(len, tokens)) + len(tokens) + 1
    length = min(longest, total) if sequence_length is None else sequence_length
    if length > total:
        raise Misuse(f"the text must fill at least one sequence of {length} tokens, got {total} tokens")
    with tempfile.TemporaryDirectory(prefix="moestro-") as folder:
        write_stream(
            Path(folder) / "text",
            tokens,
            end_of_text=int(tokenizer.eos_token_id),  # type: ignore[arg-type]  # load_tokenizer saw to it
            vocabulary=vocabulary_size(tokenizer),
            domain=text.document_domain.tolist(),
            num_bytes=text.document_bytes.tolist(),
        )
        yield PackedRows(Path(folder) / "text", length, every_token_once=True)
