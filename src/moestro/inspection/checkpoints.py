"""From what the user names to a model: a folder, a run of ours, an adapter of PEFT or a name on the hub.

`on_meta` builds the model from its config alone, without memory for its weights and without reading them; `load` reads
them. Code that a checkpoint brings along is never run.
"""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

import moestro.models  # noqa: F401 (registers our own family)
from moestro.data.tokenizer import load_tokenizer
from moestro.errors import Misuse
from moestro.gate.loading import (
    check_folder,
    load_adapter,
    load_adapter_config,
    load_config,
    load_model,
    one_misuse,
    read_object,
)
from moestro.gate.paths import user_path
from moestro.inspection.running import check_number

CONFIG, ADAPTER = "config.json", "adapter_config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Where a model is."""

    spec: str
    """As the user typed it."""
    name: str
    """What to call it."""
    place: str
    """Folder, or name on the hub, of the model that holds all weights."""
    config: PreTrainedConfig
    adapter: str | None = None
    """Folder of the PEFT adapter on top of it."""


def find(specs: Sequence[str]) -> list[Checkpoint]:
    """The checkpoints that the user named; Misuse where one is not there."""
    check_number(specs)
    names = [short_name(spec) for spec in specs]
    if len(set(names)) < len(names):
        names = list(specs)
    return [find_one(spec, name) for spec, name in zip(specs, names, strict=True)]


def short_name(spec: str) -> str:
    """The last two parts of a path: "smoe/seed-0"."""
    return "/".join(part for part in user_path(spec).parts[-2:] if part != "/") or spec


def find_one(spec: str, name: str) -> Checkpoint:
    """One checkpoint by what the user typed."""
    folder = user_path(spec)
    if not folder.exists():
        if not is_hub_name(spec):
            raise Misuse(f"{spec} does not exist")
        return Checkpoint(spec=spec, name=name, place=spec, config=read_config(spec, spec))
    if (folder / ADAPTER).exists():
        base = base_of(folder)
        return Checkpoint(spec=spec, name=name, place=base, config=read_config(base, spec), adapter=str(folder))
    if not (folder / CONFIG).exists() and (folder / "model" / CONFIG).exists():
        folder = folder / "model"  # a finished run of `moestro train`
    if not (folder / CONFIG).exists():
        raise Misuse(f"{spec} must hold a checkpoint: it has no {CONFIG}, no {ADAPTER} and no finished model/ of a run")
    return Checkpoint(spec=spec, name=name, place=str(folder), config=read_config(str(folder), spec))


def is_hub_name(spec: str) -> bool:
    """Whether this may be a name on the hub: "owner/name" or "name"."""
    return re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", spec) is not None


def base_of(adapter: Path) -> str:
    """The model that an adapter was trained on; a relative folder may be relative to the adapter's."""
    check_folder(adapter)
    base = read_object(adapter / ADAPTER).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise Misuse(f"{adapter / ADAPTER} must name its base_model_name_or_path, got {base!r}")
    place = user_path(base)
    if not place.exists():
        place = user_path(adapter / base)
    if not place.exists():
        if not is_hub_name(base):
            raise Misuse(f"the base model of {adapter} does not exist: {base}")
        return base
    if (place / ADAPTER).exists():
        raise Misuse(f"the base model of {adapter} must be a model, got an adapter: {base}")
    return str(place)


def read_config(place: str, spec: str) -> PreTrainedConfig:
    """The config of a folder or of a name on the hub."""
    of = "" if place == spec else f" (the base of {spec})"
    return load_config(place, f"{place}{of} must be a checkpoint's folder or name on the hub")


def model_class(checkpoint: Checkpoint) -> Any:
    """The class that was saved, where transformers has it; else its family's causal language model."""
    for name in checkpoint.config.architectures or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    try:
        return AutoModelForCausalLM._model_mapping[type(checkpoint.config)]  # type: ignore[attr-defined]
    except KeyError:
        kind = (checkpoint.config.architectures or [checkpoint.config.model_type])[0]
        raise Misuse(f"{checkpoint.spec} is a {kind}, which transformers has no model class for") from None


