"""Measure on held-out text: on a part of it while a run trains, and on all of it at the end."""

import logging
import math
from contextlib import nullcontext, suppress
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Integer
from torch import Tensor

from moestro.adapters.ranks import over_ranks, rank
from moestro.adapters.responses import ResponseMeter
from moestro.agreement import AgreementFigures
from moestro.comparison import CurvePoint, HeldOut
from moestro.data.preparation import PreparedData
from moestro.errors import Misuse
from moestro.evaluation import Evaluation, evaluate
from moestro.gate.loading import load_arrays
from moestro.models import MoestroForCausalLM
from moestro.training.recipe import Recipe
from moestro.training.resume import read_metrics

CURVE_TOKENS = 4_096
"""Held-out tokens of each point of a learning curve."""
UNIGRAM_TOKENS = 4_000_000
"""Number of training tokens that the unigram baseline counts: enough for stable frequencies, and fast."""
KEPT = ("agreement", "static_agreement", "regret", "target_entropy", "response", "changed")
"""What a learning curve keeps of the router beside competition."""
logger = logging.getLogger(__name__)
LOGGED = (*(f.name for f in fields(AgreementFigures) if f.name != "tokens"), "changed")


def held_out_evaluation(
    model: MoestroForCausalLM, recipe: Recipe, data: PreparedData, max_tokens: int | None = None
) -> Evaluation:
    """The model on the held-out rows, or on the first of them."""
    t = recipe.training
    # Meters that come and go would each cost a compiled layer a graph, which a few batches never pay back.
    with torch.compiler.set_stance("force_eager") if t.compile else nullcontext():
        return evaluate(
            model,
            data.held_out,
            data.domains,
            dtype=torch.bfloat16 if t.dtype == "bfloat16" else torch.float32,
            max_rows=None if max_tokens is None else max(1, max_tokens // t.sequence_length),
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
            competition={name: line[f"competition/{name}"] for name in KEPT if f"competition/{name}" in line},
        )
        for line in read_metrics(metrics)
    )


class HeldOutCurve:
    """The held-out loss, and each router beside competition, at one point of a run after another.

    What it returns is logged: `held_out_loss`, and of models with experts `competition/NAME` (mean over layers) and
    `competition/LAYER/NAME` for the fields of `AgreementFigures` and for `changed`: the share of the tokens' experts
    that were others at the point before. Over ranks, each with its own rows, they are averaged. Choices are kept in
    `folder`, so that a resumed run finds those of the point before, `every` steps earlier.
    """

    def __init__(
        self, model: MoestroForCausalLM, recipe: Recipe, data: PreparedData, folder: Path, *, every: int
    ) -> None:
        self.model, self.recipe, self.data, self.folder, self.every = model, recipe, data, folder, every

    def __call__(self, step: int) -> dict[str, float]:
        """Measure after `step` steps."""
        meter = ResponseMeter(self.recipe.compete)
        with meter.attach(self.model) if self.model.config.has_experts else nullcontext():
            evaluation = held_out_evaluation(self.model, self.recipe, self.data, CURVE_TOKENS)
        return {"held_out_loss": evaluation.loss} | self.beside_competition(meter, step)

    def beside_competition(self, meter: ResponseMeter, step: int) -> dict[str, float]:
        """What the meter saw, layer by layer and in the mean."""
        chosen, figures = meter.chosen(), meter.figures()
        before = self.choices_before(step, chosen)
        self.keep(step, chosen)
        sums = torch.zeros(2, len(meter.layers), len(LOGGED), dtype=torch.float64)  # of values, and of who knows them
        for index, layer in enumerate(meter.layers):
            if layer in figures:  # a rank without a row takes part in the reduction all the same
                known = asdict(figures[layer])
                if layer in before:
                    known["changed"] = changed(before[layer], chosen[layer])
                for place, name in enumerate(LOGGED):
                    if name in known:
                        sums[:, index, place] = torch.tensor([known[name], 1.0])
        total, count = over_ranks(sums.to(self.model.device)).cpu()
        logged = {}
        for place, name in enumerate(LOGGED):
            if count[:, place].sum() == 0:
                continue
            mean = (total[:, place] / count[:, place].clamp_min(1)).tolist()
            logged[f"competition/{name}"] = sum(mean) / len(mean)
            logged |= {f"competition/{layer}/{name}": value for layer, value in zip(meter.layers, mean, strict=True)}
        return logged

    def choices_before(self, step: int, chosen: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return this rank's choices at the point before `step`; nothing, with a warning, if they are lost.

        They are lost after a resume on another number of ranks, because each rank then has other rows.
        """
        point = (step - 1) // self.every * self.every
        if point == 0 or not chosen:
            return {}
        path = self.folder / f"{point}-{rank()}.npz"
        before: dict[str, Tensor] = {}
        with suppress(Misuse):
            kept = load_arrays(path, chosen, f"{path} cannot be read")
            before = {layer: torch.from_numpy(choices).long() for layer, choices in kept.items()}
        if [choice.shape for choice in before.values()] != [choice.shape for choice in chosen.values()]:
            logger.warning("%s is lost: the share of choices changed at step %d is unknown", path, step)
            return {}
        return before

    def keep(self, step: int, chosen: dict[str, Tensor]) -> None:
        """Write down what this rank's routers chose, whole or not at all."""
        if not chosen:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{step}-{rank()}.npz"
        partial = path.with_suffix(".part.npz")
        choices = {layer: expert.numpy().astype(np.int16) for layer, expert in chosen.items()}
        np.savez(partial, allow_pickle=False, **choices)  # pyright: ignore[reportArgumentType]
        partial.replace(path)


def changed(before: Tensor, after: Tensor) -> float:
    """Share of the chosen experts, [tokens, k], that a token had not chosen before."""
    return 1 - float((after[:, :, None] == before[:, None, :]).any(-1).double().mean())


def with_chance(found: HeldOut, recipe: Recipe, data: PreparedData) -> HeldOut:
    """Return the held-out losses with two baselines: uniform, and the unigram model of the training text."""
    vocabulary = recipe.model.vocab_size
    unigram = unigram_loss(data.train.tokens[:UNIGRAM_TOKENS], data.held_out.tokens[1:], vocabulary)
    return replace(found, uniform=math.log(vocabulary), unigram=unigram)


def unigram_loss(
    train: Integer[np.ndarray, " train"], predicted: Integer[np.ndarray, " held_out"], vocabulary: int
) -> float:
    """Return the loss on `predicted` of the unigram model of `train` with add-one smoothing."""
    counts = np.bincount(train, minlength=vocabulary) + 1.0
    return float(np.mean(np.log(counts.sum()) - np.log(counts[predicted])))
