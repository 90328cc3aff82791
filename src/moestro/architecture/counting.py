"""Parameters and FLOPs of a model from its sizes alone: nothing is built, any size can be planned anywhere."""

from collections.abc import Sequence
from dataclasses import dataclass

from moestro.architecture.model import Architecture
from moestro.architecture.sub_layers import Dense, MoE, SubLayer


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """Parameters of a model or of a part: all of them, and those that take part in one token's forward pass."""

    total: int
    active: int

    def __add__(self, other: "Count") -> "Count":
        return Count(total=self.total + other.total, active=self.active + other.active)


def count_parameters(model: Architecture) -> Count:
    """Count all parameters and those active for one token. Embeddings count as active; tied ones count once."""
    embeddings = model.vocab_size * model.hidden_size * (1 if model.tie_word_embeddings else 2)
    outside = embeddings + model.hidden_size  # the last norm
    result = Count(total=outside, active=outside)
    for block in model.blocks:
        attention = attention_parameters(model) + model.hidden_size
        result += Count(total=attention, active=attention)
        for spec in block:
            result += sub_layer_parameters(model, spec)
        result += tied_parameters(model, block)
    return result


def tied_parameters(model: Architecture, block: Sequence[SubLayer]) -> Count:
    """Return, as negative numbers, the parameters that a block's sub-layers share and each of them was counted with.

    Active experts of a shared pool are counted once per sub-layer, because each sub-layer multiplies the token anew. A
    tied router runs once and is counted once.
    """
    later = [spec for spec in block if isinstance(spec, MoE)][1:]
    if model.composition == "tied":
        routers = sum(spec.num_experts * model.hidden_size for spec in later)
        return Count(total=-routers, active=-routers)
    if model.composition == "shared-pool":
        return Count(total=-sum(spec.num_experts * swiglu_parameters(model, spec.width) for spec in later), active=0)
    return Count(total=0, active=0)


def attention_parameters(model: Architecture) -> int:
    """Count the parameters of one block's attention: projections, query-key norms and biases."""
    return attention_products(model) + attention_extras(model)


def attention_products(model: Architecture) -> int:
    """Count the weights of one block's query, key, value and output projections."""
    heads = 2 * model.num_attention_heads + 2 * model.num_key_value_heads
    return model.hidden_size * heads * model.head_dim


def attention_extras(model: Architecture) -> int:
    """Count the query-key norms and biases of one block's attention; both are absent without `qk_norm`."""
    if not model.qk_norm:
        return 0
    outputs = (model.num_attention_heads + 2 * model.num_key_value_heads) * model.head_dim + model.hidden_size
    return 2 * model.head_dim + (outputs if model.attention_bias else 0)


def sub_layer_parameters(model: Architecture, spec: SubLayer) -> Count:
    """Count one feed-forward sub-layer with its norm. A selection bias is a buffer, not a parameter."""
    norm = model.hidden_size
    if isinstance(spec, Dense):
        dense = norm + swiglu_parameters(model, spec.width)
        return Count(total=dense, active=dense)
    common = norm + spec.num_experts * model.hidden_size + swiglu_parameters(model, spec.total_shared_width)
    if spec.mix == "convex":
        common += 2 * model.hidden_size + 2
    expert = swiglu_parameters(model, spec.width)
    return Count(total=common + spec.num_experts * expert, active=common + spec.top_k * expert)


def swiglu_parameters(model: Architecture, width: int) -> int:
    """Count the gate, up and down projections of a SwiGLU network with inner width `width`."""
    return 3 * model.hidden_size * width


def forward_flops_per_token(model: Architecture, sequence_length: int) -> int:
    """Return the FLOPs of one token's forward pass, averaged over a sequence of `sequence_length` tokens.

    A multiply-add counts as two. Norms, activations and softmaxes are left out. Attention counts all pairs of positions
    and not only the causal half. Both PaLM (arXiv:2204.02311, appendix B) and PyTorch's flop counter count so.
    """
    products = model.vocab_size * model.hidden_size
    for block in model.blocks:
        products += attention_products(model) + sum(matrix_products(model, spec) for spec in block)
    pairs = 2 * sequence_length * model.num_attention_heads * model.head_dim * len(model.blocks)
    return 2 * (products + pairs)


def matrix_products(model: Architecture, spec: SubLayer) -> int:
    """Count the weights of a sub-layer that multiply one token: of the routed experts, `top_k`."""
    if isinstance(spec, Dense):
        return swiglu_parameters(model, spec.width)
    mix = 2 * model.hidden_size if spec.mix == "convex" else 0
    routed = spec.top_k * swiglu_parameters(model, spec.width)
    return routed + swiglu_parameters(model, spec.total_shared_width) + spec.num_experts * model.hidden_size + mix


def training_flops_per_token(model: Architecture, sequence_length: int) -> int:
    """Return the FLOPs of one token's forward and backward pass: three times those of the forward pass."""
    return 3 * forward_flops_per_token(model, sequence_length)


def all_experts_flops_per_token(model: Architecture) -> int:
    """Return the extra forward FLOPs of a competing token, which every routed expert of every MoE sub-layer answers."""
    moes = [spec for block in model.blocks for spec in block if isinstance(spec, MoE)]
    return sum(2 * spec.num_experts * swiglu_parameters(model, spec.width) for spec in moes)


def moe_layer_names(model: Architecture) -> list[str]:
    """Return the module names of the MoE sub-layers, in order."""
    return [
        f"layers.{index}.feed_forward.{position}"
        for index, block in enumerate(model.blocks)
        for position, spec in enumerate(block)
        if isinstance(spec, MoE)
    ]
