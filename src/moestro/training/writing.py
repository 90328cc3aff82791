"""Writing weights: what the libraries raise on a full disk, as the error that the system gave."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

TORCH_WRITER = ("PytorchStreamWriter", "inline_container", "unexpected pos")


@contextmanager
def failures_as_os_errors(folder: Path) -> Iterator[None]:
    """Raise OSError with `folder` where safetensors or torch.save cannot write within the context.

    Both have error types of their own and hide the system's number in the text, or leave it out.
    """
    try:
        yield
    except SafetensorError as error:
        raise as_os_error(str(error), folder) from error
    except RuntimeError as error:
        if not any(name in str(error) for name in TORCH_WRITER):
            raise
        raise as_os_error(str(error), folder) from error


def as_os_error(text: str, folder: Path) -> OSError:
    """The system's error that `text` tells of; an error of input or output where it tells of none."""
    number = re.search(r"os error (\d+)", text)
    code = int(number.group(1)) if number else errno.EIO
    return OSError(code, os.strerror(code), str(folder))
