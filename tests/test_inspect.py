"""`moestro inspect`: what it says of a checkpoint is so, what it measures is what the model does."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from command_line import moestro
from inspection_fixture import domains, edit_config, save, tiny, tiny_models, tokenizer
from moestro.adapters.applicability import trainable
from moestro.adapters.layers import moe_layers
from moestro.errors import Interrupted, Misuse
from moestro.inspection import measuring
from moestro.inspection.checkpoints import find
from moestro.inspection.findings import describe
from moestro.inspection.measuring import Conditions, RoutingStudy
from moestro.inspection.places import spans
from moestro.inspection.running import Running
from moestro.inspection.texts import read_text
from moestro.records import read_record
from moestro.routing_study import study_routing

pytestmark = pytest.mark.xdist_group("inspect")
PACKAGES = ("mixtral", "deepseek_v3", "gpt_oss", "olmoe", "moestro")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {package: save(package, folder / package) for package in (*PACKAGES, "llama")}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return domains(tmp_path_factory.mktemp("text"))


def line_of(printed: str, name: str) -> str:
    return next(line for line in printed.splitlines() if line.strip().startswith(name))


@pytest.mark.parametrize("package", PACKAGES)
def test_parameters_are_the_models_and_active_ones_without_idle_experts(package: str, checkpoints):
    model = tiny(package)
    found = describe(find([str(checkpoints[package])])[0])
    layers = {layer.name: layer for layer in moe_layers(model)}
    active = 0.0
    for name, parameter in model.named_parameters():
        layer = next((layer for at, layer in layers.items() if name.startswith(f"{at}.experts.")), None)
        active += parameter.numel() * (1.0 if layer is None else layer.top_k / layer.num_experts)
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.active_parameters == pytest.approx(active, abs=1)
    assert found.model_class == type(model).__name__


SAID = {
    "mixtral": ["layers 0 to 2: 8 experts, 3 per token, softmax", "own balance loss not as saved", "3 in 3 blocks"],
    "deepseek_v3": ["layers 1 and 2: 8 experts, 3 per token, sigmoid, selection bias, shared: mlp.shared_experts"],
    "gpt_oss": ['target_parameters=["mlp.router.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"])'],
    "olmoe": ["bias_rate            does not apply: it needs a router with a selection bias"],
    "moestro": [
        "layer 1: 8 experts, 2 per token, softmax, shared: feed_forward.0.shared_expert",
        "layer 1: 8 experts, 2 per token, softmax\n",
        "layer 2: 16 experts, 2 per token, softmax",
        "own balance loss no",
        "aux = moestro.AuxLosses(balance=1e-2, orthogonality=0.1, variance=0.1)",
    ],
}


@pytest.mark.parametrize("package", PACKAGES)
def test_a_description_needs_no_weights(package: str, checkpoints, tmp_path: Path, monkeypatch, capsys):
    shutil.copy(checkpoints[package] / "config.json", tmp_path)
    assert moestro(monkeypatch, "inspect", str(tmp_path)) == 0
    printed = capsys.readouterr().out
    assert all(words in printed for words in SAID[package])
    assert ("bias_rate            applies at all MoE layers" in printed) == (package == "deepseek_v3")


def test_losses_that_apply_nowhere_or_somewhere_are_told_apart(checkpoints, tmp_path: Path):
    shutil.copy(checkpoints["mixtral"] / "config.json", tmp_path)
    edit_config(tmp_path, num_experts_per_tok=1, output_router_logits=True)
    found = describe(find([str(tmp_path)])[0])
    losses = {loss.loss: loss for loss in found.losses}
    assert losses["variance"].applies_at == ""
    assert "top_k is 1" in losses["variance"].obstacles[0]
    assert losses["balance"].applies_at == "all MoE layers"
    assert found.attach[0] == "aux = moestro.AuxLosses(balance=1e-2)"
    assert found.own_balance.startswith("yes")


@pytest.mark.parametrize("package", PACKAGES)
def test_the_lora_line_reaches_routers_and_experts(package: str, checkpoints):
    peft = pytest.importorskip("peft")
    line = describe(find([str(checkpoints[package])])[0]).lora.replace("...", "r=2")
    model = peft.get_peft_model(tiny(package), eval(line, {"LoraConfig": peft.LoraConfig}))
    layers = moe_layers(model)
    assert all(trainable(layer, model) for layer in layers)
    reached = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all(any(layer.name in name and ".experts." in name for name in reached) for layer in layers)


def test_an_adapter_is_inspected_with_its_base(checkpoints, data, tmp_path: Path, monkeypatch, capsys):
    peft = pytest.importorskip("peft")
    for name, targets in (("reaches", ["mlp.gate.weight"]), ("misses", None)):
        base = AutoModelForCausalLM.from_pretrained(checkpoints["olmoe"])
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=targets, init_lora_weights=False)
        peft.get_peft_model(base, config).save_pretrained(tmp_path / name)
    assert moestro(monkeypatch, "inspect", str(tmp_path / "reaches"), str(tmp_path / "misses")) == 0
    first, second = capsys.readouterr().out.split("misses\n")
    assert "trainable: LoRA reaches it at all MoE layers" in first
    assert "frozen: LoRA does not reach it" in second
    assert line_of(first, "adapter of").endswith(str(checkpoints["olmoe"]))
    out = ["--out", str(tmp_path / "out"), "--dtype", "float32"]
    assert moestro(monkeypatch, "inspect", str(checkpoints["olmoe"]), str(tmp_path / "reaches"), *data, *out) == 0
    study = read_record(RoutingStudy, tmp_path / "out" / "routing.json")
    base, adapted = study.checkpoints
    assert base.layers[0].load != adapted.layers[0].load  # the adapter's weights were read


def test_a_run_folder_means_its_model(checkpoints, tmp_path: Path):
    shutil.copytree(checkpoints["moestro"], tmp_path / "smoe" / "seed-0" / "model")
    (found,) = find([str(tmp_path / "smoe" / "seed-0")])
    assert found.name == "smoe/seed-0"
    assert describe(found).model_class == "MoestroForCausalLM"


def test_loads_and_loss_are_what_the_model_does(checkpoints, tmp_path: Path, monkeypatch):
    """Two documents in one row, against the model run by hand with a hook on its first router."""
    for name, words in (("a", "expert router token"), ("b", "dense layer block shared choice")):
        (tmp_path / f"{name}.txt").write_text(words)
    arguments = ["--data", str(tmp_path / "a.txt"), str(tmp_path / "b.txt"), "--dtype", "float32"]
    out = ["--out", str(tmp_path / "out")]
    assert moestro(monkeypatch, "inspect", str(checkpoints["mixtral"]), *arguments, *out) == 0
    study = read_record(RoutingStudy, tmp_path / "out" / "routing.json")

    model = AutoModelForCausalLM.from_pretrained(checkpoints["mixtral"]).eval()
    encode = AutoTokenizer.from_pretrained(checkpoints["mixtral"])
    text = read_text(arguments[1:3])
    ids, domain = [encode.eos_token_id], [text.documents[0].domain]
    for document in text.documents:
        own = [*encode.encode(document.text, add_special_tokens=False), encode.eos_token_id]
        ids, domain = ids + own, domain + [document.domain] * len(own)
    chosen = []
    model.model.layers[0].mlp.gate.register_forward_hook(lambda gate, given, output: chosen.append(output[2]))
    tokens = torch.tensor([ids])
    loss = model(input_ids=tokens, labels=tokens).loss.item()

    (found,) = study.checkpoints
    assert study.sequence_length == len(ids)
    assert found.prediction.loss == pytest.approx(loss, rel=1e-5)
    assert found.tokens == len(ids) - 1
    count = torch.bincount(chosen[0].flatten(), minlength=8)
    assert found.layers[0].load == pytest.approx((count / count.sum()).tolist())
    of_b = torch.bincount(chosen[0][torch.tensor([name == "b" for name in domain])].flatten(), minlength=8)
    assert found.layers[0].domain_load["b"] == pytest.approx((of_b / of_b.sum()).tolist())
    assert found.layers[0].figures["dead_experts"] == int((count == 0).sum())
    bits = found.prediction.bits_per_byte
    assert bits == pytest.approx(loss * (len(ids) - 1) / 0.693147 / sum(len(d.text) for d in text.documents), rel=1e-4)


@pytest.fixture(scope="module")
def pair(checkpoints, data, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Our own family and another, with tokenizers that differ: the folder of results, and the report."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("pair")
        shutil.copytree(checkpoints["deepseek_v3"], folder / "other")
        tokenizer(260).save_pretrained(folder / "other")
        arguments = ["inspect", str(checkpoints["moestro"]), str(folder / "other"), *data, "--dtype", "float32"]
        assert moestro(patch, *arguments, "--out", str(folder / "out")) == 0
    return folder / "out", (folder / "out" / "report.html").read_text()


def test_composed_sub_layers_say_what_they_owe_to_each_other(pair):
    folder, report = pair
    ours, other = read_record(RoutingStudy, folder / "routing.json").checkpoints
    names = ("pair_information", "pair_information_shuffled", "composed", "rerouted")
    found = {layer.label: [layer.figures[name] for name in names] for layer in (*ours.layers, *other.layers)}
    assert all(value is not None and value > 0 for value in found.pop("1.1"))
    assert all(values == [None] * 4 for values in found.values())
    assert "composed term" in report


def test_two_with_tokenizers_of_their_own_are_compared_by_byte(pair):
    folder, report = pair
    study = read_record(RoutingStudy, folder / "routing.json")
    assert not study.same_tokens
    assert "Each checkpoint read the text with a tokenizer of its own" in report
    cells = {name: re.findall(r"<td>([^<]*)", row) for name, row in rows_of(report).items()}
    ours, other = (found.prediction for found in study.checkpoints)
    assert cells["loss"] == [f"{ours.loss:.3f}", f"{other.loss:.3f}", "–"]
    assert cells["bits per byte"][2] == f"{other.bits_per_byte - ours.bits_per_byte:+.3f}".replace("-", "−")


def rows_of(report: str) -> dict[str, str]:
    """Rows of the report's tables by the text of their first cell."""
    found = re.findall(r'<tr><th scope="row">([^<]*)(.*?)</tr>', report, flags=re.DOTALL)
    return dict(found)


