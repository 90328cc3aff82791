"""Whatever a stranger's files ask for, loading them runs no code, asks nothing, and ends in one line."""

import ast
import io
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from inspection_fixture import edit_config, save, tiny
from moestro.data.sources import read_source
from moestro.data.tokenizer import load_tokenizer
from moestro.errors import Misuse
from moestro.gate.loading import load_adapter, load_config, load_model
from moestro.inspection.checkpoints import find, load, model_class
from moestro.inspection.findings import describe
from moestro.training.runs import check_folder

SOURCE = Path(__file__).parent.parent / "src" / "moestro"
LOADERS = {"from_pretrained", "load_dataset", "load_from_disk", "load_state_dict_from_url"}
UNSAFE = {("torch", "load"), ("pickle", "load"), ("pickle", "loads"), ("joblib", "load"), ("yaml", "load")}
UNSAFE |= {("Tokenizer", "from_file"), ("Tokenizer", "from_str"), ("builtins", "eval"), ("builtins", "exec")}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("mixtral", tmp_path_factory.mktemp("checkpoint") / "mixtral")


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A good checkpoint to damage; whoever asks on the terminal is told yes."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))
    return Path(shutil.copytree(checkpoint, tmp_path / "given"))


class Touch:
    """Unpickled, it leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.trace),)


def trace(folder: Path) -> Path:
    return folder.parent / "ran"


def code_beside(folder: Path) -> None:
    body = f"import os; os.mkdir({str(trace(folder))!r})\nclass Config: pass\nclass Own: pass\n"
    for name in ("evil.py", "given.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(body)


def edit(folder: Path, name: str, **changed: object) -> None:
    path = folder / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changed))


def tokenizer_map(folder: Path) -> None:
    own = ["evil.Own", "evil.Own"]
    edit(folder, "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": own})


def legacy_tokenizer_map(folder: Path) -> None:
    edit(folder, "tokenizer_config.json", tokenizer_class="Own", auto_map=["evil.Own", None])


def every_map(folder: Path) -> None:
    names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer", "AutoProcessor")
    maps = dict.fromkeys(names, "evil.Own")
    edit(folder, "config.json", model_type="evil", auto_map=maps)
    edit(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Own", None]}, processor_class="Own")


def pickled(folder: Path, name: str = "pytorch_model.bin") -> None:
    for path in folder.glob("*.safetensors"):
        path.unlink()
    (folder / name).write_bytes(pickle.dumps(Touch(trace(folder))))


def named_pickle(folder: Path) -> None:
    pickled(folder, "adapter_model.bin")
    edit(folder, "config.json", transformers_weights="adapter_model.bin")


def index(folder: Path, shard: str) -> None:
    if (folder / "model.safetensors").exists():
        (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    weights = dict.fromkeys(tiny("mixtral").state_dict(), shard)
    edit(folder, "model.safetensors.index.json", metadata={"total_size": 1}, weight_map=weights)


def kernel(folder: Path) -> None:
    edit(folder, "config.json", attn_implementation="evil/kernel")


def nested_kernel(folder: Path) -> None:
    edit(folder, "config.json", text_config={"_attn_implementation": {"": "paged|evil/kernel:code"}})


def pipe(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)


def everything(folder: Path) -> None:
    """Load what can be loaded of it."""
    (found,) = find([str(folder)])
    describe(found)
    load(found, dtype=torch.float32, device=torch.device("cpu"))
    load_tokenizer(str(folder))


BAD: dict[str, Callable[[Path], None]] = {
    "all code": every_map,
    "pickle": pickled,
    "pickle by another name": lambda folder: pickled(folder, "weights.pt"),
    "pickle named by the config": named_pickle,
    "shard above": lambda folder: index(folder, "../outside.safetensors"),
    "shard elsewhere": lambda folder: index(folder, str(folder.parent / "outside.safetensors")),
    "shard that is not there": lambda folder: index(folder, "model-1.safetensors"),
    "shard that is a pickle": lambda folder: (pickled(folder), index(folder, "pytorch_model.bin"))[0],
    "shard of another type": lambda folder: edit(folder, "model.safetensors.index.json", weight_map={"a": [1]}),
    "index that is a list": lambda folder: (folder / "model.safetensors.index.json").write_text("[]") and None,
    "kernel": kernel,
    "kernel of a part": nested_kernel,
    "pipe for a config": lambda folder: pipe(folder, "config.json"),
    "pipe for a tokenizer": lambda folder: pipe(folder, "tokenizer.json"),
    "pipe for weights": lambda folder: pipe(folder, "model.safetensors"),
    "tokenizer that is a list": lambda folder: (folder / "tokenizer.json").write_text("[]") and None,
    "tokenizer without a model": lambda folder: (folder / "tokenizer.json").write_text("{}") and None,
    "tokenizer of a wrong type": lambda folder: edit(folder, "tokenizer.json", model={"type": "BPE", "vocab": 3}),
    "tokenizer cut short": lambda folder: (folder / "tokenizer.json").write_text('{"version') and None,
    "deep config": lambda folder: (folder / "config.json").write_text('{"a":' * 10**5) and None,
    "more layers than memory": lambda folder: edit(folder, "config.json", num_hidden_layers=10**9),
    "more labels than memory": lambda folder: edit(folder, "config.json", num_labels=10**9),
    "more experts than memory": lambda folder: edit(folder, "config.json", num_local_experts=10**9),
    "endless size": lambda folder: (folder / "config.json").write_text('{"hidden_size": 1e999}') and None,
}


@pytest.mark.parametrize("kind", BAD)
def test_a_strangers_files_run_no_code_and_end_in_one_line(kind: str, folder: Path):
    code_beside(folder)
    BAD[kind](folder)
    with pytest.raises(Misuse) as refused:
        everything(folder)
    assert not trace(folder).exists()
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize("damage", [tokenizer_map, legacy_tokenizer_map])
@pytest.mark.parametrize("family", [None, "moestro", "evil"])
def test_a_tokenizers_own_code_is_not_offered(damage: Callable[[Path], None], family: str | None, folder: Path, capsys):
    """transformers asks whether to run it, where the family's tokenizer is not its own, and runs it if told yes."""
    code_beside(folder)
    damage(folder)
    if family is None:
        (folder / "config.json").unlink()
    else:
        edit_config(folder, model_type=family)
    with suppress(Misuse):  # or one that needs no code is loaded
        load_tokenizer(str(folder))
    assert not trace(folder).exists()
    assert "y/N" not in capsys.readouterr().out


