"""How the cut of a batch changes the router's auxiliary gradient: transformers' own loss beside moestro's.

The same 16 rows and the same weights go through the Trainer as 1 x 16, 2 x 8, ... (micro-batches x rows). For each cut
the script prints the norm of the auxiliary loss's own gradient on the routers (the gradient with the loss minus the
gradient without), relative to the uncut batch. 1.000 everywhere is what it should be.

    python scripts/stock_aux_loss.py
"""

import argparse
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from moestro import AuxLosses, MoE, MoestroConfig, MoestroForCausalLM

ROWS, LENGTH, VOCABULARY = 16, 64, 128
CUTS = (1, 2, 4, 8, 16)
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "tie_word_embeddings": False,
}


class Rows(Dataset):
    """Random rows, the same every time."""

    def __init__(self) -> None:
        self.ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


class RouterGradient(TrainerCallback):
    """Keeps the routers' gradients just before the optimiser's step."""

    value = torch.zeros(0)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        routers = [
            p.grad.flatten() for n, p in model.named_parameters() if n.endswith(("gate.weight", "router.weight"))
        ]
        self.value = torch.cat(routers).clone()


def stock(coefficient: float) -> PreTrainedModel:
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            **SIZES,
            intermediate_size=64,
            num_key_value_heads=4,
            num_local_experts=8,
            output_router_logits=coefficient > 0,
            router_aux_loss_coef=coefficient,
        )
    )


def ours() -> PreTrainedModel:
    torch.manual_seed(0)
    blocks = [[MoE(num_experts=8, top_k=2, width=64)] for _ in range(4)]
    return MoestroForCausalLM(MoestroConfig(**SIZES, qk_norm=False, feed_forward=blocks))


def router_gradient(model: PreTrainedModel, micro_batches: int, aux: AuxLosses | None = None) -> torch.Tensor:
    keep = RouterGradient()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=ROWS // micro_batches,
            gradient_accumulation_steps=micro_batches,
            max_steps=1,
            max_grad_norm=0.0,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            train_sampling_strategy="sequential",
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=Rows(), callbacks=[keep])
        if aux is None:
            trainer.train()
        else:
            with aux.attach(trainer):
                trainer.train()
    return keep.value


def main(cuts: Sequence[int]) -> None:
    uncut: dict[str, float] = {}
    print(f"{'micro-batches x rows':<22}{'stock':>10}{'ours, per sequence':>22}{'ours, lagged':>16}")
    for micro_batches in cuts:
        plain, our_plain = router_gradient(stock(0.0), micro_batches), router_gradient(ours(), micro_batches)
        lagged = AuxLosses(balance=1.0, balance_over="lagged")
        lagged.load_state_dict({"steps": 0, "layers": previous_load()})
        sequence = AuxLosses(balance=1.0)
        norms = {
            "stock": router_gradient(stock(1.0), micro_batches) - plain,
            "sequence": router_gradient(ours(), micro_batches, sequence) - our_plain,
            "lagged": router_gradient(ours(), micro_batches, lagged) - our_plain,
        }
        ratios = {
            name: float(value.norm()) / uncut.setdefault(name, float(value.norm())) for name, value in norms.items()
        }
        cut = f"{micro_batches} x {ROWS // micro_batches}"
        print(f"{cut:<22}{ratios['stock']:>10.3f}{ratios['sequence']:>22.3f}{ratios['lagged']:>16.3f}", flush=True)


def previous_load() -> dict[str, dict[str, list[float]]]:
    """Return some load that an earlier step might have left: without one the lagged balance is constant."""
    load = [(expert + 1) / 36 for expert in range(8)]
    return {f"model.layers.{index}.feed_forward.0": {"load": load} for index in range(4)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cuts", type=int, nargs="+", choices=CUTS, default=CUTS, metavar="N",
        help=f"micro-batches of the {ROWS} rows, the first of which is what the others are compared with: "
        f"{', '.join(map(str, CUTS))} (default: all)",
    )  # fmt: skip
    main(parser.parse_args().cuts)