def test_layers_of_several_in_a_block_and_of_others_stand_at_their_blocks(pair):
    study = read_record(RoutingStudy, pair[0] / "routing.json")
    assert [[layer.label for layer in found.layers] for found in study.checkpoints] == [["1.0", "1.1", "2"], ["1", "2"]]
    shown = re.findall(r'<option value="([^"]*)"', pair[1])
    assert shown == ["1", "1.0", "1.1", "2"]


def test_every_figure_of_the_meter_is_in_file_and_report(pair):
    folder, report = pair
    layers = [
        layer for found in read_record(RoutingStudy, folder / "routing.json").checkpoints for layer in found.layers
    ]
    figures = set(layers[0].figures)
    assert {"max_vio_batch", "column_variance", "overlap", "domain_mutual_information_shuffled"} <= figures
    drawn = json.loads(re.search(r'id="figures">(.*?)</script>', report, flags=re.DOTALL)[1])["measures"]
    assert set(drawn) == {name for name in figures if not name.endswith("_shuffled")}
    values = [layer.figures["column_variance"] for layer in layers]
    shown = [y for trace in drawn["column_variance"]["data"] for y in trace["y"] if y is not None]
    assert sorted(shown) == pytest.approx(sorted(values), rel=1e-5)


def test_the_same_tokens_make_losses_comparable(checkpoints, data, tmp_path: Path, monkeypatch, capsys):
    both = [str(checkpoints["mixtral"]), str(checkpoints["olmoe"])]
    assert moestro(monkeypatch, "inspect", *both, *data, "--out", str(tmp_path), "--sequence-length", "32") == 0
    study = read_record(RoutingStudy, tmp_path / "routing.json")
    assert study.same_tokens
    assert study.sequence_length == 32
    losses = [found.prediction.loss for found in study.checkpoints]
    difference = f"{losses[1] - losses[0]:+.3f}".replace("-", "−")
    assert difference in line_of(capsys.readouterr().out, "loss ")


