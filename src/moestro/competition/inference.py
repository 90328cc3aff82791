"""Competition where a model is used: what the router was to learn, at the cost of all experts for every token."""

from collections.abc import Mapping

import torch

from moestro.competition.responses import responses
from moestro.competition.scaling import ResponseStatistics, scaled
from moestro.competition.settings import Compete
from moestro.competition.winners import shares, strongest, to_winners, used_slots
from moestro.errors import Misuse
from moestro.routing import Proposal, Reroute, Routing


def by_competition(rule: Compete, statistics: Mapping[str, ResponseStatistics] | None = None) -> Reroute:
    """Every token goes to the experts that respond most, for `moestro.reroute`: the bound of what can be distilled.

    `statistics`, by layer name, bring responses on one scale unless its response_scale is none.
    """
    if rule.response_scale != "none" and statistics is None:
        raise Misuse(f"response_scale = {rule.response_scale} needs statistics of responses")

    def compete(proposal: Proposal) -> Routing:
        layer, proposed = proposal.layer, proposal.routing
        response = responses(proposal.run, proposal.hidden, layer.num_experts, rule.respond)
        strength = scaled(response, rule.response_scale, None if statistics is None else statistics[layer.name])
        winner = strongest(strength, proposed.expert.shape[1])
        scores = None if proposed.scores is None else proposed.scores.gather(-1, winner)
        share = shares(strength.gather(-1, winner), rule.weights, rule.temperature, scores)
        token = torch.arange(len(winner), device=winner.device)
        used = used_slots(proposed, token, torch.ones_like(token, dtype=torch.bool))
        return to_winners(proposed, token, used, winner, share)

    return compete
