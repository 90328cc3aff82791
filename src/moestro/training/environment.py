"""Record versions and hardware of a run, so that others can reproduce it."""

import platform
from pathlib import Path

import torch
import transformers


def environment() -> dict[str, str]:
    """Return versions and hardware as text."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "platform": platform.platform(),
        "device": device,
        "threads": str(torch.get_num_threads()),
    }


def processor() -> str:
    """Return the processor's name from Linux; from Python if Linux hides it."""
    info = cpu_info()
    names = [line for line in info.splitlines() if "model name" in line]
    name = names[0].partition(":")[2].strip() if names else platform.processor()
    return name + (" with AMX" if "amx_bf16" in info else "")


def cpu_info() -> str:
    """Return the contents of /proc/cpuinfo; empty on other systems and in containers that hide it."""
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
