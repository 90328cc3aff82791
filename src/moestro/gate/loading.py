"""Load configs, tokenizers, models, adapters, data sets and arrays. No other module loads them.

Files from strangers control what these libraries do. Their code never runs here: no module named by `auto_map`, no
pickle, no kernel of the hub. Nothing prompts on the terminal. Any exception of a library becomes one Misuse, and files
that could exhaust the machine are refused before a library opens them.
"""

import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from moestro.errors import Misuse, TrainingFailed
from moestro.gate.visible import said

SAFE, INDEX, ADAPTER_WEIGHTS = ".safetensors", "*.safetensors.index.json", "adapter_model.safetensors"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
LARGEST_JSON = {"tokenizer.json": 512 * 2**20, "vocab.json": 64 * 2**20}
"""Largest size in bytes. Other JSON files and templates may have 16 MiB, indices of weights 64 MiB."""
MOST = {
    "layers": 2_000,
    "num_layers": 2_000,
    "num_hidden_layers": 2_000,
    "n_layer": 2_000,
    "n_layers": 2_000,
    "depth": 2_000,
    "num_labels": 100_000,
}
"""Largest values in a config, checked before a model is built: each creates that many Python objects."""
MOST_EXPERTS = 65_536
IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")
"""Prefixes of config fields that may name a kernel of the hub, which is code."""


