"""The feed-forward sub-layers: a router, experts on transformers' experts interface, shared experts, and their mix."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation

from moestro.architecture.sub_layers import Dense, MoE, SubLayer
from moestro.models.configuration import MoestroConfig
from moestro.routers import route
from moestro.routing import Routing


class Router(nn.Module):
    """A weight matrix and a rule: tokens to a `Routing`.

    Returns transformers' triple (logits, weights, indices), so that whatever hooks stock routers hooks this one; all
    in fp32, under autocast too, because a choice between near-equal logits should not depend on rounding.
    """

    def __init__(self, config: MoestroConfig, spec: MoE):
        super().__init__()
        self.rule = spec.router
        self.top_k = spec.top_k
        self.num_experts = spec.num_experts
        self.weight = nn.Parameter(torch.empty(spec.num_experts, config.hidden_size))
        if spec.router.selection_bias:
            self.e_score_correction_bias = nn.Buffer(torch.zeros(spec.num_experts))

    @property
    def selection_bias(self) -> Float[Tensor, " experts"] | None:
        """The bias of selection, or None where the rule has none."""
        return self.e_score_correction_bias if self.rule.selection_bias else None

    def routing(self, hidden: Float[Tensor, "tokens dim"]) -> Routing:
        """The choice for each token, as a record."""
        with torch.autocast(hidden.device.type, enabled=False):
            logits = F.linear(hidden.float(), self.weight.float())
        return route(logits, self.rule, self.top_k, bias=self.selection_bias)

    def forward(
        self, hidden: Float[Tensor, "tokens dim"]
    ) -> tuple[Float[Tensor, "tokens experts"], Float[Tensor, "tokens k"], Int[Tensor, "tokens k"]]:
        """(logits, weights, indices) of the choice."""
        routing = self.routing(hidden)
        assert routing.logits is not None
        return routing.logits, routing.weight, routing.expert


@use_experts_implementation
class Experts(nn.Module):
    """The routed SwiGLU experts as fused 3-D weights, run by whichever experts backend the config names.

    What stands below is the `eager` backend. It unbinds the weights once: indexing `weight[e]` inside a loop would
    write a zero gradient of the size of all experts for each of them.
    """

    def __init__(self, config: MoestroConfig, spec: MoE):
        super().__init__()
        self.num_experts = spec.num_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = spec.width
        self.gate_up_proj = nn.Parameter(torch.empty(spec.num_experts, 2 * spec.width, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(spec.num_experts, config.hidden_size, spec.width))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self,
        hidden_states: Float[Tensor, "tokens dim"],
        top_k_index: Int[Tensor, "tokens k"],
        top_k_weights: Float[Tensor, "tokens k"],
    ) -> Float[Tensor, "tokens dim"]:
        """The weighted sum of each token's experts."""
        output = torch.zeros_like(hidden_states)
        weights = zip(self.gate_up_proj.unbind(0), self.down_proj.unbind(0), strict=True)
        for expert, (gate_up, down) in enumerate(weights):
            token, slot = torch.where(top_k_index == expert)
            inner = self._apply_gate(F.linear(hidden_states[token], gate_up))  # type: ignore[operator]  # the decorator's
            weighted = F.linear(inner, down) * top_k_weights[token, slot, None]
            output = output.index_add(0, token, weighted.to(output.dtype))
        return output


def writes_to_the_stream(projection: nn.Linear) -> nn.Linear:
    """Mark a projection whose output is added to the residual stream, for its initial weights."""
    projection.writes_to_the_stream = True  # type: ignore[assignment]
    return projection


class DenseFeedForward(nn.Module):
    """A SwiGLU network; also what shared experts are made of (n of them side by side are one of n times the width)."""

    def __init__(self, config: MoestroConfig, width: int):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = writes_to_the_stream(nn.Linear(width, config.hidden_size, bias=False))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden: Float[Tensor, "... dim"]) -> Float[Tensor, "... dim"]:
        """down(act(gate x) * up x)."""
        return self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))


class ConvexMix(nn.Module):
    """c_1 routed + c_2 shared with c = softmax(V x + b).

    Paper: CartesianMoE, Su et al. 2024, arXiv:2410.16077 (docs/papers.md).
    """

    def __init__(self, config: MoestroConfig):
        super().__init__()
        self.proj = nn.Linear(config.hidden_size, 2)

    def forward(
        self,
        hidden: Float[Tensor, "tokens dim"],
        routed: Float[Tensor, "tokens dim"],
        shared: Float[Tensor, "tokens dim"],
    ) -> Float[Tensor, "tokens dim"]:
        """The mix, its two shares computed in fp32."""
        with torch.autocast(hidden.device.type, enabled=False):
            logits = F.linear(hidden.float(), self.proj.weight.float(), self.proj.bias.float())
        # Shares sum to one: the first of a two-way softmax is a sigmoid, and one pass over the outputs mixes them.
        share = (logits[:, :1] - logits[:, 1:]).sigmoid()
        return torch.lerp(shared.to(routed.dtype), routed, share.to(routed.dtype))


class SparseMoE(nn.Module):
    """One MoE sub-layer: route, run, mix. Norm and residual stay outside, where serving engines expect them."""

    def __init__(self, config: MoestroConfig, spec: MoE):
        super().__init__()
        self.router = Router(config, spec)
        self.experts = Experts(config, spec)
        self.num_shared = spec.num_shared
        self.shared_expert = DenseFeedForward(config, spec.total_shared_width) if spec.num_shared else None
        self.mix = ConvexMix(config) if spec.mix == "convex" else None

    def forward(
        self,
        hidden: Float[Tensor, "batch sequence dim"],
        routed_by: Float[Tensor, "batch sequence dim"] | None = None,
    ) -> Float[Tensor, "batch sequence dim"]:
        """Route each token (by `routed_by` where that is given), run its experts, mix in the shared ones."""
        tokens = hidden.flatten(0, -2)
        _, weight, expert = self.router(tokens if routed_by is None else routed_by.flatten(0, -2))
        routed = self.experts(tokens, expert, weight)
        return self.with_shared(tokens, routed).view_as(hidden)

    def with_shared(
        self, tokens: Float[Tensor, "tokens dim"], routed: Float[Tensor, "tokens dim"]
    ) -> Float[Tensor, "tokens dim"]:
        """Join the shared experts' output: their sum is added, or their mean mixed in convexly."""
        if self.shared_expert is None:
            return routed
        shared = self.shared_expert(tokens)
        return routed + shared if self.mix is None else self.mix(tokens, routed, shared / self.num_shared)


def build_sub_layer(config: MoestroConfig, spec: SubLayer) -> DenseFeedForward | SparseMoE:
    """The module that a sub-layer's record describes."""
    return DenseFeedForward(config, spec.width) if isinstance(spec, Dense) else SparseMoE(config, spec)
