"""Simulates comparisons and counts verdicts: do the level, the power and the margin that a report prints hold?

    python scripts/verdict_simulation.py [--studies 40000] [--seeds 3 5 8] [--recipes 1 4]

`recipes` counts those that are compared to the first. Every run's loss is normal around its recipe's true loss, with
one deviation for all; so differences to the first recipe are correlated, as they are in a comparison. Power is checked
as the report states it: one study is drawn, its printed number becomes the truth, and a new study is drawn. The number
holds if a single recipe differs (or is equal); the columns "all" show how much more is found if all of them do.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import tyro
from scipy import stats

from moestro.difference import ALPHA, MARGIN
from moestro.power import POWER, minimum_detectable_effect, minimum_margin
from moestro.statistics import equivalence_p

Array = np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What is simulated."""

    seeds: tuple[int, ...] = (3, 5, 8)
    recipes: tuple[int, ...] = (1, 4)
    studies: int = 40_000
    """Simulated comparisons per number."""
    deviation: float = 0.005
    """True standard deviation of a paired difference, nats per token."""
    margin: float = MARGIN


@dataclass(frozen=True, kw_only=True, slots=True)
class Counted:
    """Shares of simulated comparisons of one size."""

    seeds: int
    recipes: int
    level: float
    """One recipe is called better or worse; none differs."""
    family_level: float
    """Any recipe is called better or worse; none differs."""
    power: float
    """A recipe is found that differs by what a study printed; the others do not differ."""
    power_all: float
    """The same if every recipe differs so."""
    equivalence_level: float
    """Any recipe is found within the margin; all differ by just the margin."""
    equivalence_power: float
    """An equal recipe is found within the margin that a study printed; the others differ by more."""
    equivalence_power_all: float
    """The same if every recipe is equal."""


def count(seeds: int, recipes: int, settings: Settings) -> Counted:
    """Simulate comparisons of one size."""
    draw = np.random.default_rng([seeds, recipes])
    nothing, all_differ = np.zeros((settings.studies, recipes)), np.ones((settings.studies, recipes))
    one = nothing.copy()
    one[:, 0] = 1

    def differences(truth: Array) -> Array:
        """Return paired differences, (studies, recipes, seeds), around the true ones."""
        losses = draw.normal(scale=settings.deviation / np.sqrt(2), size=(settings.studies, recipes + 1, seeds))
        return losses[:, 1:] - losses[:, :1] + truth[..., None]

    def printed(effect: Callable[..., float]) -> Array:
        """Return the number that a first study of each kind prints, per recipe."""
        deviation = differences(nothing).std(axis=-1, ddof=1)
        return deviation * effect(1.0, seeds, alpha=ALPHA / recipes)

    by_chance, far = differs(differences(nothing)), 1e3 * settings.deviation
    effect, margin = printed(minimum_detectable_effect), printed(minimum_margin)
    return Counted(
        seeds=seeds,
        recipes=recipes,
        level=by_chance[:, 0].mean(),
        family_level=by_chance.any(axis=1).mean(),
        power=differs(differences(effect * one))[:, 0].mean(),
        power_all=differs(differences(effect * all_differ))[:, 0].mean(),
        equivalence_level=within(differences(settings.margin * all_differ), settings.margin).any(axis=1).mean(),
        equivalence_power=within(differences(far * (1 - one)), margin)[:, 0].mean(),
        equivalence_power_all=within(differences(nothing), margin)[:, 0].mean(),
    )


def differs(by_seed: Array) -> Array:
    """Return which recipes of each study are called better or worse."""
    return holm(stats.ttest_1samp(by_seed, 0.0, axis=-1).pvalue) < ALPHA


def within(by_seed: Array, margin: float | Array) -> Array:
    """Return which recipes of each study are found within the margin, which may differ from study to study."""
    return holm(equivalence_p(by_seed / np.asarray(margin)[..., None], 1.0)) < ALPHA


def holm(p: Array) -> Array:
    """Return p-values adjusted over the last axis: `moestro.statistics.holm` for many comparisons at once."""
    order = np.argsort(p, axis=-1)
    scaled = np.take_along_axis(p, order, axis=-1) * (p.shape[-1] - np.arange(p.shape[-1]))
    adjusted = np.empty_like(p)
    np.put_along_axis(adjusted, order, np.minimum(np.maximum.accumulate(scaled, axis=-1), 1.0), axis=-1)
    return adjusted


def table(settings: Settings) -> Iterator[str]:
    """Return the lines of a Markdown table, in per cent."""
    yield "| seeds | recipes | level | of any | power | all | equivalence: level of any | power | all |"
    yield "|--:" * 9 + "|"
    alpha, power = f"{ALPHA:.0%}", f"{POWER:.0%}"
    yield f"|  | printed |  | {alpha} | {power} | more | {alpha} | {power} | more |"
    for seeds in settings.seeds:
        for recipes in settings.recipes:
            c = count(seeds, recipes, settings)
            shares = (c.level, c.family_level, c.power, c.power_all)
            shares += (c.equivalence_level, c.equivalence_power, c.equivalence_power_all)
            yield f"| {seeds} | {recipes} | {' | '.join(f'{share:.1%}' for share in shares)} |"


if __name__ == "__main__":
    for line in table(tyro.cli(Settings)):
        print(line)
