"""Held-out loss per document and domain, and what the routing looks like on the held-out text."""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from types import MappingProxyType

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from moestro.adapters.composed import ComposedFigures, ComposedMeter
from moestro.adapters.layers import labels, moe_layers
from moestro.adapters.meter import RoutingMeter
from moestro.adapters.reroute import reroute
from moestro.adapters.responses import ResponseMeter
from moestro.agreement import AgreementFigures
from moestro.comparison import CompetedLoss, DomainLoss, HeldOut, LayerStatistics
from moestro.competition.inference import by_competition
from moestro.competition.settings import Compete
from moestro.data.packing import PackedRows
from moestro.joint_routing import JointFigures
from moestro.metrics import RoutingFigures

COMPOSED_TOKENS = 8_192
"""Held-out tokens on which composed sub-layers are looked at: they run twice there."""
LOSS_TOKENS = 256
"""Tokens whose losses are computed at once."""
RESPONSE_TOKENS = 4_096
"""Held-out tokens of which a sample is answered by all experts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One pass over the held-out rows."""

    nll: Float[np.ndarray, " documents"]
    """Summed negative log-likelihood of each document, in nats."""
    tokens: Int[np.ndarray, " documents"]
    layers: tuple[LayerStatistics, ...]
    competed: CompetedLoss | None = None

    @property
    def loss(self) -> float:
        """Nats per token over all documents."""
        return float(self.nll.sum() / self.tokens.sum())


@torch.no_grad()
def evaluate(
    model: nn.Module,
    rows: PackedRows,
    domains: Sequence[str],
    *,
    batch_tokens: int = 4096,
    max_rows: int | None = None,
    dtype: torch.dtype = torch.float32,
    routing: bool = True,
    compete: Compete | None = None,
) -> Evaluation:
    """Evaluate `model` on held-out rows (the first `max_rows`), over all ranks where there are several.

    Every rank takes every n-th row and gets the same result. `dtype` bfloat16 means autocast, as in training. `compete`
    is what the router is compared with (None: the default).
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    num_documents = len(rows.document_domain)
    sums = torch.zeros(2, num_documents, dtype=torch.float64, device=device)
    meter = RoutingMeter(num_domains=len(domains))
    meter.detailed = True
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = range(rank, min(len(rows), max_rows or len(rows)), ranks)
    batch_rows = max(1, batch_tokens // rows.sequence_length)
    has_experts = routing and bool(getattr(model.config, "has_experts", False))  # type: ignore[union-attr]
    composed: dict[str, ComposedFigures] = {}
    agreement: dict[str, AgreementFigures] = {}
    competed: CompetedLoss | None = None
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        with meter.attach(model) if has_experts else nullcontext() as current:
            for start in range(0, len(mine), batch_rows):
                batch = collate(rows, mine[start : start + batch_rows], device)
                if current is not None:
                    current.domain = batch["domain"]
                add_losses(sums, model, batch)
        if has_experts:
            composed = composed_figures(model, rows, batch_rows)
            agreement, competed = beside_competition(model, rows, batch_rows, compete)
    if ranks > 1:
        dist.all_reduce(sums)
    model.train(was_training)
    nll, tokens = sums.cpu().numpy()
    layers = layer_statistics(model, meter, domains, composed, agreement) if has_experts else ()
    return Evaluation(nll=nll, tokens=tokens.astype(np.int64), layers=layers, competed=competed)


@torch.no_grad()
def composed_figures(model: nn.Module, rows: PackedRows, batch_rows: int) -> dict[str, ComposedFigures]:
    """What sub-layers of one block owe to each other, on the first `COMPOSED_TOKENS`; every rank looks at the same."""
    meter = ComposedMeter()
    with meter.attach(model):
        if meter.finds_nothing:
            return {}
        run_on_first(model, rows, batch_rows, COMPOSED_TOKENS)
    return meter.figures()


@torch.no_grad()
def beside_competition(
    model: nn.Module, rows: PackedRows, batch_rows: int, compete: Compete | None
) -> tuple[dict[str, AgreementFigures], CompetedLoss]:
    """The routers beside what competition would choose, and the loss if it did, on the first `RESPONSE_TOKENS`.

    On every rank the same. The scale of responses is that of these tokens.
    """
    meter = ResponseMeter(compete)
    with meter.attach(model):
        by_router = run_on_first(model, rows, batch_rows, RESPONSE_TOKENS)
    with reroute(model, by_competition(meter.rule, meter.statistics())):
        by_all = run_on_first(model, rows, batch_rows, RESPONSE_TOKENS)
    tokens = by_router[1].sum()
    router, competition = (finite(float(sums[0].sum() / tokens)) for sums in (by_router, by_all))
    return meter.figures(), CompetedLoss(tokens=int(tokens), router=router, competition=competition)


def run_on_first(model: nn.Module, rows: PackedRows, batch_rows: int, tokens: int) -> Float[Tensor, "2 documents"]:
    """Run the model on the first rows, about so many tokens, for whoever looks; returns what `add_losses` adds up."""
    device = next(model.parameters()).device
    sums = torch.zeros(2, len(rows.document_domain), dtype=torch.float64, device=device)
    last = min(len(rows), max(1, tokens // rows.sequence_length))
    for start in range(0, last, batch_rows):
        add_losses(sums, model, collate(rows, range(start, min(last, start + batch_rows)), device))
    return sums


def collate(rows: PackedRows, indices: Sequence[int], device: torch.device) -> dict[str, Tensor]:
    """Rows as one batch."""
    items = [rows[index] for index in indices]
    return {name: torch.stack([item[name] for item in items]).to(device) for name in items[0]}


def add_losses(sums: Float[Tensor, "2 documents"], model: nn.Module, batch: dict[str, Tensor]) -> None:
    """Add each document's summed loss and number of predicted tokens."""
    logits = model(**inputs_of(batch), use_cache=False).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    # In chunks that stay in a CPU's caches: fp32 logits of a whole batch are slower to allocate than to use.
    pairs = zip(logits.flatten(0, 1).split(LOSS_TOKENS), labels.flatten().split(LOSS_TOKENS), strict=True)
    losses = torch.cat([cross_entropy(some.float(), label, reduction="none") for some, label in pairs])
    document = batch["document"][:, 1:].flatten()
    sums[0].index_add_(0, document, losses.double())
    sums[1].index_add_(0, document, (labels.flatten() != -100).double())