def on_meta(checkpoint: Checkpoint, *, adapted: bool = True) -> nn.Module:
    """The model without its weights, built from the config; `adapted`: with its adapter."""
    kind = model_class(checkpoint)
    with one_misuse(f"{checkpoint.spec} cannot be built from its config"):
        with torch.device("meta"), no_init_weights():
            model = kind(checkpoint.config)
        model.tie_weights()
    return adapt_on_meta(model, checkpoint) if adapted and checkpoint.adapter else model


def adapt_on_meta(model: nn.Module, checkpoint: Checkpoint) -> nn.Module:
    """The model wrapped as its adapter says, ready to train on."""
    peft = import_peft(checkpoint)
    problem = f"{checkpoint.spec} is no adapter for {checkpoint.place}"
    assert checkpoint.adapter is not None
    config = load_adapter_config(checkpoint.adapter, problem)
    config.inference_mode = False
    with one_misuse(problem), torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # between PEFT and transformers
        return peft.get_peft_model(model, config)


def import_peft(checkpoint: Checkpoint) -> Any:
    """PEFT, which is not required otherwise."""
    try:
        import peft
    except ImportError:
        raise Misuse(f"{checkpoint.spec} is a PEFT adapter: install peft to inspect it") from None
    return peft


def load(checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device) -> tuple[nn.Module, tuple[str, ...]]:
    """The model with its weights, in evaluation mode, and notes on what its files hold beyond it."""
    check_memory(checkpoint, dtype, device)
    problem = f"the weights of {checkpoint.spec} cannot be read"
    model, info = load_model(
        model_class(checkpoint),
        checkpoint.place,
        problem,
        dtype=dtype,
        device_map={"": device},
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    if checkpoint.adapter:
        import_peft(checkpoint)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # between PEFT and transformers
            model = load_adapter(model, checkpoint.adapter, problem)
    if info["mismatched_keys"]:
        name, stored, built = sorted(info["mismatched_keys"])[0]
        raise Misuse(
            f"the weights of {checkpoint.spec} do not fit its config: {name} is {tuple(stored)} in the file and "
            f"{tuple(built)} by the config"
        )
    if missing := sorted(info["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise Misuse(f"the weights of {checkpoint.spec} are not complete: {missing[0]}{more} would stay random")
    unexpected = len(info["unexpected_keys"])
    notes = (f"{unexpected} tensors of its files have no place in {type(model).__name__}",) if unexpected else ()
    return model.eval(), notes


def check_memory(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse what cannot fit, before the machine runs out of memory."""
    needed = sum(p.numel() for p in on_meta(checkpoint, adapted=False).parameters()) * dtype.itemsize
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > free:
        raise Misuse(
            f"the weights of {checkpoint.spec} take {needed / 1e9:,.1f} GB in {str(dtype).removeprefix('torch.')}, and "
            f"{free / 1e9:,.1f} GB are free on {device.type}: inspect it without --data, or on a larger machine"
        )


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """What the config says of its weights; float32 where it says nothing."""
    config = checkpoint.config
    for holder in (config, config.get_text_config()):
        if isinstance(found := getattr(holder, "dtype", None), torch.dtype):
            return found
    return torch.float32


def tokenizer_of(checkpoint: Checkpoint, given: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer that the user named, else the checkpoint's own (an adapter's own, or its base's)."""
    if given is not None:
        return load_tokenizer(given)
    places = [place for place in (checkpoint.adapter, checkpoint.place) if place is not None]
    for place in places:
        if not Path(place).exists() or any((Path(place) / name).exists() for name in TOKENIZER_FILES):
            return load_tokenizer(place)
    raise Misuse(f"{checkpoint.spec} has no tokenizer beside its weights: name one with --tokenizer")
