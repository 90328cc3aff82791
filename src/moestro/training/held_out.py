"""The held-out text: what is measured on a part of it while a run trains, and on all of it at the end."""

from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from moestro.adapters.ranks import over_ranks
from moestro.adapters.responses import ResponseMeter
from moestro.agreement import AgreementFigures
from moestro.comparison import CurvePoint
from moestro.data.preparation import PreparedData
from moestro.evaluation import Evaluation, evaluate
from moestro.models import MoestroForCausalLM
from moestro.training.recipe import Recipe
from moestro.training.runs import read_metrics

CURVE_TOKENS = 8_192
"""Held-out tokens of each point of a learning curve."""
DRAWN = ("agreement", "static_agreement", "regret", "target_entropy", "response", "changed")
"""What a learning curve keeps of the router beside competition."""
LOGGED = tuple(f.name for f in fields(AgreementFigures) if f.name != "tokens")


def held_out_evaluation(
    model: MoestroForCausalLM, recipe: Recipe, data: PreparedData, max_tokens: int | None = None
) -> Evaluation:
    """The model on the held-out rows, or on the first of them."""
    length = recipe.training.sequence_length
    return evaluate(
        model,
        data.held_out,
        data.domains,
        dtype=torch.bfloat16 if recipe.training.dtype == "bfloat16" else torch.float32,
        max_rows=None if max_tokens is None else max(1, max_tokens // length),
        routing=max_tokens is None,
        compete=recipe.compete,
    )


def learning_curve(metrics: Path) -> tuple[CurvePoint, ...]:
    """The curve that a metrics.jsonl holds."""
    return tuple(
        CurvePoint(
            step=line["step"],
            tokens=line["tokens"],
            loss=line["loss"],
            held_out_loss=line.get("held_out_loss"),
            competition={name: line[f"competition/{name}"] for name in DRAWN if f"competition/{name}" in line},
        )
        for line in read_metrics(metrics)
    )


class HeldOutCurve:
    """The held-out loss, and each router beside competition, at one point of a run after another.

    What it returns is logged: `held_out_loss`, and of models with experts `competition/NAME` (mean over layers) and
    `competition/LAYER/NAME` for the fields of `AgreementFigures` and for `changed`: the share of the tokens' experts
    that were others at the point before. Over ranks, each with its own rows, they are averaged.
    """

    def __init__(self, model: MoestroForCausalLM, recipe: Recipe, data: PreparedData) -> None:
        self.model, self.recipe, self.data = model, recipe, data
        self.before: dict[str, Tensor] = {}

    def __call__(self) -> dict[str, float]:
        """Measure here."""
        meter = ResponseMeter(self.recipe.compete)
        with meter.attach(self.model) if self.model.config.has_experts else nullcontext():
            evaluation = held_out_evaluation(self.model, self.recipe, self.data, CURVE_TOKENS)
        return {"held_out_loss": evaluation.loss} | self.beside_competition(meter)

    def beside_competition(self, meter: ResponseMeter) -> dict[str, float]:
        """What the meter saw, layer by layer and in the mean."""
        chosen, figures = meter.chosen(), meter.figures()
        names = [*LOGGED, *(["changed"] if self.before else [])]
        rows = [
            [getattr(figure, name) for name in LOGGED]
            + ([changed(self.before[layer], chosen[layer])] if self.before else [])
            for layer, figure in figures.items()
        ]
        self.before = chosen
        if not rows:
            return {}
        mean = over_ranks(torch.tensor(rows, dtype=torch.float64, device=self.model.device))
        mean = (mean / (dist.get_world_size() if dist.is_initialized() else 1)).cpu()
        logged = {f"competition/{name}": value for name, value in zip(names, mean.mean(0).tolist(), strict=True)}
        for layer, values in zip(figures, mean.tolist(), strict=True):
            logged |= {f"competition/{layer}/{name}": value for name, value in zip(names, values, strict=True)}
        return logged


def changed(before: Tensor, after: Tensor) -> float:
    """Share of the chosen experts, [tokens, k], that a token had not chosen before."""
    return 1 - float((after[:, :, None] == before[:, None, :]).any(-1).double().mean())
