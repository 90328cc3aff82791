"""Turn errors of safetensors and torch.save on a full disk into the system's OSError."""

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

    Both raise error types of their own, with the system's error number in the text or not at all.
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
    """Return the OSError with the error number in `text`; EIO if there is none."""
    number = re.search(r"os error (\d+)", text)
    code = int(number.group(1)) if number else errno.EIO
    return OSError(code, os.strerror(code), str(folder))
