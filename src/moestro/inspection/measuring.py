"""How checkpoints route a text: their figures per layer, and how well they predict it."""

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from moestro.adapters.composed import ComposedFigures
from moestro.adapters.layers import moe_layers
from moestro.adapters.meter import RoutingMeter
from moestro.adapters.watch import Watch
from moestro.adapters.wrappers import inner_model
from moestro.comparison import HeldOut, LayerStatistics
from moestro.data.packing import PackedRows
from moestro.data.progress import watched
from moestro.data.tokenizer import vocabulary_size
from moestro.errors import Misuse, TrainingFailed
from moestro.evaluation import Evaluation, add_losses, collate, composed_figures, held_out, layer_statistics
from moestro.inspection.checkpoints import Checkpoint, load, tokenizer_of
from moestro.inspection.findings import Finding
from moestro.inspection.robustness import Robustness, measure_robustness
from moestro.inspection.texts import Text, packed

DEFAULT_SEQUENCE_LENGTH = 512
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One checkpoint on the text."""

    finding: Finding
    tokenizer: str
    tokens: int
    """Tokens that were predicted."""
    prediction: HeldOut
    layers: tuple[LayerStatistics, ...]
    notes: tuple[str, ...] = ()
    robustness: Robustness | None = None
    """None where nobody asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainRead:
    """What was read of a domain."""

    documents: int
    bytes: int
    left_out_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingStudy:
    """One checkpoint, or two, on the same text."""

    version: str
    created: str
    command: str
    environment: dict[str, str]
    sources: tuple[str, ...]
    domains: dict[str, DomainRead]
    sequence_length: int
    batch_tokens: int
    dtype: str
    same_tokens: bool
    """Whether all were given the same tokens; losses per token cannot be compared otherwise."""
    checkpoints: tuple[Measured, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """How to run the models."""

    tokenizer: str | None = None
    sequence_length: int | None = None
    batch_tokens: int = 4096
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    """Of each checkpoint's weights."""
    autocast: bool = False
    """Matrix products in bfloat16."""
    robustness: bool = False
    """Whether to perturb the routing too."""
    device: torch.device = CPU


def study(
    checkpoints: Sequence[Checkpoint],
    findings: Sequence[Finding],
    text: Text,
    conditions: Conditions,
    **about: Any,
) -> RoutingStudy:
    """Run one model after the other over the text. `about`: version, command and environment."""
    if conditions.batch_tokens < 1:
        raise Misuse(f"batch_tokens must be at least 1, got {conditions.batch_tokens}")
    tokenizers = [tokenizer_of(checkpoint, conditions.tokenizer) for checkpoint in checkpoints]
    longest = min(fitting_length(checkpoint, conditions.sequence_length) for checkpoint in checkpoints)
    with ExitStack() as stack:
        rows = [stack.enter_context(packed(text, t, conditions.sequence_length, longest)) for t in tokenizers]
        length = min(r.sequence_length for r in rows)
        rows = [PackedRows(r.folder, length, every_token_once=True) for r in rows]
        measured = [
            measure(checkpoint, finding, tokenizer, packed_rows, text, conditions, dtype)
            for checkpoint, finding, tokenizer, packed_rows, dtype in zip(
                checkpoints, findings, tokenizers, rows, conditions.dtypes, strict=True
            )
        ]
        same_tokens = all(np.array_equal(r.tokens, rows[0].tokens) for r in rows)
    return RoutingStudy(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        sources=text.sources,
        domains=domains_read(text),
        sequence_length=length,
        batch_tokens=max(1, conditions.batch_tokens // length) * length,
        dtype=dtype_words(conditions),
        same_tokens=same_tokens,
        checkpoints=tuple(measured),
        **about,
    )


def fitting_length(checkpoint: Checkpoint, asked: int | None) -> int:
    """The longest sequence to run: what was asked for, else 512 or what the model can take."""
    limit = getattr(checkpoint.config.get_text_config(), "max_position_embeddings", None)
    if asked is None:
        return min(DEFAULT_SEQUENCE_LENGTH, limit or DEFAULT_SEQUENCE_LENGTH)
    if asked < 2:
        raise Misuse(f"sequence_length must be at least 2, got {asked}")
    if limit is not None and asked > limit:
        raise Misuse(f"sequence_length must be at most {limit}, the positions that {checkpoint.spec} has, got {asked}")
    return asked


def measure(
    checkpoint: Checkpoint,
    finding: Finding,
    tokenizer: PreTrainedTokenizerBase,
    rows: PackedRows,
    text: Text,
    conditions: Conditions,
    dtype: torch.dtype,
) -> Measured:
    """Load one checkpoint and run it over its rows."""
    model, notes = load(checkpoint, dtype=dtype, device=conditions.device)
    check_head(model, checkpoint, tokenizer)
    meter = RoutingMeter(num_domains=len(text.domains))
    meter.detailed = True
    evaluation = run(model, rows, meter.attach(model), conditions, f"running {checkpoint.name}")
    if not np.isfinite(evaluation.nll).all():
        raise TrainingFailed(f"{checkpoint.spec} gives a loss that is not finite: are its weights whole?")
    prediction = held_out(evaluation, text.document_bytes, text.document_domain, text.domains)
    return Measured(
        finding=finding,
        tokenizer=f"{conditions.tokenizer or 'its own'}, {vocabulary_size(tokenizer):,} tokens",
        tokens=int(evaluation.tokens.sum()),
        prediction=prediction,
        layers=layer_statistics(model, meter, text.domains, composition(model, rows, conditions)),
        notes=notes,
        robustness=perturbed(model, rows, conditions, checkpoint.name, evaluation.loss)
        if conditions.robustness
        else None,
    )


def composition(model: nn.Module, rows: PackedRows, conditions: Conditions) -> dict[str, ComposedFigures]:
    """What sub-layers of one block owe to each other, where there are such."""
    with torch.autocast(conditions.device.type, dtype=torch.bfloat16, enabled=conditions.autocast):
        return composed_figures(model, rows, batch_rows(rows, conditions))


def batch_rows(rows: PackedRows, conditions: Conditions) -> int:
    """How many rows run at once."""
    return max(1, conditions.batch_tokens // rows.sequence_length)


def perturbed(model: nn.Module, rows: PackedRows, conditions: Conditions, name: str, loss: float) -> Robustness:
    """What perturbed routing does to the model's `loss` on the same rows."""

    def loss_of(rerouted: AbstractContextManager[Watch], words: str) -> float:
        return run(model, rows, rerouted, conditions, f"{name}: {words}").loss

    return measure_robustness(model, moe_layers(model), loss, loss_of)


def check_head(model: nn.Module, checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a model that does not predict the next token, or not of this vocabulary."""
    inner: Any = inner_model(model)
    head = inner.get_output_embeddings()
    if head is None or "decoder_input_ids" in inspect.signature(type(inner).forward).parameters:
        raise Misuse(f"{checkpoint.spec}: {type(inner).__name__} does not predict the next token of a text")
    vocabulary = inner.get_input_embeddings().weight.shape[0]
    if (needed := vocabulary_size(tokenizer)) > vocabulary:
        raise Misuse(
            f"the tokenizer must fit the {vocabulary:,} tokens of {checkpoint.spec}, got one of {needed:,}: "
            "name its own with --tokenizer"
        )


@torch.no_grad()
def run(
    model: Any, rows: PackedRows, watching: AbstractContextManager[Watch], conditions: Conditions, doing: str
) -> Evaluation:
    """The model over all rows, within a context that watches it."""
    sums = torch.zeros(2, len(rows.document_domain), dtype=torch.float64, device=conditions.device)
    size = batch_rows(rows, conditions)
    starts = range(0, len(rows), size)
    with (
        torch.autocast(conditions.device.type, dtype=torch.bfloat16, enabled=conditions.autocast),
        watching as current,
    ):
        for start in watched(starts, doing, total=len(starts), patience=0.5):
            batch = collate(rows, range(start, min(start + size, len(rows))), conditions.device)
            current.domain = batch["domain"]
            add_losses(sums, model, batch)
    nll, tokens = sums.cpu().numpy()
    return Evaluation(nll=nll, tokens=tokens.astype(np.int64), layers=())


def domains_read(text: Text) -> dict[str, DomainRead]:
    """What was read, by domain."""
    sizes, of = text.document_bytes, text.document_domain
    return {
        domain: DomainRead(
            documents=int((of == index).sum()),
            bytes=int(sizes[of == index].sum()),
            left_out_bytes=text.left_out[domain],
        )
        for index, domain in enumerate(text.domains)
    }


def dtype_words(conditions: Conditions) -> str:
    """Weights and products, in words."""
    names = dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in conditions.dtypes)
    weights = " and ".join(names) + " weights"
    return f"{weights}, bfloat16 products" if conditions.autocast else weights
