"""How much of competition's choice a router could know: routers fitted to a checkpoint's experts as they are.

All experts answer the text. On its first part a linear router, as models have, and one with a hidden layer are fitted
to the competition's target alone; on the rest it is counted how many of the winners they choose, beside the
checkpoint's own router. What a linear one misses then is not for want of teaching. Competition is by `Compete()`,
whatever the checkpoint was trained with.

    python benchmarks/router_ceiling.py runs/.../model --data law=held_out/law.jsonl ...
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from paired import machine, start
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

import moestro
from moestro import Misuse
from moestro.agreement import agreement_figures
from moestro.competition.inference import sample_statistics
from moestro.competition.responses import response_of, responses
from moestro.competition.scaling import scaled
from moestro.competition.settings import Compete
from moestro.competition.winners import preferences, strongest
from moestro.inspection.texts import packed, read_text


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What is fitted to what."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    data: tuple[str, ...]
    tokens: int = 49_152
    """Tokens that routers are fitted to."""
    measured: int = 16_384
    sequence: int = 256
    epochs: int = 4
    batch: int = 1024
    learning_rate: float = 3e-3
    hidden: int = 256
    """Width of the router that is not linear."""


def answered(model: nn.Module, rows: Tensor, rule: Compete) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Per layer the inputs, the responses of all experts, and the router's choice, of every token."""
    found: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}

    def look(proposal: moestro.Proposal) -> moestro.Routing:
        response = responses(proposal.run, proposal.hidden, proposal.layer.num_experts, response_of(rule))
        seen = (proposal.hidden.float(), response, proposal.routing.expert)
        found.setdefault(proposal.layer.name, []).append(seen)
        return proposal.routing

    with moestro.reroute(model, look), torch.no_grad():
        for part in rows.split(8):
            model(input_ids=part)
    return {name: tuple(map(torch.cat, zip(*parts, strict=True))) for name, parts in found.items()}  # type: ignore


def fitted(router: nn.Module, hidden: Tensor, target: Tensor, settings: Settings) -> nn.Module:
    """The router, taught the target by cross-entropy."""
    steps = settings.epochs * len(hidden) // settings.batch
    optimizer = torch.optim.Adam(router.parameters(), lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        some = torch.randint(len(hidden), (settings.batch,))
        cross_entropy(router(hidden[some]), target[some]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return router.requires_grad_(False)


def row(hidden: Tensor, response: Tensor, chosen: Tensor, rule: Compete, settings: Settings) -> list[float]:
    """Agreement of the checkpoint's router, of a linear one and of another; what a fixed choice has."""
    k, experts, dim = chosen.shape[1], response.shape[1], hidden.shape[1]
    learnt, rest = slice(None, settings.tokens), slice(settings.tokens, None)
    statistics = sample_statistics(response[learnt], rule, k)
    strength = scaled(response[learnt], rule.response_scale, statistics)
    target = preferences(strength, strongest(strength, k), rule.target, rule.temperature)
    linear = nn.Linear(dim, experts, bias=False)
    other = nn.Sequential(nn.Linear(dim, settings.hidden), nn.SiLU(), nn.Linear(settings.hidden, experts))
    choices = [chosen[rest]]
    for router in (linear, other):
        choices.append(fitted(router, hidden[learnt], target, settings)(hidden[rest]).topk(k, dim=-1).indices)
    figures = [agreement_figures(response[rest], choice, rule) for choice in choices]
    return [*(f.agreement for f in figures), figures[0].static_agreement]


def main(settings: Settings) -> None:
    """Print a row per layer and their mean."""
    rule = Compete()
    if not (settings.checkpoint / "config.json").exists():
        raise Misuse(f"the checkpoint must be the folder of a saved model, got {settings.checkpoint}")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(settings.checkpoint, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(settings.checkpoint)
    with packed(read_text(settings.data), tokenizer, settings.sequence, settings.sequence) as text:
        number = (settings.tokens + settings.measured) // settings.sequence
        if number > len(text):
            raise Misuse(f"the text must have {number} rows of {settings.sequence} tokens, got {len(text)}")
        rows = torch.stack([torch.as_tensor(text[index]["input_ids"]) for index in range(number)])
    print(f"{machine('cpu')}; {settings}\n\n| layer | router | linear, fitted | hidden layer, fitted | fixed |")
    print("|---|--:|--:|--:|--:|")
    found = {name: row(*seen, rule, settings) for name, seen in answered(model, rows, rule).items()}
    for name, values in found.items():
        print(f"| {name} | {' | '.join(f'{value:.3f}' for value in values)} |")
    means = torch.tensor(list(found.values())).mean(0)
    print(f"| mean | {' | '.join(f'{value:.3f}' for value in means)} |")


if __name__ == "__main__":
    start(main, Settings, __doc__)
