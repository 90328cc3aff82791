"""What differs between the model packages of transformers: score functions, names of biases, who stands outside.

Most packages follow one convention, and what is written here are the exceptions to it. scripts/attach_every_family.py
checks all of it against every package of the installed transformers.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from moestro.errors import Misuse
from moestro.models.layers import Router
from moestro.routing import MoELayer

HOW_TO_ADAPT = (
    "describe its layers yourself, one moestro.MoELayer each (name, block, router, experts, num_experts, top_k, "
    "scores), and pass them as layers=[...]; the experts' forward must take (hidden_states, top_k_index, top_k_weights)"
)

# fmt: off
SIGMOID = frozenset({
    "afmoe", "axk1", "axk2", "bailing_hybrid", "beam", "deepseek_v3", "deepseek_v32", "dots1", "dots3_note",
    "exaone_moe", "flint", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm5_next", "glm_moe_dsa", "hy_v3", "hy_v4",
    "inkling", "kimi_linear", "kolibri1", "laguna", "lfm2_moe", "mimo_v2_flash", "minimax_m2", "minimax_m3_vl",
    "muse_spark", "nemotron_h", "solar_open", "step3p7",
})
# fmt: on
"""Packages whose routers score each expert by its own sigmoid; elsewhere it is a softmax over experts."""

PROBABILITIES = frozenset({"gemma4", "diffusion_gemma"})
"""Packages whose routers return probabilities where others return logits."""

SKIPPING = frozenset({"zaya"})
"""Packages whose routers may send a token to no expert at all, and then say expert 0 with weight 0."""

EXPERTS_ARGUMENTS = {
    ("hidden_states", "top_k_index", "top_k_weights"),
    ("hidden_states", "router_indices", "routing_weights"),
}
"""What experts are called with. All packages on the experts interface do so, and dbrx and step3p7 besides."""

OUTSIDE = frozenset({"llama4", "jetmoe", "doge", "switch_transformers", "nllb_moe", "vitpose", "longcat_flash"})
"""Packages whose experts take something else; longcat_flash's cannot run one expert per row."""

BIASES = ("e_score_correction_bias", "expert_bias", "balancing_biases")


def describe(layer: MoELayer, parent: nn.Module) -> MoELayer:
    """The handle with what its router, and the block around it, say of themselves."""
    router = layer.router
    return replace(
        layer,
        top_k=top_k(router, parent),
        scores=score_function(layer),
        weight_at=matrix_of(router, layer.num_experts),
        bias_at=selection_bias_at(router, parent),
    )


def package(module: nn.Module) -> str:
    """Return the transformers model package that defines a module's class or one of its bases; else its top package.

    Bases count because parametrizations and FSDP replace a module's class by a subclass of it.
    """
    for kind in type(module).__mro__:
        parts = kind.__module__.split(".")
        if parts[:2] == ["transformers", "models"]:
            return parts[2]
    return type(module).__module__.split(".")[0]


def score_function(layer: MoELayer) -> Any:
    """Return the function, or its name, that turns router outputs into scores; None if the choice is not learned."""
    router = layer.router
    if isinstance(router, Router):
        return router.rule.scores
    if "Hash" in type(router).__name__:
        return None
    if package(router) in PROBABILITIES:
        return "probabilities"
    if package(router) in SIGMOID:
        return "sigmoid"
    config = getattr(layer.experts, "config", None)
    return getattr(router, "expert_selection_fn", None) or getattr(config, "scoring_func", None) or "softmax"


def top_k(router: nn.Module, parent: nn.Module) -> int:
    """How many experts each token gets."""
    for holder, name in (
        (router, "top_k"),
        (parent, "top_k"),
        (getattr(router, "config", None), "top_k_experts"),
    ):
        if isinstance(value := getattr(holder, name, None), int):
            return value
    raise Misuse(f"{type(router).__name__} does not say how many experts it chooses: {HOW_TO_ADAPT}")


def number_of_experts(experts: nn.Module) -> int:
    """All of them, also where expert parallelism leaves this rank a part: a sharded weight knows its full shape."""
    fused = [parameter.shape[0] for parameter in experts.parameters() if parameter.ndim == 3]
    return fused[0] if fused else int(experts.num_experts)  # type: ignore[arg-type]


def matrix_of(router: nn.Module, num_experts: int) -> tuple[nn.Module, str] | None:
    """Place of the one matrix that makes the router's logits; None where the router holds several."""
    matrices = [
        (module, name)
        for module in router.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 2 and min(parameter.shape) > 1
    ]
    fits = len(matrices) == 1 and getattr(*matrices[0]).shape[0] >= num_experts
    return matrices[0] if fits else None


def selection_bias_at(router: nn.Module, parent: nn.Module) -> tuple[nn.Module, str] | None:
    """Place of the selection bias: on the router, on the block that hands it over, or on a module of its own."""
    if isinstance(router, Router) and not router.rule.selection_bias:
        return None
    for holder in (router, parent, getattr(router, "moe_statics", None)):
        for name in BIASES:
            if isinstance(getattr(holder, name, None), Tensor):
                return holder, name  # type: ignore[return-value]
    return None


def refuse_if_outside(model: nn.Module) -> None:
    """Raise Misuse where the model has experts that cannot be watched."""
    outside = sorted({name for module in model.modules() if (name := package(module)) in OUTSIDE})
    if outside:
        raise Misuse(f"the experts of {outside[0]} stand outside transformers' experts interface; {HOW_TO_ADAPT}")
