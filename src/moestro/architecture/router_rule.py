"""`RouterRule`: how a router chooses experts. `moestro.routers` applies it to logits."""

from dataclasses import dataclass
from typing import Literal

from moestro.errors import Misuse
from moestro.gate.ranges import Experts, Positive, check_fields


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterRule:
    """The rule by which a router turns logits into chosen experts and their weights.

    Paper: DeepSeek-V3 (arXiv:2412.19437), Eq. 14 to 16 for sigmoid, bias and groups; Shazeer et al. 2017
    (arXiv:1701.06538) for softmax.
    """

    scores: Literal["softmax", "sigmoid"] = "softmax"
    renormalise: bool = True
    """Divide a token's weights by their sum."""
    scale: Positive = 1.0
    """Factor on the weights, after renormalisation ("routed scaling factor")."""
    selection_bias: bool = False
    """Add a bias to the scores for selection, never to the weights; `moestro.balance` moves it between steps."""
    num_groups: Experts = 1
    top_groups: Experts = 1
    """Experts come from the best `top_groups` of `num_groups` equal groups; a group's score sums its two best."""

    def __post_init__(self) -> None:
        check_fields(self)

    def validate(self, num_experts: int, top_k: int) -> None:
        """Raise Misuse unless this rule can choose `top_k` of `num_experts`."""
        if not 1 <= top_k <= num_experts:
            raise Misuse(f"top_k must lie between 1 and num_experts ({num_experts}), got {top_k}")
        if num_experts % self.num_groups:
            raise Misuse(f"num_groups must divide num_experts ({num_experts}), got {self.num_groups}")
        if not 1 <= self.top_groups <= self.num_groups:
            raise Misuse(f"top_groups must lie between 1 and num_groups ({self.num_groups}), got {self.top_groups}")
        reachable = num_experts // self.num_groups * self.top_groups
        if top_k > reachable:
            raise Misuse(
                f"top_k must not exceed the {reachable} experts in top_groups ({self.top_groups}), got {top_k}"
            )
