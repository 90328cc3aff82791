"""Byte-level BPE trained on the corpus, or any tokenizer of transformers, and the check that it can encode the text."""

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import cast

import numpy as np
from jaxtyping import Integer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from moestro.errors import Misuse
from moestro.gate import loading
from moestro.gate.paths import user_path

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"
MIN_VOCABULARY = 256 + 2  # every byte, and the two special tokens

_CHECKED = 1000  # chunks wanted
_CHUNK = 256  # characters
_TOLERATED = 0.01  # of the chunks; normalising tokenizers rewrite a rare character


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train byte-level BPE, GPT-2's word splitting; the same texts in the same order give the same tokenizer.

    `<|endoftext|>` (id 0) is both end and beginning of text. Padding has a token of its own, since collators that
    hide padding from the loss would otherwise hide the end of text too. Special tokens spelled out in a text are
    encoded as plain text. A corpus too small for `vocab_size` merges gives a smaller vocabulary: `len(tokenizer)`
    is the truth.
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
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        pad_token=PADDING,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Load any tokenizer of transformers, from a folder or the hub.

    Raises:
        Misuse: there is none, or it has no end-of-text token.
    """
    place = user_path(name_or_path)
    problem = f"tokenizer {name_or_path!r} must be a tokenizer's folder or name on the Hugging Face hub"
    tokenizer = loading.load_tokenizer(str(place) if place.exists() else name_or_path, problem)
    if tokenizer.eos_token_id is None:
        raise Misuse(f"tokenizer {name_or_path!r} must have an end-of-text token to join documents, got none")
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
    """Refuse a tokenizer that loses text: bits per byte would then count bytes that no token carries.

    Looks at an evenly spread sample of chunks of up to 256 characters. A chunk is lost when decoding gives another
    text, unknown tokens among them (after Unicode normalisation; one space more at the start is forgiven, as
    SentencePiece adds it). At most 1 % of the chunks may be lost.

    Raises:
        Misuse: with the share of lost chunks and an example.
    """
    chunks = list(_sample(texts))
    tokens = list(encode(tokenizer, chunks))
    lost = [chunk for chunk, ids in zip(chunks, tokens, strict=True) if _is_lost(tokenizer, chunk, ids.tolist())]
    if len(lost) > _TOLERATED * len(chunks):
        example = lost[0][:60]
        decoded = decode(tokenizer, encode_one(tokenizer, example))
        raise Misuse(
            f"the tokenizer must be able to encode the text: {len(lost) / len(chunks):.0%} of a sample came back "
            f"changed, such as {example!r} as {decoded!r}"
        )


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Iterator[Integer[np.ndarray, " tokens"]]:
    """Token ids of each text, no special tokens added or recognised; one batch, spread over the cores."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        for text in texts:
            yield np.array(encode_one(tokenizer, text), dtype=np.uint32)
        return
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # means: encode their spelling as plain text
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


def _is_lost(tokenizer: PreTrainedTokenizerBase, chunk: str, ids: list[int]) -> bool:
    decoded = unicodedata.normalize("NFC", decode(tokenizer, ids))
    return unicodedata.normalize("NFC", chunk) not in (decoded, decoded.removeprefix(" "))
