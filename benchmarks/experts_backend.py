"""How long a training step takes with our experts backend, cross-entropy and model, against stock transformers.

A Qwen3-MoE model and ours of the same shape in one process; the arms take turns, a new batch of random tokens each
round, because what is measured depends on routing that changes from step to step. Each ratio is to the fastest stock
arm *of the same round*; the table gives its median and quartiles. A step is forward, loss, backward, fused AdamW and
zero_grad.

    python benchmarks/experts_backend.py --threads 1
    python benchmarks/experts_backend.py --hidden 128 --expert-width 128 --vocabulary 4096 --tokens 512 --sequence 128
    python benchmarks/experts_backend.py --keep-heap     # all arms without page faults
"""

import ctypes
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import transformers
from paired import heads, machine, quartiles, start
from torch import Tensor
from torch.optim import AdamW
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from moestro import MoE, MoestroConfig, MoestroForCausalLM
from moestro.models import PADDED_MM, SHORT_SDPA
from moestro.models.chunked_cross_entropy import chunked_cross_entropy

Model = Qwen3MoeForCausalLM | MoestroForCausalLM


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """The model, the batch and the measurement."""

    layers: int = 4
    hidden: int = 256
    head: int = 64
    """Largest width of an attention head."""
    expert_width: int = 256
    experts: int = 16
    top_k: int = 2
    vocabulary: int = 8192
    tokens: int = 2048
    sequence: int = 256
    rounds: int = 7
    warm_up: int = 2
    threads: int = 1
    keep_heap: bool = False
    """Tell glibc to keep freed memory, so that no arm pays for new pages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One way to do the same step."""

    name: str
    backend: str
    bf16: bool
    chunked: bool = False
    stock: bool = False
    own: bool = False
    """Our model, as `moestro train` runs it."""


ARMS = [
    Arm(name="stock eager, fp32", backend="eager", bf16=False, stock=True),
    Arm(name="stock eager, bf16 autocast", backend="eager", bf16=True, stock=True),
    Arm(name="stock grouped_mm, fp32", backend="grouped_mm", bf16=False, stock=True),
    Arm(name="stock grouped_mm, bf16 autocast", backend="grouped_mm", bf16=True, stock=True),
    Arm(name="padded_mm, bf16 autocast", backend=PADDED_MM, bf16=True),
    Arm(name="padded_mm + chunked loss, bf16 autocast", backend=PADDED_MM, bf16=True, chunked=True),
    Arm(name="padded_mm + chunked loss, fp32", backend=PADDED_MM, bf16=False, chunked=True),
    Arm(name="our model, bf16 autocast", backend=PADDED_MM, bf16=True, own=True),
    Arm(name="our model, fp32", backend="grouped_mm", bf16=False, own=True),
]


def build_stock(sizes: Sizes) -> Qwen3MoeForCausalLM:
    """The model of transformers."""
    config = Qwen3MoeConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        moe_intermediate_size=sizes.expert_width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=heads(sizes.hidden, sizes.head),
        num_key_value_heads=heads(sizes.hidden, sizes.head),
        head_dim=sizes.hidden // heads(sizes.hidden, sizes.head),
        num_experts=sizes.experts,
        num_experts_per_tok=sizes.top_k,
        norm_topk_prob=True,
        max_position_embeddings=sizes.sequence,
        use_cache=False,
    )
    return Qwen3MoeForCausalLM(config).train()


def build_ours(sizes: Sizes) -> MoestroForCausalLM:
    """Our model of the same shape."""
    block = MoE(num_experts=sizes.experts, top_k=sizes.top_k, width=sizes.expert_width)
    config = MoestroConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=heads(sizes.hidden, sizes.head),
        feed_forward=[[block]] * sizes.layers,
        max_position_embeddings=sizes.sequence,
    )
    model = MoestroForCausalLM(config).train()
    model.chunked_loss = True
    return model


def loss_of(model: Model, arm: Arm, tokens: Tensor) -> Tensor:
    """The language-model loss, as the arm computes it."""
    with torch.autocast("cpu", torch.bfloat16) if arm.bf16 else nullcontext():
        if not arm.chunked:
            return model(input_ids=tokens, labels=tokens, use_cache=False).loss
        hidden = model.model(input_ids=tokens).last_hidden_state[:, :-1].flatten(0, 1)
        labels = tokens[:, 1:].flatten()
        return chunked_cross_entropy(hidden, model.lm_head.weight, labels, num_items=len(labels))


def measure(step: Callable[[], object]) -> tuple[float, float]:
    """CPU and wall milliseconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    step()
    return 1e3 * (time.process_time() - cpu), 1e3 * (time.perf_counter() - wall)


def run(sizes: Sizes) -> dict[Arm, list[tuple[float, float]]]:
    """Milliseconds of every arm in every round after the warm-up."""
    torch.manual_seed(0)
    models: dict[bool, Model] = {False: build_stock(sizes), True: build_ours(sizes)}
    optimizers = {own: torch.optim.AdamW(m.parameters(), lr=3e-4, fused=True) for own, m in models.items()}
    shape = (sizes.tokens // sizes.sequence, sizes.sequence)
    times: dict[Arm, list[tuple[float, float]]] = {arm: [] for arm in ARMS}
    for number in range(sizes.warm_up + sizes.rounds):
        tokens = torch.randint(sizes.vocabulary, shape)
        for arm in ARMS:
            model, optimizer = models[arm.own], optimizers[arm.own]
            model.set_experts_implementation(arm.backend)
            if arm.own:
                model.set_attn_implementation(SHORT_SDPA if arm.bf16 else "sdpa")

            def step(
                model: Model = model, optimizer: AdamW = optimizer, arm: Arm = arm, tokens: Tensor = tokens
            ) -> None:
                loss_of(model, arm, tokens).backward()
                optimizer.step()
                optimizer.zero_grad()

            taken = measure(step)
            if number >= sizes.warm_up:
                times[arm].append(taken)
        print(f"\rround {number + 1} of {sizes.warm_up + sizes.rounds}", end="", file=sys.stderr)
    print(file=sys.stderr)
    return times


def table(times: dict[Arm, list[tuple[float, float]]]) -> str:
    medians = {arm: [statistics.median(column) for column in zip(*rows, strict=True)] for arm, rows in times.items()}
    fastest = min((arm for arm in ARMS if arm.stock), key=lambda arm: medians[arm][0])
    lines = ["| arm | CPU ms | wall ms | CPU ratio | quartiles |", "|---|--:|--:|--:|--:|"]
    for arm, rows in times.items():
        ratios = [ours[0] / theirs[0] for ours, theirs in zip(rows, times[fastest], strict=True)]
        low, middle, high = quartiles(ratios)
        cpu, wall = medians[arm]
        lines.append(f"| {arm.name} | {cpu:.0f} | {wall:.0f} | {middle:.2f} | {low:.2f} to {high:.2f} |")
    return "\n".join(lines)


def keep_heap() -> None:
    """glibc's M_MMAP_MAX = 0 and the highest M_TRIM_THRESHOLD: freed memory is neither unmapped nor given back."""
    libc = ctypes.CDLL("libc.so.6")
    assert libc.mallopt(-4, 0) and libc.mallopt(-1, 2**31 - 1)


def main(sizes: Sizes) -> None:
    torch.set_num_threads(sizes.threads)
    if sizes.keep_heap:
        keep_heap()
    times = run(sizes)
    print(f"{machine('cpu')}; torch {torch.__version__}, transformers {transformers.__version__}; {sizes}\n")
    print(table(times))


if __name__ == "__main__":
    start(main, Sizes, __doc__)
