"""What a training step of recipes costs: time paired in one run, and peak memory, each against the first recipe.

The models take turns on the same batch of random tokens, with the losses of their recipes. A step is forward, loss,
backward, AdamW, zero_grad, as `moestro train` does it (chunked cross-entropy; on a CPU bf16 with padded_mm and
short_sdpa).

    python benchmarks/recipe_steps.py --recipes fine-grained cartesian cartesian-paper --size small
    python benchmarks/recipe_steps.py --size base --device cuda --tokens 8192 --sequence 2048
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from paired import milliseconds, report, resident_gib, rounds, start

from moestro import AuxLosses, MoestroForCausalLM
from moestro.models import PADDED_MM, SHORT_SDPA
from moestro.training.recipes import recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """The models, the batch and the measurement."""

    recipes: tuple[str, ...] = ("fine-grained", "cartesian", "cartesian-paper")
    size: str = "small"
    tokens: int = 4096
    sequence: int = 512
    rounds: int = 15
    warm_up: int = 3
    threads: int = 1
    bf16: bool = True
    compile: bool = False
    """Compile each decoder layer, as `--compile` of `moestro train` does."""
    device: str = "cpu"
    memory: bool = True
    """Measure peak memory too."""
    only: str = ""
    """Run this recipe alone (the benchmark calls itself so, for memory on a CPU)."""


class Arm:
    """One recipe's model, optimiser and losses."""

    def __init__(self, name: str, sizes: Sizes) -> None:
        torch.manual_seed(0)
        chosen = recipe(name, sizes.size, sequence_length=sizes.sequence, batch_tokens=sizes.tokens)
        self.sizes = sizes
        self.model = MoestroForCausalLM(chosen.model.config(sizes.sequence)).train().to(sizes.device)
        self.model.chunked_loss = True
        if sizes.device == "cpu" and sizes.bf16:
            self.model.set_experts_implementation(PADDED_MM)
            self.model.set_attn_implementation(SHORT_SDPA)
        if sizes.compile:
            for layer in self.model.model.layers:
                layer.compile(dynamic=False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.aux = chosen.aux_losses() if self.model.config.has_experts else AuxLosses()

    def step(self, tokens: torch.Tensor) -> float:
        """Milliseconds; hooks are attached before and detached after the clock."""
        with self.aux.attach(self.model) if self.model.config.has_experts else nullcontext():
            return milliseconds(lambda: self.train(tokens), self.sizes.device)

    def train(self, tokens: torch.Tensor) -> None:
        """One step."""
        with torch.autocast(self.sizes.device, torch.bfloat16) if self.sizes.bf16 else nullcontext():
            loss = self.model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.aux.step()


def batch(sizes: Sizes, index: int) -> torch.Tensor:
    """The tokens of one round, the same for all arms."""
    generator = torch.Generator().manual_seed(index)
    return torch.randint(4096, (sizes.tokens // sizes.sequence, sizes.sequence), generator=generator).to(sizes.device)


def three_steps(name: str, sizes: Sizes) -> None:
    """What peak memory is measured of."""
    arm = Arm(name, sizes)
    for index in range(3):
        arm.step(batch(sizes, index))


def main(sizes: Sizes) -> None:
    torch.set_num_threads(sizes.threads)
    if sizes.only:
        three_steps(sizes.only, sizes)
        print(resident_gib())
        return
    arms = {name: Arm(name, sizes) for name in sizes.recipes}
    times = rounds(
        sizes.recipes, lambda name, i: arms[name].step(batch(sizes, i)), number=sizes.rounds, warm_up=sizes.warm_up
    )
    arms.clear()
    report("recipe", sizes, times, sizes.recipes[0], lambda arm: three_steps(arm, sizes))


if __name__ == "__main__":
    start(main, Sizes, __doc__)
