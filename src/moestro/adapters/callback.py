"""`RoutingCallback`: see what the experts do while any Trainer trains. It measures, and changes nothing."""

import json
import logging
import math
import sys
import weakref
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler

from moestro.adapters.meter import RoutingMeter
from moestro.errors import Misuse
from moestro.gate.ranges import Steps, check
from moestro.metrics import RoutingFigures
from moestro.records import write_atomically

logger = logging.getLogger(__name__)

Mode = Literal["brief", "detailed"]

LOGGED = {
    "max_vio": "max_vio_data",
    "max_vio_batch": "max_vio_batch",
    "dead_experts": "dead_experts",
    "entropy": "entropy",
    "confidence": "confidence",
    "mutual_information": "mutual_information",
    "sequence_mutual_information_excess": "sequence_mutual_information_excess",
    "score_square": "score_square",
    "mean_score_square": "mean_score_square",
    "column_variance": "column_variance",
    "cosine": "cosine",
    "cosine_square": "cosine_square",
    "overlap": "overlap",
    "overlap_shuffled": "overlap_shuffled",
    "competing": "competing",
    "agreement": "agreement",
}
"""What is logged as `moe/NAME`, and the figure that it is."""


class RoutingCallback(TrainerCallback):
    """Adds routing figures to what a Trainer (or one of TRL's) logs: `Trainer(..., callbacks=[RoutingCallback()])`.

    They are logged as `moe/max_vio`, `moe/dead_experts`, `moe/entropy`, ... (definitions: docs/papers.md), averaged
    over layers, but for dead experts, which are added up, and `moe/max_vio_worst`, the largest of a layer. They cover
    the training passes since the last log, over all micro-batches and ranks, and reach `report_to`, the trainer's
    `log_history`, and a file of one JSON line per log, which holds them per layer too in detailed mode.

    Loss, gradients and random state are bit for bit what they are without it. In brief mode sums stay on the device,
    and are read once per log. Detailed mode adds cosines between a token's expert outputs, and the overlap of experts'
    neighbourhoods, of a sample of tokens, in some steps only. Where experts compete, `moe/competing` is the number of
    tokens that did, and `moe/agreement` the share of their winners that the router had chosen too.

    Args:
        mode: "brief" or "detailed".
        every: Look at details in every so many optimiser steps; None: in the first step after each log.
        file: Where the lines go; None: `metrics.jsonl` in the trainer's output_dir. A run that resumes goes on in it,
            without the lines of later steps; a new one begins it anew.
        per_layer: Log the figures of every layer too, as `moe/LAYER/NAME`.
    """

    def __init__(
        self, mode: Mode = "brief", *, every: int | None = None, file: str | Path | None = None, per_layer: bool = False
    ) -> None:
        if mode not in get_args(Mode):
            raise Misuse(f"mode must be one of {', '.join(get_args(Mode))}, got {mode!r}")
        if every is not None and mode == "brief":
            raise Misuse('every says in which steps to look at details: it needs mode="detailed"')
        check("every", every, Steps | None)
        self.mode, self.every, self.file, self.per_layer = mode, every, file, per_layer
        self.meter = RoutingMeter(training=True)
        self._due = True
        self._path = Path()
        self._detach = lambda: None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """An event of the Trainer: look at the model from here on."""
        self._detach()  # training that broke off said no goodbye
        self.meter, self._due = RoutingMeter(training=True), True
        self._detach = detach_with(self, self.meter, model)
        run_first(self)
        self._path = Path(args.output_dir, "metrics.jsonl") if self.file is None else Path(self.file)
        if state.is_world_process_zero:
            forget_later_steps(self._path, state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An event of the Trainer: decide whether this step is looked at in detail."""
        due = self._due if self.every is None else (state.global_step + 1) % self.every == 0
        self.meter.detailed = due and self.mode == "detailed"

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An event of the Trainer."""
        self._due = False

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """An event of the Trainer: add the figures to what is logged of training."""
        # The last log, without "loss", covers the steps after the last one with.
        if not logs or not {"loss", "train_loss"} & logs.keys() or not self.meter.sums:
            return
        figures = self.meter.figures()
        self.meter.reset()
        self._due = True
        added = over_layers(figures.values())
        if self.per_layer:
            added |= {f"moe/{layer}/{k}": v for layer, figure in figures.items() for k, v in logged(figure).items()}
        logs.update(added)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(added)  # a copy of `logs`, made before any callback heard of it
        if state.is_world_process_zero:
            layers = {name: whole(figure) for name, figure in figures.items()} if self.mode == "detailed" else {}
            append(self._path, {"step": state.global_step, **logs}, layers)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An event of the Trainer: leave the model as it was."""
        self._detach()


def detach_with(callback: RoutingCallback, meter: RoutingMeter, model: nn.Module) -> Any:
    """Attach the meter; returns what detaches it. A callback that goes does that too: training may break off."""
    stack = ExitStack()
    stack.enter_context(meter.attach(model))
    detach = weakref.finalize(callback, stack.close)
    detach.atexit = False
    return detach


def run_first(callback: TrainerCallback) -> None:
    """Put the callback before all others of its trainer, so that what it adds to a log reaches the reporters.

    A trainer runs its reporters first, hands all callbacks the same `logs`, and tells none of them who calls. So the
    caller is looked for among the frames.
    """
    frame = sys._getframe()
    while frame is not None:
        handler = frame.f_locals.get("self") if frame.f_code.co_name == "call_event" else None
        if isinstance(handler, CallbackHandler) and callback in handler.callbacks:
            # A new list: the old one is being walked through.
            handler.callbacks = [callback, *(other for other in handler.callbacks if other is not callback)]
            return
        frame = frame.f_back
    logger.warning("RoutingCallback is not run by a transformers Trainer: its figures may not reach report_to")


def logged(figures: RoutingFigures) -> dict[str, float]:
    """One layer's figures by the names that they are logged under."""
    values = {name: getattr(figures, figure) for name, figure in LOGGED.items()}
    return {name: float(value) for name, value in values.items() if value is not None}


def over_layers(layers: Iterable[RoutingFigures]) -> dict[str, float]:
    """What is logged of all layers together."""
    rows = [logged(figures) for figures in layers]
    result = {}
    for name in LOGGED:
        values = [row[name] for row in rows if name in row]
        if values:
            result[f"moe/{name}"] = sum(values) / (1 if name == "dead_experts" else len(values))
    return result | {"moe/max_vio_worst": max(row["max_vio"] for row in rows)}


def whole(figures: RoutingFigures) -> dict[str, Any]:
    """All figures of one layer but those of domains, which training does not know."""
    everything = asdict(figures) | {
        "sequence_mutual_information_excess": figures.sequence_mutual_information_excess,
    }
    return {name: value for name, value in everything.items() if not name.startswith("domain")}


def append(path: Path, line: Mapping[str, Any], layers: Mapping[str, Mapping[str, Any]]) -> None:
    """Append one JSON line. A number that is not finite becomes null: JSON has no NaN."""
    content = finite(line) | ({"layers": {name: finite(figures) for name, figures in layers.items()}} if layers else {})
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(content, default=float) + "\n")


def finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same with None for what is not finite."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def forget_later_steps(path: Path, step: int) -> None:
    """Drop the lines of steps after `step`, which will be run again, and what is no line (a write that broke off)."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines()
        write_atomically(path, "".join(f"{line}\n" for line in lines if 0 < step_of(line) <= step))


def step_of(line: str) -> int:
    """The step of a line; 0 where there is none."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 0
