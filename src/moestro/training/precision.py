"""Whether bfloat16 pays on this machine: measured, not guessed from a name."""

import time

import torch

GAIN = 1.5
"""How much faster bf16 products must be before it is worth its rounding; AMX and CUDA gain far more, others nothing."""


def faster_dtype(device: torch.device) -> tuple[torch.dtype, float]:
    """(bfloat16 or float32, how many times faster bf16 matrix products ran here): a probe of some milliseconds."""
    ratio = product_seconds(torch.float32, device) / product_seconds(torch.bfloat16, device)
    return (torch.bfloat16 if ratio >= GAIN else torch.float32), ratio


@torch.no_grad()
def product_seconds(dtype: torch.dtype, device: torch.device, size: int = 768, repeats: int = 20) -> float:
    """The fastest of several square matrix products, in seconds."""
    a = torch.ones(size, size, dtype=dtype, device=device)
    times = []
    for _ in range(repeats):
        wait(device)
        start = time.perf_counter()
        torch.mm(a, a)
        wait(device)
        times.append(time.perf_counter() - start)
    return min(times)


def wait(device: torch.device) -> None:
    """Let the device finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
