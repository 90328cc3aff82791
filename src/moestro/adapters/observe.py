"""Watching a model's MoE layers: hooks that turn every forward pass into a `Batch` and one `LayerRecord` per layer."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moestro.adapters.layers import moe_layers, routing_of
from moestro.errors import Misuse
from moestro.routing import Batch, LayerRecord, MoELayer


class Pass:
    """What hooks share during one forward pass. `batch` outlives it, for the recomputation of checkpointed layers."""

    def __init__(self) -> None:
        self.batch: Batch | None = None
        self.open = False
        self.domain: Tensor | None = None
        """Domain of each token of the coming pass, [batch, sequence]; set by whoever knows it."""


@contextmanager
def observe(
    model: nn.Module,
    on_layer: Callable[[LayerRecord], None],
    *,
    on_begin: Callable[[dict[str, Any]], None] = lambda inputs: None,
    on_end: Callable[[Any], Any] = lambda output: None,
) -> Iterator[Pass]:
    """Call `on_layer` with every MoE layer's record, inside that layer's forward, until the context ends.

    `on_begin` gets the model's inputs by name before a pass, `on_end` its output after it (what it returns, unless
    None, replaces the output). In the recomputation of a checkpointed layer records come again, marked `recomputed`.
    """
    current = Pass()
    signature = inspect.signature(type(model).forward)

    def begin(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        inputs = dict(signature.bind(module, *args, **kwargs).arguments)
        inputs |= inputs.pop("kwargs", {})
        current.batch, current.open = describe(inputs, current.domain), True
        on_begin(inputs)

    def end(module: nn.Module, args: tuple, output: Any) -> Any:
        current.open = False
        return on_end(output)

    handles = [model.register_forward_pre_hook(begin, with_kwargs=True), model.register_forward_hook(end)]
    handles += [layer.router.register_forward_hook(reporter(layer, current, on_layer)) for layer in moe_layers(model)]
    try:
        yield current
    finally:
        for handle in handles:
            handle.remove()


def reporter(layer: MoELayer, current: Pass, on_layer: Callable[[LayerRecord], None]) -> Callable[..., None]:
    """A hook on one router that reports its layer."""

    def report(router: nn.Module, args: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
        batch = current.batch
        if batch is None or batch.sequence.shape[0] != args[0].shape[0]:
            return  # the layer was called by itself, outside any pass of the model
        routing = routing_of(router, output)
        on_layer(
            LayerRecord(
                layer=layer,
                batch=batch,
                hidden=args[0],
                proposed=routing,
                routing=routing,
                recomputed=not current.open,
            )
        )

    # What consumers write (a list here, a count there) would make every layer of a compiled model compile again.
    return torch.compiler.disable(report)


def describe(inputs: dict[str, Any], domain: Tensor | None = None) -> Batch:
    """The batch of one forward pass, from the model's inputs; a sequence is a row."""
    tokens = inputs.get("input_ids") if inputs.get("input_ids") is not None else inputs.get("inputs_embeds")
    if tokens is None:
        raise Misuse("the model must be called with input_ids or inputs_embeds")
    rows, length = tokens.shape[:2]
    device = tokens.device
    mask, labels, position = inputs.get("attention_mask"), inputs.get("labels"), inputs.get("position_ids")
    is_plain_mask = isinstance(mask, Tensor) and mask.ndim == 2
    return Batch(
        sequence=torch.arange(rows, device=device).repeat_interleave(length),
        num_sequences=rows,
        # With a cache the mask covers the past too; the tokens of this pass are its last columns.
        valid=mask[:, -length:].bool().flatten() if is_plain_mask else None,  # type: ignore[index]
        label=None if labels is None else predicts(labels).flatten(),
        position=None if position is None else position.expand(rows, length).flatten(),
        input_ids=inputs["input_ids"].flatten() if inputs.get("input_ids") is not None else None,
        domain=None if domain is None else domain.to(device).flatten(),
    )


def predicts(labels: Tensor) -> Tensor:
    """True at each position whose *next* token is a label, as causal losses shift them; [batch, sequence]."""
    shifted = torch.zeros_like(labels, dtype=torch.bool)
    shifted[:, :-1] = labels[:, 1:] != -100
    return shifted
