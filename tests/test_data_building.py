"""Preparation of text of any size: what is read again, what a killed one goes on from, and how much memory it takes."""

import json
import os
import random
import signal
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from moestro.data import prepare
from moestro.data.corpus import split_documents
from moestro.data.inventory import inventory
from moestro.data.packing import PackedRows, StreamWriter
from moestro.data.preparation import PreparedData
from moestro.data.sources import Document
from moestro.data.spool import Spool, spooled


def write(path: Path, seed: int, count: int = 400) -> Path:
    draw = np.random.default_rng(seed)
    words = ["".join(draw.choice(list("etaoinshrdlu"), size=draw.integers(2, 9))) for _ in range(500)]
    rows = ({"text": " ".join(draw.choice(words, size=60))} for _ in range(count))
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def prepared(sources: list[Path], cache: Path, **options) -> PreparedData:
    return prepare(list(map(str, sources)), tokenizer=300, sequence_length=16, cache_dir=cache, **options)


def same(one: PreparedData, two: PreparedData) -> bool:
    sides = ((one.train, two.train), (one.held_out, two.held_out))
    return one.hash == two.hash and all(np.array_equal(a.tokens, b.tokens) for a, b in sides)


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sources that were read, as often as they were."""
    from moestro.data import corpus

    seen: list[str] = []
    original = corpus.read_source

    def read(spec: str, **options):
        seen.append(spec)
        return original(spec, **options)

    monkeypatch.setattr(corpus, "read_source", read)
    return seen


def test_unchanged_sources_are_not_read_again_and_changed_ones_are(tmp_path: Path, reading: list[str]):
    source = write(tmp_path / "a.jsonl", 1)
    first = prepared([source], tmp_path / "cache")
    assert same(first, prepared([source], tmp_path / "cache"))
    assert len(reading) == 1
    os.utime(source, (0, 0))  # another time, the same text
    assert same(first, prepared([source], tmp_path / "cache"))
    assert len(reading) == 2
    before = source.stat()
    source.write_text(source.read_text().replace("e", "a", 1))  # the same size
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert prepared([source], tmp_path / "cache").hash != first.hash
    assert len(reading) == 3


def test_what_an_inventory_notices(tmp_path: Path):
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "folder" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "folder")
    seen = [inventory([f"{tmp_path}/folder"], "x")]
    for path in ("folder/a.txt", "folder/inner/b.md", "elsewhere/c.py", "folder/d.unknown"):
        (tmp_path / path).write_text("text")
        seen.append(inventory([f"{tmp_path}/folder"], "x"))
    (tmp_path / "folder" / "a.txt").rename(tmp_path / "folder" / "e.txt")
    seen += [inventory([f"{tmp_path}/folder"], "x"), inventory([f"{tmp_path}/folder"], "y")]
    seen += [inventory([f"name={tmp_path}/folder"], "x"), inventory([f"{tmp_path}/*/inner"], "x"), inventory([], "x")]
    assert len(set(seen)) == len(seen)
    assert inventory([f"{tmp_path}/folder"], "x") == seen[5]
    assert inventory(["hf:somebody/something", f"{tmp_path}/folder"], "x") is None


def test_what_is_said_of_sources_follows_the_sources(tmp_path: Path):
    """The same text in the end, but other sources: the description must not be that of the others."""
    source = write(tmp_path / "a.jsonl", 1)
    once = prepared([source], tmp_path / "cache")
    for _ in range(2):  # read, and found again
        twice = prepared([source, source], tmp_path / "cache")
        assert (once.hash, once.description["duplicates_dropped"]) == (twice.hash, 0)
        assert twice.description["duplicates_dropped"] == 400


def killed(work: Callable[[], object]) -> None:
    """Run `work` in another process, which must not outlive it."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_preparation_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = write(tmp_path / "a.jsonl", 1)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setattr("moestro.data.building._BATCH", 10_000)
    flush = StreamWriter.flush

    def flush_and_die(self: StreamWriter) -> None:
        flush(self)
        if self.documents > 150:
            self._tokens.extend([1, 2, 3])  # a part of the next batch
            die()

    with monkeypatch.context() as patch:
        patch.setattr(StreamWriter, "flush", flush_and_die)
        killed(lambda: prepared([source], tmp_path / "cache"))
    (left,) = (tmp_path / "cache" / "data").iterdir()
    assert json.loads(next(left.glob("content-*/train/written.json")).read_text())["documents"] > 150
    with monkeypatch.context() as patch:
        patch.setattr("moestro.data.building.train_tokenizer", pytest.fail)
        patch.setattr("moestro.data.spool.Spool.add", pytest.fail)
        resumed = prepared([source], tmp_path / "cache")
    assert same(resumed, prepared([source], tmp_path / "another"))
    assert [path.name for path in (tmp_path / "cache" / "data").iterdir()] == [resumed.hash[:32]]


def test_a_killed_reading_begins_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = write(tmp_path / "a.jsonl", 1)
    with monkeypatch.context() as patch:
        patch.setattr(Spool, "finish", die)
        killed(lambda: prepared([source], tmp_path / "cache"))
    assert same(prepared([source], tmp_path / "cache"), prepared([source], tmp_path / "another"))


def test_a_stream_written_in_pieces_is_the_stream(tmp_path: Path):
    documents = [np.arange(n, dtype=np.uint32) + 70_000 for n in (3, 1, 0, 5)]
    for name, flushes in (("whole", ()), ("pieces", (0, 1, 3))):
        writer = StreamWriter(tmp_path / name, end_of_text=9, vocabulary=80_000)
        for number, tokens in enumerate(documents):
            writer.append(tokens, number, 10 * number)
            if number in flushes:
                writer.flush()
                writer = StreamWriter(tmp_path / name, end_of_text=9, vocabulary=80_000)
        writer.finish()
    whole, pieces = (PackedRows(tmp_path / name, 4) for name in ("whole", "pieces"))
    expected = [9] + [token for each in documents for token in (*each.tolist(), 9)]
    assert whole.tokens.tolist() == pieces.tokens.tolist() == expected
    assert whole.document_starts.tolist() == pieces.document_starts.tolist() == [1, 5, 7, 8]
    assert pieces.document_domain.tolist() == [0, 1, 2, 3]
    assert pieces.document_bytes.tolist() == [0, 10, 20, 30]


def hex_documents(count: int) -> Iterator[Document]:
    """Documents of 32 kB."""
    for n in range(count):
        yield Document(text=random.Random(n).randbytes(16_000).hex(), domain="hex", source=str(n))


def peak(work: Callable[[], object]) -> int:
    """The most that Python and numpy had allocated at once."""
    tracemalloc.start()
    work()
    size = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return size


def test_memory_of_reading_does_not_grow_with_the_text():
    small, large = (peak(lambda: spooled(hex_documents(count))) for count in (20, 320))  # noqa: B023
    assert large - small < 10**6 < 320 * 32_000


@pytest.mark.parametrize("max_bytes", [None, 100_000])
def test_memory_of_splitting_does_not_grow_with_the_text(max_bytes: int | None):
    def split(count: int) -> None:
        corpus = split_documents(hex_documents(count), max_bytes=max_bytes, max_held_out_bytes=20_000)
        assert sum(1 for _ in corpus.train) > 2

    small, large = (peak(lambda: split(count)) for count in (60, 180))  # noqa: B023
    assert large - small < 10**6
