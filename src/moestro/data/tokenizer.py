"""Byte-level BPE trained on the corpus, or any tokenizer of transformers, and the check that it can encode the text."""

import json
import math
import os
import re
import sys
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
from jaxtyping import Integer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from moestro.data.progress import watched
from moestro.errors import Misuse
from moestro.gate import loading
from moestro.gate.paths import user_path

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"
MIN_VOCABULARY = 256 + 2  # every byte, and the two special tokens

LONGEST_WORD = 256
"""Largest number of characters of a word in the training text of a tokenizer."""
LARGEST_VOCABULARY = 4 * 2**20
LARGEST_GROWTH = 64
MOST_TOKENS_A_BYTE = 8

_TOO_LONG = f"{{{LONGEST_WORD + 1},}}"
_LONG_WORD = re.compile(rf"\S{_TOO_LONG}|\s{_TOO_LONG}")
_LONG_RUN = re.compile(rf"[^\W\d_]{_TOO_LONG}|\d{_TOO_LONG}|\s{_TOO_LONG}|(?:[^\w\s]|_){_TOO_LONG}")
"""Runs that GPT-2's pre-tokenizer treats as one word."""

_CHECKED = 1000  # chunks wanted
_CHUNK = 256  # characters
_TOLERATED = 0.01  # of the chunks; normalising tokenizers rewrite a rare character


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train byte-level BPE, GPT-2's word splitting; the same texts in the same order give the same tokenizer.

    `<|endoftext|>` (id 0) is both end and beginning of text. Padding has a token of its own, since collators that
    hide padding from the loss would otherwise hide the end of text too. Special tokens spelled out in a text are
    encoded as plain text. A corpus too small for `vocab_size` merges gives a smaller vocabulary: `len(tokenizer)`
    is the truth. Longer runs of letters (DNA, some scripts) are cut into words of 256 characters, because training
    time grows with the square of a word's length; ordinary text is not affected.
    """
    if vocab_size < MIN_VOCABULARY:
        raise Misuse(
            f"the vocabulary must have at least {MIN_VOCABULARY} tokens (the bytes and two more), got {vocab_size}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(watched(in_words(texts), "training the tokenizer"), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        pad_token=PADDING,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )


def in_words(texts: Iterable[str]) -> Iterator[str]:
    """Yield the texts, cut inside each run of more than 256 letters, digits, spaces or other characters."""
    for text in texts:
        start = 0
        if _LONG_WORD.search(text):
            for run in _LONG_RUN.finditer(text):
                for cut in range(run.start() + LONGEST_WORD, run.end(), LONGEST_WORD):
                    yield text[start:cut]
                    start = cut
        yield text[start:]


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of embedding rows needed: the largest id + 1, which exceeds `len` if ids have gaps."""
    return max(len(tokenizer), *(i + 1 for i in tokenizer.get_vocab().values()))


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Load any tokenizer of transformers, from a folder or the hub.

    Raises:
        Misuse: there is no such tokenizer, it has no end-of-text token, an id is 4 Mi or more, or its rules can expand
            text more than 64-fold.
    """
    place = user_path(name_or_path)
    problem = f"tokenizer {name_or_path!r} must be a tokenizer's folder or name on the Hugging Face hub"
    if place.exists():
        with panics_unseen():
            tokenizer = loading.load_tokenizer(str(place), problem)
    else:
        tokenizer = loading.load_tokenizer(name_or_path, problem)
    check_size(tokenizer, f"tokenizer {name_or_path!r}")
    if tokenizer.eos_token_id is None:
        raise Misuse(f"tokenizer {name_or_path!r} must have an end-of-text token to join documents, got none")
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
    """Refuse a tokenizer that loses text: bits per byte would then count bytes that no token carries.

    Looks at an evenly spread sample of chunks of up to 256 characters. A chunk is lost when decoding gives another
    text, unknown tokens among them (after Unicode normalisation; one space more at the start is forgiven, as
    SentencePiece adds it). At most 1 % of the chunks may be lost.

    Raises:
        Misuse: with the share of lost chunks and an example; or the tokenizer gives more than 8 tokens for a byte.
    """
    chunks = list(_sample(texts))
    with panics_unseen():
        lost = [chunk for start in range(0, len(chunks), 64) for chunk in _lost(tokenizer, chunks[start : start + 64])]
    if len(lost) > _TOLERATED * len(chunks):
        example = lost[0][:60]
        decoded = decode(tokenizer, encode_one(tokenizer, example))
        raise Misuse(
            f"the tokenizer must be able to encode the text: {len(lost) / len(chunks):.0%} of a sample came back "
            f"changed, such as {example!r} as {decoded!r}"
        )


def check_size(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise Misuse for a tokenizer that could exhaust memory by huge ids or by replacements that multiply text."""
    if (size := vocabulary_size(tokenizer)) > LARGEST_VOCABULARY:
        raise Misuse(f"{name} must have ids below {LARGEST_VOCABULARY:,}, got {size - 1:,}")
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return
    backend = tokenizer.backend_tokenizer
    for part in (backend.normalizer, backend.decoder):
        if part is not None and (grown := growth(json.loads(part.__getstate__()))) > LARGEST_GROWTH:
            raise Misuse(f"{name} must expand text at most {LARGEST_GROWTH}-fold, got replacements of {grown:,}-fold")


