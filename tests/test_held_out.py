"""What a run measures on held-out text while it trains."""

import json
from pathlib import Path

import pytest

import moestro.training.held_out as held_out
from command_line import SMALL, moestro, sources, write_corpus
from moestro.training.resume import read_metrics


@pytest.fixture(scope="module")
def metrics(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("held_out")
    corpus = sources(write_corpus(folder / "corpus"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOESTRO_CACHE", str(folder / "cache"))
        arguments = ["smoe+compete", "--out", str(folder / "run"), *corpus, "--tokens", "1536", *SMALL]
        assert moestro(patch, "train", *arguments) == 0
    return read_metrics(folder / "run" / "metrics.jsonl")


def test_routers_beside_competition_are_measured_where_the_held_out_loss_is(metrics: list[dict]):
    points = [line for line in metrics if "held_out_loss" in line]
    assert len(points) > 2
    layers = [f"model.layers.{index}.feed_forward.0" for index in range(2)]
    for index, point in enumerate(points):
        names = [name for name in held_out.LOGGED if name != "changed" or index > 0]
        for name in names:
            by_layer = [point[f"competition/{layer}/{name}"] for layer in layers]
            assert point[f"competition/{name}"] == pytest.approx(sum(by_layer) / 2)
        assert 0 <= point["competition/agreement"] <= 1
    assert "competition/changed" not in points[0]
    assert points[1]["competition/changed"] > 0
    others = [line for line in metrics if "held_out_loss" not in line]
    assert all("competition/agreement" not in line for line in others)


def test_a_curve_keeps_what_is_read(metrics: list[dict], tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    curve = held_out.learning_curve(tmp_path / "metrics.jsonl")
    assert [point.step for point in curve] == [line["step"] for line in metrics]
    last = metrics[-1]
    assert curve[-1].competition["regret"] == last["competition/regret"]
    assert set(curve[-1].competition) == set(held_out.KEPT)
