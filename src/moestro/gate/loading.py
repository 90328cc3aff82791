"""Load configs, tokenizers, models, adapters and data sets; no other module asks a library to do so.

Files from strangers decide what these libraries do. Here code that comes with them never runs: no module that
`auto_map` names, no pickle, no kernel of the hub. Nothing is asked on the terminal. Whatever a library raises becomes
one Misuse, and what would take the machine down is refused before the library sees it.
"""

import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from moestro.errors import Misuse, TrainingFailed
from moestro.gate.visible import said

SAFE, INDEX, ADAPTER_WEIGHTS = ".safetensors", "*.safetensors.index.json", "adapter_model.safetensors"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
LARGEST_JSON = {"tokenizer.json": 512 * 2**20, "vocab.json": 64 * 2**20}
"""Bytes; other JSON files may have 16 MiB, indices of weights 64 MiB."""
MOST = {
    "layers": 2_000,
    "num_layers": 2_000,
    "num_hidden_layers": 2_000,
    "n_layer": 2_000,
    "n_layers": 2_000,
    "depth": 2_000,
    "num_labels": 100_000,
}
"""What a config may ask for before a model is built: each of these makes that many Python objects."""
MOST_EXPERTS = 65_536
IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")
"""Fields of a config whose values may name a kernel of the hub, which is code."""


@contextmanager
def one_misuse(problem: str) -> Iterator[None]:
    """Turn whatever a library raises into `Misuse(f"{problem}: {reason}")`.

    Every exception is meant: configs of strangers end in ZeroDivisionError as well as in OSError, and tokenizers raises
    a bare Exception, or a panic that is none.
    """
    try:
        yield
    except TrainingFailed:
        raise
    except Exception as error:
        raise Misuse(f"{problem}: {said(error)}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of Rust; its class cannot be imported
            raise
        raise Misuse(f"{problem}: {said(error)}") from error


def load_config(place: str, problem: str) -> PreTrainedConfig:
    """Load the config of a folder or of a name on the hub; Misuse, beginning with `problem`, if it cannot be used."""
    with one_misuse(problem):
        check_folder(Path(place))
        stored, _ = PreTrainedConfig.get_config_dict(place)
        check_config(stored)
        return AutoConfig.from_pretrained(place, trust_remote_code=False)


def load_tokenizer(place: str, problem: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or a name on the hub; Misuse, beginning with `problem`, if it cannot be used."""
    with one_misuse(problem):
        check_folder(Path(place))
        return AutoTokenizer.from_pretrained(place, trust_remote_code=False)


def load_model(kind: Any, place: str, problem: str, **options: Any) -> Any:
    """Load a model of class `kind` with its weights, from safetensors alone; returns what `from_pretrained` returns.

    Raises:
        Misuse: beginning with `problem`, if its files cannot be used.
    """
    with one_misuse(problem):
        check_folder(Path(place))
        check_weights(Path(place))
        return kind.from_pretrained(place, trust_remote_code=False, use_safetensors=True, **options)


def load_adapter_config(folder: str, problem: str) -> Any:
    """Load the config of a PEFT adapter; Misuse, beginning with `problem`, if it cannot be used."""
    from peft import PeftConfig  # not required otherwise

    with one_misuse(problem):
        check_folder(Path(folder))
        return PeftConfig.from_pretrained(folder)


def load_adapter(model: Any, folder: str, problem: str) -> Any:
    """Load a PEFT adapter, from safetensors alone, on top of `model`."""
    from peft import PeftModel

    with one_misuse(problem):
        check_folder(Path(folder))
        if not (Path(folder) / ADAPTER_WEIGHTS).is_file():
            raise Misuse(f"it must have its weights in {ADAPTER_WEIGHTS}; pickled ones are never read")
        return PeftModel.from_pretrained(model, folder)


def load_rows(name: str, config: str | None, split: str, problem: str) -> Any:
    """Load one split of a data set of the hub, or of a folder, as `datasets` does; its scripts are never run."""
    import datasets  # slow to import, and rarely needed

    with one_misuse(problem):
        return datasets.load_dataset(name, config, split=split)


def load_saved_rows(folder: str, problem: str) -> Any:
    """Load what `save_to_disk` of `datasets` wrote."""
    import datasets

    with one_misuse(problem):
        for state in Path(folder).rglob("state.json"):
            check_folder(state.parent)
            for file in read_object(state).get("_data_files") or ():
                check_inside(state, file["filename"])
        return datasets.load_from_disk(folder)


def check_folder(folder: Path) -> None:
    """Raise Misuse if a folder holds pipes or devices, or configs too large to be ones. A name on the hub passes."""
    for path, status in contents(folder):
        small = 64 * 2**20 if path.match(INDEX) else 16 * 2**20
        most = LARGEST_JSON.get(path.name, small)
        if path.suffix in (".json", ".jinja") and status.st_size > most:
            raise Misuse(f"{path.name} must have at most {most // 2**20} MiB, got {status.st_size / 2**20:,.0f}")


def contents(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield what a folder holds, nothing if there is none; Misuse at a pipe or a device, which would never end."""
    for path in folder.iterdir() if folder.is_dir() else ():
        try:
            status = path.stat()
        except OSError:  # a link to nothing: who reads it says that the file is not there
            continue
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            raise Misuse(f"{path} must be a file, got a device or a pipe")
        yield path, status


def check_config(stored: Any) -> None:
    """Raise Misuse if a config.json asks for code from elsewhere, or for more objects than a model can have."""
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
    """Whether an implementation is none, or named without an owner on the hub (or these by sub-config)."""
    if isinstance(value, Mapping):
        return all(map(is_plain, value.values()))
    return value is None or (isinstance(value, str) and value.replace("_", "").isalnum())


def entries(stored: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the fields of a config and of the configs in it."""
    for key, value in stored.items():
        yield str(key), value
        if isinstance(value, Mapping):
            yield from entries(value)


def check_weights(folder: Path) -> None:
    """Raise Misuse if a folder's weights are pickled, or an index names files outside it. A name on the hub passes."""
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
    """Raise Misuse unless a file that `index` names lies in the folder of `index`, by its name."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise Misuse(f"{index.name} must name files of its own folder, got {name!r}")
    if not (index.parent / name).is_file():
        raise Misuse(f"{index.name} names {name!r}, which is not there")


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object; Misuse if it holds something else."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Misuse(f"{path} must hold a JSON object: {said(error)}") from error
    if not isinstance(stored, dict):
        raise Misuse(f"{path} must hold a JSON object, got {type(stored).__name__}")
    return stored
