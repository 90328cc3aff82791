"""Parameters and FLOPs of a model from its config alone: nothing is built, any size can be planned anywhere."""

from dataclasses import dataclass

from moestro.models.configuration import Dense, MoE, MoestroConfig, SubLayer


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """How much there is of something, in all and per token."""

    total: int
    active: int

    def __add__(self, other: "Count") -> "Count":
        return Count(total=self.total + other.total, active=self.active + other.active)


def count_parameters(config: MoestroConfig) -> Count:
    """Parameters, and those that take part in one token's forward pass (embeddings included, tied ones once)."""
    embeddings = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    outside = embeddings + config.hidden_size  # the last norm
    result = Count(total=outside, active=outside)
    for block in config.sub_layers:
        attention = attention_parameters(config) + config.hidden_size
        result += Count(total=attention, active=attention)
        for spec in block:
            result += sub_layer_parameters(config, spec)
        result += tied_parameters(config, block)
    return result


def tied_parameters(config: MoestroConfig, block: list[SubLayer]) -> Count:
    """What a block's sub-layers counted singly have twice, as negative numbers.

    Active experts of a shared pool that a token passes twice count twice, as they multiply it twice; a tied router,
    whose choice is the same, counts once.
    """
    later = [spec for spec in block if isinstance(spec, MoE)][1:]
    if config.composition == "tied":
        routers = sum(spec.num_experts * config.hidden_size for spec in later)
        return Count(total=-routers, active=-routers)
    if config.composition == "shared-pool":
        return Count(total=-sum(spec.num_experts * swiglu_parameters(config, spec.width) for spec in later), active=0)
    return Count(total=0, active=0)


def attention_parameters(config: MoestroConfig) -> int:
    """Query, key, value and output projections, and the query-key norms."""
    return attention_products(config) + attention_extras(config)


def attention_products(config: MoestroConfig) -> int:
    """The weights of attention that multiply every token."""
    assert config.head_dim is not None and config.num_key_value_heads is not None
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    return config.hidden_size * heads * config.head_dim


def attention_extras(config: MoestroConfig) -> int:
    """Query-key norms, and biases where there are any (only the query-key-norm variant has them)."""
    if not config.qk_norm:
        return 0
    assert config.head_dim is not None and config.num_key_value_heads is not None
    outputs = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim + config.hidden_size
    return 2 * config.head_dim + (outputs if config.attention_bias else 0)


def sub_layer_parameters(config: MoestroConfig, spec: SubLayer) -> Count:
    """One feed-forward sub-layer with its norm; a selection bias is a buffer, not a parameter."""
    norm = config.hidden_size
    if isinstance(spec, Dense):
        dense = norm + swiglu_parameters(config, spec.width)
        return Count(total=dense, active=dense)
    common = norm + spec.num_experts * config.hidden_size + swiglu_parameters(config, spec.total_shared_width)
    if spec.mix == "convex":
        common += 2 * config.hidden_size + 2
    expert = swiglu_parameters(config, spec.width)
    return Count(total=common + spec.num_experts * expert, active=common + spec.top_k * expert)


def swiglu_parameters(config: MoestroConfig, width: int) -> int:
    """Gate, up and down projection."""
    return 3 * config.hidden_size * width


def forward_flops_per_token(config: MoestroConfig, sequence_length: int) -> int:
    """Multiply-adds count two; norms, activations and softmaxes are left out; attention counts every pair of positions.

    Counting all pairs, not the causal half, is the convention of PaLM (arXiv:2204.02311, appendix B) and of PyTorch's
    flop counter.
    """
    products = config.vocab_size * config.hidden_size
    for block in config.sub_layers:
        products += attention_products(config) + sum(matrix_products(config, spec) for spec in block)
    assert config.head_dim is not None
    pairs = 2 * sequence_length * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    return 2 * (products + pairs)


def matrix_products(config: MoestroConfig, spec: SubLayer) -> int:
    """The parameters of a sub-layer that multiply every token."""
    if isinstance(spec, Dense):
        return swiglu_parameters(config, spec.width)
    mix = 2 * config.hidden_size if spec.mix == "convex" else 0
    routed = spec.top_k * swiglu_parameters(config, spec.width)
    return routed + swiglu_parameters(config, spec.total_shared_width) + spec.num_experts * config.hidden_size + mix


def training_flops_per_token(config: MoestroConfig, sequence_length: int) -> int:
    """Forward and backward: three times the forward pass."""
    return 3 * forward_flops_per_token(config, sequence_length)


def all_experts_flops_per_token(config: MoestroConfig) -> int:
    """Of a token that every expert of every MoE sub-layer answers, forward, beside its way through the model."""
    moes = [spec for block in config.sub_layers for spec in block if isinstance(spec, MoE)]
    return sum(2 * spec.num_experts * swiglu_parameters(config, spec.width) for spec in moes)


def moe_layer_names(config: MoestroConfig) -> list[str]:
    """Names of the MoE sub-layers, in order."""
    return [
        f"layers.{index}.feed_forward.{position}"
        for index, block in enumerate(config.sub_layers)
        for position, spec in enumerate(block)
        if isinstance(spec, MoE)
    ]
