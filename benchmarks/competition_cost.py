"""What competition costs in one MoE layer, by the number of experts and how many of them a token is sent to.

A model of one block with next to nothing around its experts, so that ratios are of the layer; of a whole model they
are nearer to 1. `ours` competes with a share of every sequence's tokens in every step; `step` is one in which all of
the layer's tokens compete, as the papers have it in 7 % of the steps, and `v2-code` is what that is on average. The
counted ratio is of the experts' FLOPs, forward and backward.

    python benchmarks/competition_cost.py
    python benchmarks/competition_cost.py --device cuda --hidden 1024 --width 512 --tokens 32768
"""

import statistics
from dataclasses import dataclass, replace

import torch
import transformers
from paired import heads, machine, milliseconds, rounds, start

from moestro import AuxLosses, MoE, MoestroConfig, MoestroForCausalLM
from moestro.competition.presets import PRESETS
from moestro.models import PADDED_MM

ARMS = ("without", "ours", "step")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """The layer, the batch and the measurement."""

    experts: tuple[int, ...] = (8, 16, 32, 64, 128)
    top_k: tuple[int, ...] = (2, 8)
    hidden: int = 256
    width: int = 128
    tokens: int = 4096
    sequence: int = 512
    rounds: int = 9
    warm_up: int = 2
    threads: int = 1
    device: str = "cpu"


class Layer:
    """One size, in three arms that share their model."""

    def __init__(self, sizes: Sizes, experts: int, k: int) -> None:
        torch.manual_seed(0)
        self.sizes = sizes
        config = MoestroConfig(
            vocab_size=512,
            hidden_size=sizes.hidden,
            num_hidden_layers=1,
            num_attention_heads=heads(sizes.hidden, 64),
            feed_forward=[[MoE(num_experts=experts, top_k=k, width=sizes.width)]],
        )
        self.model = MoestroForCausalLM(config).train().to(sizes.device)
        self.model.chunked_loss = True
        if sizes.device == "cpu":
            self.model.set_experts_implementation(PADDED_MM)
        ours, code = PRESETS["ours"](1), PRESETS["v2-code"](1)
        code["compete"] = replace(code["compete"], rate=1.0, max_layers=None)
        self.arms = {
            "without": AuxLosses(balance=0.01),
            "ours": AuxLosses(balance=0.01, **ours),
            "step": AuxLosses(balance=0.01, **code),
        }

    def step(self, arm: str, index: int) -> float:
        """Milliseconds of forward and backward."""
        generator = torch.Generator().manual_seed(index)
        shape = (self.sizes.tokens // self.sizes.sequence, self.sizes.sequence)
        ids = torch.randint(512, shape, generator=generator).to(self.sizes.device)
        with self.arms[arm].attach(self.model):
            taken = milliseconds(lambda: self.train(ids), self.sizes.device)
            self.arms[arm].step()
        return taken

    def train(self, ids: torch.Tensor) -> None:
        """Forward and backward."""
        with torch.autocast(self.sizes.device, torch.bfloat16):
            loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        self.model.zero_grad()


def main(sizes: Sizes) -> None:
    torch.set_num_threads(sizes.threads)
    where = machine(sizes.device)
    print(f"{where}; torch {torch.__version__}, transformers {transformers.__version__}; {sizes}\n")
    rate, mean = PRESETS["ours"](1)["compete"].rate, PRESETS["v2-code"](1)["compete"].rate
    print(f"| experts | k | ms without | ours (rate {rate:g}) | counted | step | v2-code (rate {mean:g}) | counted |")
    print("|--:|--:|--:|--:|--:|--:|--:|--:|")
    for k in sizes.top_k:
        for experts in sizes.experts:
            layer = Layer(sizes, experts, k)
            times = rounds(ARMS, layer.step, number=sizes.rounds, warm_up=sizes.warm_up)
            ours, step = (ratio(times[arm], times["without"]) for arm in ("ours", "step"))
            counted = [1 + share * experts / k / 3 for share in (rate, mean)]
            print(
                f"| {experts} | {k} | {statistics.median(times['without']):.0f} | {ours:.3f} | {counted[0]:.3f} | "
                f"{step:.3f} | {1 + mean * (step - 1):.3f} | {counted[1]:.3f} |",
                flush=True,
            )


def ratio(taken: list[float], base: list[float]) -> float:
    """The median over rounds."""
    return statistics.median(ours / theirs for ours, theirs in zip(taken, base, strict=True))


if __name__ == "__main__":
    start(main, Sizes, __doc__)