def growth(part: Mapping[str, Any]) -> int:
    """Return how many times longer a normalizer or a decoder of tokenizers can make a text by its replacements."""
    match part.get("type"):
        case "Sequence":
            return math.prod(map(growth, part.get("normalizers") or part.get("decoders") or ()))
        case "Replace":
            content, pattern = len(part["content"]), part["pattern"]
            if "Regex" in pattern:  # may match the empty string between any two characters
                return content + 1
            return max(-(-content // max(len(pattern["String"]), 1)), 1)
        case "Prepend":
            return max(len(part["prepend"]), 1)
    return 1


@contextmanager
def panics_unseen() -> Iterator[None]:
    """Hide stderr within the context, where Rust prints dozens of lines for a panic that also raises an exception.

    If nothing fails, the hidden output appears afterwards.
    """
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as written:
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
        written.seek(0)
        os.write(2, written.read())


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, special_tokens: bool = False
) -> Iterator[Integer[np.ndarray, " tokens"]]:
    """Yield the token ids of each text, no special tokens added; one batch, spread over the cores.

    Special tokens spelled out in a text are recognised only if `special_tokens` is true, as in a chat template's text.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        for text in texts:
            ids = tokenizer.encode(
                text, add_special_tokens=False, split_special_tokens=not special_tokens, verbose=False
            )
            yield np.array(ids, dtype=np.uint32)
        return
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = not special_tokens  # true means: encode their spelling as plain text
    for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False):
        yield np.array(encoding.ids, dtype=np.uint32)


def encode_one(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of one text, no special tokens added or recognised."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False)


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of token ids, as it was encoded."""
    return cast(str, tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _sample(texts: Sequence[str]) -> Iterator[str]:
    """Up to about two thousand chunks, spread evenly over texts and within each, of whole words where there are any."""
    chosen = texts[:: max(len(texts) // _CHECKED, 1)]
    for text in chosen:
        for start in range(0, len(text), max(len(text) * len(chosen) // _CHECKED, _CHUNK)):
            words = text[start : start + _CHUNK].split(" ")
            cut_start, cut_end = start > 0, start + _CHUNK < len(text)
            yield " ".join(words[cut_start : len(words) - cut_end] if len(words) > 2 else words)


def _lost(tokenizer: PreTrainedTokenizerBase, chunks: Sequence[str]) -> list[str]:
    """Return the chunks that change when they are encoded and decoded."""
    with loading.one_misuse("the tokenizer must be able to encode the text"):
        tokens = list(encode(tokenizer, chunks))
        lost = [chunk for chunk, ids in zip(chunks, tokens, strict=True) if _is_lost(tokenizer, chunk, ids.tolist())]
    size = sum(len(chunk.encode()) for chunk in chunks)
    if (count := sum(map(len, tokens))) > MOST_TOKENS_A_BYTE * size:
        raise Misuse(f"the tokenizer must give at most {MOST_TOKENS_A_BYTE} tokens for a byte, got {count / size:.1f}")
    return lost


def _is_lost(tokenizer: PreTrainedTokenizerBase, chunk: str, ids: list[int]) -> bool:
    decoded = unicodedata.normalize("NFC", decode(tokenizer, ids))
    return unicodedata.normalize("NFC", chunk) not in (decoded, decoded.removeprefix(" "))
