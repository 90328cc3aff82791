"""Initial weights that depend on seed and name only, so that models which share a part start with it equal."""

import hashlib

import torch
from transformers import PreTrainedModel


def initialise(model: PreTrainedModel, seed: int) -> None:
    """Initialise every module anew, by the model's own rule, with a generator seeded by (seed, module name).

    Two recipes compared with the same seed then start from the same embeddings and attention, whatever their experts
    are: a paired comparison (docs/design.md).
    """
    state = torch.random.get_rng_state()
    # Skip modules that borrow the weights of an earlier sub-layer: `tie_weights` gives them its initial values.
    base = model.base_model
    borrowers = {base.get_submodule(key.rpartition(".")[0]) for key in base.all_tied_weights_keys}  # type: ignore[union-attr]
    for name, module in model.named_modules():
        parameters = list(module.parameters(recurse=False))
        if not parameters or module in borrowers:
            continue
        for parameter in parameters:
            if hasattr(parameter, "_is_hf_initialized"):
                delattr(parameter, "_is_hf_initialized")  # transformers would skip it
        torch.manual_seed(stable_hash(seed, name))
        model._init_weights(module)
    model.tie_weights()
    torch.random.set_rng_state(state)


def stable_hash(*parts: object) -> int:
    """The same 63-bit number for the same parts, in every process."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
