"""The joint histogram of two layers' choices, and what sub-layers of one block owe to each other."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import mutual_info_score
from sklearn.metrics.cluster import expected_mutual_information
from torch import Tensor

from agreement import MOE, block, randomise, small_model, some_ids
from moestro import Dense, MoestroForCausalLM
from moestro.adapters import RoutingMeter
from moestro.adapters.composed import ComposedFigures, ComposedMeter
from moestro.joint_routing import JointFigures, joint_figures, joint_sums
from moestro.routing import Batch, Routing


def routing_of(expert: Tensor, edge: Tensor | None = None) -> Routing:
    return Routing(expert=expert, weight=torch.ones(expert.shape), logits=None, scores=None, edge=edge)


def batch_of(tokens: int, valid: Tensor | None = None) -> Batch:
    return Batch(sequence=torch.zeros(tokens, dtype=torch.long), num_sequences=1, valid=valid)


def drawn(generator: torch.Generator, tokens: int, experts: int, top_k: int) -> Tensor:
    return torch.rand(tokens, experts, generator=generator).topk(top_k).indices


@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**32), st.data())
def test_pairs_are_counted_as_in_a_plain_loop(tokens, first_experts, later_experts, seed, data):
    generator = torch.Generator().manual_seed(seed)
    first = drawn(generator, tokens, first_experts, data.draw(st.integers(1, first_experts)))
    later = drawn(generator, tokens, later_experts, data.draw(st.integers(1, later_experts)))
    edge = torch.rand(later.shape, generator=generator) > 0.2
    valid = torch.rand(tokens, generator=generator) > 0.2
    sums = joint_sums(
        routing_of(first), routing_of(later, edge), batch_of(tokens, valid), (first_experts, later_experts)
    )
    expected = np.zeros((first_experts, later_experts))
    for token in range(tokens):
        for a in first[token].tolist():
            for slot, b in enumerate(later[token].tolist()):
                expected[a, b] += bool(valid[token]) and bool(edge[token, slot])
    np.testing.assert_array_equal(sums.pairs.numpy(), expected)
    assert sums.tokens == valid.sum()


def test_information_is_scikit_learns_where_each_token_has_one_choice():
    generator = torch.Generator().manual_seed(0)
    first, noise = drawn(generator, 300, 6, 1), drawn(generator, 300, 5, 1)
    later = torch.where(torch.rand(300, 1, generator=generator) < 0.4, first % 5, noise)
    figures = joint_figures(joint_sums(routing_of(first), routing_of(later), batch_of(300), (6, 5)))
    table = np.zeros((6, 5), dtype=np.int64)
    np.add.at(table, (first[:, 0].numpy(), later[:, 0].numpy()), 1)
    assert figures.mutual_information == pytest.approx(mutual_info_score(first[:, 0], later[:, 0]))
    assert figures.mutual_information_shuffled == pytest.approx(expected_mutual_information(table, 300), rel=1e-6)
    assert np.allclose(figures.histogram, table / 300)
    assert figures.mutual_information_excess > 0.1


def test_the_baseline_is_what_shuffling_gives_where_tokens_have_several_choices():
    generator = torch.Generator().manual_seed(1)
    first, later = drawn(generator, 120, 8, 3), drawn(generator, 120, 6, 2)
    shuffled: list[JointFigures] = []
    for _ in range(300):
        order = torch.randperm(120, generator=generator)
        shuffled.append(joint_figures(joint_sums(routing_of(first), routing_of(later[order]), batch_of(120), (8, 6))))
    mean = np.mean([figures.mutual_information for figures in shuffled])
    error = np.std([figures.mutual_information for figures in shuffled]) / len(shuffled) ** 0.5
    assert abs(mean - shuffled[0].mutual_information_shuffled) < 4 * error
    assert len({round(figures.mutual_information_shuffled, 12) for figures in shuffled}) == 1


def test_sums_of_batches_add():
    generator = torch.Generator().manual_seed(2)
    first, later = drawn(generator, 10, 4, 2), drawn(generator, 10, 4, 2)
    parts = [
        joint_sums(routing_of(first[s]), routing_of(later[s]), batch_of(5), (4, 4)) for s in (slice(5), slice(5, 10))
    ]
    whole = joint_sums(routing_of(first), routing_of(later), batch_of(10), (4, 4))
    assert torch.equal((parts[0] + parts[1]).pairs, whole.pairs)
    assert joint_figures(parts[0] + parts[1]) == joint_figures(whole)


# --- on models --------------------------------------------------------------------------------------------------------

TWO = [[Dense(width=16)], [MOE, replace(MOE, num_experts=6)], [MOE]]


def joint(model: MoestroForCausalLM, ids: Tensor) -> dict[str, JointFigures]:
    meter = RoutingMeter()
    with torch.no_grad(), meter.attach(model.eval()):
        model(ids)
    return meter.joint_figures()


def composed(model: MoestroForCausalLM, *batches: Tensor) -> dict[str, ComposedFigures]:
    meter = ComposedMeter()
    with torch.no_grad(), meter.attach(model.eval()):
        for ids in batches:
            model(ids)
    return meter.figures()


def test_only_layers_of_one_block_are_paired():
    model = small_model(feed_forward=TWO, num_hidden_layers=3)
    found = joint(model, some_ids(3, 8))
    assert list(found) == ["model.layers.1.feed_forward.1"]
    histogram = np.array(found["model.layers.1.feed_forward.1"].histogram)
    assert histogram.shape == (4, 6)
    assert histogram.sum() == pytest.approx(1)


def test_passes_in_training_keep_no_routing_alive():
    model = small_model(feed_forward=[[MOE, MOE]], num_hidden_layers=1).train()
    meter = RoutingMeter(training=True)
    with meter.attach(model):
        model(some_ids())
    assert meter.figures()
    assert meter.joint_figures() == {}
    assert meter._before is None


def test_a_tied_choice_tells_everything():
    shape = {"feed_forward": [[MOE, MOE]], "num_hidden_layers": 1}
    tied = joint(small_model(**shape, composition="tied"), some_ids(4, 32))["model.layers.0.feed_forward.1"]
    serial = joint(small_model(**shape), some_ids(4, 32))["model.layers.0.feed_forward.1"]
    assert np.allclose(tied.histogram, np.array(tied.histogram).T)
    assert tied.mutual_information_excess > 2 * max(serial.mutual_information_excess, 0.05)


def by_hand(model: MoestroForCausalLM, ids: Tensor, index: int) -> tuple[float, float]:
    """BA against B of block 0, and the share of other choices, from the stream as a hook sees it."""
    layer, seen = block(model, 0), []
    layer.feed_forward_norm[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(ids)
        before = stream = seen[0]
        for i in range(index):
            stream = stream + layer.feed_forward[i](layer.feed_forward_norm[i](stream))
        inputs = [layer.feed_forward_norm[index](x) for x in (stream, before)]
        with_a, alone = (layer.feed_forward[index](x) for x in inputs)
        choices = [layer.feed_forward[index].router(x.flatten(0, 1))[2].tolist() for x in inputs]
    other = sum(expert not in lone for own, lone in zip(*choices, strict=True) for expert in own)
    return float((with_a - alone).norm() / alone.norm()), other / sum(map(len, choices[0]))


@pytest.mark.parametrize("index", [1, 2])
def test_the_composed_term_is_what_the_earlier_sub_layers_change(index):
    model = small_model(
        feed_forward=[[MOE, Dense(width=16), MOE][: index + 1] if index == 2 else [MOE, MOE]], num_hidden_layers=1
    )
    ids = some_ids(2, 9)
    figures = composed(model, ids[:1], ids[1:])[f"model.layers.0.feed_forward.{index}"]
    size, rerouted = by_hand(model, ids, index)
    assert figures.size == pytest.approx(size, rel=1e-4)
    assert figures.rerouted == pytest.approx(rerouted)
    assert figures.size > 0.05
    assert 0 < rerouted < 1


def test_parallel_sub_layers_compose_nothing_and_tied_ones_keep_their_choice():
    shape = {"feed_forward": [[MOE, MOE]], "num_hidden_layers": 1}
    parallel = composed(small_model(**shape, composition="parallel"), some_ids())["model.layers.0.feed_forward.1"]
    tied = composed(small_model(**shape, composition="tied"), some_ids())["model.layers.0.feed_forward.1"]
    assert (parallel.size, parallel.rerouted) == (0, 0)
    assert tied.size > 0.05
    assert tied.rerouted == 0


def test_a_dense_sub_layer_has_a_composed_term_and_no_choices():
    figures = composed(small_model(feed_forward=[[MOE, Dense(width=16)]], num_hidden_layers=1), some_ids())
    assert figures["model.layers.0.feed_forward.1"].rerouted is None


def test_looking_leaves_nothing_behind_and_changes_nothing():
    model = small_model(feed_forward=[[MOE, MOE]], num_hidden_layers=1).eval()
    randomise(model)
    ids = some_ids()
    before = model(ids).logits
    meter = ComposedMeter()
    with meter.attach(model):
        assert torch.equal(model(ids).logits, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in block(model, 0).modules())
    assert not meter.finds_nothing
    alone = ComposedMeter()
    with alone.attach(small_model(feed_forward=[[MOE]], num_hidden_layers=1)):
        assert alone.finds_nothing
