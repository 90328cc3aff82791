"""What a model is made of: `MoestroConfig`, and the sub-layers that its blocks list."""

from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, Literal, TypeVar

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import RopeParameters

from moestro.errors import Misuse
from moestro.gate.ranges import (
    BatchTokens,
    Experts,
    Heads,
    Layers,
    Positive,
    Share,
    SharedExperts,
    Steps,
    Vocabulary,
    Weight,
    Width,
    check,
    check_fields,
)
from moestro.gate.visible import said
from moestro.routers import RouterRule

Config = TypeVar("Config", bound=PreTrainedConfig)
WIDTH_MULTIPLE = 8
"""Grouped matrix products need rows of a multiple of 16 bytes: 8 numbers in bf16, 4 in fp32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dense:
    """A dense SwiGLU feed-forward sub-layer."""

    width: Width
    kind: Literal["dense"] = "dense"

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class MoE:
    """A mixture-of-experts sub-layer: routed SwiGLU experts, and shared ones that see every token."""

    num_experts: Experts
    top_k: Experts
    width: Width
    """Inner width of each routed expert."""
    router: RouterRule = field(default_factory=RouterRule)
    num_shared: SharedExperts = 0
    shared_width: Width | None = None
    """Inner width of each shared expert; None: as the routed ones."""
    mix: Literal["sum", "convex"] = "sum"
    """How shared experts join: added up (DeepSeekMoE), or averaged and mixed in by a learned two-way softmax
    (CartesianMoE).
    """
    kind: Literal["moe"] = "moe"

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def total_shared_width(self) -> int:
        """Inner width of all shared experts together."""
        return self.num_shared * (self.shared_width or self.width)

    def validate(self) -> None:
        """Raise Misuse unless it can be built."""
        if self.width % WIDTH_MULTIPLE:
            raise Misuse(f"width of an expert must be a multiple of {WIDTH_MULTIPLE}, got {self.width}")
        if self.mix == "convex" and not self.num_shared:
            raise Misuse("mix = convex needs a shared expert: num_shared must be at least 1, got 0")
        self.router.validate(self.num_experts, self.top_k)


SubLayer = Dense | MoE

EQUAL_WITHIN_A_BLOCK = {"tied": ("num_experts", "top_k", "router"), "shared-pool": ("num_experts", "width", "router")}
"""What a composition needs a block's MoE sub-layers to agree in."""

Composition = Literal["serial", "parallel", "tied", "shared-pool"]
"""How the feed-forward sub-layers of a block are composed (CartesianMoE, arXiv:2410.16077, and its controls):

serial: each reads the residual stream after the one before it, through a norm and a router of its own.
parallel: all read the stream as it was before the first of them; no sub-layer sees another's output.
tied: serial, but all MoE sub-layers take the choice that the first one's router makes of the first one's input.
shared-pool: serial, but all MoE sub-layers choose from the same experts (Chain-of-Experts, arXiv:2506.18945).
"""


def sub_layer(value: SubLayer | dict[str, Any]) -> SubLayer:
    """A sub-layer from its dict form (as in config.json), validated."""
    if isinstance(value, dict):
        name = value.get("kind", "moe")
        kind = {"dense": Dense, "moe": MoE}.get(name)
        if kind is None:
            raise Misuse(f"kind of a sub-layer must be dense or moe, got {name!r}")
        if isinstance(rule := value.get("router"), dict):
            value = value | {"router": record(RouterRule, rule, "router")}
        value = record(kind, value, f"{name} sub-layer")
    if not isinstance(value, Dense | MoE):
        raise Misuse(f"feed_forward must list Dense and MoE sub-layers for each block, got {value!r}")
    if isinstance(value, MoE):
        value.validate()
    return value


def record(kind: type, value: dict[str, Any], what: str) -> Any:
    """The dataclass `kind` from its dict form; raises Misuse where a field is unknown or missing."""
    known = {f.name: f.default is MISSING and f.default_factory is MISSING for f in fields(kind)}
    unknown = sorted(value.keys() - known)
    if unknown:
        raise Misuse(f"unknown field {unknown[0]!r} in a {what}; it takes {', '.join(sorted(known))}")
    missing = [name for name, required in known.items() if required and name not in value]
    if missing:
        raise Misuse(f"a {what} must have {missing[0]}, got {', '.join(sorted(value)) or 'nothing'}")
    return kind(**value)


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
        self.check_composition()
        self.settle_attention()
        if self.has_experts and self.hidden_size % WIDTH_MULTIPLE:
            raise Misuse(
                f"hidden_size must be a multiple of {WIDTH_MULTIPLE} where there are experts, got {self.hidden_size}"
            )
        super().__post_init__(**kwargs)

    def check_composition(self) -> None:
        """Raise Misuse unless the sub-layers of each block can be composed as asked."""
        equal = EQUAL_WITHIN_A_BLOCK.get(self.composition, ())
        for index, block in enumerate(self.sub_layers):
            kinds = {tuple(getattr(spec, name) for name in equal) for spec in block if isinstance(spec, MoE)}
            if len(kinds) > 1:
                raise Misuse(
                    f"composition = {self.composition} needs the MoE sub-layers of a block to agree in "
                    f"{', '.join(equal)}, and block {index}'s do not"
                )

    def settle_attention(self) -> None:
        """Fill in what follows from other sizes of attention; raises Misuse where they do not fit together."""
        heads = self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = heads
        if heads % self.num_key_value_heads:
            raise Misuse(
                f"num_key_value_heads must divide num_attention_heads ({heads}), got {self.num_key_value_heads}"
            )
        if self.head_dim is None:
            if self.hidden_size % heads:
                raise Misuse(f"num_attention_heads must divide hidden_size ({self.hidden_size}), got {heads}")
            self.head_dim = self.hidden_size // heads
        if self.attention_bias and not self.qk_norm:
            raise Misuse(
                "attention_bias needs qk_norm (attention without query-key norm has no biases), got qk_norm=False"
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


__all__ = ["Composition", "Dense", "MoE", "MoestroConfig", "SubLayer"]
