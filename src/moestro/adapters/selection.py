"""A router's own rule with experts banned or logits disturbed, whatever the rule is: it is changed while it runs.

Routers of all families make logits by a matrix product, scores of those, and choose by `topk` (or `max`) of what has a
column per expert, some of them within the best groups of experts. While a `Selection` is entered, banned experts are
minus infinity to whatever chooses, and noise is added to the product. All else of the rule is left as it is: the
weights come from scores that know of no ban.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torch.overrides import TorchFunctionMode

PRODUCTS = {F.linear, torch.mm, torch.matmul, torch.addmm, Tensor.mm, Tensor.matmul, Tensor.__matmul__}
CHOICES = {torch.topk, torch.max, Tensor.topk, Tensor.max}
SOFTMAXES = {F.softmax, torch.softmax, Tensor.softmax}


class Selection(TorchFunctionMode):
    """Changes how experts are selected by what runs while it is entered."""

    def __init__(
        self,
        tokens: int,
        num_experts: int,
        banned: Bool[Tensor, "tokens experts"] | None = None,
        noise: Float[Tensor, "tokens experts"] | None = None,
        product: int | None = None,
    ) -> None:
        super().__init__()
        self.tokens, self.num_experts = tokens, num_experts
        self.banned, self.noise = banned, noise
        self.product = product
        """Which of the products, counted from 0, gets the noise."""
        self.widths: list[int] = []
        """Columns of each product for all tokens so far, until the first choice is made."""
        self.chosen = False
        """Whether experts were chosen yet."""
        self.disturbed = False
        """Whether the noise was added."""
        self.lacking = torch.zeros(tokens, dtype=torch.bool)
        """The tokens that could not be given as many experts as the rule chooses."""
        self._compares = False
        self._groups: int | None = None
        """Groups whose scores were made, until the best of them are chosen."""
        self._in_best: Tensor | None = None
        """The experts of each token's best groups; None where the rule has no groups."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in PRODUCTS:
            return self._multiply(func(*args, **kwargs))
        if func in CHOICES and (len(args) > 1 or kwargs.keys() & {"k", "dim"}):
            return self._choose(func, *args, **kwargs)
        if func in SOFTMAXES and self._compares:
            return func(self._without_banned(args[0]), *args[1:], **kwargs)
        return func(*args, **kwargs)

    def _multiply(self, result: Tensor) -> Tensor:
        """A matrix product, disturbed where it is the one that makes the logits."""
        width = result.shape[-1]
        if self.chosen or not self._has_experts(result):
            return result
        self.widths.append(width)
        if self.noise is None or self.product != len(self.widths) - 1:
            return result
        self.disturbed = True
        logits = result.reshape(self.tokens, width)[:, : self.num_experts].float()
        added = self.noise * logits.std(-1, correction=0, keepdim=True)
        return result + F.pad(added, (0, width - self.num_experts)).view(result.shape).to(result.dtype)

    def _choose(self, func: Callable[..., Any], scores: Tensor, *args: Any, **kwargs: Any) -> Any:
        """`topk` or `max`: among experts, among those of one group, among groups, or of something else."""
        if self._groups is not None and scores.shape == (self.tokens, self._groups):
            return self._choose_groups(func(scores, *args, **kwargs))
        if self._has_experts(scores):
            self.chosen = True
            best = func(self._without_banned(scores), *args, **kwargs)
            self._compares = func in (torch.max, Tensor.max)
            self._count_lacking(best.values.reshape(self.tokens, -1))
            return best
        if scores.ndim != 3 or scores.shape[0] != self.tokens or scores[0].numel() != self.num_experts:
            return func(scores, *args, **kwargs)
        self._groups = scores.shape[1]
        if self.banned is None:
            return func(scores, *args, **kwargs)
        best = func(scores.masked_fill(self.banned.view(scores.shape), float("-inf")), *args, **kwargs)
        return best if best.values.ndim < scores.ndim else type(best)((summable(best.values), best.indices))

    def _choose_groups(self, best: Any) -> Any:
        """Remember which experts are in the best groups. There may be as many groups as experts."""
        assert self._groups is not None
        chosen = torch.zeros(self.tokens, self._groups, dtype=torch.bool, device=best.indices.device)
        chosen.scatter_(-1, best.indices.view(self.tokens, -1), True)
        self._in_best = chosen.repeat_interleave(self.num_experts // self._groups, dim=-1)
        self._groups = None
        return best

    def _count_lacking(self, chosen: Float[Tensor, "tokens k"]) -> None:
        """Note the tokens whose choice went beyond what the ban leaves of their best groups.

        Some rules put 0 and not minus infinity outside the best groups: there the choice would go on, with weight 0.
        """
        lacking = chosen.isneginf().any(-1)
        if self._in_best is not None and self.banned is not None:
            left = (self._in_best & ~self.banned).sum(-1)
            lacking = lacking | (left < self._in_best.sum(-1).clamp_max(chosen.shape[-1]))
        self.lacking = self.lacking.to(lacking.device) | lacking

    def _has_experts(self, scores: Tensor) -> bool:
        """Whether it is a row of all experts for every token; some families score one class more, or shared experts."""
        width = scores.shape[-1] if scores.ndim > 1 else 0
        return width >= self.num_experts and scores.numel() == self.tokens * width

    def _without_banned(self, scores: Tensor) -> Tensor:
        """The scores, minus infinity at banned experts."""
        if self.banned is None or not self._has_experts(scores):
            return scores
        banned = F.pad(self.banned, (0, scores.shape[-1] - self.num_experts))
        return scores.masked_fill(banned.view(scores.shape), float("-inf"))


def summable(best: Float[Tensor, "tokens groups k"]) -> Float[Tensor, "tokens groups k"]:
    """A group's best scores, to be added up: a banned one adds nothing, and a group without others is last.

    As `moestro.routers.in_best_groups` has it.
    """
    banned = best.isneginf()
    return best.masked_fill(banned & ~banned.all(-1, keepdim=True), 0.0)
