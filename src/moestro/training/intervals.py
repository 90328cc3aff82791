"""How often a run logs, measures and saves."""

LOGS, CURVE_POINTS, CHECKPOINTS = 40, 6, 4
"""How many times a run logs, evaluates on a part of the held-out text, and writes a checkpoint."""


def steps_per_log(steps: int) -> int:
    """Steps between logs of a run of `steps` steps."""
    return max(1, steps // LOGS)


def every(steps: int, times: int) -> int:
    """Steps between events that come about `times` times in a run, a multiple of the steps between logs."""
    return max(1, steps // times // steps_per_log(steps)) * steps_per_log(steps)