def test_the_text_is_limited_by_domain_and_says_so(tmp_path: Path):
    for name, words in (("long", "a" * 99 + "é"), ("short", "b" * 30), ("again", "b" * 30)):
        (tmp_path / f"{name}.txt").write_text(words)
    text = read_text([str(tmp_path / f"{name}.txt") for name in ("long", "short", "again")], max_bytes=100)
    assert text.domains == ("long", "short")  # the third's text had been read before
    assert dict(zip([d.domain for d in text.documents], text.document_bytes.tolist(), strict=True)) == {
        "long": 99,  # not half a character
        "short": 30,
    }
    assert text.left_out == {"long": 2, "short": 0}


def test_a_domain_of_many_documents_keeps_the_limit_over_all_of_them(tmp_path: Path):
    for index in range(3):
        (tmp_path / f"{index}.txt").write_text(str(index) * 40)
    text = read_text([f"one={tmp_path}"], max_bytes=100)
    assert sorted(text.document_bytes.tolist()) == [20, 40, 40]
    assert text.left_out == {"one": 20}


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ([3], "layer 3"),
        ([0, 1], "layers 0 and 1"),
        ([1, 2, 3, 7], "layers 1 to 3 and 7"),
        ([0, 2, 4, 5, 6], "layers 0, 2 and 4 to 6"),
        ([1, 1, 2, 2], "layers 1 and 2 (2 in each)"),
    ],
)
def test_places_in_words(numbers: list[int], words: str):
    assert spans(numbers) == words


