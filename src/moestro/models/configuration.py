"""`MoestroConfig`: transformers' config of our models, made of the records of `moestro.architecture`."""

from dataclasses import asdict
from typing import Any, TypeVar

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import RopeParameters

from moestro.architecture.model import Architecture, attention_sizes
from moestro.architecture.sub_layers import Composition, Dense, MoE, SubLayer, sub_layer
from moestro.errors import Misuse
from moestro.gate.ranges import (
    BatchTokens,
    Heads,
    Layers,
    Positive,
    Share,
    Steps,
    Vocabulary,
    Weight,
    Width,
    check,
)
from moestro.gate.visible import said

Config = TypeVar("Config", bound=PreTrainedConfig)
FIELDS: dict[str, Any] = {
    "vocab_size": Vocabulary,
    "hidden_size": Width,
    "num_hidden_layers": Layers,
    "num_attention_heads": Heads,
    "num_key_value_heads": Heads | None,
    "head_dim": Width | None,
    "max_position_embeddings": BatchTokens,
    "initializer_range": Weight,
    "rms_norm_eps": Positive,
    "attention_dropout": Share,
    "sliding_window": Steps | None,
    "qk_norm": bool,
    "depth_scaled_init": bool,
    "attention_bias": bool,
    "composition": Composition,
}
"""Ranges of the fields of `MoestroConfig`. They are not annotations, because transformers' @strict refuses ranges."""


def refusing_in_one_line(kind: type[Config]) -> type[Config]:
    """Make a config class check `FIELDS` on every assignment, and raise Misuse instead of @strict's error."""
    strictly = kind.__setattr__

    def set_field(self: Config, name: str, value: Any) -> None:
        if name in FIELDS:
            check(name, value, FIELDS[name])
        try:
            strictly(self, name, value)
        except StrictDataclassFieldValidationError as error:
            raise Misuse(f"{name} cannot be set: {said(error.__cause__ or error)}") from error

    kind.__setattr__ = set_field  # type: ignore[method-assign]
    return kind


@refusing_in_one_line
@strict
class MoestroConfig(PreTrainedConfig):
    """A decoder whose every block is attention and a list of pre-norm residual feed-forward sub-layers, dense or MoE.

    `feed_forward` holds one list per block; a block's list is usually one sub-layer long, and two for a Cartesian
    block. Its entries may be given as `Dense` and `MoE` or as their dicts; they are stored as dicts, so that
    config.json is plain. `sub_layers` gives them back. `composition` says how the sub-layers of one block relate.

    Raises Misuse where sizes do not fit together.
    """

    model_type = "moestro"
    keys_to_ignore_at_inference = ["past_key_values"]
    default_theta = 10_000.0
    base_model_ep_plan = {  # type: ignore[assignment]  # declared in transformers for other plans
        "layers.*.feed_forward.*.experts.gate_up_proj": "grouped_gemm",
        "layers.*.feed_forward.*.experts.down_proj": "grouped_gemm",
        "layers.*.feed_forward.*.experts": "ep_dispatch_experts",
    }

    vocab_size: int = 4096
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    qk_norm: bool = True
    feed_forward: list | None = None
    composition: str = "serial"
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    depth_scaled_init: bool = True
    """Whether what is written to the residual stream starts smaller by the root of the number of writes (GPT-2)."""
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = True
    rope_parameters: RopeParameters | dict | None = None
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    sliding_window: int | None = None
    output_router_logits: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        if self.feed_forward is None:
            self.feed_forward = [[Dense(width=4 * self.hidden_size)] for _ in range(self.num_hidden_layers)]
        if len(self.feed_forward) != self.num_hidden_layers:
            got = len(self.feed_forward)
            raise Misuse(f"feed_forward must list num_hidden_layers ({self.num_hidden_layers}) blocks, got {got}")
        self.feed_forward = [[asdict(sub_layer(entry)) for entry in block] for block in self.feed_forward]
        if self.hidden_act not in ACT2FN:
            raise Misuse(f"hidden_act must be one of {', '.join(sorted(ACT2FN))}, got {self.hidden_act!r}")
        self.num_key_value_heads, self.head_dim = attention_sizes(
            self.hidden_size, self.num_attention_heads, self.num_key_value_heads, self.head_dim
        )
        _ = self.architecture  # the record checks what sizes must fit together
        super().__post_init__(**kwargs)

    @property
    def architecture(self) -> Architecture:
        """The sizes of the model as a plain record; raises Misuse if they do not fit together."""
        assert self.num_key_value_heads is not None and self.head_dim is not None
        return Architecture(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            blocks=tuple(tuple(block) for block in self.sub_layers),
            composition=self.composition,  # type: ignore[arg-type]  # FIELDS checked it
            qk_norm=self.qk_norm,
            attention_bias=self.attention_bias,
            tie_word_embeddings=self.tie_word_embeddings,
        )

    @property
    def sub_layers(self) -> list[list[SubLayer]]:
        """The feed-forward of every block, as records."""
        assert self.feed_forward is not None
        return [[sub_layer(entry) for entry in block] for block in self.feed_forward]

    @property
    def residual_writes(self) -> int:
        """How often the blocks add to the residual stream: once for attention and once for each sub-layer."""
        return sum(1 + len(block) for block in self.sub_layers)

    @property
    def has_experts(self) -> bool:
        """Whether any sub-layer is an MoE."""
        return any(isinstance(entry, MoE) for block in self.sub_layers for entry in block)
