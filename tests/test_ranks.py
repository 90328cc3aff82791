"""Two ranks on one run: one decides and writes, an error of one is an error of both, and both stop after one step."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from command_line import SMALL, sources, write_corpus

TRAIN = ["train", "smoe", "--tokens", "2048", *SMALL]
ASK_ONE_TO_STOP = """
import os, signal
import moestro.training.trainer as t
original = t.PretrainingTrainer.training_step
def step(self, *args, **kwargs):
    if self.state.global_step == 4 and os.environ["RANK"] == "1" and not self._task_loss:
        os.kill(os.getpid(), signal.SIGTERM)
    return original(self, *args, **kwargs)
t.PretrainingTrainer.training_step = step
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return sources(write_corpus(tmp_path_factory.mktemp("corpus")))


def on_two_ranks(*arguments: str, places: tuple[Path, Path], prelude: str = "") -> list[tuple[int, str]]:
    """`moestro ARGUMENTS` on two ranks, each in a folder of its own; exit codes and what they say."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    code = f"import sys; sys.argv = ['moestro', *{list(arguments)!r}]\n{prelude}\nfrom moestro.cli import main\nmain()"
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    shared |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MOESTRO_CACHE": str(places[0].parent / "cache")}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=place,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, place in enumerate(places)
    ]
    said = [process.communicate(timeout=300)[1] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


def errors(text: str) -> list[str]:
    assert "Traceback" not in text, text
    return [line for line in text.splitlines() if line.startswith("moestro: ")]


@pytest.mark.slow
def test_an_error_of_the_first_rank_ends_both_with_one_line(corpus: list[str], tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    ended = on_two_ranks(*TRAIN, *corpus, "--out", str(tmp_path / "run"), places=(tmp_path, tmp_path))
    assert [code for code, _ in ended] == [2, 2], ended
    assert ["must be empty or hold a run" in line for line in errors(ended[0][1])] == [True]
    assert errors(ended[1][1]) == []


@pytest.mark.slow
def test_ranks_without_a_shared_folder_are_refused(corpus: list[str], tmp_path: Path):
    """As on two machines that each have a disk of their own."""
    places = (tmp_path / "one", tmp_path / "two")
    for place in places:
        place.mkdir()
    ended = on_two_ranks(*TRAIN, *corpus, "--out", "run", places=places)
    assert [code for code, _ in ended] == [2, 2], ended
    assert errors(ended[0][1]) == []
    (line,) = errors(ended[1][1])
    assert "run must be one folder that all ranks share: rank 1 on " in line
    assert not (places[1] / "run").exists()
    assert [path.name for path in (places[0] / "run").iterdir()] == [".lock"]


@pytest.mark.slow
def test_one_rank_asked_to_stop_stops_both_after_the_same_step(corpus: list[str], tmp_path: Path):
    arguments = [*TRAIN, *corpus, "--out", str(tmp_path / "run")]
    ended = on_two_ranks(*arguments, places=(tmp_path, tmp_path), prelude=ASK_ONE_TO_STOP)
    assert [code for code, _ in ended] == [130, 130], ended
    assert ["stopped at step 5; the same command goes on" in line for line in errors(ended[0][1])] == [True]
    assert errors(ended[1][1]) == []
    ended = on_two_ranks(*arguments, places=(tmp_path, tmp_path))
    assert [code for code, _ in ended] == [0, 0], ended
    assert "checkpoint-5" in ended[0][1].replace("\n", "")
    assert ended[1][1].count("resuming") == 0
    assert (tmp_path / "run" / "summary.json").exists()


@pytest.mark.slow
def test_killed_anywhere_all_is_the_same(tmp_path: Path):
    """One kill of each kind; more of them: scripts/kill_runs.py --kills 50."""
    script = Path(__file__).parent.parent / "scripts" / "kill_runs.py"
    command = [sys.executable, str(script), "--kills", "1", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("the same") == 5
