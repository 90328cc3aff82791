"""Intervals in steps at which a run logs, evaluates and saves."""

LOGS, CURVE_POINTS, CHECKPOINTS = 40, 6, 4
"""Number of times that a run logs, evaluates on a part of the held-out text, and saves a checkpoint."""


def steps_per_log(steps: int) -> int:
    """Return the steps between logs in a run of `steps` steps."""
    return max(1, steps // LOGS)


def every(steps: int, times: int) -> int:
    """Return the steps between events that occur about `times` times in a run, as a multiple of the log interval."""
    return max(1, steps // times // steps_per_log(steps)) * steps_per_log(steps)
