"""The feed-forward sub-layers of a block, and the ways to compose them."""

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal

from moestro.architecture.router_rule import RouterRule
from moestro.errors import Misuse
from moestro.gate.ranges import Experts, SharedExperts, Width, check_fields

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
    """Inner width of each shared expert; None: that of the routed ones."""
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
        """Raise Misuse unless this sub-layer can be built."""
        if self.width % WIDTH_MULTIPLE:
            raise Misuse(f"width of an expert must be a multiple of {WIDTH_MULTIPLE}, got {self.width}")
        if self.mix == "convex" and not self.num_shared:
            raise Misuse("mix = convex needs a shared expert: num_shared must be at least 1, got 0")
        self.router.validate(self.num_experts, self.top_k)


SubLayer = Dense | MoE

EQUAL_WITHIN_A_BLOCK = {"tied": ("num_experts", "top_k", "router"), "shared-pool": ("num_experts", "width", "router")}
"""The fields in which a composition requires all MoE sub-layers of a block to agree."""

Composition = Literal["serial", "parallel", "tied", "shared-pool"]
"""How the feed-forward sub-layers of a block are composed (CartesianMoE, arXiv:2410.16077, and its controls):

serial: each reads the residual stream after the one before it, through a norm and a router of its own.
parallel: all read the stream as it was before the first of them; no sub-layer sees another's output.
tied: serial, but all MoE sub-layers take the choice that the first one's router makes of the first one's input.
shared-pool: serial, but all MoE sub-layers choose from the same experts (Chain-of-Experts, arXiv:2506.18945).
"""


def check_composition(block: Sequence[SubLayer], composition: str, index: int) -> None:
    """Raise Misuse unless the MoE sub-layers of block `index` agree in all fields that the composition requires."""
    equal = EQUAL_WITHIN_A_BLOCK.get(composition, ())
    kinds = {tuple(getattr(spec, name) for name in equal) for spec in block if isinstance(spec, MoE)}
    if len(kinds) > 1:
        raise Misuse(
            f"composition = {composition} needs the MoE sub-layers of a block to agree in "
            f"{', '.join(equal)}, and block {index}'s do not"
        )


def sub_layer(value: SubLayer | dict[str, Any]) -> SubLayer:
    """Return a valid sub-layer, made from its dict form (as in config.json) or given. Raise Misuse if invalid."""
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
    """Make the dataclass `kind` from its dict form. Raise Misuse, which names it `what`, if a field is wrong."""
    known = {f.name: f.default is MISSING and f.default_factory is MISSING for f in fields(kind)}
    unknown = sorted(value.keys() - known)
    if unknown:
        raise Misuse(f"unknown field {unknown[0]!r} in a {what}; it takes {', '.join(sorted(known))}")
    missing = [name for name, required in known.items() if required and name not in value]
    if missing:
        raise Misuse(f"a {what} must have {missing[0]}, got {', '.join(sorted(value)) or 'nothing'}")
    return kind(**value)
