"""What a run was made with, so that others can reproduce it."""

import platform
from pathlib import Path

import torch
import transformers


def environment() -> dict[str, str]:
    """Versions and hardware."""
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
    """The processor's name as Linux knows it; what Python knows where Linux keeps it hidden."""
    info = cpu_info()
    names = [line for line in info.splitlines() if "model name" in line]
    name = names[0].partition(":")[2].strip() if names else platform.processor()
    return name + (" with AMX" if "amx_bf16" in info else "")


def cpu_info() -> str:
    """Linux's description of the processors; empty on other systems, and in containers that hide it."""
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
