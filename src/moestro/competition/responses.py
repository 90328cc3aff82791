"""How strongly an expert responds to a token: one number of its output."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from moestro.competition.amounts import rows_at_once
from moestro.competition.settings import NAMES, Compete, Response
from moestro.errors import Misuse

Run = Callable[[Float[Tensor, "some dim"]], Float[Tensor, "some experts out"]]
"""Runs all of a layer's experts on any tokens."""


def l2(output: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows"]:
    """Length. Paper: Pham et al. 2024, arXiv:2402.02526 (CompeteSMoE v1)."""
    return torch.linalg.vector_norm(output, dim=-1)


def rms(output: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows"]:
    """Root of the mean square: the length, whatever the width."""
    return l2(output) / output.shape[-1] ** 0.5


def softplus(output: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows"]:
    """Mean softplus. Paper: Nguyen et al. 2025, arXiv:2505.13380 (CompeteSMoE v2).

    For small outputs that is log 2 and half their mean: it hardly differs between experts, and not by their strength.
    """
    return F.softplus(output).mean(-1)


def relu(output: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows"]:
    """Mean of the positive part."""
    return output.relu().mean(-1)


def silu(output: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows"]:
    """Mean SiLU; may be negative."""
    return F.silu(output).mean(-1)


def sigmoid(output: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows"]:
    """Mean sigmoid."""
    return output.sigmoid().mean(-1)


RESPONSES: Mapping[str, Response] = MappingProxyType(
    dict(zip(NAMES, (l2, rms, softplus, relu, silu, sigmoid), strict=True))
)


def response_of(rule: Compete) -> Response:
    """Return the rule's response as a function."""
    return RESPONSES[rule.response] if isinstance(rule.response, str) else rule.response


def check_response(rule: Compete, response: Float[Tensor, "competing experts"]) -> None:
    """Raise Misuse if a function of one's own is below 0 and its logarithm is asked for."""
    own = callable(rule.response) and rule.response_scale == "log"
    if own and not torch.compiler.is_compiling() and bool((response < 0).any()):
        raise Misuse(
            f"response_scale = log needs a response that is never negative, got {response.min():.3g}: set it to "
            "standard"
        )


@torch.no_grad()
def responses(
    run: Run, hidden: Float[Tensor, "competing dim"], num_experts: int, respond: Response
) -> Float[Tensor, "competing experts"]:
    """Every expert's response to some tokens, without graph, fp32, in parts of bounded memory."""
    parts = hidden.split(rows_at_once(num_experts, hidden.shape[1]))
    return torch.cat([responses_to(run(part).float(), respond) for part in parts])


def responses_to(output: Float[Tensor, "some experts out"], respond: Response) -> Float[Tensor, "some experts"]:
    """One number of each output, or Misuse where the function makes another shape of them."""
    found = respond(output)
    if not isinstance(found, Tensor) or not found.is_floating_point() or found.shape != output.shape[:-1]:
        got = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else repr(found)
        raise Misuse(
            f"response must make {tuple(output.shape[:-1])} numbers of {tuple(output.shape)} outputs, got {got}"
        )
    return found.float()
