"""`short_sdpa`: transformers' `sdpa` attention, in fp32 where half precision is slower.

On a CPU, the backward pass of torch's fused attention in bf16 takes three times as long as in fp32 for sequences of 128
tokens, and 1.5 times for 256; from 512 on bf16 is faster (docs/log.md). Values are at least as exact.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

SHORT_SDPA = "short_sdpa"
_LONGEST = 256


def register() -> None:
    """Register `attn_implementation="short_sdpa"` with transformers. Repeated calls have no effect."""
    ALL_ATTENTION_FUNCTIONS.register(SHORT_SDPA, short_sdpa_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(SHORT_SDPA, sdpa_mask)


def short_sdpa_forward(
    module: nn.Module,
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    value: Float[Tensor, "batch kv_heads keys dim"],
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "batch queries heads dim"], None]:
    """Attend as `sdpa` does; the result has the dtype that `sdpa` would compute in."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    if query.device.type != "cpu" or key.shape[2] > _LONGEST or dtype not in (torch.bfloat16, torch.float16):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    with torch.autocast("cpu", enabled=False):
        attended, _ = sdpa_attention_forward(
            module, query.float(), key.float(), value.float(), attention_mask, **kwargs
        )
    return attended.to(dtype), None
