"""Padding and packed sequences, however attention is told of them: truth is a loop over the sequences, one by one."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch
from torch.nn.attention.flex_attention import create_block_mask

from moestro import AuxLosses, Misuse
from moestro.adapters.batch import describe
from test_aux_losses import assert_equal

LOSSES: dict[str, Any] = {"balance": 1.0, "variance": 1.0, "variance_over": "sequence", "router_z": 0.1}
PACKAGES = ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "olmoe"]
LENGTHS = [5, 8, 3]
"""Sequences in a padded batch of rows of 8, or packed into one row of 16."""


@functools.cache
def sequences() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 64, (length,), generator=generator) for length in LENGTHS]


def items() -> int:
    return sum(length - 1 for length in LENGTHS)


def gradients(package: str, batches: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    model = tiny_models.build(package).model
    aux = AuxLosses(**LOSSES)
    with aux.attach(model):
        for batch in batches:
            model(**batch, num_items_in_batch=items()).loss.backward()
        loads = {f"load of {state.layer.name}": state.load for state in aux._layers}
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None} | loads


@functools.cache
def one_by_one(package: str) -> dict[str, torch.Tensor]:
    return gradients(package, [{"input_ids": ids[None], "labels": ids[None]} for ids in sequences()])


def padded(*, left: bool = False) -> tuple[dict[str, Any], torch.Tensor]:
    """Rows of 8 with labels of -100 at padding, and which tokens are valid."""
    ids, valid = torch.zeros(len(LENGTHS), 8, dtype=torch.long), torch.zeros(len(LENGTHS), 8, dtype=torch.bool)
    for row, sequence in enumerate(sequences()):
        place = slice(8 - len(sequence), None) if left else slice(len(sequence))
        ids[row, place], valid[row, place] = sequence, True
    position = (valid.cumsum(1) - 1).clamp_min(0)  # nothing predicts the first token of a sequence, padding neither
    return {
        "input_ids": ids,
        "labels": ids.masked_fill((position == 0) | ~valid, -100),
        "position_ids": position,
    }, valid


def packed() -> tuple[dict[str, Any], torch.Tensor]:
    """One row, and the index of each token's sequence."""
    ids, index = torch.cat(sequences())[None], torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))[None]
    labels = ids.masked_fill(index.diff(dim=1, prepend=-torch.ones(1, 1, dtype=torch.long)) != 0, -100)
    return {"input_ids": ids, "labels": labels}, index


def causal(keys: torch.Tensor) -> torch.Tensor:
    """[rows, 1, length, length]: causal, and only to keys that are valid (bool) or of the same sequence (int)."""
    length = keys.shape[1]
    pairs = keys[:, None, :] if keys.dtype == torch.bool else keys[:, :, None] == keys[:, None, :]
    return (pairs & torch.ones(length, length, dtype=torch.bool).tril())[:, None]


def additive(mask: torch.Tensor, masked: float = torch.finfo(torch.float32).min) -> torch.Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, masked)


def unmasked(mask: torch.Tensor) -> torch.Tensor:
    """As transformers makes it for kernels that cannot do without any key: who may attend to nothing attends to all."""
    return mask | ~mask.any(-1, keepdim=True)


MASKS: dict[str, Callable[[torch.Tensor], Any]] = {
    "matrix": lambda keys: keys,
    "bool": causal,
    "additive": lambda keys: additive(causal(keys)),
    "additive, -1e9": lambda keys: additive(causal(keys), -1e9),
    "all heads": lambda keys: causal(keys).expand(-1, 4, -1, -1),
    "unmasked": lambda keys: unmasked(causal(keys)),
}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("package", PACKAGES)
def test_padding_is_read_off_any_mask(package: str, side: str):
    batch, valid = padded(left=side == "left")
    for name, make in MASKS.items():
        if side == "left" and name not in ("matrix", "unmasked"):
            continue  # rows without any key give NaN
        mask: Any = make(valid)
        if package == "gpt_oss" and name != "matrix":  # adds its masks, of which it takes one per type of layer
            mask = additive(mask) if mask.dtype == torch.bool else mask
            mask = {"sliding_attention": mask, "full_attention": mask}  # windows hold 8 tokens
        assert_equal(gradients(package, [batch | {"attention_mask": mask}]), one_by_one(package))


@pytest.mark.parametrize("package", PACKAGES)
def test_packed_rows_are_read_off_a_mask(package: str):
    batch, index = packed()
    position = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    mask: Any = additive(causal(index))
    window = causal(index) & torch.ones(16, 16, dtype=torch.bool).triu(-7)
    if package == "gpt_oss":
        mask = {"sliding_attention": additive(window), "full_attention": mask}
    got = gradients(package, [batch | {"attention_mask": mask, "position_ids": position}])
    assert_equal(got, one_by_one(package))


