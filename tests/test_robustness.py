"""`moestro inspect --robustness`: the losses are those of the model perturbed as it says, where it says."""

import json
import math
import re
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import moestro as package
from agreement import randomise, small_model, some_ids
from command_line import moestro
from inspection_fixture import domains, own_config, save, tiny_models, tokenizer
from moestro.adapters import moe_layers
from moestro.inspection.measuring import RoutingStudy
from moestro.inspection.robustness import NOISE, RobustnessTest, measure_robustness, planned
from moestro.inspection.texts import read_text
from moestro.records import read_record
from moestro.report.routing_robustness import METHOD, limits

pytestmark = pytest.mark.xdist_group("inspect")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    found = {name: save(name, folder / name) for name in ("mixtral", "deepseek_v4")}
    own = package.MoestroForCausalLM(own_config())
    randomise(own, std=0.25)
    own.save_pretrained(folder / "moestro")
    tokenizer().save_pretrained(folder / "moestro")
    return found | {"moestro": folder / "moestro"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return domains(tmp_path_factory.mktemp("text"), documents=1)


def inspected(
    patch: pytest.MonkeyPatch, specs: list[Path], data: list[str], out: Path, *how: str
) -> tuple[RoutingStudy, str]:
    arguments = [*map(str, specs), *data, "--robustness", "--dtype", "float32", "--out", str(out), *how]
    assert moestro(patch, "inspect", *arguments) == 0
    return read_record(RoutingStudy, out / "routing.json"), (out / "report.html").read_text()


@pytest.fixture(scope="module")
def pair(checkpoints, data, tmp_path_factory) -> tuple[RoutingStudy, str]:
    """Ours and a foreign one, side by side."""
    with pytest.MonkeyPatch.context() as patch:
        return inspected(patch, [checkpoints["moestro"], checkpoints["mixtral"]], data, tmp_path_factory.mktemp("out"))


def made_of(study: RoutingStudy, index: int = 0) -> tuple[RobustnessTest, ...]:
    found = study.checkpoints[index].robustness
    assert found is not None
    return found.tests


def without_the_first(router: Any, given: Any, output: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mixtral's rule in plain words: softmax, the first expert struck out, the best of the rest, weights of sum 1."""
    scores = output[0].softmax(-1)
    rest = scores.scatter(-1, scores.argmax(-1, keepdim=True), -1.0)
    weight, expert = rest.topk(router.top_k, dim=-1)
    return output[0], weight / weight.sum(-1, keepdim=True), expert


def test_losses_are_those_of_a_model_disabled_by_hand(checkpoints, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "a.txt").write_text("expert router token dense layer block shared choice " * 2)
    study, _ = inspected(monkeypatch, [checkpoints["mixtral"]], ["--data", str(tmp_path / "a.txt")], tmp_path / "out")
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoints["mixtral"]).eval()
    encode: Any = AutoTokenizer.from_pretrained(checkpoints["mixtral"])
    ids = [encode.eos_token_id, *encode.encode(read_text([str(tmp_path / "a.txt")]).documents[0].text)]
    tokens = torch.tensor([[*ids, encode.eos_token_id]])
    routers = [layer.router for layer in moe_layers(model)]

    def loss(disabled: list[int]) -> float:
        handles = [routers[index].register_forward_hook(without_the_first) for index in disabled]
        found = model(input_ids=tokens, labels=tokens).loss.item()
        for handle in handles:
            handle.remove()
        return found

    undisturbed = loss([])
    assert study.checkpoints[0].robustness.loss == pytest.approx(undisturbed, rel=1e-5)
    disabled = [test for test in made_of(study) if test.kind == "disabled"]
    assert [test.scope.words for test in disabled] == ["layer 0", "layer 1", "layer 2", "all layers"]
    for test, layers in zip(disabled, ([0], [1], [2], [0, 1, 2]), strict=True):
        assert test.scope.layers == tuple(f"model.layers.{index}.mlp" for index in layers)
        assert test.loss == pytest.approx(expected := loss(layers), rel=1e-5)
        assert test.rise == pytest.approx(expected - undisturbed, abs=1e-4)
        assert test.perplexity == pytest.approx(math.exp(expected), rel=1e-4)
    assert len({round(test.loss or 0.0, 6) for test in made_of(study)}) == len(made_of(study))


def test_scopes_are_single_layers_sub_layers_of_all_blocks_and_all() -> None:
    moe = package.MoE(num_experts=4, top_k=2, width=8)
    layers = moe_layers(small_model(feed_forward=[[moe, moe], [moe, moe]]))
    disabled = [test.scope for test in planned(layers, count=2) if (test.kind, test.amount) == ("disabled", 2)]
    names = [layer.name for layer in layers]
    assert [(scope.label, scope.words, list(scope.layers)) for scope in disabled] == [
        ("0.0", "layer 0.0", names[:1]),
        ("0.1", "layer 0.1", names[1:2]),
        ("1.0", "layer 1.0", names[2:3]),
        ("1.1", "layer 1.1", names[3:]),
        ("first", "first of layers 0 and 1", names[::2]),
        ("second", "second of layers 0 and 1", names[1::2]),
        ("all", "all layers", names),
    ]
    others = [(test.kind, test.amount, test.scope.label) for test in planned(layers) if test.kind != "disabled"]
    assert others == [("replaced", 1, "all"), *(("noise", scale, "all") for scale in NOISE)]


def test_results_do_not_depend_on_how_rows_are_batched(checkpoints, data, tmp_path: Path, monkeypatch) -> None:
    found = [
        inspected(monkeypatch, [checkpoints["moestro"]], data, tmp_path / tokens, "--batch-tokens", tokens)[0]
        for tokens in ("64", "4096")
    ]
    losses = [[test.loss for test in made_of(study)] for study in found]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_report_shows_every_test_side_by_side(pair) -> None:
    study, report = pair
    assert " ".join(METHOD.split()) in " ".join(report.replace("&#39;", "'").split())
    rows = re.findall(
        r'<th scope="row">top-1 disabled<small>([^<]*)</small></th>\s*<td>([^<]*)</td>\s*<td>([^<]*)', report
    )
    shown = {where: cells for where, *cells in rows}
    ours, other = ({t.scope.words: t for t in made_of(study, index) if t.kind == "disabled"} for index in (0, 1))
    assert shown.keys() == ours.keys() | other.keys()
    assert list(shown) == ["layer 0", "layer 1", "layer 1.0", "layer 1.1", "layer 2", "all layers"]
    for where, cells in shown.items():
        for cell, tests in zip(cells, (ours, other), strict=True):
            test = tests.get(where)
            words = f"{test.rise:+.3f} ({test.perplexity:,.2f})".replace("-", "−") if test else "–"
            assert cell == words.replace("+0.000", "0.000").replace("−0.000", "0.000")
    drawn = json.loads(re.search(r'id="figures">(.*?)</script>', report, flags=re.DOTALL)[1])["robustness"]  # type: ignore[index]
    assert drawn["layout"]["yaxis"]["type"] == "log"
    points = sorted(y for trace in drawn["data"] if "markers" in trace["mode"] for y in trace["y"])
    assert points == pytest.approx(sorted(t.perplexity for i in (0, 1) for t in made_of(study, i)), rel=1e-4)


def test_layers_whose_experts_are_looked_up_are_replaced_at_random_only(
    checkpoints, data, tmp_path: Path, monkeypatch, capsys
) -> None:
    study, report = inspected(monkeypatch, [checkpoints["deepseek_v4"]], data, tmp_path)
    words = [(test.kind, test.scope.words) for test in made_of(study)]
    assert words[:4] == [
        ("disabled", "layer 1"),
        ("disabled", "layer 2"),
        ("disabled", "all layers but layer 0"),
        ("replaced", "all layers"),
    ]
    said = "Experts are looked up by token in layer 0: only random replacement reaches there."
    assert said in report
    printed = " ".join(capsys.readouterr().out.split())
    assert said in printed
    assert "With each token's first expert disabled in all layers but layer 0 the loss changes by" in printed


def test_what_cannot_be_tested_says_why() -> None:
    model = tiny_models.build("deepseek_v3").model.eval()
    ids = some_ids()

    def loss_of(rerouted: AbstractContextManager[Any], words: str) -> float:
        with torch.no_grad(), rerouted:
            return float(model(input_ids=ids, labels=ids).loss)

    found = measure_robustness(model, moe_layers(model), 1.0, loss_of, count=2)
    lacking = [test for test in found.tests if test.obstacle]
    assert {(test.kind, test.amount) for test in lacking} == {("disabled", 2)}  # groups of four experts
    assert all(test.loss is test.rise is test.perplexity is None for test in lacking)
    (said,) = limits(found)
    assert said.startswith("Not tested: top-2 disabled (layer 1, ")
    assert "tokens fewer than top_k (3) experts" in said


def test_robustness_without_a_text_is_one_line(checkpoints, monkeypatch, capsys) -> None:
    assert moestro(monkeypatch, "inspect", str(checkpoints["mixtral"]), "--robustness") == 2
    printed = capsys.readouterr()
    assert printed.err == "moestro: --robustness needs a text to run the model on: name it with --data\n"
    assert printed.out == ""


def test_nobody_is_tested_who_did_not_ask(checkpoints, data, tmp_path: Path, monkeypatch) -> None:
    assert moestro(monkeypatch, "inspect", str(checkpoints["mixtral"]), *data, "--out", str(tmp_path)) == 0
    assert read_record(RoutingStudy, tmp_path / "routing.json").checkpoints[0].robustness is None
    assert "data-robustness" not in (tmp_path / "report.html").read_text()
