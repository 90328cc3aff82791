"""Coordinate the ranks of one run: the first rank decides and writes, and all ranks raise an error of any rank."""

import datetime
import os
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from moestro.adapters.ranks import rank
from moestro.errors import Misuse, TrainingFailed

Result = TypeVar("Result")

_PATIENCE = datetime.timedelta(days=7)  # the first rank may prepare a large text; if it dies, the launcher ends all
_waiting: list[dist.ProcessGroup] = []  # the gloo group for Python objects, created once


def join() -> None:
    """Start the process group if a launcher such as torchrun started several ranks; the Trainer then uses it."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or _waiting:
        return
    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    assert isinstance(group, dist.ProcessGroup)
    _waiting.append(group)


def together(work: Callable[[], Result]) -> Result:
    """Run `work` on every rank and return this rank's result. If ranks fail, all raise the lowest rank's error."""
    if not _waiting:
        return work()
    result, error = None, None
    try:
        result = work()
    except (Misuse, TrainingFailed, OSError) as raised:
        error = raised
    errors: list[Exception | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error, group=_waiting[0])
    for place, found in enumerate(errors):
        if found is not None:
            raise shared(error if error is not None and place == rank() else found, place)
    return result  # type: ignore[return-value]


def on_first_rank(work: Callable[[], Result]) -> Result:
    """Run `work` on the first rank alone, while the others wait, and return its result on every rank."""
    result = together(lambda: work() if rank() == 0 else None)
    if not _waiting:
        return result  # type: ignore[return-value]
    results = [result]
    dist.broadcast_object_list(results, src=0, group=_waiting[0])
    return results[0]  # type: ignore[return-value]


def first_rank_first(work: Callable[[], Result]) -> Result:
    """Run `work` on the first rank, then on the others, which can use its cached results."""
    result = together(lambda: work() if rank() == 0 else None)
    rest = together(lambda: work() if rank() > 0 else None)
    return result if rank() == 0 else rest  # type: ignore[return-value]


def agree_on(value: str, what: str) -> None:
    """Raise Misuse on every rank unless `value` is the same on all."""
    first = on_first_rank(lambda: value)

    def check() -> None:
        if value != first:
            raise Misuse(f"{what} must be the same on every rank: rank {rank()} has {value}, rank 0 has {first}")

    together(check)


def any_rank(value: bool) -> bool:
    """Return whether `value` is true on any rank."""
    if not _waiting:
        return value
    number = torch.tensor(float(value))
    dist.all_reduce(number, group=_waiting[0])
    return bool(number > 0)


def wait_for_all() -> None:
    """Wait until every rank has called this function."""
    if _waiting:
        dist.barrier(group=_waiting[0])


def shared(error: Exception, place: int = 0) -> Exception:
    """Mark an error as raised by all ranks and reported by rank `place`."""
    if _waiting:
        vars(error)["rank"] = place
    return error


def speaks(error: BaseException) -> bool:
    """Return whether this rank reports `error`: its first raiser if all ranks raise it, else every rank."""
    return vars(error).get("rank", rank()) == rank()