BOUNDS = torch.tensor([0, 5, 13, 16], dtype=torch.int32)
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])[None]


@pytest.mark.parametrize(
    "how",
    [
        {"position_ids": POSITIONS},
        {"position_ids": POSITIONS + 2},  # as position_ids_start=2 of transformers' collator has them
        {"position_ids": torch.stack([POSITIONS, *[torch.zeros_like(POSITIONS)] * 3])},
        {"cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": BOUNDS, "max_length_q": 8},
        {"cu_seq_lens_q": BOUNDS, "attention_mask": torch.ones(1, 16)},
        {"seq_idx": packed()[1].int()},
        {"attention_mask": create_block_mask(lambda b, h, q, k: (q >= k) & (packed()[1][0][q] == packed()[1][0][k]),
                                             1, None, 16, 16, device="cpu")},
    ],
    ids=["positions", "positions from 2", "positions of images", "bounds", "bounds and a mask", "seq_idx", "BlockMask"],
)  # fmt: skip
def test_packed_rows_however_they_are_marked(how: dict[str, Any]):
    batch, index = packed()
    found = describe(batch | how)
    assert found.sequence.tolist() == index[0].tolist()
    assert found.valid is None or bool(found.valid.all())
    embeds = describe({"inputs_embeds": torch.zeros(1, 16, 4)} | how)
    assert embeds.sequence.tolist() == index[0].tolist()


def test_padding_in_a_block_mask_and_behind_a_cache():
    _, valid = padded()
    mask = create_block_mask(lambda b, h, q, k: (q >= k) & valid[b, k], 3, None, 8, 8, device="cpu")
    assert torch.equal(describe({"input_ids": valid.long(), "attention_mask": mask}).valid, valid.flatten())
    # The last three tokens, after five in a cache.
    later = causal(valid)[:, :, 5:]
    found = describe({"input_ids": valid[:, 5:].long(), "attention_mask": later})
    assert torch.equal(found.valid, valid[:, 5:].flatten())
    assert torch.equal(
        describe({"input_ids": valid[:, 5:].long(), "attention_mask": valid}).valid, valid[:, 5:].flatten()
    )


@pytest.mark.parametrize(
    ("mask", "got"),
    [
        (torch.ones(3, 5), r"one of shape \(3, 5\)"),
        (torch.ones(3, 1, 1, 8, 8), r"one of shape \(3, 1, 1, 8, 8\)"),
        ("causal", "got str"),
        (torch.ones(8, 8, dtype=torch.bool).tril(-1)[None, None], "none may"),
    ],
)
def test_a_mask_that_says_nothing_of_padding_is_refused(mask: Any, got: str):
    with pytest.raises(Misuse, match=got):
        describe({"input_ids": torch.zeros(3, 8, dtype=torch.long), "attention_mask": mask})


HOLES = {
    "hole": ([1, 1, 1, 0, 0, 1, 1, 1], [0] * 8),
    "left": ([0, 0, 0, 1, 1, 1, 1, 1], [0] * 8),
    "hole at a border": ([1, 1, 0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 1, 1, 1, 1]),
    "packed behind padding": ([0, 0, 1, 1, 1, 1, 0, 1], [0, 0, 0, 0, 1, 1, 1, 1]),
}
"""Valid tokens of a row, and the sequence of each token (padding goes with a neighbour)."""


@pytest.mark.parametrize("name", HOLES)
def test_padding_starts_no_sequence(name: str):
    """A label at padding counts for the sequence beside it, as with a matrix of valid tokens."""
    valid, index = (torch.tensor(value) for value in HOLES[name])
    ids, pairs = torch.ones(1, 8, dtype=torch.long), causal(index[None]) & valid.bool()
    block = create_block_mask(
        lambda b, h, q, k: (q >= k) & (index[q] == index[k]) & valid.bool()[k], 1, None, 8, 8, device="cpu"
    )
    for mask in (pairs, pairs[:, 0], unmasked(pairs), additive(unmasked(pairs)), block):
        batch = describe({"input_ids": ids, "attention_mask": mask})
        assert batch.valid is not None and batch.valid.tolist() == valid.bool().tolist()
        own = batch.sequence[valid.bool()]
        assert own.tolist() == index[valid.bool()].tolist()
        if not index.any():
            assert batch.sequence.tolist() == describe({"input_ids": ids}).sequence.tolist()


@pytest.mark.parametrize("shape", [(3, 8), (3, 1, 8, 8), (3, 8, 8)])
def test_a_mask_of_other_rows_is_refused(shape: tuple[int, ...]):
    with pytest.raises(Misuse, match=r"for 2 rows of 8 tokens"):
        describe({"input_ids": torch.zeros(2, 8, dtype=torch.long), "attention_mask": torch.ones(shape)})