@contextmanager
def one_misuse(problem: str) -> Iterator[None]:
    """Turn any exception within the context into `Misuse(f"{problem}: {reason}")`.

    TrainingFailed passes unchanged, and so does what is no Exception, such as KeyboardInterrupt (but see below).
    Catch every Exception on purpose: a stranger's config can cause ZeroDivisionError as well as OSError, and tokenizers
    raises bare Exception, or Rust's PanicException, which is only a BaseException.
    """
    try:
        yield
    except TrainingFailed:
        raise
    except Exception as error:
        raise Misuse(f"{problem}: {said(error)}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # Rust's; its class cannot be imported
            raise
        raise Misuse(f"{problem}: {said(error)}") from error


def load_config(place: str, problem: str) -> PreTrainedConfig:
    """Load the config of a folder or hub name. Raise Misuse, beginning with `problem`, if it cannot be used."""
    with one_misuse(problem):
        check_folder(Path(place))
        stored, _ = PreTrainedConfig.get_config_dict(place)
        check_config(stored)
        return AutoConfig.from_pretrained(place, trust_remote_code=False)


def load_tokenizer(place: str, problem: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or hub name. Raise Misuse, beginning with `problem`, if it cannot be used."""
    with one_misuse(problem):
        check_folder(Path(place))
        return AutoTokenizer.from_pretrained(place, trust_remote_code=False)


def load_model(kind: Any, place: str, problem: str, **options: Any) -> Any:
    """Load a model of class `kind` with weights from safetensors alone; return the result of `from_pretrained`.

    Raises:
        Misuse: beginning with `problem`, if its files cannot be used.
    """
    with one_misuse(problem):
        check_folder(Path(place))
        check_weights(Path(place))
        return kind.from_pretrained(place, trust_remote_code=False, use_safetensors=True, **options)


def load_adapter_config(folder: str, problem: str) -> Any:
    """Load the config of a PEFT adapter. Raise Misuse, beginning with `problem`, if it cannot be used."""
    from peft import PeftConfig  # not required otherwise

    with one_misuse(problem):
        check_folder(Path(folder))
        return PeftConfig.from_pretrained(folder)


def load_adapter(model: Any, folder: str, problem: str) -> Any:
    """Load a PEFT adapter onto `model`, from safetensors alone. Raise Misuse, beginning with `problem`, if not."""
    from peft import PeftModel

    with one_misuse(problem):
        check_folder(Path(folder))
        if not (Path(folder) / ADAPTER_WEIGHTS).is_file():
            raise Misuse(f"its weights must be in {ADAPTER_WEIGHTS}; pickled weights are never read")
        return PeftModel.from_pretrained(model, folder)


def load_rows(name: str, config: str | None, split: str, problem: str) -> Any:
    """Load one split of a data set of the hub, or of a folder, with `datasets`; its scripts are never run.

    Raises:
        Misuse: beginning with `problem`, if it cannot be loaded.
    """
    import datasets  # slow to import, and rarely needed

    with one_misuse(problem):
        return datasets.load_dataset(name, config, split=split)


def load_arrays(path: Path, names: Iterable[str], problem: str) -> dict[str, np.ndarray]:
    """Load arrays of an .npz file, never a pickle. Raise Misuse, beginning with `problem`, if one cannot be read."""
    with one_misuse(problem), np.load(path, allow_pickle=False) as stored:
        return {name: stored[name] for name in names}


def check_folder(folder: Path) -> None:
    """Raise Misuse if a folder holds pipes, devices, or oversized JSON files or templates. A hub name passes."""
    for path, status in contents(folder):
        small = 64 * 2**20 if path.match(INDEX) else 16 * 2**20
        most = LARGEST_JSON.get(path.name, small)
        if path.suffix in (".json", ".jinja") and status.st_size > most:
            raise Misuse(f"{path.name} must have at most {most // 2**20} MiB, got {status.st_size / 2**20:,.0f}")


def contents(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield the entries of a folder, if it exists. Raise Misuse for a pipe or device: reading one may never end."""
    for path in folder.iterdir() if folder.is_dir() else ():
        try:
            status = path.stat()
        except OSError:  # a broken link: its reader reports the missing file
            continue
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            raise Misuse(f"{path} must be a file, got a device or a pipe")
        yield path, status


def check_config(stored: Any) -> None:
    """Raise Misuse if a config.json is malformed, names hub code or pickled weights, or asks for too many objects."""
    if not isinstance(stored, Mapping):
        raise Misuse(f"config.json must hold an object, got {type(stored).__name__}")
    architectures = stored.get("architectures")
    if not (
        architectures is None or (isinstance(architectures, list) and all(isinstance(a, str) for a in architectures))
    ):
        raise Misuse("architectures must be a list of names")
    weights = stored.get("transformers_weights")
    if weights is not None and not (isinstance(weights, str) and weights.endswith((SAFE, f"{SAFE}.index.json"))):
        raise Misuse(f"transformers_weights must name a {SAFE} file, got {weights!r}")
    for key, value in entries(stored):
        if key.strip("_").startswith(IMPLEMENTATIONS) and not is_plain(value):
            raise Misuse(f"{key} must be one that transformers has: code of the hub is never run, got {value!r}")
        most = MOST_EXPERTS if "expert" in key else MOST.get(key)
        if most is not None and isinstance(value, int | float) and not value <= most:
            raise Misuse(f"{key} must be at most {most:,}, got {value}")


def is_plain(value: Any) -> bool:
    """Return whether an implementation (or each in a mapping by sub-config) is None or a name without a hub owner."""
    if isinstance(value, Mapping):
        return all(map(is_plain, value.values()))
    return value is None or (isinstance(value, str) and value.replace("_", "").isalnum())


def entries(stored: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the fields of a config and of all nested configs."""
    for key, value in stored.items():
        yield str(key), value
        if isinstance(value, Mapping):
            yield from entries(value)


def check_weights(folder: Path) -> None:
    """Raise Misuse unless a folder's weights can be read from safetensors alone. A hub name passes.

    Every file in an index of weights must exist in this folder and be in safetensors format; pickled weights alone are
    refused.
    """
    if not folder.is_dir():
        return
    for index in folder.glob(INDEX):
        shards = read_object(index).get("weight_map")
        if not isinstance(shards, dict):
            raise Misuse(f"{index.name} must hold a weight_map")
        for shard in dict.fromkeys(map(str, shards.values())):
            check_inside(index, shard)
            if not shard.endswith(SAFE):
                raise Misuse(f"{index.name} must name {SAFE} files, got {shard!r}: a pickle can run code")
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
    if pickled and not any(folder.glob(f"*{SAFE}")):
        raise Misuse(f"weights must be in {SAFE} files, got {pickled[0]}: a pickle can run code and is never read")


def check_inside(index: Path, name: str) -> None:
    """Raise Misuse unless the file `name`, listed in `index`, exists inside the folder of `index`."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise Misuse(f"{index.name} must name files of its own folder, got {name!r}")
    if not (index.parent / name).is_file():
        raise Misuse(f"{index.name} names {name!r}, which does not exist")


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file. Raise Misuse unless it holds an object."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Misuse(f"{path} must hold a JSON object: {said(error)}") from error
    if not isinstance(stored, dict):
        raise Misuse(f"{path} must hold a JSON object, got {type(stored).__name__}")
    return stored
