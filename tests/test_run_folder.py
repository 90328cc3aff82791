"""The folder of a run: one owner, an identity first, and a finish that is the same the first time and again."""

import fcntl
import json
import re
import resource
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE

import moestro.training.memory as memory
import moestro.training.train as training
from command_line import moestro
from moestro import Misuse
from moestro.gate.writing import failures_as_os_errors
from moestro.training.finish import read_losses
from moestro.training.held_out import learning_curve
from moestro.training.resume import keep_metrics_until
from moestro.training.runs import check_folder
from run_folder import STEPS, assert_same_run, endings, finished_run, unfinished_copy

pytestmark = pytest.mark.xdist_group("run_folder")  # they share the finished run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    return finished_run(tmp_path_factory.mktemp("finished"))


@pytest.fixture(autouse=True)
def _cache(finished: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESTRO_CACHE", str(finished[0].parent / "cache"))


def again(monkeypatch: pytest.MonkeyPatch, arguments: list[str], folder: Path) -> int:
    return moestro(monkeypatch, *arguments, "--out", str(folder))


def one_line(capsys: pytest.CaptureFixture) -> str:
    """The error, which is the last line and the only one of `moestro: `."""
    output = capsys.readouterr()
    lines = output.err.splitlines()
    assert "Traceback" not in output.err
    assert sum(line.startswith("moestro: ") for line in lines) == 1
    assert lines[-1].startswith("moestro: ")
    assert output.out == ""
    return lines[-1]


def test_killed_in_the_last_evaluation_trains_no_step_more(finished, tmp_path, monkeypatch, capsys):
    run, arguments = finished
    folder = unfinished_copy(run, tmp_path / "run")
    assert again(monkeypatch, arguments, folder) == 0
    assert f"resuming from {folder}/checkpoint-{STEPS}" in capsys.readouterr().err.replace("\n", "")
    assert_same_run(folder, run)
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["steps"], summary["tokens"]) == (STEPS, STEPS * 128)
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in run.iterdir())


@pytest.mark.parametrize("left", ["half a model", "a model beside its place", "losses cut short"])
def test_killed_while_results_are_written_finishes_again(left, finished, tmp_path, monkeypatch):
    run, arguments = finished
    folder = unfinished_copy(run, tmp_path / "run")
    if left == "half a model":
        weights = folder / "model" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        (folder / "model" / "model-00001-of-00002.safetensors").write_bytes(b"from elsewhere")
    elif left == "a model beside its place":
        (folder / "model").rename(folder / "model.part")
        (folder / "model.part" / "config.json").unlink()
    else:
        losses = folder / "held_out.npz"
        losses.write_bytes(losses.read_bytes()[:40])
    assert again(monkeypatch, arguments, folder) == 0
    assert_same_run(folder, run)
    assert {path.name for path in folder.iterdir()} == {path.name for path in run.iterdir()}
    assert {path.name for path in (folder / "model").iterdir()} == {path.name for path in (run / "model").iterdir()}


def test_ctrl_c_in_the_last_evaluation_loses_nothing(finished, tmp_path, monkeypatch, capsys):
    run, arguments = finished
    folder = unfinished_copy(run, tmp_path / "run")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        endings(patch)
        patch.setattr(training, "held_out_evaluation", interrupted)
        assert again(patch, arguments, folder) == 130
    assert "the same command goes on" in one_line(capsys)
    assert again(monkeypatch, arguments, folder) == 0
    assert_same_run(folder, run)


def test_a_checkpoint_from_beyond_the_last_step_is_refused(finished, tmp_path, monkeypatch, capsys):
    run, arguments = finished
    folder = unfinished_copy(run, tmp_path / "run")
    shutil.copytree(folder / f"checkpoint-{STEPS}", folder / f"checkpoint-{STEPS + 1}")
    assert again(monkeypatch, arguments, folder) == 2
    assert f"a run of {STEPS} steps must have no checkpoint beyond step {STEPS}" in one_line(capsys)


def test_a_checkpoint_under_another_name_is_refused(finished, tmp_path, monkeypatch, capsys):
    run, arguments = finished
    folder = unfinished_copy(run, tmp_path / "run")
    shutil.rmtree(folder / f"checkpoint-{STEPS}")
    (folder / f"checkpoint-{STEPS - 2}").rename(folder / f"checkpoint-{STEPS}")
    assert again(monkeypatch, arguments, folder) == 2
    assert f"must hold the state of step {STEPS}, got step {STEPS - 2}" in one_line(capsys)


