import gzip
import json
import logging
import math
import os
import re
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moestro.data import cache, standard_library
from moestro.data import prepare as prepare_data
from moestro.data.building import ALL
from moestro.data.cache import cached_folder, default_cache_dir, is_whole
from moestro.data.corpus import load_corpus
from moestro.data.packing import IGNORED
from moestro.data.preparation import PreparedData
from moestro.data.tokenizer import decode, train_tokenizer
from moestro.errors import Misuse

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture
def sources(tmp_path: Path) -> list[str]:
    """Two domains of 60 and 40 short documents."""
    for domain, count in (("law", 60), ("fiction", 40)):
        rows = ({"text": f"The {domain} of section {n} says {n * n} things, é.\n" * 3} for n in range(count))
        (tmp_path / f"{domain}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [f"{tmp_path}/law.jsonl", f"prose={tmp_path}/fiction.jsonl"]


@pytest.fixture
def prepare(tmp_path: Path) -> Callable[..., PreparedData]:
    def run(sources: list[str], **options) -> PreparedData:
        defaults = {"tokenizer": 300, "sequence_length": 16, "cache_dir": tmp_path / "cache"}
        return prepare_data(sources, **(defaults | options))

    return run


def test_rows_hold_the_text_of_the_corpus(prepare: Callable[..., PreparedData], sources: list[str]):
    data, corpus = prepare(sources), load_corpus(sources)
    stream = data.held_out.tokens.tolist()
    texts = [document.text for document in corpus.held_out]
    assert decode(data.tokenizer, stream) == "".join(f"<|endoftext|>{text}" for text in texts) + "<|endoftext|>"
    assert data.held_out_bytes.tolist() == [len(text.encode()) for text in texts]
    assert [data.domains[i] for i in data.held_out_domain] == [document.domain for document in corpus.held_out]
    row = data.train[3]["input_ids"]
    assert decode(data.tokenizer, row.tolist()).replace("<|endoftext|>", "")[:20] in "".join(
        document.text for document in corpus.train
    )


def test_description_counts_everything_and_is_json(prepare: Callable[..., PreparedData], sources: list[str]):
    data, corpus = prepare([*sources, sources[0]]), load_corpus(sources)
    assert json.loads(json.dumps(data.description)) == data.description
    assert data.description["sources"] == [*sources, sources[0]]
    assert data.description["duplicates_dropped"] == 60
    assert data.description["tokenizer"]["vocabulary"] == len(data.tokenizer)
    assert list(data.description["domains"]) == list(data.domains) == ["law", "prose"]
    for side, rows, documents in (("train", data.train, corpus.train), ("held_out", data.held_out, corpus.held_out)):
        counts = [data.description["domains"][domain][side] for domain in data.domains]
        assert sum(count["tokens"] for count in counts) == rows.num_tokens - 1
        for domain, count in zip(data.domains, counts, strict=True):
            own = [document.text.encode() for document in documents if document.domain == domain]
            assert (count["documents"], count["bytes"]) == (len(own), sum(map(len, own)))


def test_gzip_is_measured_on_the_held_out_text(prepare: Callable[..., PreparedData], sources: list[str]):
    data, corpus = prepare(sources), load_corpus(sources)
    text = "".join(document.text for document in corpus.held_out).encode()
    assert len(text) == data.held_out_bytes.sum()
    assert data.gzip_bits_per_byte.keys() == {"law", "prose", ALL}
    assert math.isclose(data.gzip_bits_per_byte[ALL], 8 * len(gzip.compress(text, 9)) / len(text))
    law = "".join(document.text for document in corpus.held_out if document.domain == "law").encode()
    assert math.isclose(data.gzip_bits_per_byte["law"], 8 * len(gzip.compress(law, 9)) / len(law))


def test_a_domain_may_be_named_all(prepare: Callable[..., PreparedData], sources: list[str]):
    named, other = prepare([f"all={sources[0]}", sources[1]]), prepare([f"law={sources[0]}", sources[1]])
    for name, same in (("all", "law"), ("prose", "prose"), (ALL, ALL)):
        assert named.gzip_bits_per_byte[name] == other.gzip_bits_per_byte[same]


def test_a_full_disk_is_an_os_error_with_the_folder(prepare: Callable[..., PreparedData], tmp_path: Path):
    """Short documents need more room in the index, which SQLite writes, than in the file of texts."""
    (tmp_path / "short.jsonl").write_text("\n".join(f'{{"text": "short {n}"}}' for n in range(4000)))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match=re.escape(str(tmp_path / "cache"))):
            prepare([f"{tmp_path}/short.jsonl"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert prepare([f"{tmp_path}/short.jsonl"]).train.num_tokens > 4000


def test_uniform_guessing_costs_what_bits_per_byte_say(prepare: Callable[..., PreparedData], sources: list[str]):
    data = prepare(sources)
    predicted = sum(int((row["labels"] != IGNORED).sum()) for row in data.held_out)
    nll = predicted * math.log(len(data.tokenizer))
    tokens = sum(domain["held_out"]["tokens"] for domain in data.description["domains"].values())
    bits_per_byte = nll / math.log(2) / data.held_out_bytes.sum()
    assert math.isclose(bits_per_byte, tokens * math.log2(len(data.tokenizer)) / data.held_out_bytes.sum())


def test_a_second_call_neither_trains_nor_tokenises(
    prepare: Callable[..., PreparedData], sources: list[str], monkeypatch: pytest.MonkeyPatch
):
    first = prepare(sources)
    monkeypatch.setattr("moestro.data.building._fill", pytest.fail)
    prepare(sources[::-1])  # in another order they are read again
    monkeypatch.setattr("moestro.data.preparation.load_corpus", pytest.fail)
    began = time.perf_counter()
    second = prepare(sources, sequence_length=8, block_diagonal=True)
    assert time.perf_counter() - began < 5
    assert (second.hash, second.domains) == (first.hash, first.domains)
    assert second.tokenizer.get_vocab() == first.tokenizer.get_vocab()
    assert np.array_equal(second.train.tokens, first.train.tokens)
    assert "position_ids" in second.held_out[0]


@pytest.mark.parametrize("change", [{"tokenizer": 301}, {"max_bytes": 2000}, {"held_out_fraction": 0.3}])
def test_whatever_changes_the_tokens_changes_the_hash(
    prepare: Callable[..., PreparedData], sources: list[str], change: dict
):
    assert prepare(sources, **change).hash != prepare(sources).hash


def test_a_tokenizer_of_transformers(prepare: Callable[..., PreparedData], sources: list[str], tmp_path: Path):
    train_tokenizer(["of section and things"] * 9, 270).save_pretrained(tmp_path / "theirs")
    data = prepare(sources, tokenizer=f"{tmp_path}/theirs")
    assert data.description["tokenizer"]["name"] == f"{tmp_path}/theirs"
    assert data.tokenizer.eos_token_id == data.train.tokens[0]
    assert decode(data.tokenizer, data.held_out[0]["input_ids"].tolist()).startswith("<|endoftext|>The ")


def test_a_tokenizer_that_cannot_encode_the_text(
    prepare: Callable[..., PreparedData], sources: list[str], tmp_path: Path
):
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1, "The": 2, "law": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="</s>")
    wrapped.save_pretrained(tmp_path / "words")
    with pytest.raises(Misuse, match="must be able to encode the text: 100% of a sample"):
        prepare(sources, tokenizer=f"{tmp_path}/words")
    assert not list((tmp_path / "cache" / "data").iterdir())


@pytest.mark.parametrize(("sequence_length", "side"), [(100_000, "train"), (400, "held-out")])
def test_less_text_than_one_sequence(
    prepare: Callable[..., PreparedData], sources: list[str], sequence_length: int, side: str
):
    message = rf"the {side} text must fill at least one sequence of {sequence_length} tokens, got \d+ from .*law.jsonl"
    with pytest.raises(Misuse, match=message):
        prepare(sources, sequence_length=sequence_length)


def test_a_single_short_text_has_no_held_out_side(
    prepare: Callable[..., PreparedData], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "short.txt").write_text("one two three four five six seven eight nine ten")
    with caplog.at_level(logging.WARNING), pytest.raises(Misuse, match=r"the held-out text must fill .* got 1 from"):
        prepare([f"{tmp_path}/short.txt"])
    with pytest.raises(Misuse, match="sequence_length must be at least 2, got 1"):
        prepare([f"{tmp_path}/short.txt"], sequence_length=1)


def test_the_default_corpus(prepare: Callable[..., PreparedData], monkeypatch: pytest.MonkeyPatch):
    documents = [
        standard_library.Document(text=f"def f{n}(): return {n}", domain="library", source=f"{n}.py:1")
        for n in range(99)
    ]
    monkeypatch.setattr("moestro.data.corpus.read_standard_library", lambda: (documents, ("tests",)))
    data = prepare([])
    assert data.domains == ("library",)
    assert data.description["missing_domains"] == ["tests"]
    assert data.description["sources"][0].startswith("standard library of ")


@pytest.mark.parametrize("name", ["train/tokens.npy", "held_out/starts.npy", "gzip.json", "tokenizer/tokenizer.json"])
@pytest.mark.parametrize("damage", [b"", None, b"flipped"])
def test_a_damaged_cache_is_built_again(
    prepare: Callable[..., PreparedData], sources: list[str], tmp_path: Path, name: str, damage: bytes | None
):
    tokens = np.array(prepare(sources).train.tokens)
    (path,) = (tmp_path / "cache" / "data").glob(f"*/{name}")
    if damage is None:
        path.unlink()
    elif damage:
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    else:
        path.write_bytes(damage)
    assert np.array_equal(prepare(sources).train.tokens, tokens)
    assert is_whole(next((tmp_path / "cache" / "data").iterdir()))


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("MOESTRO_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path
    monkeypatch.delenv("MOESTRO_CACHE")
    assert default_cache_dir() == Path.home() / ".cache" / "moestro"


def write_one_by_one(folder: Path) -> Iterator[None]:
    for name in ("a", "b"):
        (folder / name).write_text(name)
        yield


def write_all(folder: Path) -> None:
    list(write_one_by_one(folder))


def test_a_killed_build_leaves_nothing_that_counts(tmp_path: Path):
    def killed(folder: Path) -> None:
        next(write_one_by_one(folder))
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        cached_folder(tmp_path / "result", killed)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    (left_behind,) = tmp_path.iterdir()
    assert (left_behind / "content" / "a").exists()
    cached_folder(tmp_path / "another", write_all)  # what nobody works on any more goes at once
    assert sorted(path.name for path in tmp_path.iterdir()) == ["another"]
    cached_folder(tmp_path / "result", write_all)
    assert is_whole(tmp_path / "result")


@pytest.mark.parametrize("broken", [False, True])
def test_builders_at_the_same_time_wait_and_share(tmp_path: Path, broken: bool):
    folder = tmp_path / "result"
    if broken:
        folder.mkdir()
        (folder / "a").write_text("half")
    builds: list[Path] = []
    results: list[Path] = []

    def build(place: Path) -> None:
        builds.append(place)
        time.sleep(0.05)
        write_all(place)

    workers = [threading.Thread(target=lambda: results.append(cached_folder(folder, build))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert (len(builds), results) == (1, [folder] * 4)
    assert is_whole(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


def test_a_working_folder_that_another_builder_removes_is_made_again(tmp_path: Path, monkeypatch):
    """The holder removes its folder when it is done, perhaps just before the next one opens the lock within."""
    opened = os.open
    removed: list[Path] = []

    def open_late(path: Path, *arguments: int, **others: int) -> int:
        if not removed:
            removed.append(path.parent)
            shutil.rmtree(path.parent)
        return opened(path, *arguments, **others)

    monkeypatch.setattr(cache.os, "open", open_late)
    assert is_whole(cached_folder(tmp_path / "result", write_all))
    assert removed == [tmp_path / ".building-result"]


def test_a_lock_that_links_to_nowhere_is_one_line(tmp_path: Path):
    (tmp_path / ".building-result").mkdir()
    (tmp_path / ".building-result" / "lock").symlink_to(tmp_path / "nowhere" / "lock")
    with pytest.raises(Misuse, match=r"the cache folder .* must be writable"):
        cached_folder(tmp_path / "result", write_all)


def test_a_build_that_looks_old_is_left_alone(tmp_path: Path):
    """A clock that jumps, or a file system that keeps old times, must not cost a living build its files."""
    steps = write_one_by_one
    alone = threading.Event()

    def slow(place: Path) -> None:
        step = steps(place)
        next(step)
        for path in (place, place.parent, place / "a"):
            os.utime(path, (0, 0))
        cached_folder(tmp_path / "another", write_all)
        list(step)
        alone.set()

    cached_folder(tmp_path / "result", slow, expected=["a", "b"])
    assert alone.is_set()
    assert {path.name: is_whole(path) for path in tmp_path.iterdir()} == {"result": True, "another": True}
    assert (tmp_path / "result" / "a").read_text() == "a"


def test_a_build_that_lost_a_file_is_not_sealed(tmp_path: Path):
    def build(place: Path) -> None:
        write_all(place)
        (place / "a").unlink()

    with pytest.raises(Misuse, match="must be left alone while it is built: a in "):
        cached_folder(tmp_path / "result", build, expected=["a", "b"])
    assert list(tmp_path.iterdir()) == []


def test_a_failed_build_leaves_no_trace(tmp_path: Path):
    def fail(folder: Path) -> None:
        next(write_one_by_one(folder))
        raise Misuse("no")

    with pytest.raises(Misuse, match="no"):
        cached_folder(tmp_path / "result", fail)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Misuse, match=r"the cache folder .* must be writable"):
        cached_folder(tmp_path / "file" / "result", write_all)
    assert cache.CHECKSUMS not in os.listdir(tmp_path)


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the shared data sets lie beside a full checkout only")
def test_data_sets_of_other_people(prepare: Callable[..., PreparedData]):
    places = (
        "gsm8k/test.jsonl.gz::question+answer",
        "code_mbxp/mbpp*.gz::prompt+canonical_solution",
        "math_latex",
        "tinyshakespeare/input.txt.gz",
        "web_wiki_small/c4_demo.jsonl.gz",
    )
    data = prepare([f"{place.partition('/')[0]}={SHARED_DATA}/{place}" for place in places], max_bytes=50_000)
    assert data.domains == ("code_mbxp", "gsm8k", "math_latex", "tinyshakespeare", "web_wiki_small")
    for domain in data.description["domains"].values():
        assert domain["train"]["bytes"] == 50_000
        assert domain["held_out"]["documents"] >= 1
    assert all(1 < bits < 5 for bits in data.gzip_bits_per_byte.values())
