"""`short_sdpa` against transformers' `sdpa`: values, gradients, masks, and where it applies."""

from typing import Any

import pytest
import torch
from torch import Tensor

from agreement import assert_all_equal, gradients, randomise
from moestro.architecture.sub_layers import Dense
from moestro.models import MoestroConfig, MoestroForCausalLM, short_attention
from moestro.models.short_attention import SHORT_SDPA


def model(num_key_value_heads: int = 4) -> MoestroForCausalLM:
    config = MoestroConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=num_key_value_heads,
        feed_forward=[[Dense(width=16)]] * 2,
        max_position_embeddings=1024,
    )
    built = MoestroForCausalLM(config)
    randomise(built)
    return built


def run(built: MoestroForCausalLM, attention: str, batch: dict[str, Tensor], *, autocast: bool) -> dict[str, Tensor]:
    built.set_attn_implementation(attention)
    built.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = built(**batch, labels=batch["input_ids"])
    output.loss.backward()
    return {"logits": output.logits.detach().float(), "loss": output.loss.detach()} | gradients(built)


def batch(rows: int, length: int, *, padded: bool) -> dict[str, Tensor]:
    ids = torch.randint(64, (rows, length), generator=torch.Generator().manual_seed(rows * length))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, : length // 3] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("num_key_value_heads", [1, 2, 4])
def test_fp32_is_untouched(num_key_value_heads: int, padded: bool):
    built, given = model(num_key_value_heads), batch(3, 17, padded=padded)
    assert_all_equal(run(built, SHORT_SDPA, given, autocast=False), run(built, "sdpa", given, autocast=False))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("num_key_value_heads", [1, 4])
def test_bf16_is_as_exact_as_sdpa(num_key_value_heads: int, padded: bool):
    built, given = model(num_key_value_heads), batch(4, 33, padded=padded)
    truth = run(built, "sdpa", given, autocast=False)
    short, stock = (run(built, attention, given, autocast=True) for attention in (SHORT_SDPA, "sdpa"))
    for name, value in truth.items():
        ours, theirs = ((found[name].float() - value).norm() / value.norm() for found in (short, stock))
        assert ours < 0.1 and ours < 1.2 * theirs + 1e-3, name


@pytest.fixture
def dtypes(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtypes in which attention is computed."""
    seen, attend = [], short_attention.sdpa_attention_forward

    def recording(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(query.dtype if not torch.is_autocast_enabled("cpu") else torch.bfloat16)
        return attend(module, query, *args, **kwargs)

    monkeypatch.setattr(short_attention, "sdpa_attention_forward", recording)
    return seen


@pytest.mark.parametrize(("length", "expected"), [(256, torch.float32), (257, torch.bfloat16)])
def test_short_rows_are_attended_to_in_fp32(length: int, expected: torch.dtype, dtypes: list[torch.dtype]):
    run(model(), SHORT_SDPA, batch(1, length, padded=False), autocast=True)
    assert dtypes == [expected] * 2


def test_what_is_saved_does_not_name_it(tmp_path: Any):
    built = model()
    built.set_attn_implementation(SHORT_SDPA)
    built.save_pretrained(tmp_path)
    assert SHORT_SDPA not in (tmp_path / "config.json").read_text()
    assert MoestroForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