def test_unfinished_checkpoints_go(finished, tmp_path, monkeypatch, capsys):
    """Else they count among those that are kept, and what they left is marked with what is written there again."""
    run, arguments = finished
    folder = unfinished_copy(run, tmp_path / "run")
    last = folder / f"checkpoint-{STEPS}"
    (last / "complete.json").rename(last / "complete.json.part")
    (last / "rng_state_1.pth").write_bytes(b"of a second rank")
    assert again(monkeypatch, arguments, folder) == 0
    assert "was never finished" in capsys.readouterr().err
    assert_same_run(folder, run)
    names = [{path.name for path in (place / last.name).iterdir()} for place in (folder, run)]
    assert names[0] == names[1]


def test_killed_in_its_first_moments_a_run_starts_again(finished, tmp_path, monkeypatch):
    run, arguments = finished
    folder = tmp_path / "run"
    folder.mkdir()
    for name in (".lock", "run.json.part"):
        (folder / name).write_text('{"recipe"')
    assert again(monkeypatch, arguments, folder) == 0
    assert_same_run(folder, run)


@pytest.mark.parametrize("name", ["environment.json", "environment.json.part", ".lock", "run.json.part"])
def test_what_a_start_leaves_is_no_other_run(name, tmp_path):
    (tmp_path / name).write_text("{")
    check_folder(tmp_path)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(Misuse, match=r"has files but no run\.json"):
        check_folder(tmp_path)


def test_a_run_has_its_identity_before_anything_else(finished, tmp_path, monkeypatch):
    _, arguments = finished
    folder = tmp_path / "run"

    def check() -> dict[str, str]:
        assert (folder / "run.json").exists()
        raise KeyboardInterrupt

    endings(monkeypatch)
    monkeypatch.setattr("moestro.training.runs.environment", check)
    assert again(monkeypatch, arguments, folder) == 130


def test_a_second_process_on_a_run_is_refused(finished, tmp_path, monkeypatch, capsys):
    run, arguments = finished
    folder = unfinished_copy(run, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with (folder / ".lock").open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as another process does
        assert again(monkeypatch, arguments, folder) == 2
    assert f"{folder} is in use by another process (process " in one_line(capsys)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert again(monkeypatch, arguments, folder) == 0


def test_a_second_process_on_a_comparison_is_refused(finished, tmp_path, monkeypatch, capsys):
    arguments = ["compare", "smoe", *finished[1][2:], "--seeds", "1", "--out", str(tmp_path)]
    with (tmp_path / ".lock").open("w+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert moestro(monkeypatch, *arguments) == 2
    assert f"{tmp_path} is in use by another process" in one_line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("run.json", b"{", "run.json must hold the description of a run, and is damaged"),
        ("run.json", b'{"recipe": []}', "run.json must hold the description of a run, and is damaged"),
        ("run.json", b"\xff\x00", "run.json must hold the description of a run, and is damaged"),
        ("summary.json", b'{"seed": 0', "summary.json must hold JSON"),
        pytest.param("summary.json", b'{"seed": ' + b"9" * 5000 + b"}", "summary.json must hold JSON", id="digits"),
        pytest.param("summary.json", b"[" * 100_000, "summary.json must hold JSON", id="deep"),
        ("summary.json", b"[]", "summary.json to write it anew from the last checkpoint"),
        ("model/config.json", b"{}", "is corrupt: config.json must have"),
        ("model/complete.json", b"", "is corrupt: complete.json cannot be read"),
        ("model/model.safetensors", None, "is corrupt: model.safetensors is missing"),
    ],
)
def test_a_damaged_finished_run_is_one_line(name, content, message, finished, tmp_path, monkeypatch, capsys):
    run, arguments = finished
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    assert again(monkeypatch, arguments, folder) == 2
    assert message in one_line(capsys)


def test_a_damaged_archive_of_arrays_is_one_line(tmp_path):
    """A compression that nobody has, and encryption: zipfile has an error type of its own for each."""
    np.savez(tmp_path / "held_out.npz", nll=np.ones(3), tokens=np.ones(3))
    content = (tmp_path / "held_out.npz").read_bytes()
    entry = content.index(b"PK\x01\x02")
    for place, value in ((entry + 10, 99), (entry + 8, 1), (entry + 6, 255)):
        (tmp_path / "held_out.npz").write_bytes(content[:place] + bytes([value]) + content[place + 1 :])
        with pytest.raises(Misuse, match=r"held_out\.npz must hold the losses of a finished run"):
            read_losses(tmp_path)


@pytest.mark.parametrize("line", ['{"step": "3", "tokens": 1, "loss": 1}', '{"step": 3, "tokens": "1", "loss": "2"}'])
def test_words_where_metrics_have_numbers_are_no_point(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "tokens": 8, "loss": 2.5}}\n{line}\n')
    assert [point.step for point in learning_curve(path)] == [1]
    assert keep_metrics_until(path, 9) == {1}


