"""Which tokens and which steps compete: how many, how fairly, and that only seed, layer, step and content decide."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.competition.schedule import competes_in_step, competing_tokens
from moestro.randomness import content
from moestro.routing import Batch


def rows_of(lengths: list[int], padded_to: int, left: bool = False) -> Batch:
    """Rows of valid tokens, padded on one side; tokens are random but the same for the same row."""
    ids = torch.zeros(len(lengths), padded_to, dtype=torch.long)
    valid = torch.zeros(len(lengths), padded_to, dtype=torch.bool)
    for row, length in enumerate(lengths):
        place = slice(padded_to - length, padded_to) if left else slice(0, length)
        ids[row, place] = torch.randint(1000, (length,), generator=torch.Generator().manual_seed(row))
        valid[row, place] = True
    sequence = torch.arange(len(lengths)).repeat_interleave(padded_to)
    return Batch(sequence=sequence, num_sequences=len(lengths), valid=valid.flatten(), input_ids=ids.flatten())


def places(batch: Batch, rate: float, seed: int = 0) -> list[set[int]]:
    """Of each sequence, which of its valid tokens compete, counted from its first."""
    token, filled = competing_tokens(batch, content(batch) + seed, rate)
    competes = set(token[filled].tolist())
    found = []
    for sequence in range(batch.num_sequences):
        mine = (batch.valid & (batch.sequence == sequence)).nonzero().flatten().tolist()
        found.append({place for place, index in enumerate(mine) if index in competes})
    return found


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    more=st.integers(0, 7),
    rate=st.sampled_from([0.01, 0.1, 1 / 3, 0.5, 1.0]),
    left=st.booleans(),
)
def test_a_fixed_number_of_each_sequence_however_it_is_cut_and_padded(lengths, more, rate, left):
    whole = rows_of(lengths, max(lengths) + more, left)
    found = places(whole, rate)
    assert [len(mine) for mine in found] == [math.ceil(round(rate * n, 6)) for n in lengths]
    token, _ = competing_tokens(whole, content(whole), rate)
    assert len(token) == len(lengths) * math.ceil(round(rate * (max(lengths) + more), 6))  # whatever is padded
    assert len(set(token.tolist())) == len(token)
    tight = rows_of(lengths, max(lengths), not left)
    assert places(tight, rate) == found


def test_a_sequence_in_other_company_and_in_a_packed_row():
    lengths = [30, 17, 25]
    apart = places(rows_of(lengths, 30), 0.2)
    ids = [rows_of(lengths, 30).input_ids.view(3, 30)[row, :n] for row, n in enumerate(lengths)]
    packed = Batch(
        sequence=torch.arange(3).repeat_interleave(torch.tensor(lengths)),
        num_sequences=sum(lengths),  # an upper bound, as where positions tell sequences apart
        valid=torch.ones(sum(lengths), dtype=torch.bool),
        input_ids=torch.cat(ids),
    )
    assert places(packed, 0.2)[:3] == apart
    token, filled = competing_tokens(packed, content(packed), 0.2)
    assert filled.all()
    assert len(token) == sum(math.ceil(0.2 * n) for n in lengths)


def test_other_keys_choose_other_tokens_and_all_of_them_in_time():
    batch = rows_of([64], 64)
    chosen = [places(batch, 0.1, seed)[0] for seed in range(200)]
    assert len({frozenset(mine) for mine in chosen}) > 190
    often = torch.zeros(64)
    for mine in chosen:
        often[list(mine)] += 1
    assert often.min() > 5  # of 22 expected
    assert often.max() < 45


@pytest.mark.parametrize(
    ("layers", "rate", "cap"), [(6, 0.07, 3), (16, 0.07, 3), (64, 0.07, 3), (4, 0.5, 3), (3, 1.0, None)]
)
def test_steps_are_shared_out_evenly(layers, rate, cap):
    steps = 3000
    table = torch.tensor(
        [[competes_in_step(s, layer, layers, rate, cap, seed=1) for layer in range(layers)] for s in range(steps)]
    ).double()
    mean = min(rate * layers, cap or layers)
    assert table.sum(1).mean() == pytest.approx(mean, abs=layers / steps)
    assert table.sum(1).max() <= math.ceil(mean)  # which is the cap at most
    share = table.mean(0)
    assert share.max() - share.min() <= 2 / steps  # no layer starves where the cap saturates
    orders = {
        tuple(competes_in_step(s, x, layers, rate, cap, seed) for s in range(50) for x in range(layers))
        for seed in range(8)
    }
    assert len(orders) > 1 or rate == 1
