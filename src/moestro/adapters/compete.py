"""Competition in one layer of a model while it trains: all experts answer some tokens, and the strongest win them.

Answers are computed without graph: experts that lose cost their forward pass and no more. The winners then run with
everybody else's tokens, in the one pass over the experts that there is anyway.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moestro.adapters.ranks import over_ranks
from moestro.adapters.tap import Rerouted, Tap
from moestro.competition.responses import check_response, response_of, responses
from moestro.competition.scaling import DECAY, ResponseStatistics, next_offset, response_sums, scaled, statistics_of
from moestro.competition.schedule import competes_in_step, competing_tokens
from moestro.competition.settings import Compete
from moestro.competition.winners import preferences, shares, strongest, to_winners, used_slots
from moestro.errors import Misuse, TrainingFailed
from moestro.randomness import content, hashed, number_of
from moestro.routing import Batch, Competition, MoELayer, Routing

logger = logging.getLogger(__name__)

ENOUGH = 8
"""Tokens that must have competed before their responses say what brings others on one scale."""

MOST_WITHIN = 2.0
"""Deviations within tokens are about 1 where statistics fit the experts. Where they do not yet (experts that began at
0), offsets shall not be moved by the misfit: nothing would bring them back soon."""


class Competitor:
    """One layer's competition: who competes now, and what is known of its experts' responses.

    It changes between optimiser steps alone (`step`), so that a recomputation, and any cut of a batch, sees the same.
    """

    def __init__(self, rule: Compete, layer: MoELayer, index: int, num_layers: int, *, diverse: bool = False) -> None:
        self.rule, self.layer, self.index, self.num_layers = rule, layer, index, num_layers
        self.wants_outputs = rule.through_weights or diverse
        """Whether each chosen expert's own output is needed where experts compete."""
        self.sums: Tensor | None = None
        """Moments of the responses since the last optimiser step."""
        self.seen: Tensor | None = None
        """Of earlier steps, ever less of them."""
        self.offset: Tensor | None = None
        """Offset of each expert's strength, moved by `balance_winners`."""
        self.statistics: ResponseStatistics | None = None
        self.counts: Tensor | None = None
        """Tokens that competed since the last optimiser step, and how many of them had non-finite responses."""
        self.warned = False
        self.begin(0)

    def begin(self, step: int) -> None:
        """Be in optimiser step `step`, counted from 0."""
        rule = self.rule
        turn = (step, self.index, self.num_layers, rule.rate, rule.max_layers, rule.seed)
        self.competes = not rule.rests(step) and (rule.by == "tokens" or competes_in_step(*turn))
        # A tensor that is replaced: a compiled model would compile a number in anew at every step.
        self.key = torch.tensor(number_of(f"compete {rule.seed} {self.layer.name} {step}"))

    def step(self, step: int) -> None:
        """Take in what was seen since the last optimiser step, over all ranks, and be in step `step`."""
        self.check_counts()
        if self.sums is not None:
            sums, self.sums = over_ranks(self.sums), None
            moments, (wins, within) = sums[:3], sums[3:]
            self.seen = moments if self.seen is None else DECAY * self.seen + moments
            if self.statistics is not None or bool(self.seen[0, 0] >= ENOUGH):
                offset = torch.zeros_like(wins) if self.offset is None else self.offset
                within = (within / (wins.sum() / self.layer.top_k).clamp_min(1)).clamp_max(MOST_WITHIN)
                self.offset = next_offset(offset, wins, within, self.rule.balance_winners)
                self.statistics = statistics_of(self.seen, self.offset)
        self.begin(step)

    def check_counts(self) -> None:
        """Warn once if responses are not finite; raise TrainingFailed if no response of a step is finite.

        The counts are read once per step, because reading a value waits for the device.
        """
        if self.counts is None:
            return
        (competed, lost), self.counts = over_ranks(self.counts).tolist(), None
        if lost and lost == competed:
            raise TrainingFailed(f"no response is finite at {self.layer.name}: its experts cannot compete")
        if lost and not self.warned:
            self.warned = True
            logger.warning("%d of %d competing tokens at %s have no finite response", lost, competed, self.layer.name)

    def count(self, competition: Competition) -> None:
        """Add a record's responses to the sums of the step, unless responses are not scaled."""
        if self.rule.response_scale == "none":
            return
        scale = self.rule.response_scale
        sums = response_sums(competition.response, competition.filled, scale, self.statistics, competition.winner)
        self.sums = sums if self.sums is None else self.sums + sums

    def decide(
        self, tap: Tap, batch: Batch, hidden: Float[Tensor, "tokens dim"], proposed: Routing, *args: Any
    ) -> Rerouted | None:
        """What shall run in the place of what the router proposed; None where nobody competes."""
        rule = self.rule
        if batch.input_ids is None and (rule.by == "tokens" or rule.tie_break):
            raise Misuse(
                f"competing tokens are chosen, and ties broken, by their content: the model must be called with "
                f"input_ids ({self.layer.name})"
            )
        if not self.competes:
            return None
        token, filled, key = self.competing(batch)
        read_with_graph(tap.layer.experts)
        answers = lambda part: tap.answers(part, None, *args)
        response = responses(answers, hidden.detach()[token], self.layer.num_experts, response_of(rule))
        check_response(rule, response)
        finite = response.isfinite().all(-1)  # one number that overflowed would be in the statistics for good
        counts = torch.stack([filled.sum(), (filled & ~finite).sum()])
        self.counts = counts if self.counts is None else self.counts + counts
        filled, response = filled & finite, response.masked_fill(~finite[:, None], 1.0)
        contest = Competition(token=token, filled=filled, response=response, target=None, winner=None)
        if rule.response_scale != "none" and self.statistics is None:
            return Rerouted(proposed, contest)
        strength = scaled(response, rule.response_scale, self.statistics)
        winner = strongest(strength, proposed.expert.shape[1], self.breaking(key))
        target = preferences(strength, winner, rule.target, rule.temperature)
        contest = replace(contest, target=target, winner=winner)
        return self.won(proposed, contest, winner, strength) if rule.forward else Rerouted(proposed, contest)

    def competing(
        self, batch: Batch
    ) -> tuple[Int[Tensor, " competing"], Bool[Tensor, " competing"], Int[Tensor, " competing"]]:
        """The competing tokens, which of the rows are filled, and a random number for each."""
        rule, everyone = self.rule, torch.arange(len(batch.sequence), device=batch.sequence.device)
        valid = torch.ones_like(everyone, dtype=torch.bool) if batch.valid is None else batch.valid
        if rule.by == "steps" and not rule.tie_break:  # nothing is chosen, nothing drawn
            return everyone, valid, everyone
        key = content(batch) + self.key.to(batch.sequence.device)
        token, filled = (everyone, valid) if rule.by == "steps" else competing_tokens(batch, key, rule.rate)
        return token, filled, key[token]

    def breaking(self, key: Int[Tensor, " competing"]) -> Float[Tensor, "competing experts"] | None:
        """What tells ties between experts apart."""
        if not self.rule.tie_break:
            return None
        expert = torch.arange(self.layer.num_experts, device=key.device)
        bits = hashed(hashed(hashed(key))[:, None] + expert) & (2**24 - 1)
        return self.rule.tie_break * bits.float() / 2**24

    def won(
        self,
        proposed: Routing,
        contest: Competition,
        winner: Int[Tensor, "competing k"],
        strength: Float[Tensor, "competing experts"],
    ) -> Rerouted:
        """Competing tokens go to their winners."""
        rule, token = self.rule, contest.token
        used = used_slots(proposed, token, contest.filled)

        def by(strength: Float[Tensor, "competing k"]) -> Routing:
            scores = None if proposed.scores is None else proposed.scores[token].gather(-1, winner)
            return to_winners(proposed, token, used, winner, shares(strength, rule.weights, rule.temperature, scores))

        def weigh(outputs: Float[Tensor, "tokens k dim"]) -> Float[Tensor, "tokens k"]:
            response = response_of(rule)(outputs[token].float())
            return by(scaled(response, rule.response_scale, self.statistics, winner)).weight

        routing = by(strength.gather(-1, winner))
        if not rule.balance_competing:
            cut = [detached_at(value, token, contest.filled) for value in (routing.logits, routing.scores)]
            routing = replace(routing, logits=cut[0], scores=cut[1])
        return Rerouted(routing, contest, self.wants_outputs, weigh if rule.through_weights else None)

    def state(self) -> dict[str, Tensor | None]:
        """What a resumed run needs, beside the step."""
        return {"responses": self.seen, "offset": self.offset}

    def resume(self, state: Mapping[str, list], step: int, device: torch.device) -> None:
        """Go on in step `step` with the state that was saved."""
        self.sums = self.seen = self.offset = self.statistics = None
        if "responses" in state:
            self.seen = torch.tensor(state["responses"], dtype=torch.float64, device=device)
        if self.seen is not None and "offset" in state:
            self.offset = torch.tensor(state["offset"], dtype=torch.float64, device=device)
            self.statistics = statistics_of(self.seen, self.offset)
        self.begin(step)


def read_with_graph(experts: nn.Module) -> None:
    """Compute the weights that are made of others, before anything asks for them without graph.

    PEFT keeps what its `target_parameters` make of a weight from its first reading to the end of the layer: where that
    was by answers without graph, its LoRA would get no gradient from the pass itself.
    """
    for module in experts.modules():
        for name in getattr(module, "parametrizations", ()):
            getattr(module, name)


def detached_at(
    value: Tensor | None, token: Int[Tensor, " competing"], filled: Bool[Tensor, " competing"]
) -> Tensor | None:
    """The same without gradient at the tokens that compete; the rows that nobody fills name any tokens."""
    if value is None:
        return None
    mine = value[token]
    return value.index_copy(0, token, torch.where(filled[:, None], mine.detach(), mine))
