"""What the routing of a layer looks like, in numbers: sums over tokens that can be added up, and figures made of them.

`RoutingSums` of two batches (micro-batches, ranks) add; `RoutingFigures` are computed once at the end. Definitions:
docs/papers.md.
"""

from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Float
from torch import Tensor

from moestro.information import expected_mutual_information, mutual_information, total_entropy
from moestro.losses import slot_scores
from moestro.routing import LayerRecord, choices_per_group, chosen
from moestro.samples import cosine_sums, first_slot, overlap_sums


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingSums:
    """Sums over the valid tokens that one layer saw; float64, so that long runs lose no count."""

    choices: Float[Tensor, "domains experts"]
    """Edges from each domain's tokens to each expert (one domain where none are known)."""
    score: Float[Tensor, " experts"]
    slot_score: Float[Tensor, " experts"]
    """s: a token's scores after top-k, of sum 1."""
    slot_score_square: Float[Tensor, ""]
    """||s||^2."""
    entropy: Float[Tensor, ""]
    confidence: Float[Tensor, ""]
    """Score of each token's first choice."""
    choosing: Float[Tensor, ""]
    """Tokens with at least one chosen expert; some routers choose none for a token."""
    tokens: Float[Tensor, ""]
    batch_max_vio: Float[Tensor, ""]
    batches: Float[Tensor, ""]
    sequences: Float[Tensor, ""]
    """Those that hold a valid token. A sequence must not be cut between batches."""
    sequence_entropy: Float[Tensor, ""]
    """Entropy of each sequence's load times its edges."""
    pairs: Float[Tensor, ""]
    """Pairs of outputs that cosines were taken of; 0 where no sample was looked at. Ordered: (j, k) and (k, j)."""
    cosine: Float[Tensor, ""]
    cosine_square: Float[Tensor, ""]
    points: Float[Tensor, ""]
    """Tokens whose neighbours were looked at."""
    overlap: Float[Tensor, ""]
    overlap_shuffled: Float[Tensor, ""]
    competing: Float[Tensor, ""]
    """Tokens that competed."""
    winners: Float[Tensor, ""]
    """Experts that won one."""
    agreed: Float[Tensor, ""]
    """Winners that the router had chosen too."""

    def __add__(self, other: "RoutingSums") -> "RoutingSums":
        return RoutingSums(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingFigures:
    """One layer's routing, summed up. Information is in nats, and that of labels per choice: k of them per token.

    What is called `shuffled` is the expected value of the figure before it if labels were dealt to tokens at random:
    few tokens look specialised by chance. What is left above it is evidence.
    """

    load: tuple[float, ...]
    """Share of choices per expert; sums to 1."""
    domain_load: tuple[tuple[float, ...], ...]
    """The same within each domain; all zero for a domain without tokens."""
    max_vio_batch: float
    """Mean over batches, as they ran, of (largest load - mean load) / mean load."""
    max_vio_data: float
    """The same for the load over all batches together: it does not depend on how they were cut."""
    dead_experts: int
    """Experts that nobody chose."""
    entropy: float
    """Mean entropy of a token's scores, in nats: 0 when certain, log(num_experts) when uniform."""
    confidence: float
    """Mean score of a token's first choice, the chosen expert of largest weight; over tokens that chose one."""
    mutual_information: float
    """Between token and expert, in nats: entropy of the mean scores minus mean entropy of the scores."""
    domain_mutual_information: float
    """Between domain and expert, in nats, from the counts of choices."""
    domain_mutual_information_shuffled: float
    sequence_mutual_information: float
    """Between sequence and expert, in nats, from the counts of choices over all sequences."""
    sequence_mutual_information_shuffled: float
    score_square: float
    """E||s||^2, how decided tokens are: 1 when one-hot, 1 / k when a token's experts share alike."""
    mean_score_square: float
    """||E s||^2, how imbalanced experts are: 1 / num_experts when balanced, 1 when all tokens go to one."""
    column_variance: float
    """Their difference: the variance of s over tokens, summed over experts. 0 when collapsed."""
    cosine: float | None = None
    """Mean cosine of the outputs of two experts of one token; None where no outputs were looked at."""
    cosine_square: float | None = None
    """Mean square of that cosine: about 1 / hidden size for random directions."""
    overlap: float | None = None
    """Mean share of a token's nearest tokens, `moestro.samples.NEIGHBOURS` of them by the layer's input, whose first
    expert is another."""
    overlap_shuffled: float | None = None
    competing: int | None = None
    """Tokens that competed; None where none did."""
    agreement: float | None = None
    """Share of the winners of their tokens that the router had chosen too; None where nobody won."""

    @property
    def domain_mutual_information_excess(self) -> float:
        """What the domain tells of the expert, above chance."""
        return self.domain_mutual_information - self.domain_mutual_information_shuffled

    @property
    def sequence_mutual_information_excess(self) -> float:
        """What the sequence tells of the expert, above chance."""
        return self.sequence_mutual_information - self.sequence_mutual_information_shuffled


@torch.no_grad()
def routing_sums(record: LayerRecord, num_domains: int = 1, sample: LayerRecord | None = None) -> RoutingSums:
    """The sums of one layer in one batch. Tokens whose domain is unknown count as the first.

    `sample`: some of its tokens, with outputs where those are known. Overlap and cosines are taken of it: overlap
    costs the square of its tokens. Without a sample nothing here waits for the device.
    """
    record = with_scores(record)
    batch, scores = record.batch, record.routing.scores
    assert scores is not None
    load_of_sequence = choices_per_group(
        record.routing, batch, batch.sequence, batch.num_sequences, record.layer.num_experts
    ).double()
    load = load_of_sequence.sum(0)
    if batch.valid is not None:  # what stands at padding may be anything, NaN included
        scores = scores.masked_fill(~batch.valid[:, None], 0.0)
    one = torch.ones_like(load[0])
    return RoutingSums(
        choices=choices_of_domains(record, num_domains, load),
        score=scores.sum(0, dtype=torch.float64),
        **slot_score_sums(record),
        entropy=torch.special.entr(scores).sum(dtype=torch.float64),
        **confidence_sums(record, scores),
        tokens=one * len(scores) if batch.valid is None else batch.valid.sum(dtype=torch.float64),
        batch_max_vio=max_violation(load),
        batches=one,
        sequences=(load_of_sequence.sum(-1) > 0).sum(dtype=torch.float64),
        sequence_entropy=total_entropy(load_of_sequence),
        **cosine_sums(sample, one),
        **overlap_sums(sample, one),
        **competition_sums(record, one),
    )


def no_sums(num_domains: int, num_experts: int, device: torch.device) -> RoutingSums:
    """The sums of a layer that saw no token."""
    shapes = {"choices": (num_domains, num_experts), "score": (num_experts,), "slot_score": (num_experts,)}
    return RoutingSums(
        **{f.name: torch.zeros(shapes.get(f.name, ()), dtype=torch.float64, device=device) for f in fields(RoutingSums)}
    )


def with_scores(record: LayerRecord) -> LayerRecord:
    """The record, where nothing is learned with equal scores for a token's experts."""
    routing = record.routing
    if routing.scores is not None:
        return record
    used = torch.ones_like(routing.expert, dtype=torch.float32) if routing.edge is None else routing.edge.float()
    scores = torch.zeros(len(used), record.layer.num_experts, device=used.device).scatter_add(1, routing.expert, used)
    return replace(record, routing=replace(routing, scores=normalised(scores)))


def choices_of_domains(
    record: LayerRecord, num_domains: int, load: Float[Tensor, " experts"]
) -> Float[Tensor, "domains experts"]:
    """Count the choices of each expert by domain; without domains, all of `load` belongs to the first.

    `load` counts each expert's choices by all tokens.
    """
    if record.batch.domain is None:
        others = load.new_zeros(num_domains - 1, len(load))
        return torch.cat([load[None], others])
    return choices_per_group(record.routing, record.batch, record.batch.domain, num_domains, len(load)).double()


def slot_score_sums(record: LayerRecord) -> dict[str, Tensor]:
    """Sums of s and of its squared length."""
    share = slot_scores(record).double()
    expert = record.routing.expert.flatten()
    total = share.new_zeros(record.layer.num_experts).index_add_(0, expert, share.flatten())
    return {"slot_score": total, "slot_score_square": share.square().sum()}


def confidence_sums(record: LayerRecord, scores: Float[Tensor, "tokens experts"]) -> dict[str, Tensor]:
    """Return the sum of the scores at first choices, and the number of first choices.

    A first choice need not have the largest score, because of selection biases, groups and disabled experts.
    """
    used = chosen(record.routing, record.batch) > 0
    first = record.routing.expert.gather(1, first_slot(record, used))
    chose = used.any(-1)
    score = scores.gather(1, first)[:, 0].masked_fill(~chose, 0.0)
    return {"confidence": score.sum(dtype=torch.float64), "choosing": chose.sum(dtype=torch.float64)}


def competition_sums(record: LayerRecord, one: Float[Tensor, ""]) -> dict[str, Tensor]:
    """Tokens that competed, and what the router knew of their winners; zeros where nobody did."""
    met = record.competition
    if met is None:
        return dict.fromkeys(("competing", "winners", "agreed"), 0 * one)
    sums = {"competing": met.filled.sum(dtype=torch.float64), "winners": 0 * one, "agreed": 0 * one}
    if met.winner is not None:
        proposed = record.proposed.expert
        if record.proposed.edge is not None:
            proposed = proposed.masked_fill(~record.proposed.edge, -1)  # unused slots hold no choice
        known = (proposed[met.token][:, :, None] == met.winner[:, None, :]).any(1)
        sums["winners"] = met.filled.sum(dtype=torch.float64) * met.winner.shape[1]
        sums["agreed"] = (known & met.filled[:, None]).sum(dtype=torch.float64)
    return sums


def max_violation(load: Float[Tensor, " experts"]) -> Float[Tensor, ""]:
    """(largest load - mean load) / mean load: 0 when balanced, num_experts - 1 when one expert gets everything.

    Paper: Wang et al. 2024, arXiv:2408.15664, Eq. 4 (MaxVio). 0 where there is no load at all.
    """
    mean = load.mean()
    return torch.where(mean > 0, (load.amax() - mean) / mean.clamp_min(1e-12), torch.zeros_like(mean))


def routing_figures(sums: RoutingSums) -> RoutingFigures:
    """The figures of one layer from its sums."""
    load = sums.choices.sum(0)
    tokens = sums.tokens.clamp_min(1)
    mean_entropy = sums.entropy / tokens
    score_square = sums.slot_score_square / tokens
    mean_score_square = (sums.slot_score / tokens).square().sum()
    in_sequence = sums.sequence_entropy / load.sum().clamp_min(1)
    return RoutingFigures(
        load=tuple(normalised(load).tolist()),
        domain_load=tuple(map(tuple, normalised(sums.choices).tolist())),
        max_vio_batch=float(sums.batch_max_vio / sums.batches.clamp_min(1)),
        max_vio_data=float(max_violation(load)),
        dead_experts=int((load == 0).sum()),
        entropy=float(mean_entropy),
        confidence=float(sums.confidence / sums.choosing.clamp_min(1)),
        mutual_information=float(torch.special.entr(sums.score / tokens).sum() - mean_entropy),
        domain_mutual_information=float(mutual_information(sums.choices)),
        domain_mutual_information_shuffled=float(shuffled_domains(sums)),
        sequence_mutual_information=float(torch.special.entr(normalised(load)).sum() - in_sequence),
        sequence_mutual_information_shuffled=float(shuffled_sequences(sums)),
        score_square=float(score_square),
        mean_score_square=float(mean_score_square),
        column_variance=float(score_square - mean_score_square),
        cosine=_mean(sums.cosine, sums.pairs),
        cosine_square=_mean(sums.cosine_square, sums.pairs),
        overlap=_mean(sums.overlap, sums.points),
        overlap_shuffled=_mean(sums.overlap_shuffled, sums.points),
        competing=int(sums.competing) or None,
        agreement=_mean(sums.agreed, sums.winners),
    )


def _mean(total: Float[Tensor, ""], count: Float[Tensor, ""]) -> float | None:
    return float(total / count) if count > 0 else None


def normalised(count: Float[Tensor, "*rows experts"]) -> Float[Tensor, "*rows experts"]:
    """Counts as shares of their row; a row without counts stays zero."""
    return count / count.sum(-1, keepdim=True).clamp_min(1)


def shuffled_domains(sums: RoutingSums) -> Float[Tensor, ""]:
    """Expected mutual information of domain and expert if the tokens' domains were shuffled."""
    edges_per_token = sums.choices.sum() / sums.tokens.clamp_min(1)
    tokens = (sums.choices.sum(1) / edges_per_token.clamp_min(1e-12)).round()
    return expected_mutual_information(tokens, torch.ones_like(tokens), sums.choices.sum(0))


def shuffled_sequences(sums: RoutingSums) -> Float[Tensor, ""]:
    """Expected mutual information of sequence and expert if tokens were shuffled between sequences.

    Lengths of sequences are not kept: they count as equal, which matters little as long as each is expected to choose
    an expert more than once or twice.
    """
    sequences = sums.sequences.clamp_min(1)
    shorter = (sums.tokens / sequences).floor()
    longer = sums.tokens - shorter * sequences  # so many sequences have a token more than the others
    tokens, times = torch.stack([shorter, shorter + 1]), torch.stack([sequences - longer, longer])
    return expected_mutual_information(tokens, times, sums.choices.sum(0))
