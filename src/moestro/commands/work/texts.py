"""The text of a run, as `DataFlags` describes it."""

from collections.abc import Sequence
from dataclasses import replace

from moestro.data.corpus import MAX_HELD_OUT_BYTES
from moestro.data.preparation import PreparedData, prepare
from moestro.data.tokenizer import vocabulary_size
from moestro.flags import DataFlags
from moestro.training.recipe import Recipe

DEFAULT_MAX_BYTES, DEFAULT_HELD_OUT_BYTES = 4 * 2**20, 48 * 2**10
"""Byte limits per domain of the default corpus, so that its largest domain does not dominate."""


def prepared(flags: DataFlags, recipe: Recipe) -> PreparedData:
    """Prepare the data for one recipe: its sequence length, and its vocabulary size if a tokenizer is trained here."""
    t = recipe.training
    train, held_out = (None, MAX_HELD_OUT_BYTES) if flags.data else (DEFAULT_MAX_BYTES, DEFAULT_HELD_OUT_BYTES)
    return prepare(
        flags.data,
        tokenizer=recipe.model.vocab_size if flags.tokenizer is None else flags.tokenizer,
        sequence_length=t.sequence_length,
        text_column=flags.text_column,
        max_bytes=train if flags.max_bytes is None else flags.max_bytes,
        max_held_out_bytes=held_out if flags.max_held_out_bytes is None else flags.max_held_out_bytes,
        block_diagonal=t.block_diagonal,
    )


def fit(flags: DataFlags, recipes: Sequence[Recipe], data: PreparedData) -> list[Recipe]:
    """Return the recipes with the vocabulary size of the tokenizer, if the user named one; else unchanged."""
    if flags.tokenizer is None:
        return list(recipes)
    vocabulary = vocabulary_size(data.tokenizer)
    return [replace(recipe, model=replace(recipe.model, vocab_size=vocabulary)) for recipe in recipes]
