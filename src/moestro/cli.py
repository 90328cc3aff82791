"""The command line: results on stdout, progress on stderr; exit 0 done, 1 failed, 2 misuse."""

import os
import sys
from importlib.metadata import version

from moestro.commands.compare import compare
from moestro.commands.inspect import inspect
from moestro.commands.recipes import recipes
from moestro.commands.train import train
from moestro.errors import Interrupted, Misuse, TrainingFailed, is_shared
from moestro.gate.parsing import parsed
from moestro.gate.ranges import shown
from moestro.gate.visible import make_visible, one_line


def main() -> None:
    """The `moestro` program."""
    commands = {"compare": compare, "train": train, "inspect": inspect, "recipes": recipes}
    make_visible()
    if sys.argv[1:] == ["--version"]:
        print(f"moestro {version('moestro')}")
        return
    try:
        check_launcher()
        parsed(commands, __doc__ or "")()
    except Misuse as error:
        fail(error, 2)
    except TrainingFailed as error:
        fail(error, 1)
    except OSError as error:
        fail(error, 1)
    except Interrupted as stop:
        fail(stop, 130)
    except KeyboardInterrupt:
        stop = Interrupted("stopped at once; the same command goes on from the last checkpoint, if there is one")
        fail(stop, 130)


def check_launcher() -> None:
    """Raise Misuse if a launcher's environment variable, such as RANK, is not a whole number."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        if not (value := os.environ.get(name, "0")).isdecimal():
            raise Misuse(f"{name} must be a whole number, as torchrun sets it, got {shown(value)}")


def told(error: Exception) -> str:
    """Return the message of an error; for an OSError, the reason and the file."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.strerror}: {error.filename}"
    return str(error)


def tell(error: Exception) -> None:
    """Print one line on stderr."""
    print(f"moestro: {one_line(told(error))}", file=sys.stderr)
    sys.stderr.flush()


def fail(error: Exception, code: int) -> None:
    """Print one line on stderr, on one rank, and end with `code`."""
    if not is_shared(error):
        tell(error)
    else:
        from moestro.training.ranks import speaks, wait_for_all  # torch: imported already, by what raised the error

        if speaks(error):
            tell(error)
        wait_for_all()  # the launcher kills all ranks when one exits, perhaps before the message is printed
    # Other threads (progress, data) must not turn a plain message into a traceback at exit.
    os._exit(code) if code == 130 else sys.exit(code)


if __name__ == "__main__":
    main()
