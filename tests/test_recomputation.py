"""Losses in checkpointed layers that are run again, whoever checkpoints them: truth is the gradient without."""

import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from moestro import AuxLosses, Compete, Misuse, observe
from moestro.adapters.meter import RoutingMeter
from moestro.adapters.wrappers import plain_name
from test_aux_losses import assert_equal

LOSSES: dict[str, Any] = {
    "balance": 0.5,
    "orthogonality": 0.1,
    "orthogonality_form": "cosine",
    "variance": 0.5,
    "variance_over": "sequence",
    "router_z": 0.1,
}
PACKAGES = ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "olmoe"]


def wrapped(*suffixes: str) -> Callable[[nn.Module], None]:
    """torch's CheckpointWrapper (FSDP's activation checkpointing) around the modules of these classes."""

    def apply(model: nn.Module) -> None:
        apply_activation_checkpointing(model, check_fn=lambda m: type(m).__name__.endswith(suffixes))

    return apply


def by_hand(attribute: str, **options: Any) -> Callable[[nn.Module], None]:
    """The user's own call of torch's checkpoint inside the forward of a part of every block."""

    def apply(model: Any) -> None:
        for block in model.model.layers:
            part = block if attribute == "block" else getattr(block, attribute)
            part.forward = functools.partial(checkpoint, part.forward, use_reentrant=False, **options)

    return apply


def by_hand_whole_stack(model: Any, **options: Any) -> None:
    model.model.forward = functools.partial(checkpoint, model.model.forward, use_reentrant=False, **options)


def alternating(model: nn.Module) -> None:
    """Half of the blocks by transformers' checkpointing, the others' MLP by hand within it."""
    model.gradient_checkpointing_enable()  # type: ignore[operator]
    by_hand("mlp")(model)


def selective() -> Any:
    kept = [torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.mul.Tensor]
    return create_selective_checkpoint_contexts(kept)


WAYS: dict[str, Callable[[nn.Module], None]] = {
    "wrapper around blocks": wrapped("DecoderLayer"),
    "wrapper around experts": wrapped("Experts"),
    "wrappers around blocks and MLPs": wrapped("DecoderLayer", "MoeBlock", "MoE", "MLP"),
    "by hand": by_hand("block"),
    "by hand, whole": by_hand("block", preserve_rng_state=False, early_stop=False),
    "by hand within transformers'": alternating,
    "selective": by_hand("block", context_fn=selective),
    "selective, all blocks in one": lambda model: by_hand_whole_stack(model, context_fn=selective),
    "selective, within a block": by_hand("mlp", context_fn=selective),
}
PASSES = ["one by one", "together", "reversed", "without gradients between", "with a meter"]


def batches() -> tuple[list[dict[str, Any]], int]:
    """Two batches of other lengths and labels, so that a layer that joins the wrong pass is seen."""
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randint(3, 64, shape, generator=generator) for shape in ((2, 12), (2, 9)))
    labels = [first.clone(), second.clone()]
    labels[0][:, 5:] = -100
    labels[1][0] = -100
    items = sum(int((label[:, 1:] != -100).sum()) for label in labels)
    return [{"input_ids": ids, "labels": label} for ids, label in zip((first, second), labels, strict=True)], items


def backward(model: nn.Module, passes: str) -> None:
    parts, items = batches()
    losses = []
    for part in parts:
        losses.append(model(**part, num_items_in_batch=items).loss)
        if passes == "without gradients between":
            with torch.no_grad():
                model(input_ids=part["input_ids"][:, :7])
        if passes == "one by one":
            losses.pop().backward()
    if passes == "reversed":
        for loss in reversed(losses):
            loss.backward()
    elif losses:
        sum(losses).backward()


