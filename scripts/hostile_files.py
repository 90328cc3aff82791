"""Hostile files: texts, tokenizers, checkpoints, adapters and folders of runs."""

import bz2
import gzip
import json
import lzma
import os
import pickle
import random
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from hostile_run import TRACE, Case
from hostile_words import SMALL

JSONS: list[Any] = [None, True, -1, 0, 1.5, 1e308, 10**30, 10**9, "", "x" * 10**5, "\x1b[2J", "evil.Own", "evil/kernel"]
JSONS += [
    [],
    {},
    [[["a"]]],
    {"a": {"b": [1]}},
    ["evil.Own", None],
    {"rope_type": "x"},
    "../../x",
    "a\nb\u202e",
    [0] * 1000,
]
RAW = [b"", b"\0" * 100, b"\xff\xfe{\0}\0", b"{", b"[]", b"null", b"3", b'"a"', b'{"a":' * 10**5, b"[" * 10**6]
RAW += [
    b'{"a": NaN}',
    b'{"hidden_size": 1e999}',
    b'{"a": 1, "a": 2}',
    b"\x80\x81",
    b"a: &a [*a, *a]",
    b"PK\x03\x04",
    b"\xef\xbb\xbf{}",
]
NAMES = ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json"]
NAMES += ["model.safetensors", "model.safetensors.index.json", "chat_template.jinja", "added_tokens.json", "vocab.json"]


