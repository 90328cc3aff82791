"""What a run tells while it trains: a bar on stderr, and one line per log in metrics.jsonl."""

import json
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
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


class ProgressBar(TrainerCallback):
    """Loss, tokens per second, MaxVio and time left; plain lines where stderr is no terminal."""

    def __init__(self, title: str, console: Console) -> None:
        columns: list[ProgressColumn] = [
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
            TimeRemainingColumn(),
        ]
        self.title, self.console = title, console
        self.bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.task = self.bar.add_task(visible(title), total=None, figures="")
        self.said = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the bar at the current step."""
        self.bar.update(self.task, total=state.max_steps, completed=state.global_step)
        self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance the bar."""
        self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Show the latest figures; without a terminal, print a line at each quarter of the run."""
        if not logs or "loss" not in logs:
            return
        text = f"loss {logs['loss']:.3f}  {logs['tokens_per_second']:,.0f} tokens/s"
        text += f"  MaxVio {logs['max_vio']:.2f}" if "max_vio" in logs else ""
        self.bar.update(self.task, figures=text)
        share = state.global_step / state.max_steps
        if not self.console.is_terminal and share - self.said >= 0.25:
            self.said = share
            self.console.print(f"{self.title}: step {state.global_step} of {state.max_steps}  {text}", markup=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove the bar."""
        self.bar.stop()
