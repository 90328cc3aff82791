"""All checks, the packages that they are run on, and what cannot hold for one of them."""

from collections.abc import Callable
from dataclasses import dataclass

import tiny_models

from attach import bias, counting, layers, losses, traces, unchanged
from attach.subject import Inapplicable, Subject
from moestro.adapters import moe_layers
from moestro.errors import Misuse


@dataclass(frozen=True)
class Check:
    """A column of the table in docs/families.md."""

    column: str
    explanation: str
    run: Callable[[Subject], str | None]


CHECKS = (
    # First, before any other check could leave something behind.
    Check(
        "detach",
        "After the context, and after an exception in it, logits are bit-identical, and hooks, attributes, config and "
        "names of weights as before.",
        traces.detach_leaves_nothing,
    ),
    Check(
        "layers",
        "`moe_layers` finds the experts modules that run and no others; the indices that they are given come from the "
        "router that it names; k, E and the decoder block are right.",
        layers.finds_the_layers,
    ),
    Check(
        "scores",
        "The weights of a token's experts are the scores of its record, up to one factor per token.",
        layers.scores_are_the_routers,
    ),
    Check(
        "watched",
        "With every expert's own output recorded, loss and logits are bit-identical around `grouped_mm` and equal to "
        "rounding around `eager`; every gradient is equal to rounding (it is summed in another order).",
        unchanged.watched_is_unchanged,
    ),
    Check(
        "zero",
        "With an `AuxLosses` of weight 0, loss, logits and every gradient are bit-identical around `grouped_mm` and "
        "`eager`.",
        unchanged.weight_zero_is_unchanged,
    ),
    Check(
        "once",
        "Each layer fires once per pass and its choices are counted once, padding excluded, under activation "
        "checkpointing too, where gradients are the same.",
        counting.firings_are_right,
    ),
    Check(
        "L_o",
        "The value of the orthogonality loss, and the gradient of every parameter, equal a loop over single tokens and "
        "the eager weights of single experts, with padding.",
        losses.orthogonality_is_right,
    ),
    Check(
        "order",
        "The losses are the same with the rows of the batch, or the experts, in another order.",
        losses.order_does_not_matter,
    ),
    Check(
        "L_v",
        "Values and gradients of the variance loss, against the mean of the step before and beside orthogonality, "
        "equal loops; by itself it reaches every learned router, and no expert of the last layer.",
        losses.variance_is_right,
    ),
    Check(
        "balance",
        "Values and gradients of the balance loss, and of the z-loss where routers return logits, equal loops.",
        losses.balance_and_z_are_right,
    ),
    Check(
        "reload",
        "A checkpoint saved while attached, after an optimiser step, has the weights of a stock one and loads into the "
        "stock class with bit-identical logits.",
        traces.saves_and_reloads_stock,
    ),
    Check(
        "bias",
        "The selection bias sways the choice and not the scores; `bias_rate` moves it against the load, and nothing "
        "else.",
        bias.bias_is_the_routers_and_moves,
    ),
)

EXCEPTIONS = {
    ("phimoe", "scores"): "its weights are those of a sparse mixer, a softmax over the experts near the best one; its "
    "scores here are the plain softmax of its logits",
}
"""Where a check cannot hold, and why."""

ATTACHED = [p for p in tiny_models.packages() if p not in tiny_models.OUTSIDE] + ["dbrx", "step3p7"]
REFUSED = [p for p in tiny_models.OUTSIDE if p in tiny_models.packages() and p not in ATTACHED]


def outcomes(subject: Subject) -> dict[str, str | None]:
    """What each check says; an error counts as a failure."""
    results: dict[str, str | None] = {}
    for check in CHECKS:
        try:
            results[check.column] = check.run(subject)
        except Exception as error:
            results[check.column] = f"{type(error).__name__}: {error}"
    return results


def failures(package: str, results: dict[str, str | None]) -> dict[str, str]:
    """The checks that fail, and the exceptions that are none."""
    failed = {column: why for column, why in results.items() if why is not None and not isinstance(why, Inapplicable)}
    named = {column for name, column in EXCEPTIONS if name == package}
    unneeded = dict.fromkeys(named - failed.keys(), "holds, though it is named as an exception")
    return {column: why for column, why in failed.items() if column not in named} | unneeded


def is_refused(package: str) -> str | None:
    """A package whose experts cannot be watched is refused by its name, in one line."""
    try:
        moe_layers(tiny_models.build(package).model)
    except Misuse as error:
        return None if package in str(error) and "\n" not in str(error) else f"refused with {error}"
    return "not refused"
