"""`Architecture`: all sizes that decide what a model costs, and the check that they fit together."""

from dataclasses import dataclass

from moestro.architecture.sub_layers import WIDTH_MULTIPLE, Composition, MoE, SubLayer, check_composition
from moestro.errors import Misuse
from moestro.gate.ranges import Heads, Vocabulary, Width, check_fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The sizes of one decoder, as `Model.architecture` of a recipe and `MoestroConfig.architecture` return them.

    Raises Misuse if the sizes do not fit together.
    """

    vocab_size: Vocabulary
    hidden_size: Width
    num_attention_heads: Heads
    num_key_value_heads: Heads
    head_dim: Width
    blocks: tuple[tuple[SubLayer, ...], ...]
    """The feed-forward sub-layers of every block."""
    composition: Composition = "serial"
    qk_norm: bool = True
    attention_bias: bool = False
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        moes = [spec for block in self.blocks for spec in block if isinstance(spec, MoE)]
        for spec in moes:
            spec.validate()
        for index, block in enumerate(self.blocks):
            check_composition(block, self.composition, index)
        if self.attention_bias and not self.qk_norm:
            raise Misuse(
                "attention_bias needs qk_norm (attention without query-key norm has no biases), got qk_norm=False"
            )
        if moes and self.hidden_size % WIDTH_MULTIPLE:
            raise Misuse(
                f"hidden_size must be a multiple of {WIDTH_MULTIPLE} where there are experts, got {self.hidden_size}"
            )


def attention_sizes(
    hidden_size: int, num_heads: int, num_key_value_heads: int | None, head_dim: int | None
) -> tuple[int, int]:
    """Return the number of key-value heads (None: `num_heads`) and a head's width (None: an equal share).

    Raises Misuse if they do not fit together.
    """
    key_value_heads = num_heads if num_key_value_heads is None else num_key_value_heads
    if num_heads % key_value_heads:
        raise Misuse(f"num_key_value_heads must divide num_attention_heads ({num_heads}), got {key_value_heads}")
    if head_dim is None and hidden_size % num_heads:
        raise Misuse(f"num_attention_heads must divide hidden_size ({hidden_size}), got {num_heads}")
    return key_value_heads, hidden_size // num_heads if head_dim is None else head_dim
