"""How much memory training takes at its peak, where the system tells."""

import resource
import sys
from pathlib import Path

import torch

STATUS, FORGET, PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs"), "VmHWM:"


def forget_peak() -> bool:
    """Measure the peak from here on; False where the system cannot forget an earlier one.

    Linux forgets through /proc, which containers may protect against writing.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return True
    if sys.platform != "linux":
        return True  # what came before training counts too there
    try:
        FORGET.write_text("5")
    except OSError:
        return False
    return True


def peak_memory_bytes() -> int | None:
    """Peak memory of the device with CUDA, else of this process's resident set; None where the system hides it."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        figures = STATUS.read_text().partition(PEAK)[2].split()
    except OSError:
        return None
    return 1024 * int(figures[0]) if figures else None
