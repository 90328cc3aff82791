"""What a run tells while it trains: a bar on stderr, and one line per log in metrics.jsonl."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback

from moestro.gate.visible import visible


class MetricsFile(TrainerCallback):
    """Appends every log to `metrics.jsonl`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Append a training log, without values that are not finite."""
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        finite = {k: v for k, v in logs.items() if not isinstance(v, float) or math.isfinite(v)}
        with self.path.open("a") as file:
            file.write(json.dumps({"step": state.global_step} | finite) + "\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class Progressed:
    """How far a run has come."""

    title: str
    step: int
    steps: int
    figures: str
    """The latest loss, tokens per second and MaxVio, as text."""
    ended: bool = False


class ProgressReports(TrainerCallback):
    """Reports progress after each step, and figures with each log."""

    def __init__(self, title: str, show: Callable[[Progressed], None]) -> None:
        self.title, self.show = title, show
        self.figures = ""

    def _report(self, state: Any, *, ended: bool = False) -> None:
        place = {"step": state.global_step, "steps": state.max_steps}
        self.show(Progressed(title=self.title, figures=self.figures, ended=ended, **place))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report the current step."""
        self._report(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report the step."""
        self._report(state)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Report the latest figures."""
        if not logs or "loss" not in logs:
            return
        text = f"loss {logs['loss']:.3f}  {logs['tokens_per_second']:,.0f} tokens/s"
        self.figures = text + (f"  MaxVio {logs['max_vio']:.2f}" if "max_vio" in logs else "")
        self._report(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report the end."""
        self._report(state, ended=True)


class ProgressBars:
    """One bar per run with its figures and time left; where the console is no terminal, a line per quarter of a run."""

    def __init__(self, console: Console) -> None:
        columns: list[ProgressColumn] = [
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
            TimeRemainingColumn(),
        ]
        self.console = console
        self.display = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.bars: dict[str, TaskID] = {}
        self.quarters: dict[str, int] = {}

    def show(self, progressed: Progressed) -> None:
        """Move the bar of a run, which appears with its first report and goes with its last."""
        title, share = progressed.title, progressed.step / progressed.steps
        if not self.console.is_terminal:
            if progressed.figures and int(4 * share) > self.quarters.get(title, 0):
                self.quarters[title] = int(4 * share)
                place = f"step {progressed.step} of {progressed.steps}"
                self.console.print(f"{title}: {place}  {progressed.figures}", markup=False)
            return
        if title not in self.bars:
            self.bars[title] = self.display.add_task(visible(title), total=progressed.steps, figures="")
            self.display.start()
        self.display.update(self.bars[title], completed=progressed.step, figures=progressed.figures)
        if progressed.ended:
            self.remove(title)

    def remove(self, title: str) -> None:
        """Remove the bar of a run, if it has one."""
        if (bar := self.bars.pop(title, None)) is not None:
            self.display.remove_task(bar)
        if not self.bars:
            self.display.stop()
