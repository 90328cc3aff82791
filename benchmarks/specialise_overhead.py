"""What orthogonality and variance losses cost beside load balance: step time paired in one run, and peak memory.

One Qwen3-MoE model; the arms take turns, in an order drawn anew each round, on the same batch of random tokens. Each
ratio is to "balance" of the same round; the table gives its median and quartiles. A step is forward, loss, backward,
AdamW, zero_grad. On a GPU peak memory is what torch allocated in the arm's steps; on a CPU it is the resident set of a
process of its own.

    python benchmarks/specialise_overhead.py --threads 1
    python benchmarks/specialise_overhead.py --device cuda --hidden 2048 --expert-width 1408 --experts 64 --tokens 8192
"""

import json
import random
import resource
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass

import torch
import transformers
import tyro
from experts_backend import processor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from moestro import AuxLosses

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
    backend: str = "grouped_mm"
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
        num_attention_heads=sizes.hidden // 128,
        num_key_value_heads=sizes.hidden // 128,
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
        autocast = torch.autocast(self.sizes.device, torch.bfloat16) if self.sizes.bf16 else nullcontext()
        with aux.attach(self.model):
            self.wait()
            start = self.clock()
            with autocast:
                loss = self.model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            aux.step()
            self.wait()
            return 1e3 * (self.clock() - start)

    def clock(self) -> float:
        """Seconds; of this process alone on a CPU, where others may be busy."""
        return time.perf_counter() if self.sizes.device == "cuda" else time.process_time()

    def wait(self) -> None:
        if self.sizes.device == "cuda":
            torch.cuda.synchronize()

    def batch(self) -> torch.Tensor:
        shape = (self.sizes.tokens // self.sizes.sequence, self.sizes.sequence)
        return torch.randint(self.sizes.vocabulary, shape, device=self.sizes.device)


def run(sizes: Sizes) -> dict[str, list[float]]:
    """Milliseconds of every arm in every round after the warm-up."""
    bench, times = Bench(sizes), {arm: [] for arm in ARMS}
    for number in range(sizes.warm_up + sizes.rounds):
        tokens = bench.batch()
        for arm in random.sample(list(ARMS), len(ARMS)):  # who comes after whom matters: caches, freed memory
            taken = bench.step(arm, tokens)
            if number >= sizes.warm_up:
                times[arm].append(taken)
        print(f"\rround {number + 1} of {sizes.warm_up + sizes.rounds}", end="", file=sys.stderr)
    print(file=sys.stderr)
    return times


def peak_gib(sizes: Sizes, arm: str) -> float:
    """Peak memory of three steps of one arm."""
    if sizes.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        bench = Bench(sizes)
        for _ in range(3):
            bench.step(arm, bench.batch())
        return torch.cuda.max_memory_allocated() / 2**30
    flags = [f"--only={arm}"]
    for name, value in asdict(sizes).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif name != "only":
            flags.append(f"--{flag}={value}")
    done = subprocess.run([sys.executable, __file__, *flags], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def table(sizes: Sizes, times: dict[str, list[float]]) -> str:
    lines = ["| losses | ms a step (CPU time on a CPU) | ratio | quartiles | peak GiB |", "|---|--:|--:|--:|--:|"]
    for arm, taken in times.items():
        ratios = [ours / base for ours, base in zip(taken, times[BASE], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        memory = f"{peak_gib(sizes, arm):.2f}" if sizes.memory else ""
        lines.append(f"| {arm} | {statistics.median(taken):.0f} | {middle:.3f} | {low:.3f} to {high:.3f} | {memory} |")
    return "\n".join(lines)


def main(sizes: Sizes) -> None:
    torch.set_num_threads(sizes.threads)
    if sizes.only:
        bench = Bench(sizes)
        for _ in range(3):
            bench.step(sizes.only, bench.batch())
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
        return
    where = torch.cuda.get_device_name() if sizes.device == "cuda" else processor()
    print(f"{where}; torch {torch.__version__}, transformers {transformers.__version__}; {sizes}\n")
    print(table(sizes, run(sizes)))


if __name__ == "__main__":
    main(tyro.cli(Sizes, description=__doc__))