def test_a_known_family_with_code_beside_it_loads_without_it(folder: Path):
    code_beside(folder)
    edit(folder, "config.json", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Own"})
    edit(folder, "generation_config.json", custom_generate="custom_generate")
    everything(folder)
    assert not trace(folder).exists()


WRONG = [("hidden_size", "wide"), ("hidden_size", None), ("hidden_size", 0), ("hidden_size", [8]), ("hidden_size", -8)]
WRONG += [("num_attention_heads", 0), ("num_attention_heads", "4"), ("num_key_value_heads", 3), ("vocab_size", "many")]
WRONG += [
    ("architectures", 5),
    ("architectures", [5]),
    ("model_type", 3),
    ("model_type", "x" * 10**6),
    ("dtype", "warm"),
]
WRONG += [("max_position_embeddings", "far"), ("num_experts_per_tok", 99), ("num_experts_per_tok", None)]
WRONG += [("num_local_experts", 0), ("rope_parameters", [1]), ("hidden_act", "swish!"), ("num_hidden_layers", "two")]
WRONG += [("quantization_config", {"quant_method": "magic"}), ("text_config", 3), ("layer_types", {"a": 1})]
WRONG += [("intermediate_size", 1.5), ("tie_word_embeddings", "maybe"), ("sliding_window", "wide"), ("id2label", 3)]


@pytest.mark.parametrize(("field", "value"), WRONG, ids=[f"{f}={str(v)[:10]}" for f, v in WRONG])
def test_a_config_of_wrong_types_is_a_misuse_or_harmless(field: str, value: object, folder: Path):
    edit_config(folder, **{field: value})
    with suppress(Misuse):  # and nothing else
        everything(folder)


def test_an_adapters_pickle_is_never_read(folder: Path):
    pytest.importorskip("peft")
    adapter = folder.parent / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Touch(trace(folder))))
    edit(adapter, "adapter_config.json", peft_type="LORA", base_model_name_or_path=str(folder), r=2)
    with pytest.raises(Misuse, match="pickled weights are never read"):
        load_adapter(tiny("mixtral"), str(adapter), "the adapter")
    assert not trace(folder).exists()


@pytest.mark.parametrize("base", [".", "../adapter", "", 3, None, "~nouser/x", "a" * 5000, "\0", "/nowhere/at/all"])
def test_an_adapter_must_lie_on_a_model(base: object, tmp_path: Path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    edit(adapter, "adapter_config.json", peft_type="LORA", base_model_name_or_path=base)
    with pytest.raises(Misuse):
        find([str(adapter)])


def test_a_data_sets_script_is_never_run(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))
    folder = tmp_path / "given"
    folder.mkdir()
    code_beside(folder)
    (folder / "rows.pkl").write_bytes(pickle.dumps(Touch(trace(folder))))
    with pytest.raises(Misuse, match="cannot be loaded as a data set"):
        list(read_source(f"hf:{folder}"))
    assert not trace(folder).exists()


def test_links_out_of_a_folder_are_followed_as_the_hubs_cache_needs_it(folder: Path):
    blob = folder.parent / "blob"
    (folder / "model.safetensors").rename(blob)
    (folder / "model.safetensors").symlink_to(blob)
    (found,) = find([str(folder)])
    assert load_model(model_class(found), str(folder), "the model").num_parameters() > 0
    assert load_config(str(folder), "the model").model_type == "mixtral"


def calls(tree: ast.AST) -> list[tuple[str, str]]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            found.append((owner.id if isinstance(owner, ast.Name) else "", node.func.attr))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found.append(("builtins", node.func.id))
    return found


def test_nobody_else_loads():
    files = {path.relative_to(SOURCE).as_posix(): path for path in SOURCE.rglob("*.py")}
    asked = {
        name: [call for call in calls(ast.parse(path.read_text())) if call[1] in LOADERS or call in UNSAFE]
        for name, path in files.items()
    }
    asked = {name: found for name, found in asked.items() if found}
    assert set(asked) == {"gate/loading.py"}
    trusting = [
        node for node in ast.walk(ast.parse(files["gate/loading.py"].read_text())) if isinstance(node, ast.keyword)
    ]
    answers = {node.value.value for node in trusting if node.arg == "trust_remote_code"}  # type: ignore[attr-defined]
    assert answers == {False}


def test_a_pipe_in_a_runs_folder_is_refused(tmp_path: Path):
    pipe(tmp_path, "run.json")
    with pytest.raises(Misuse, match=r"run.json must be a file, got a device or a pipe"):
        check_folder(tmp_path)