class Touch:
    """Unpickled, it leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.trace),)


@cache
def good() -> Path:
    """A tiny checkpoint with a tokenizer, and an adapter of it."""
    import peft
    import tiny_models
    from transformers import AutoModelForCausalLM

    from moestro.data.tokenizer import train_tokenizer

    folder = Path(tempfile.mkdtemp(prefix="hostile-good-"))
    with_vocabulary = tiny_models.GENERIC | {"vocab_size": 300}
    kept, tiny_models.GENERIC = tiny_models.GENERIC, with_vocabulary
    tiny_models.build("mixtral").model.save_pretrained(folder / "model")
    tiny_models.GENERIC = kept
    train_tokenizer(["expert router token gate balance load"] * 20, 280).save_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder / "adapter")
    return folder


def damage(draw: random.Random, folder: Path, names: list[str]) -> None:
    """Damage one file in one way."""
    path = folder / draw.choice(names)
    if path.is_dir():  # damaged once already
        return
    ways: list[Callable[[], object]] = [
        lambda: replace(path, draw.choice(RAW)),
        lambda: replace(path, path.read_bytes()[: draw.randrange(1, 2000)] if path.is_file() else b"x"),
        lambda: (path.unlink(missing_ok=True), path.mkdir()),
        lambda: (path.unlink(missing_ok=True), os.mkfifo(path)),
        lambda: (
            path.unlink(missing_ok=True),
            path.symlink_to(draw.choice([path, "/dev/zero", "/nowhere", "/etc/shadow"])),
        ),
        lambda: path.unlink(missing_ok=True),
    ]
    fields: list[Callable[[], object]] = [lambda: edit(draw, path)] * 8
    weights: list[Callable[[], object]] = [lambda: tensors(draw, path)] * 6
    draw.choice(ways + (weights if path.suffix == ".safetensors" else fields))()


def replace(path: Path, data: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def edit(draw: random.Random, path: Path) -> None:
    """Set one field of a JSON file, at any depth, to something else."""
    try:
        whole = json.loads(path.read_text()) if path.is_file() else {}
    except (OSError, ValueError, RecursionError):
        whole = {}
    if not isinstance(whole, dict):
        return
    place = whole
    while isinstance(deeper := place.get(draw.choice(list(place) or [""])), dict) and deeper and draw.random() < 0.8:
        place = deeper
    place[draw.choice([*list(place)[:200], "auto_map", "num_labels", "attn_implementation", "rope_parameters"])] = (
        draw.choice(JSONS)
    )
    replace(path, json.dumps(whole).encode())


def tensors(draw: random.Random, path: Path) -> None:
    """Damage the header of a file of weights, or put it out of its folder."""
    data = path.read_bytes() if path.is_file() else b""
    if len(data) < 5000:
        return
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = draw.choice([key for key in header if key != "__metadata__"])
    field = draw.choice(["dtype", "shape", "data_offsets"])
    changed = header | {
        name: header[name] | {field: draw.choice([*JSONS, [0, 10**12], [-1, 8], [10**9, 10**9], "F64"])}
    }
    text = json.dumps(changed).encode()
    replace(
        path,
        draw.choice(
            [
                (2**60).to_bytes(8, "little") + data[8:],
                len(text).to_bytes(8, "little") + text + data[8 + length :],
                data[:-5],
            ]
        ),
    )


def code(folder: Path, trace: Path) -> None:
    """Put code into a folder, by every name that is ever asked for."""
    body = f"import os\nos.mkdir({str(trace)!r})\nclass Own: pass\nclass Config: pass\n"
    for name in ("evil.py", f"{folder.name}.py", "modeling_evil.py", "custom_generate/generate.py", "sitecustomize.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(body)
    for name in ("pytorch_model.bin", "adapter_model.bin", "optimizer.pt", "training_args.bin", "rows.pkl"):
        (folder / name).write_bytes(pickle.dumps(Touch(trace)))


def maps(draw: random.Random, folder: Path) -> None:
    """Ask for the code in the folder."""
    own: Any = draw.choice(
        ["evil.Own", ["evil.Own", "evil.Own"], ["evil.Own", None], "other--evil.Own", "evil", 3, {"a": 1}]
    )
    for name, key in (
        ("config.json", "AutoConfig"),
        ("tokenizer_config.json", "AutoTokenizer"),
        ("config.json", "AutoModelForCausalLM"),
    ):
        if draw.random() < 0.6:
            whole = json.loads((folder / name).read_text())
            whole["auto_map"] = draw.choice([{key: own}, own])
            if draw.random() < 0.5:
                whole |= {
                    "model_type": draw.choice(["evil", "moestro", ""]),
                    "tokenizer_class": "Own",
                    "architectures": ["Own"],
                }
            replace(folder / name, json.dumps(whole).encode())


def shards(draw: random.Random, folder: Path) -> None:
    """Replace the weights by an index."""
    if (folder / "model.safetensors").is_dir():  # damaged once already
        return
    (folder / "model.safetensors").unlink(missing_ok=True)
    names = [
        "../x.safetensors",
        "/etc/passwd",
        "pytorch_model.bin",
        "x.safetensors",
        "",
        ".",
        "\0",
        3,
        None,
        "a" * 300,
        "https://x/y.safetensors",
    ]
    weights = draw.choice(
        [{f"w{i}": f"m-{i}.safetensors" for i in range(10**5)}, {"a": draw.choice(names)}, draw.choice(JSONS)]
    )
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": draw.choice(JSONS), "weight_map": weights})
    )


def damaged(draw: random.Random, folder: Path, names: list[str]) -> Path:
    """A checkpoint with something wrong."""
    place = Path(shutil.copytree(good() / "model", folder / "given"))
    if draw.random() < 0.4:
        code(place, folder / TRACE)
        maps(draw, place)
    for _ in range(draw.choice([1, 1, 2])):
        draw.choice([lambda: damage(draw, place, names)] * 5 + [lambda: shards(draw, place)])()
    return place


def texts(draw: random.Random, folder: Path) -> Path:
    """A small good corpus of some domains."""
    (folder / "texts").mkdir()
    for number in range(40):
        words = draw.choices(["expert", "router", "token", "gate", "balance", "load", "sparse", "dense"], k=80)
        (folder / "texts" / f"{number}.txt").write_text(" ".join(words))
    return folder / "texts"


def checkpoint(draw: random.Random, folder: Path) -> Case:
    """Inspect a damaged checkpoint, at times by running it."""
    place = damaged(draw, folder, NAMES)
    data = ["--data", str(texts(draw, folder)), "--out", str(folder / "out")] if draw.random() < 0.4 else []
    return Case(argv=["inspect", str(place), *data])


def tokenizer_folder(draw: random.Random, folder: Path) -> Case:
    """Train with a damaged tokenizer."""
    names = ["tokenizer.json", "tokenizer.json", "tokenizer_config.json", "config.json", "special_tokens_map.json"]
    place = damaged(draw, folder, names)
    out = ["--out", str(folder / "out"), *SMALL]
    return Case(argv=["train", "smoe", "--data", str(texts(draw, folder)), "--tokenizer", str(place), *out])


def adapter(draw: random.Random, folder: Path) -> Case:
    """Inspect a damaged adapter."""
    place = Path(shutil.copytree(good() / "adapter", folder / "given"))
    whole = json.loads((place / "adapter_config.json").read_text())
    if draw.random() < 0.4:
        code(place, folder / TRACE)
        (place / "adapter_model.safetensors").unlink(missing_ok=draw.random() < 2)
    bases = [".", "..", str(place), "~nouser/x", "\0", "a" * 5000, 3, None, "hf/none", "\x1b[2J"]
    changes = [{"base_model_name_or_path": draw.choice(bases)}, {draw.choice(list(whole)): draw.choice(JSONS)}]
    changes += [
        {"auto_mapping": {"base_model_class": "Own", "parent_library": "evil"}},
        {"megatron_core": "evil", "megatron_config": {}},
    ]
    changes += [{"peft_type": draw.choice([*JSONS, "IA3", "PREFIX_TUNING"])}, {"r": draw.choice(JSONS)}, {}]
    (place / "adapter_config.json").write_text(json.dumps(whole | draw.choice(changes)))
    if draw.random() < 0.4:
        damage(
            draw,
            place,
            ["adapter_config.json", "adapter_model.safetensors"]
            if (place / "adapter_model.safetensors").exists()
            else ["adapter_config.json"],
        )
    data = ["--data", str(texts(draw, folder)), "--out", str(folder / "out")] if draw.random() < 0.4 else []
    return Case(argv=["inspect", str(place), *data])


ENDINGS = [".txt", ".md", ".py", ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".ndjson", ".jsonl.gz", ".txt.gz"]
ENDINGS += [".jsonl.zst", ".txt.bz2", ".arrow", ".xz"]
CONTENTS = [b"text\n", b'"a\n', b"a,b,c\n1\n", b"[]\n", b'{"text": 3}\n', b'{"text": null}\n', b'{"other": "x"}\n']
CONTENTS += [b'{"text": "\\ud800"}\n', b'{"text": "a b c"}\n', b"# coding: rot13\nprint(1)\n", b"# coding: nothing\n"]
CONTENTS += [b"# -*- coding: hex -*-\n", b"# coding: unicode_escape\n\\ud800", b"text\n\xff\xfe\n", b"a\0b\n"]
FILES = [
    "a",
    "\x1b[31m",
    "\u202ex",
    "a\nb",
    "é" * 80,
    "x" * 240,
    "-rf",
    "LABEL=x",
    "a::b",
    "$(touch ran)",
    "\udcff",
    "[a]",
]


def corpus(draw: random.Random, folder: Path) -> Case:
    """Prepare texts that are none, or not what their names say, alone or among good ones."""
    place = texts(draw, folder)
    made = [path for _ in range(draw.randrange(1, 5)) if (path := text_file(draw, place)) is not None]
    if draw.random() < 0.3:
        (place / "loop").symlink_to(place)
        os.mkfifo(place / "pipe.txt")
    named = str(draw.choice([place, place, *made]))
    prefix, suffix = (
        draw.choice(["", "", "", "L=", "\x1b[2J=", "=", "hf:"]),
        draw.choice(["", "", "", "::text", "::", "::a+b", "/**"]),
    )
    flags = [[], [], ["--text-column", draw.choice(["text", "", "+", "a+b", "\x1b"])], ["--max-bytes", "100"]]
    out = ["--out", str(folder / "out"), *SMALL]
    return Case(
        argv=[
            "train",
            "smoe",
            "--data",
            prefix + named + suffix,
            *out,
            *draw.choice([*flags, ["--max-held-out-bytes", "1"]]),
        ]
    )


def text_file(draw: random.Random, place: Path) -> Path | None:
    """Make a file that is not what its name says; None where there is one already."""
    path = place / (draw.choice(FILES) + draw.choice(ENDINGS))
    data = [draw.choice(RAW), draw.choice(CONTENTS) * draw.choice([1, 50]), draw.randbytes(500), b"\0" * 10**7]
    content = draw.choice([*data, b'{"text": "' + b"expert router token " * 100 + b'"}\n' + draw.choice(CONTENTS)])
    if path.exists():
        return None
    packed = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}.get(path.suffix)
    path.write_bytes(packed(content) if packed and draw.random() < 0.7 else content)
    return path


def run_folder(draw: random.Random, folder: Path) -> Case:
    """Start a run in a folder that holds something else."""
    out = folder / "out"
    out.mkdir()
    names = [
        "run.json",
        "summary.json",
        "metrics.jsonl",
        "choices.jsonl",
        "checkpoint-5",
        "checkpoint-x",
        "model",
        "lock",
    ]
    for name in draw.sample(names, 2):
        recipe = json.dumps({"recipe": draw.choice(JSONS), "seed": 0}).encode()
        data = draw.choice([*RAW, recipe, pickle.dumps(Touch(folder / TRACE))])
        if name.startswith(("checkpoint", "model")):
            (out / name).mkdir()
            for inner in ("complete.json", "optimizer.pt", "trainer_state.json"):
                (out / name / inner).write_bytes(data)
        else:
            replace(out / name, data)
            damage(draw, out, [name])
    return Case(argv=["train", "smoe", "--data", str(texts(draw, folder)), "--out", str(out), *SMALL])