def inputs_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the model reads of a batch."""
    return {name: batch[name] for name in ("input_ids", "position_ids") if name in batch}


def layer_statistics(
    model: nn.Module,
    meter: RoutingMeter,
    domains: Sequence[str],
    composed: Mapping[str, ComposedFigures],
    agreement: Mapping[str, AgreementFigures] = MappingProxyType({}),
) -> tuple[LayerStatistics, ...]:
    """What the meters counted, as records: of layers that saw a token."""
    layers, found, joint = moe_layers(model), meter.figures(), meter.joint_figures()
    return tuple(
        LayerStatistics(
            name=name,
            label=label,
            load=figures.load,
            domain_load=dict(zip(domains, figures.domain_load, strict=True)),
            figures=numbers(figures)
            | pair_numbers(joint.get(name), composed.get(name))
            | competition_numbers(agreement.get(name)),
            pairs=joint[name].histogram if name in joint else None,
        )
        for layer, label in zip(layers, labels(layers), strict=True)
        if (figures := found.get(name := layer.name)) is not None
    )


def numbers(figures: RoutingFigures) -> dict[str, float | None]:
    """Return every field that holds one number or None, except the two that exist only in training."""
    values = {f.name: getattr(figures, f.name) for f in fields(figures) if f.name not in ("competing", "agreement")}
    return {name: finite(value) for name, value in values.items() if value is None or isinstance(value, int | float)}


def pair_numbers(joint: JointFigures | None, composed: ComposedFigures | None) -> dict[str, float | None]:
    """Of a layer that another MoE layer of its block stands before."""
    return {
        "pair_information": joint and joint.mutual_information,
        "pair_information_shuffled": joint and joint.mutual_information_shuffled,
        "composed": composed and composed.size,
        "rerouted": composed and composed.rerouted,
    }


def competition_numbers(found: AgreementFigures | None) -> dict[str, float | None]:
    """Of a router beside competition; the best fixed choice stands for chance."""
    if found is None:
        return {}
    values = asdict(found) | {"corrected_agreement": found.corrected_agreement}
    del values["tokens"]
    values["agreement_shuffled"] = values.pop("static_agreement")
    return {name: finite(value) for name, value in values.items()}


def finite(value: float | int | None) -> float | None:
    """A number that a record can hold; None where it is not finite or not known."""
    return None if value is None or not math.isfinite(value) else float(value)


def held_out(
    evaluation: Evaluation,
    document_bytes: Int[np.ndarray, " documents"],
    document_domain: Int[np.ndarray, " documents"],
    domains: Sequence[str],
) -> HeldOut:
    """The endpoint of a run, over all documents and per domain."""
    nll, tokens = evaluation.nll, evaluation.tokens

    def domain_loss(chosen: np.ndarray) -> DomainLoss:
        return DomainLoss(
            loss=float(nll[chosen].sum() / tokens[chosen].sum()),
            bits_per_byte=float(nll[chosen].sum() / math.log(2) / document_bytes[chosen].sum()),
            tokens=int(tokens[chosen].sum()),
        )

    everything = domain_loss(tokens > 0)
    return HeldOut(
        loss=everything.loss,
        perplexity=math.exp(everything.loss) if everything.loss < 700 else None,
        bits_per_byte=everything.bits_per_byte,
        domains={
            domain: domain_loss(chosen)
            for index, domain in enumerate(domains)
            if (chosen := (document_domain == index) & (tokens > 0)).any()
        },
    )
