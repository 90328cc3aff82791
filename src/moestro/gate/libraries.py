"""Settings of the libraries that the commands use."""

import transformers


def quiet() -> None:
    """Hide the warnings and progress bars of transformers: the command line prints its own."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
