"""Competition where a model is used: what the router was to learn, at the cost of all experts for every token.

There is no step before it, so a text's own responses say what brings them on one scale.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from moestro.competition.responses import response_of, responses
from moestro.competition.scaling import (
    ResponseStatistics,
    deviation_within,
    next_offset,
    response_sums,
    scaled,
    statistics_of,
    wins_of,
)
from moestro.competition.settings import Compete
from moestro.competition.winners import shares, strongest, to_winners, used_slots
from moestro.errors import Misuse
from moestro.routing import Proposal, Reroute, Routing

EVEN_TOKENS, EVEN_STEPS, EVEN_RATE, EVEN_WITHIN = 2048, 64, 0.1, 0.02
"""How the offsets are found under which experts win a sample about equally often: by so many of its tokens, in at most
so many steps at this rate, fewer where no expert is further from the mean than that share of it."""


def sample_statistics(response: Float[Tensor, "tokens experts"], rule: Compete, k: int) -> ResponseStatistics:
    """Those of a sample by itself; where winners are balanced, with offsets by which all win about equally often."""
    everyone = torch.ones(len(response), dtype=torch.bool, device=response.device)
    found = statistics_of(response_sums(response, everyone, rule.response_scale))
    if not rule.balance_winners:
        return found
    some = slice(None, None, -(-len(response) // EVEN_TOKENS))
    strength, offset = scaled(response[some], rule.response_scale, found), found.offset
    within = deviation_within(response[some], rule.response_scale, found).mean()
    for _ in range(EVEN_STEPS):
        wins = wins_of(strongest(strength + offset, k), everyone[some], response.shape[1])
        if (wins - wins.mean()).abs().max() <= EVEN_WITHIN * wins.mean():
            break
        offset = next_offset(offset, wins, within, EVEN_RATE)
    return replace(found, offset=offset)


def by_competition(rule: Compete, statistics: Mapping[str, ResponseStatistics] | None = None) -> Reroute:
    """Every token goes to the experts that respond most, for `moestro.reroute`: the bound of what can be distilled.

    `statistics`, by layer name, bring responses on one scale unless its response_scale is none.
    """
    if rule.response_scale != "none" and statistics is None:
        raise Misuse(f"response_scale = {rule.response_scale} needs statistics of responses")

    def compete(proposal: Proposal) -> Routing:
        layer, proposed = proposal.layer, proposal.routing
        if statistics is not None and layer.name not in statistics:
            raise Misuse(f"statistics of responses lack {layer.name}")
        if rule.weights == "router" and proposed.scores is None:
            raise Misuse(f"weights = router needs a router with scores, but the router of {layer.name} has none")
        response = responses(proposal.run, proposal.hidden, layer.num_experts, response_of(rule))
        strength = scaled(response, rule.response_scale, None if statistics is None else statistics[layer.name])
        winner = strongest(strength, proposed.expert.shape[1])
        scores = None if proposed.scores is None else proposed.scores.gather(-1, winner)
        share = shares(strength.gather(-1, winner), rule.weights, rule.temperature, scores)
        token = torch.arange(len(winner), device=winner.device)
        used = used_slots(proposed, token, torch.ones_like(token, dtype=torch.bool))
        return to_winners(proposed, token, used, winner, share)

    return compete
