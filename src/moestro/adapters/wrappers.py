"""Look through the wrappers that PEFT, torch.compile, checkpointing and data parallelism put around modules.

A wrapper holds one module and runs it. A *plain name* is a module's name without wrappers, so that saved state of a
layer is found again in a model that is wrapped differently.
"""

import re

from torch import nn

from moestro.errors import Misuse

HELD_AS = ("base_layer", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""Names under which wrappers hold the module that they run: LoRA, torch.compile, activation checkpointing, FSDP."""

OF_WRAPPERS = re.compile(rf"(^|\.)({'|'.join(HELD_AS)}|original_module|modules_to_save\.[^.]+)(?=\.|$)")


def inner_model(model: nn.Module) -> nn.Module:
    """Return the transformers model inside the wrappers of data parallelism, torch.compile and PEFT."""
    if not isinstance(model, nn.Module):
        raise Misuse(f"the model must be a torch.nn.Module, got {type(model).__name__}")
    while callable(getattr(model := unwrapped(model), "get_base_model", None)):
        model = model.get_base_model()  # type: ignore[operator]
    return model


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside all wrappers, but stop at a PEFT model: that one saves the adapters."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif (inner := held_by(model)) is not None:
            model = inner
        else:
            return model


def held_by(module: nn.Module) -> nn.Module | None:
    """Return the module that a wrapper currently runs; None if `module` is not a wrapper."""
    children = module._modules
    if isinstance(copies := children.get("modules_to_save"), nn.ModuleDict):  # PEFT's: a copy per adapter
        active = [] if module.disable_adapters else list(module.active_adapters)  # type: ignore[arg-type]
        return copies[active[0]] if active and active[0] in copies else children["original_module"]
    return next((child for name in HELD_AS if (child := children.get(name)) is not None), None)


def innermost(module: nn.Module) -> nn.Module:
    """Return the module inside all wrappers around it."""
    while (inner := held_by(module)) is not None:
        module = inner
    return module


def plain_name(name: str) -> str:
    """Return the name that a module or parameter has without wrappers."""
    return OF_WRAPPERS.sub("", name).removeprefix(".")


def module_at(model: nn.Module, name: str) -> nn.Module:
    """Return the module that now runs under a plain name, unwrapped."""
    return innermost(outer_module_at(model, name))


def outer_module_at(model: nn.Module, name: str) -> nn.Module:
    """Return the module under a plain name, or the outermost wrapper around it."""
    for part in name.split(".") if name else ():
        model = innermost(model)._modules[part]  # type: ignore[assignment]
    return model
