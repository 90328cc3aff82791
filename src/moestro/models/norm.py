"""Root-mean-square norm in few passes over memory, where transformers' takes one per operation.

A composed block has a norm more than an ordinary one. On a CPU, where nothing fuses its operations, transformers' norm
took two to three times as long as this one, forward and backward (docs/log.md).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm


class RMSNorm(Qwen3MoeRMSNorm):
    """w * x / sqrt(mean(x^2) + eps), computed in fp32: the same weights and values as transformers' norm."""

    def forward(self, hidden_states: Float[Tensor, "... dim"]) -> Float[Tensor, "... dim"]:
        """Normalised over the last dimension, in the type that comes in."""
        hidden, weight = hidden_states.float(), self.weight.float()
        if hidden.device.type == "cpu" and not torch.compiler.is_compiling():
            normed = _FewPasses.apply(hidden, weight, self.variance_epsilon)
        else:
            normed = F.rms_norm(hidden, weight.shape, weight, self.variance_epsilon)
        return normed.to(hidden_states.dtype)


class _FewPasses(torch.autograd.Function):
    """The norm and its gradient, written out so that temporaries are reused in place."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
        scale = scale.square_().div_(hidden.shape[-1]).add_(eps).rsqrt_()
        unit = hidden * scale
        ctx.save_for_backward(unit, weight, scale)
        return unit * weight

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        """With u = x s: dw = sum g u, dx = s (g w - u mean(g w u))."""
        unit, weight, scale = ctx.saved_tensors
        product = gradient * unit
        with torch.autocast(gradient.device.type, enabled=False):
            mean = (product @ weight).div_(weight.shape[0]).unsqueeze(-1)
        of_hidden = (gradient * weight).addcmul_(unit, mean, value=-1).mul_(scale)
        return of_hidden, product.flatten(0, -2).sum(0), None