def gradients(package: str, passes: str, way: Callable[[nn.Module], None] | None, **losses: Any) -> dict[str, Any]:
    model = tiny_models.build(package).model
    if way is not None:
        way(model)
    meter = RoutingMeter(training=True)
    aux = AuxLosses(**(losses or LOSSES))
    with aux.attach(model):
        if passes == "with a meter":
            meter.detailed = True
            with meter.attach(model):
                backward(model, passes)
        else:
            backward(model, passes)
        loads = {f"load of {state.layer.name}": state.load for state in aux._layers}
    found = {plain_name(name): p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | loads | {f"sums of {name}": sums.choices for name, sums in meter.sums.items()}


@functools.cache
def plain(package: str, passes: str) -> dict[str, Any]:
    return gradients(package, passes, None)


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("way", WAYS)
def test_any_checkpointing_changes_no_bit(way: str, passes: str):
    assert_equal(gradients("mixtral", passes, WAYS[way]), plain("mixtral", passes), 0.0)


@pytest.mark.parametrize("package", PACKAGES[1:])
@pytest.mark.parametrize("way", ["wrapper around blocks", "wrapper around experts", "selective"])
def test_in_every_family(package: str, way: str):
    for passes in ("reversed", "without gradients between"):
        assert_equal(gradients(package, passes, WAYS[way]), plain(package, passes), 0.0)


def test_competition_in_a_checkpoint_of_ones_own():
    losses = {"compete": Compete(rate=0.5, by="tokens"), "distillation": 0.5, "diversity": 0.3}
    truth = gradients("mixtral", "reversed", None, **losses)
    assert_equal(gradients("mixtral", "reversed", WAYS["wrapper around blocks"], **losses), truth, 0.0)


def test_a_total_of_ones_own_keeps_its_passes():
    """Only the auxiliary total is run backward: nothing else of the first pass lives then."""

    def run(way: Callable[[nn.Module], None] | None) -> dict[str, torch.Tensor]:
        model = tiny_models.build("mixtral").model
        if way:
            way(model)
        parts, items = batches()
        aux = AuxLosses(**LOSSES)
        with aux.attach(model, add_to_loss=False):
            totals = []
            for part in parts:
                model(**part, num_items_in_batch=items)
                totals.append(aux.total())
            sum(totals).backward()  # type: ignore[union-attr]
        return {plain_name(name): p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    assert_equal(run(WAYS["wrapper around blocks"]), run(None), 0.0)


def test_passes_are_forgotten_with_their_graphs():
    model = tiny_models.build("mixtral").model
    parts, _ = batches()
    with AuxLosses(**LOSSES).attach(model) as aux:
        for _ in range(3):
            model(**parts[0]).loss.backward()
        assert aux._watch is not None
        assert len(aux._watch._passes) == 1  # the latest


def test_reentrant_wrappers_are_refused():
    model = tiny_models.build("mixtral").model
    for block in model.model.layers:
        block.forward = functools.partial(checkpoint_positionally, block.forward)
    with AuxLosses(balance=1.0).attach(model), pytest.raises(Misuse, match="reentrant"):
        model(**batches()[0][0])


def checkpoint_positionally(forward: Callable[..., Any], hidden: torch.Tensor, **rest: Any) -> Any:
    return checkpoint(lambda x: forward(x, **rest), hidden, use_reentrant=True)


def test_a_checkpoint_around_the_whole_model_is_refused_and_not_counted_twice():
    model, part = tiny_models.build("mixtral").model, batches()[0][0]

    def run() -> torch.Tensor:
        return checkpoint(lambda: model(**part).loss, use_reentrant=False)

    records = []
    with observe(model, lambda record: records.append(record.recomputed)):
        run().backward()
    assert records == [False] * 3 + [True] * 3
    with AuxLosses(balance=1.0).attach(model), pytest.raises(Misuse, match="checkpoint its blocks"):
        run().backward()


def test_passes_of_several_threads_are_told_apart_or_refused():
    model, parts = tiny_models.build("mixtral").model, batches()[0]
    WAYS["wrapper around blocks"](model)
    with AuxLosses(balance=1.0).attach(model):
        losses = []
        for part in parts:
            thread = threading.Thread(target=lambda part=part: losses.append(model(**part).loss))
            thread.start()
            thread.join()
        with pytest.raises(Misuse, match="in one thread"):
            sum(losses).backward()


def test_a_layer_called_outside_of_any_pass_is_run_unwatched():
    model, part = tiny_models.build("mixtral").model, batches()[0][0]
    records = []
    with observe(model, records.append):
        model(**part)
        seen = len(records)
        model.model.layers[0].mlp(torch.randn(1, 5, 32))
    assert len(records) == seen
