"""A router's selection bias: moved between optimiser steps, and saved with a PEFT adapter, which would omit it."""

import logging
from collections.abc import Iterable
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from moestro.adapters.wrappers import plain_name, unwrapped
from moestro.balance import next_bias
from moestro.errors import Misuse
from moestro.routing import MoELayer

logger = logging.getLogger(__name__)

NAMES = "_moestro_selection_biases"

ADAPTER, PICKLED_ADAPTER = "adapter_model.safetensors", "adapter_model.bin"
"""File names of PEFT adapters."""


class SelectionBias:
    """One layer's selection bias in fp32, and its rounded copy in the model.

    A step of 0.001 is rounded away on a bf16 value of 8. So steps accumulate in fp32 here, and the model gets a copy.
    """

    def __init__(self, layer: MoELayer) -> None:
        self.layer = layer
        self.master: Tensor | None = None
        """The bias in fp32; None before its first step."""

    def own(self) -> Tensor:
        """Return the model's bias, of any shape and dtype. Raise Misuse if it is offloaded."""
        bias = self.layer.selection_bias
        assert bias is not None
        if bias.is_meta:
            raise Misuse(
                f"bias_rate cannot move the selection bias of {self.layer.name}: it is offloaded; load the model "
                "without offload, or set bias_rate to 0"
            )
        return bias

    def entries(self, whole: Tensor) -> Float[Tensor, " experts"]:
        """Return a view of the entries that belong to experts.

        Ernie's bias is [1, experts]; Zaya's has one more entry, for skipping a layer, which stays.
        """
        return whole.view(-1)[: self.layer.num_experts]

    def value(self) -> Float[Tensor, " experts"]:
        """Return the bias in full precision: `master`, except entries changed in the model since the last step.

        Those entries come from a loaded checkpoint or the user, and take precedence over `master`.
        """
        own = self.entries(full(self.own()))
        precise = own.to(precision(own))
        if self.master is None:
            return precise
        master = self.master.to(precise)
        return torch.where(master.to(own.dtype).to(precise) == precise, master, precise)

    def move(self, load: Float[Tensor, " experts"], rate: float) -> None:
        """Take one step: up by `rate` for experts below the mean of `load`, down by it for those above."""
        value = self.value()
        self.write(next_bias(value, load.to(value.device), rate))

    def restore(self, saved: list[float], *, into_model: bool) -> None:
        """Restore a saved `master`; if `into_model` is true, write it into the model too."""
        own = self.own()
        self.master = torch.tensor(saved, dtype=precision(own), device=own.device)
        if into_model:
            self.write(self.master)

    def write(self, value: Float[Tensor, " experts"]) -> None:
        """Set the bias to `value`, here and in the model."""
        self.master, own = value, self.own()
        if isinstance(own, DTensor):
            whole = own.full_tensor()
            self.entries(whole).copy_(value)
            own.copy_(distribute_tensor(whole, own.device_mesh, own.placements))
        else:
            self.entries(own).copy_(value)


def precision(own: Tensor) -> torch.dtype:
    """Return the dtype in which steps accumulate: fp32, or fp64 for a bias in fp64."""
    return torch.float64 if own.dtype == torch.float64 else torch.float32


def full(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor that may be sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def keep_with_adapter(model: nn.Module, layers: Iterable[MoELayer]) -> None:
    """Make saves of a PEFT model include the selection biases; saves of other models include them anyway.

    PEFT saves an adapter without the buffers of its base model. A reloaded adapter would then run with the biases from
    before training, and route differently. PEFT loads every tensor that it finds in an adapter's file.
    """
    model = unwrapped(model)
    if not saves_adapters(model) or NAMES in model.__dict__:
        return
    paths = {id(module): name for name, module in model.named_modules()}
    names = [f"{paths[id(layer.bias_at[0])]}.{layer.bias_at[1]}" for layer in layers if layer.bias_at is not None]
    setattr(model, NAMES, {plain_name(name) for name in names})  # adapters added later may wrap routers
    # Bound to the instance, so that a deep copy of the model saves itself and not this model.
    model.save_pretrained = MethodType(save_with_biases, model)  # type: ignore[assignment]


def saves_adapters(model: nn.Module) -> bool:
    """Return whether saves of the model hold adapters alone: it is a PEFT model, or its `add_adapter` was called."""
    return callable(getattr(model, "get_base_model", None)) or bool(getattr(model, "_hf_peft_config_loaded", False))


def warn_if_not_kept(model: nn.Module, outer: nn.Module) -> None:
    """Warn that saved adapters will lack the biases if losses were not attached to the PEFT model itself."""
    if getattr(model, "peft_config", None) and NAMES not in unwrapped(outer).__dict__:
        logger.warning(
            "saves of the adapter will lack the selection biases that bias_rate moves, and a reloaded adapter will "
            "route differently: attach to the PEFT model itself, not to the model inside it or before get_peft_model"
        )


def save_with_biases(self: Any, save_directory: str | Path, *args: Any, **kwargs: Any) -> Any:
    """Replace `save_pretrained` of a PEFT model: save, then add the selection biases to every adapter file."""
    result = type(self).save_pretrained(self, save_directory, *args, **kwargs)
    tensors = dict(self.named_buffers()) | dict(self.named_parameters())
    names = [name for name in tensors if plain_name(name) in getattr(self, NAMES) and ".modules_to_save." not in name]
    biases = {adapter_key(name): full(tensors[name].detach()).cpu().contiguous() for name in names}
    adapters = kwargs.get("selected_adapters") or list(self.peft_config)
    for folder in (Path(save_directory), *(Path(save_directory, adapter) for adapter in adapters)):
        if (folder / ADAPTER).exists():  # only the first rank writes files
            add_tensors(folder / ADAPTER, biases)
        elif (folder / PICKLED_ADAPTER).exists():
            logger.warning("%s lacks the selection biases: leave out safe_serialization=False", folder)
    return result


def adapter_key(name: str) -> str:
    """Return the name of a tensor in an adapter's file: below `base_model.model`, without `original_module`."""
    name = name.replace(".original_module.", ".")
    return name if name.startswith("base_model.model.") else f"base_model.model.{name}"


def add_tensors(file: Path, more: dict[str, Tensor]) -> None:
    """Add tensors to a safetensors file, except those that it holds: an adapter's own copy of a router has its bias.

    The old file stays intact until the new one is complete.
    """
    with safe_open(file, "pt") as old:
        tensors, metadata = {name: old.get_tensor(name).clone() for name in old.keys()}, old.metadata()  # noqa: SIM118
    unfinished = file.with_suffix(".unfinished")
    save_file(more | tensors, unfinished, metadata=metadata)
    unfinished.replace(file)
