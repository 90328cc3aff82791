"""What competition tells a router: how even its target is, and how strongly a competing token moves the logits.

One layer as it is initialised, on tokens of standard normal numbers, and the same with the experts' outputs brought to
a standard deviation of 2.2. `target` is the entropy of the target over that of an even one. `gradient` is by a token's
logits, of its loss times the preset's coefficient (per layer), root of the sum of squares, in the mean over tokens;
`balance` is the same for a load balance loss with the coefficient 0.01.

    python benchmarks/competition_signal.py
"""

from dataclasses import dataclass

import torch
import transformers
from paired import start
from torch import Tensor, nn
from torch.nn import functional as F

from moestro import Misuse, RouterRule
from moestro.competition.inference import sample_statistics
from moestro.competition.presets import PRESETS
from moestro.competition.responses import response_of
from moestro.competition.scaling import scaled
from moestro.competition.winners import preferences, strongest
from moestro.losses import balance_against, distillation, load_share
from moestro.routers import route
from moestro.routing import Batch, Competition, LayerRecord, MoELayer


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """As the paper's language models have them."""

    presets: tuple[str, ...] = ("v2-paper", "v2-code", "ours")
    experts: tuple[int, ...] = (16, 64)
    top_k: int = 8
    hidden: int = 512
    width: int = 128
    tokens: int = 2048
    initial_std: float = 0.02
    output_std: float = 2.2


def outputs_of_all(hidden: Tensor, experts: int, sizes: Sizes) -> Tensor:
    """[tokens, experts, hidden]: what SwiGLU experts with initial weights answer."""
    gate, up = (torch.randn(experts, sizes.hidden, sizes.width) * sizes.initial_std for _ in range(2))
    down = torch.randn(experts, sizes.width, sizes.hidden) * sizes.initial_std
    inner = F.silu(torch.einsum("td,edw->tew", hidden, gate)) * torch.einsum("td,edw->tew", hidden, up)
    return torch.einsum("tew,ewd->ted", inner, down)


def row(preset: str, hidden: Tensor, outputs: Tensor, sizes: Sizes) -> list[float]:
    """Target entropy, standard deviation of the target times E, size of the distillation's and balance's gradient."""
    experts, settings = outputs.shape[1], PRESETS[preset](1)
    rule = settings["compete"]
    every = torch.arange(len(hidden))
    filled = torch.ones_like(every, dtype=torch.bool)
    response = response_of(rule)(outputs)
    found = sample_statistics(response, rule, sizes.top_k)
    strength = scaled(response, rule.response_scale, found)
    winner = strongest(strength, sizes.top_k)
    target = preferences(strength, winner, rule.target, rule.temperature)
    logits = (hidden @ torch.randn(sizes.hidden, experts) * sizes.initial_std).requires_grad_()
    routing = route(logits, RouterRule(), sizes.top_k)
    layer = MoELayer(
        name="0", block="0", router=nn.Identity(), experts=nn.Identity(), num_experts=experts, top_k=sizes.top_k
    )
    record = LayerRecord(
        layer=layer,
        batch=Batch(sequence=torch.zeros_like(every), num_sequences=1),
        hidden=hidden,
        proposed=routing,
        routing=routing,
        competition=Competition(token=every, filled=filled, response=response, target=target, winner=winner),
    )
    taught = distillation(record, settings.get("distillation_form", "kl"), settings.get("distillation_winners", 0.0))
    losses = [settings["distillation"] * taught.sum.sum(), 0.01 * balance_against(record, load_share(record)).sum.sum()]
    sizes_of = [torch.autograd.grad(loss, logits, retain_graph=True)[0].norm(dim=-1).mean().item() for loss in losses]
    entropy = torch.special.entr(target.double()).sum(-1).mean() / torch.tensor(experts).double().log()
    return [entropy.item(), (experts * target).std(-1).mean().item(), *sizes_of]


def main(sizes: Sizes) -> None:
    for preset in sizes.presets:
        if preset not in PRESETS:
            raise Misuse(f"--presets must be among {', '.join(PRESETS)}, got {preset}")
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}; {sizes}\n")
    print("| preset | experts | outputs | target | std of E · target | gradient | balance |")
    print("|---|--:|---|--:|--:|--:|--:|")
    for experts in sizes.experts:
        hidden = torch.randn(sizes.tokens, sizes.hidden)
        initial = outputs_of_all(hidden, experts, sizes)
        larger = initial / initial.std() * sizes.output_std
        for what, outputs in (("initial", initial), (f"std {sizes.output_std:g}", larger)):
            for preset in sizes.presets:
                entropy, spread, gradient, balance = row(preset, hidden, outputs, sizes)
                figures = f"{entropy:.8f} | {spread:.1e} | {gradient:.1e} | {balance:.1e}"
                print(f"| {preset} | {experts} | {what} | {figures} |")


if __name__ == "__main__":
    start(main, Sizes, __doc__)
