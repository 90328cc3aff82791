"""What orthogonality and variance losses cost beside load balance: step time paired in one run, and peak memory.

One Qwen3-MoE model; the arms take turns, in an order drawn anew each round, on the same batch of random tokens. Each
ratio is to "balance" of the same round; the table gives its median and quartiles. A step is forward, loss, backward,
AdamW, zero_grad. On a GPU peak memory is what torch allocated in the arm's steps; on a CPU it is the resident set of a
process of its own.

    python benchmarks/specialise_overhead.py --threads 1
    python benchmarks/specialise_overhead.py --device cuda --hidden 2048 --expert-width 1408 --experts 64 --tokens 8192
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from paired import heads, milliseconds, report, resident_gib, rounds, start
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from moestro import AuxLosses, Misuse

ARMS: dict[str, dict[str, float | str]] = {
    "nothing": {},
    "balance": {"balance": 1e-3},
    "balance + variance": {"balance": 1e-3, "variance": 1e-3},
    "balance + orthogonality": {"balance": 1e-3, "orthogonality": 1e-3},
    "balance + orthogonality + variance": {"balance": 1e-3, "orthogonality": 1e-3, "variance": 1e-3},
}
BASE = "balance"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """The model, the batch and the measurement. Proportions of hidden, width and k are DeepSeek-V2-Lite's."""

    layers: int = 2
    hidden: int = 1024
    expert_width: int = 704
    experts: int = 16
    top_k: int = 6
    vocabulary: int = 4096
    tokens: int = 2048
    sequence: int = 512
    rounds: int = 9
    warm_up: int = 2
    threads: int = 1
    backend: Literal["eager", "batched_mm", "grouped_mm", "padded_mm"] = "grouped_mm"
    bf16: bool = False
    device: str = "cpu"
    memory: bool = True
    """Measure peak memory too."""
    only: str = ""
    """Run this arm alone (the benchmark calls itself so, for memory on a CPU)."""


def build(sizes: Sizes) -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        moe_intermediate_size=sizes.expert_width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=heads(sizes.hidden, 128),
        num_key_value_heads=heads(sizes.hidden, 128),
        num_experts=sizes.experts,
        num_experts_per_tok=sizes.top_k,
        norm_topk_prob=True,
        max_position_embeddings=sizes.sequence,
        use_cache=False,
    )
    model = Qwen3MoeForCausalLM(config).train().to(sizes.device)
    model.set_experts_implementation(sizes.backend)
    return model


class Bench:
    """One model and its optimiser, stepped with one arm's losses or another's."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes, self.model = sizes, build(sizes)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def step(self, arm: str, tokens: torch.Tensor) -> float:
        """Milliseconds of one step, hooks attached before and detached after the clock."""
        aux = AuxLosses(**ARMS[arm])  # type: ignore[arg-type]
        with aux.attach(self.model):
            return milliseconds(lambda: self.train(aux, tokens), self.sizes.device)

    def train(self, aux: AuxLosses, tokens: torch.Tensor) -> None:
        """One step."""
        with torch.autocast(self.sizes.device, torch.bfloat16) if self.sizes.bf16 else nullcontext():
            loss = self.model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        aux.step()

    def batch(self, index: int) -> torch.Tensor:
        """The tokens of one round, the same for all arms."""
        shape = (self.sizes.tokens // self.sizes.sequence, self.sizes.sequence)
        generator = torch.Generator().manual_seed(index)
        return torch.randint(self.sizes.vocabulary, shape, generator=generator).to(self.sizes.device)


def three_steps(arm: str, sizes: Sizes) -> None:
    """What peak memory is measured of."""
    bench = Bench(sizes)
    for index in range(3):
        bench.step(arm, bench.batch(index))


def main(sizes: Sizes) -> None:
    torch.set_num_threads(sizes.threads)
    if sizes.only and sizes.only not in ARMS:
        raise Misuse(f"--only must be one of {', '.join(ARMS)}, got {sizes.only}")
    if sizes.only:
        three_steps(sizes.only, sizes)
        print(resident_gib())
        return
    bench = Bench(sizes)
    times = rounds(
        list(ARMS), lambda arm, i: bench.step(arm, bench.batch(i)), number=sizes.rounds, warm_up=sizes.warm_up
    )
    report("losses", sizes, times, BASE, lambda arm: three_steps(arm, sizes))


if __name__ == "__main__":
    start(main, Sizes, __doc__)
