"""Held-out evaluation: every document pays for its own tokens, once, whatever the batch."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from agreement import small_model
from moestro import Compete, MoE, reroute
from moestro.competition.inference import by_competition
from moestro.data.packing import PackedRows, write_stream
from moestro.evaluation import evaluate, held_out
from test_aux_losses import tiny_model

LENGTHS, END = [5, 17, 1, 30, 9], 0


@pytest.fixture
def rows(tmp_path: Path) -> PackedRows:
    draw = np.random.default_rng(0)
    documents = [draw.integers(1, 64, size=n) for n in LENGTHS]
    write_stream(
        tmp_path / "held_out",
        documents,
        end_of_text=END,
        vocabulary=64,
        domain=[0, 1, 0, 1, 1],
        num_bytes=[3 * n for n in LENGTHS],
    )
    return PackedRows(tmp_path / "held_out", 16, every_token_once=True)


def loop(model: torch.nn.Module, rows: PackedRows) -> tuple[np.ndarray, np.ndarray]:
    """Token by token, row by row."""
    nll, tokens = np.zeros(len(LENGTHS)), np.zeros(len(LENGTHS), dtype=int)
    starts = np.cumsum([0, *[n + 1 for n in LENGTHS]]) + 1
    place = 0
    for index in range(len(rows)):
        row = rows[index]
        logits = model(row["input_ids"][None]).logits[0]
        for t in range(1, 16):
            if row["labels"][t] == -100:
                continue
            place += 1
            document = int(np.searchsorted(starts, place, side="right")) - 1
            nll[document] += cross_entropy(logits[t - 1], row["labels"][t]).item()
            tokens[document] += 1
    return nll, tokens


@pytest.mark.parametrize("batch_tokens", [16, 48, 4096])
def test_documents_pay_for_their_own_tokens(rows: PackedRows, batch_tokens: int):
    model = tiny_model(attention_dropout=0.5)
    result = evaluate(model, rows, ["a", "b"], batch_tokens=batch_tokens)
    assert model.training
    with torch.no_grad():
        nll, tokens = loop(model.eval(), rows)
    np.testing.assert_allclose(result.nll, nll, rtol=1e-5)
    assert result.tokens.tolist() == tokens.tolist() == [n + 1 for n in LENGTHS]


def test_bits_per_byte_and_domains(rows: PackedRows):
    model = tiny_model()
    result = evaluate(model, rows, ["a", "b"])
    figures = held_out(result, rows.document_bytes, rows.document_domain, ["a", "b"])
    total = result.nll.sum()
    assert figures.loss == pytest.approx(total / (sum(LENGTHS) + len(LENGTHS)))
    assert figures.bits_per_byte == pytest.approx(total / math.log(2) / (3 * sum(LENGTHS)))
    assert figures.domains["a"].loss == pytest.approx((result.nll[0] + result.nll[2]) / 8)
    assert figures.domains["b"].tokens == 17 + 30 + 9 + 3


def test_routing_is_counted_per_domain(rows: PackedRows):
    result = evaluate(tiny_model(), rows, ["a", "b"])
    assert len(result.layers) == 3
    for layer in result.layers:
        assert sum(layer.load) == pytest.approx(1)
        assert all(sum(load) == pytest.approx(1) for load in layer.domain_load.values())
        assert layer.figures["max_vio_data"] == pytest.approx(max(layer.load) * 4 - 1)
    assert result.layers == evaluate(tiny_model(), rows, ["a", "b"]).layers


def test_a_part_of_the_rows(rows: PackedRows):
    result = evaluate(tiny_model(), rows, ["a", "b"], max_rows=1, routing=False)
    assert result.tokens.sum() == 15
    assert result.layers == ()


def test_the_loss_if_all_experts_competed_stands_beside_the_routers(rows: PackedRows):
    """A rule of responses as they are needs no statistics, so the same can be had by hand."""
    model, rule = tiny_model(), Compete(response_scale="none", balance_winners=0.0, temperature=0.5)
    found = evaluate(model, rows, ["a", "b"], compete=rule)
    assert found.competed.tokens == found.tokens.sum()
    assert found.competed.router == pytest.approx(found.loss)
    with reroute(model, by_competition(rule)):
        by_hand = evaluate(model, rows, ["a", "b"], routing=False)
    assert found.competed.competition == pytest.approx(by_hand.loss)
    assert by_hand.loss != pytest.approx(found.loss)
    assert evaluate(model, rows, ["a", "b"], routing=False).competed is None


def test_composed_sub_layers_say_what_they_owe_to_each_other(rows: PackedRows):
    half = MoE(num_experts=4, top_k=2, width=8, num_shared=1)
    model = small_model(feed_forward=[[half, half], [half]], num_hidden_layers=2)
    first, second, alone = evaluate(model, rows, ["a", "b"]).layers
    assert (first.label, second.label, alone.label) == ("0.0", "0.1", "1")
    assert first.pairs is None
    assert alone.pairs is None
    assert second.name == "model.layers.0.feed_forward.1"
    assert second.figures["composed"] is not None
    assert second.figures["composed"] > 0
    assert np.array(second.pairs).shape == (4, 4)
