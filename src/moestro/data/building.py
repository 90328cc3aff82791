"""Build a cache folder of tokens from sources: read, split, train a tokenizer, tokenise, in bounded memory.

A folder is named by the hash of its contents. Small files beside the folders map sources to folders, so that unchanged
sources are not read again.
"""

import gzip
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from moestro.data.cache import is_whole, put, replace_text, seal, workplace
from moestro.data.corpus import Corpus
from moestro.data.packing import StreamWriter
from moestro.data.progress import watched
from moestro.data.sources import Document
from moestro.data.tokenizer import check_tokenizer, encode, load_tokenizer, train_tokenizer, vocabulary_size

LAYOUT = 2  # raise when what is written to the cache, or how it is computed, changes
TOKENIZER_TEXT = 16 * 1024 * 1024  # characters of training text for training a tokenizer
CHECKED_DOCUMENTS = 1000  # the tokenizer is checked on fewer than twice as many training documents, evenly spaced

_BATCH = 2**20  # characters tokenised at once, over all cores
_ARRAYS = ("tokens.npy", "starts.npy", "domain.npy", "bytes.npy")
_EXPECTED = ("gzip.json", *(f"{side}/{name}" for side in ("train", "held_out") for name in _ARRAYS))
_TOKENIZER = "tokenizer/tokenizer.json"

ALL = ""
"""The key of all domains together, beside the names of domains. No domain has an empty name."""

Tokenizer = PreTrainedTokenizerBase | int  # a tokenizer, or the vocabulary size of one to train


def find(cache: Path, inventory: str | None) -> tuple[str, dict[str, Any]] | None:
    """Return the key of the intact folder built from these sources, and the facts recorded with it, or None."""
    if inventory is None:
        return None
    try:
        known = json.loads(_known(cache, inventory).read_text())
        key, facts = known["key"], known["facts"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return (key, facts) if is_whole(folder_of(cache, key)) else None


def build(
    cache: Path, inventory: Callable[[], str | None], load: Callable[[Path], Corpus], tokenizer: Tokenizer
) -> tuple[str, dict[str, Any]]:
    """Read the sources with `load`, and build their folder unless it exists intact. Return its key and its facts.

    A killed build of the same sources resumes after its last complete step: reading, tokenizer, or batch of tokens.
    """
    before = inventory()
    with workplace(cache / "data", (before or "unlisted")[:32]) as place:
        if before is None:
            shutil.rmtree(place / "texts", ignore_errors=True)
        elif (found := find(cache, before)) is not None:  # built by another process meanwhile
            return found
        (place / "texts").mkdir(exist_ok=True)
        corpus = load(place / "texts")
        key, facts = _key(corpus, tokenizer), facts_of(corpus)
        if not is_whole(folder_of(cache, key)):
            content = place / f"content-{key[:32]}"
            _fill(content, corpus, tokenizer)
            seal(content, (*_EXPECTED, _TOKENIZER) if isinstance(tokenizer, int) else _EXPECTED)
            put(content, folder_of(cache, key))
        if before is not None and inventory() == before:
            _known(cache, before).parent.mkdir(exist_ok=True)
            replace_text(_known(cache, before), json.dumps({"key": key, "facts": facts}))
    return key, facts


def folder_of(cache: Path, key: str) -> Path:
    """Return the cache folder that holds the contents with this key."""
    return cache / "data" / key[:32]


def identity(tokenizer: Tokenizer) -> str:
    """Return a text that identifies the tokenizer by its contents, regardless of where it was loaded from."""
    if isinstance(tokenizer, int):
        return f"{TOKENIZER_TEXT} {tokenizer}"
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        content = tokenizer.backend_tokenizer.to_str()
    else:
        content = repr((type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())))
    return f"{tokenizer.eos_token_id} {content}"


def facts_of(corpus: Corpus) -> dict[str, Any]:
    """Return the facts that describe a corpus, as plain JSON values. They may differ between equal texts."""
    names = ("hash", "domains", "missing", "duplicates", "left_out", "shared", "leaked")
    return json.loads(json.dumps({name: getattr(corpus, name) for name in names}))


def _known(cache: Path, inventory: str) -> Path:
    return cache / "sources" / f"{inventory[:32]}.json"


def _key(corpus: Corpus, tokenizer: Tokenizer) -> str:
    return hashlib.sha256(repr((LAYOUT, corpus.hash, identity(tokenizer))).encode()).hexdigest()


def _fill(folder: Path, corpus: Corpus, tokenizer: Tokenizer) -> None:
    """Fill a cache folder: both streams of tokens, gzip's figures, and the tokenizer if it is trained here."""
    folder.mkdir(exist_ok=True)
    if isinstance(tokenizer, int):
        tokenizer = _trained(folder / "tokenizer", corpus, tokenizer)
    sampled = corpus.train.documents(step=max(corpus.train_documents // CHECKED_DOCUMENTS, 1))
    check_tokenizer(tokenizer, [document.text for document in (*sampled, *corpus.held_out)])
    _tokenise(
        folder / "held_out", tokenizer, corpus.domains, lambda start: corpus.held_out[start:], len(corpus.held_out)
    )
    _tokenise(folder / "train", tokenizer, corpus.domains, corpus.train.documents, corpus.train_documents)
    (folder / "gzip.json").write_text(json.dumps(_gzip_bits_per_byte(corpus)))


def _trained(folder: Path, corpus: Corpus, vocabulary: int) -> PreTrainedTokenizerBase:
    if not folder.exists():
        unfinished = folder.with_name("unfinished")
        train_tokenizer(_first_characters(corpus.train, TOKENIZER_TEXT), vocabulary).save_pretrained(unfinished)
        unfinished.rename(folder)
    return load_tokenizer(str(folder))


def _first_characters(documents: Iterable[Document], room: int) -> Iterator[str]:
    for document in documents:
        yield document.text[:room]
        room -= len(document.text)
        if room <= 0:
            return


def _tokenise(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    domains: tuple[str, ...],
    documents: Callable[[int], Iterable[Document]],
    total: int,
) -> None:
    """Write the tokens of `documents(start)`, where `start` counts the documents that a killed build has written."""
    end_of_text = cast(int, tokenizer.eos_token_id)
    writer = StreamWriter(folder, end_of_text=end_of_text, vocabulary=vocabulary_size(tokenizer))
    remaining = watched(documents(writer.documents), "tokenising documents", total=total - writer.documents)
    for batch in _batches(remaining):
        for document, tokens in zip(batch, encode(tokenizer, [document.text for document in batch]), strict=True):
            writer.append(tokens, domains.index(document.domain), len(document.text.encode()))
        writer.flush()
    writer.finish()


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    yield batch


def gzip_bits_per_byte(folder: Path) -> dict[str, float]:
    """Read gzip's figures from a cache folder. Earlier folders named ALL "all", which may also be a domain's name."""
    stored = json.loads((folder / "gzip.json").read_text())
    return stored if ALL in stored else {ALL if name == "all" else name: bits for name, bits in stored.items()}


def _gzip_bits_per_byte(corpus: Corpus) -> dict[str, float]:
    """Return the bits per byte of gzip -9 on held-out text, per domain and for ALL: a baseline for any model."""
    texts = {domain: [d.text for d in corpus.held_out if d.domain == domain] for domain in corpus.domains}
    texts[ALL] = [document.text for document in corpus.held_out]
    joined = {name: "".join(parts).encode() for name, parts in texts.items() if parts}
    return {name: 8 * len(gzip.compress(data, 9, mtime=0)) / len(data) for name, data in joined.items()}
