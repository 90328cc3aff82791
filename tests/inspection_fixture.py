"""Tiny checkpoints on disk, each with a tokenizer, and a text of two domains to inspect them with."""

import json
import random
from pathlib import Path
from unittest.mock import patch

import tiny_models
import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import moestro
from command_line import WORDS
from moestro.data.tokenizer import train_tokenizer

VOCABULARY = 280


def tiny(package: str) -> PreTrainedModel:
    """A tiny model of a package of transformers, of our own family, or a dense one."""
    if package == "llama":
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=2)
        )
    if package == "moestro":
        torch.manual_seed(0)
        return moestro.MoestroForCausalLM(own_config())
    with patch.dict(tiny_models.GENERIC, vocab_size=VOCABULARY):
        return tiny_models.build(package).model


def own_config() -> moestro.MoestroConfig:
    """A dense block, a block of two MoE sub-layers of which one has a shared expert, and one of another size."""
    wide = moestro.MoE(num_experts=8, top_k=2, width=16, num_shared=1)
    return moestro.MoestroConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        feed_forward=[
            [moestro.Dense(width=32)],
            [wide, moestro.MoE(num_experts=8, top_k=2, width=16)],
            [moestro.MoE(num_experts=16, top_k=2, width=16)],
        ],
    )


def tokenizer(vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    return train_tokenizer([" ".join(random.Random(0).choices(WORDS, k=400))], vocabulary)


def save(package: str, folder: Path, vocabulary: int = VOCABULARY) -> Path:
    """A checkpoint as `save_pretrained` writes it."""
    tiny(package).save_pretrained(folder)
    tokenizer(vocabulary).save_pretrained(folder)
    return folder


def edit_config(folder: Path, **changed: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def domains(folder: Path, names: tuple[str, str] = ("first", "second"), documents: int = 3) -> list[str]:
    """`--data` arguments: two folders of short texts with words of their own."""
    draw = random.Random(1)
    for index, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for number in range(documents):
            (folder / name / f"{number}.txt").write_text(" ".join(draw.choices(WORDS[index::2], k=60)))
    return ["--data", *(str(folder / name) for name in names)]