def test_a_library_that_cannot_write_is_an_os_error(tmp_path):
    def sqlite() -> None:
        with sqlite3.connect("/dev/full") as connection:
            connection.execute("create table a (b)")

    for write in (sqlite, lambda: Tokenizer(BPE()).save("/dev/full")):
        with pytest.raises(OSError, match=re.escape(str(tmp_path))), failures_as_os_errors(tmp_path):
            write()
    with pytest.raises(ZeroDivisionError), failures_as_os_errors(tmp_path):
        print(1 / 0)


def test_inspect_notices_damaged_weights(finished, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    weights = folder / "model" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert moestro(monkeypatch, "inspect", str(folder)) == 2
    assert "the contents of model.safetensors have changed" in one_line(capsys)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model.safetensors": 3}', '{"../a.safetensors": [1, "b"]}'])
def test_a_damaged_marker_is_one_line(content, finished, tmp_path, monkeypatch, capsys):
    run, arguments = finished
    folder = unfinished_copy(run, tmp_path / "run")
    (folder / f"checkpoint-{STEPS}" / "complete.json").write_text(content)
    assert again(monkeypatch, arguments, folder) == 2
    assert f"checkpoint-{STEPS} is corrupt: complete.json cannot be read" in one_line(capsys)


def test_lost_metrics_and_choices_are_said(finished, tmp_path, monkeypatch, capsys, caplog):
    run, arguments = finished
    folder = unfinished_copy(run, tmp_path / "run")
    shutil.rmtree(folder / f"checkpoint-{STEPS}")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[1] = lines[1][:20]
    lines[2] = lines[2].replace('"loss": ', '"loss": "')
    lines[3] = "[]"
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    for path in (folder / "choices").glob(f"{STEPS - 2}-*.npz"):
        path.write_bytes(path.read_bytes()[:50])
    assert again(monkeypatch, arguments, folder) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert (
        f"has lost 3 of the {STEPS - 2} points before step {STEPS - 2}: the learning curve will be incomplete" in said
    )
    assert f"choices changed at step {STEPS - 1} is unknown" in caplog.text
    curve = json.loads((folder / "summary.json").read_text())["curve"]
    assert [point["step"] for point in curve] == [1, 5, 6, 7, 8]
    assert ["changed" in point["competition"] for point in curve[-2:]] == [False, True]


@pytest.mark.parametrize("kind", ["a file", "below a file", "a link loop", "too long"])
def test_an_out_that_is_no_folder_is_one_line(kind, finished, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    places = {"a file": "file", "below a file": "file/run", "a link loop": "loop", "too long": "x" * 300}
    for command in (finished[1], ["compare", *finished[1][1:]]):
        assert again(monkeypatch, command, tmp_path / places[kind]) == 2
        one_line(capsys)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_is_one_line_and_loses_nothing(finished, tmp_path, monkeypatch, capsys):
    """The largest size of a file stands for a full disk: safetensors and torch each raise errors of their own."""
    run, arguments = finished
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (20_000, 100_000):  # too little for the weights; too little for the optimiser's state
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            assert again(monkeypatch, arguments, tmp_path / "run") == 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert f"{tmp_path / 'run'}/checkpoint-2" in one_line(capsys)
    assert again(monkeypatch, arguments, tmp_path / "run") == 0
    assert_same_run(tmp_path / "run", run)


def test_a_folder_that_is_deleted_meanwhile_is_one_line(finished, tmp_path, monkeypatch, capsys):
    run, arguments = finished
    folder = unfinished_copy(run, tmp_path / "run")
    evaluate = training.held_out_evaluation

    def deleted(*arguments: object) -> object:
        shutil.rmtree(folder)
        return evaluate(*arguments)

    monkeypatch.setattr(training, "held_out_evaluation", deleted)
    assert again(monkeypatch, arguments, folder) == 1
    assert f"No such file or directory: {folder}" in one_line(capsys)


def test_memory_is_unknown_where_the_system_hides_it(finished, tmp_path, monkeypatch):
    """As in hardened containers."""
    run, arguments = finished
    folder = unfinished_copy(run, tmp_path / "run")
    monkeypatch.setattr(memory, "FORGET", tmp_path / "nowhere" / "clear_refs")
    monkeypatch.setattr(memory, "STATUS", tmp_path / "nowhere" / "status")
    assert memory.peak_memory_bytes() is None
    (tmp_path / "status").write_text("VmRSS: 3 kB\n")
    monkeypatch.setattr(memory, "STATUS", tmp_path / "status")
    assert memory.peak_memory_bytes() is None
    assert again(monkeypatch, arguments, folder) == 0
    assert json.loads((folder / "summary.json").read_text())["peak_memory_bytes"] is None