def test_interrupted_it_says_so_and_writes_nothing(checkpoints, data, tmp_path: Path, monkeypatch):
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(measuring, "add_losses", interrupt)
    found = find([str(checkpoints["mixtral"])])
    running = Running(dtype="float32")
    with pytest.raises(Interrupted, match="no report was written"):
        study_routing(found, [describe(found[0])], read_text(data[1:]), running, tmp_path, command="moestro")
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]  # of the folder's owner: nothing else
    assert Conditions().device.type == "cpu"


def break_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:3000])


def lose_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def lose_a_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors.pop("lm_head.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


DAMAGE = [
    (break_weights, "the weights of {} cannot be read"),
    (lambda folder: (folder / "model.safetensors").unlink(), "the weights of {} cannot be read"),
    (lose_a_tensor, "the weights of {} are not complete: lm_head.weight would stay random"),
    (
        lambda folder: edit_config(folder, intermediate_size=48),
        "the weights of {} do not fit its config: model.layers.0",
    ),
    (lose_tokenizer, "{} has no tokenizer beside its weights: name one with --tokenizer"),
    (lambda folder: edit_config(folder, model_type="smeagol"), "{} must be a checkpoint's folder or name on the hub"),
    (lambda folder: (folder / "config.json").unlink(), "{} must hold a checkpoint: it has no config.json"),
    (lambda folder: (folder / "config.json").write_text("{"), "{} must be a checkpoint's folder or name on the hub"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_a_damaged_checkpoint_is_one_line(damage, message, checkpoints, data, tmp_path: Path, monkeypatch, capsys):
    shutil.copytree(checkpoints["mixtral"], tmp_path / "damaged")
    damage(tmp_path / "damaged")
    out = tmp_path / "out"
    assert moestro(monkeypatch, "inspect", str(tmp_path / "damaged"), *data, "--out", str(out)) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("moestro: " + message.format(tmp_path / "damaged"))
    assert len(errors.strip().splitlines()) == 1
    assert not (out / "report.html").exists()


BAD = [
    (["llama"], "LlamaForCausalLM has no experts"),
    (["mixtral", "mixtral", "mixtral"], "name one checkpoint, or two to set side by side, got 3"),
    (["./nowhere/at/all"], "nowhere/at/all does not exist"),
    (["mixtral", "--data", "nowhere.txt"], "nowhere.txt does not exist"),
    (["mixtral", "DATA", "--sequence-length", "65"], "sequence_length must be at most 64"),
    (["mixtral", "DATA", "--sequence-length", "1"], "sequence_length must be at least 2, got 1"),
    (["mixtral", "DATA", "--batch-tokens", "0"], "batch_tokens must be at least 1, got 0"),
    (["mixtral", "DATA", "--max-bytes", "0"], "max_bytes must be at least 1, got 0"),
    (
        ["mixtral", "DATA", "--max-bytes", "9", "--sequence-length", "64"],
        "must fill at least one sequence of 64 tokens",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_misuse_is_one_line(arguments, message, checkpoints, data, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = [str(checkpoints.get(word, word)) for word in arguments]
    if "DATA" in given:
        given[given.index("DATA") : given.index("DATA") + 1] = data
    assert moestro(monkeypatch, "inspect", *given) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert len(errors.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("report.html"))


def test_a_package_outside_the_interface_says_how_to_adapt(tmp_path: Path):
    tiny_model = tiny_models.build("llama4").model
    tiny_model.config.architectures = [type(tiny_model).__name__]
    tiny_model.config.save_pretrained(tmp_path)
    with pytest.raises(Misuse, match="the experts of llama4 stand outside transformers' experts interface"):
        describe(find([str(tmp_path)])[0])


def test_code_of_a_checkpoint_is_never_run(tmp_path: Path, monkeypatch, capsys):
    config = {"model_type": "evil", "architectures": ["Evil"], "auto_map": {"AutoConfig": "evil.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')\nclass Config: pass\n")
    assert moestro(monkeypatch, "inspect", str(tmp_path)) == 2
    assert not (tmp_path / "pwned").exists()
    assert "custom code" in capsys.readouterr().err
