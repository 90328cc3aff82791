"""The two ways in which moestro says no."""


class Misuse(ValueError):
    """Something the user typed or passed cannot work: one line that says what must hold and what it got (exit 2)."""


class TrainingFailed(RuntimeError):
    """Work that began properly could not go on: one line that says where it stopped and what is safe (exit 1)."""
