"""How moestro says no, and how it says that it was stopped."""


class Misuse(ValueError):
    """Something the user typed or passed cannot work: one line that says what must hold and what it got (exit 2)."""


class TrainingFailed(RuntimeError):
    """Work that began properly could not go on: one line that says where it stopped and what is safe (exit 1)."""


class Diverged(TrainingFailed):
    """Training reached a value that is not finite. It would do so again, so a comparison does not retry it.

    `step` is the step at which it was found, counted from 1.
    """

    def __init__(
        self, message: str, *, step: int | None = None
    ):  # keyword with a default: unpickling on another rank passes the message alone
        super().__init__(message)
        self.step = step


class Interrupted(Exception):
    """The user asked to stop; the same command continues from the last checkpoint, if one was written."""


def is_shared(error: BaseException) -> bool:
    """Return whether all ranks raise this error (`moestro.training.ranks.shared` marked it)."""
    return "rank" in vars(error)
