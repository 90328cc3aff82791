"""Text to rows of tokens: sources, the default corpus, the split, tokenizers, packing, the cache."""

from moestro.data.corpus import Corpus, load_corpus
from moestro.data.packing import PackedRows
from moestro.data.preparation import PreparedData, prepare
from moestro.data.sources import Document, read_source
from moestro.data.tokenizer import check_tokenizer, load_tokenizer, train_tokenizer

__all__ = [
    "Corpus",
    "Document",
    "PackedRows",
    "PreparedData",
    "check_tokenizer",
    "load_corpus",
    "load_tokenizer",
    "prepare",
    "read_source",
    "train_tokenizer",
]
