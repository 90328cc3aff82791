"""Other states of a subject, each for as long as its context lasts."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch import Tensor

from attach.subject import Subject
from moestro.routing import MoELayer


@contextmanager
def implementation(subject: Subject, name: str) -> Iterator[None]:
    """The model with an implementation of its experts, where the package lets one choose."""
    if not subject.interface:
        yield
        return
    before = subject.model.config._experts_implementation
    subject.model.set_experts_implementation(name)
    try:
        yield
    finally:
        subject.model.set_experts_implementation(before)


@contextmanager
def checkpointing(subject: Subject) -> Iterator[None]:
    """The model with activation checkpointing."""
    subject.model.activation_checkpointing_enable()
    try:
        yield
    finally:
        subject.model.activation_checkpointing_disable()


@contextmanager
def own_balance_loss(subject: Subject) -> Iterator[None]:
    """The model with its own balance loss on, if it has one: ours switch it off for as long as they are there."""
    config = subject.model.config.get_text_config()
    before = getattr(config, "output_router_logits", None)
    if before is not None:
        config.output_router_logits = True
    try:
        yield
    finally:
        if before is not None:
            config.output_router_logits = before


@contextmanager
def restored(subject: Subject) -> Iterator[dict[str, Tensor]]:
    """What is done to parameters and buffers is undone in the end; gives what they were."""
    before = {name: tensor.clone() for name, tensor in subject.tensors().items()}
    try:
        yield before
    finally:
        for name, tensor in subject.tensors().items():
            tensor.copy_(before[name])


@contextmanager
def one_outcome(subject: Subject) -> Iterator[None]:
    """Phimoe draws from the experts within a jitter of the best: with a jitter of 0 there is one."""
    with ExitStack() as jitters:
        for layer in subject.layers:
            if hasattr(layer.router, "router_jitter_noise"):
                jitters.enter_context(patch.object(layer.router, "router_jitter_noise", 0.0))
        yield


@contextmanager
def rows_reversed(subject: Subject) -> Iterator[None]:
    """The batch with its rows in reverse order."""
    with patch.object(subject, "inputs", {name: tensor.flip(0) for name, tensor in subject.inputs.items()}):
        yield


@contextmanager
def experts_reversed(subject: Subject) -> Iterator[None]:
    """The same model with its experts in reverse order, which keeps groups of them together."""
    reverse(subject.layers)
    try:
        yield
    finally:
        reverse(subject.layers)


@torch.no_grad()
def reverse(layers: Sequence[MoELayer]) -> None:
    """Reverse experts' weights, the router's rows, its selection bias, and tables of expert numbers."""
    tensors: dict[int, tuple[Tensor, int]] = {}
    for layer in layers:
        for tensor in [*layer.experts.parameters(), *layer.router.parameters(), *layer.router.buffers()]:
            tensors[id(tensor)] = tensor, layer.num_experts
        if layer.selection_bias is not None:
            tensors[id(layer.selection_bias)] = layer.selection_bias, layer.num_experts
    for tensor, size in tensors.values():
        if not tensor.is_floating_point():
            tensor.copy_(size - 1 - tensor)  # DeepSeek-V4's experts by token id
        elif tensor.shape[0] == size * 16 and tensor.ndim == 2:  # dbrx
            tensor.copy_(tensor.unflatten(0, (size, 16)).flip(0).flatten(0, 1))
        elif tensor.shape[0] in (size, size + 1):
            tensor[:size] = tensor[:size].flip(0)
        elif tensor.shape == (1, size):
            tensor.copy_(tensor.flip(1))
