"""One process of two (or the one that they must equal): two steps with auxiliary losses, and the gradients of the last.

    python sharded_worker.py FOLDER one|ddp|fsdp|expert-parallel

FOLDER holds a saved model and `inputs.pt`. Ranks take a row each; rank 0 writes `HOW.pt`: loss and gradients.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from moestro import AuxLosses

LOSSES = {
    "balance": 0.5,
    "balance_over": "lagged",
    "orthogonality": 0.1,
    "orthogonality_form": "cosine",
    "variance": 0.5,
    "router_z": 0.1,
    "router_orthogonality": 0.3,
}


def load(folder: Path, how: str) -> nn.Module:
    if how in ("fsdp", "expert-parallel"):
        from transformers.distributed import DistributedConfig

        sharding = DistributedConfig(fsdp_size=2, ep_size=2 if how == "expert-parallel" else 1)
        return AutoModelForCausalLM.from_pretrained(folder, distributed_config=sharding).train()
    model = AutoModelForCausalLM.from_pretrained(folder).train()
    model.gradient_checkpointing_enable()  # two of the ways, so that the ways differ in it
    return model if how == "one" else DistributedDataParallel(model)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[operator]


def main(folder: Path, how: str) -> None:
    ranks = 1 if how == "one" else 2
    if ranks > 1:
        dist.init_process_group("gloo")
    rank = dist.get_rank() if ranks > 1 else 0
    inputs = torch.load(folder / "inputs.pt")
    items = int((inputs["labels"][:, 1:] != -100).sum())
    mine = inputs if ranks == 1 else {name: value[rank : rank + 1] for name, value in inputs.items()}
    model, aux = load(folder, how), AuxLosses(**LOSSES)
    # Not fused, for parameters lie on several meshes. Its step shows whether what is shared moves as one.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
    with aux.attach(model):
        for step in range(2):  # the second step knows the first one's load and mean scores
            if step:
                optimizer.step()
            model.zero_grad()
            loss = model(**mine, num_items_in_batch=items).loss
            (loss * ranks).backward()  # gradients are averaged over ranks
            aux.step()
    total = loss.detach()
    if ranks > 1:
        dist.all_reduce(total)
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    gradients = {name: whole(p.grad) for name, p in inner.named_parameters() if p.grad is not None}
    if rank == 0:
        torch.save({"loss": total, "gradients": gradients, "state": aux.state_dict()}, folder / f"{how}.pt")
    if ranks > 1:
        dist.barrier()
        # Taking the reducer apart can wait for a thread of gloo that waits for the interpreter, for ever (torch 2.13).
        os._exit(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2])
