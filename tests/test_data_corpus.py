import hashlib
import logging
import sys
import types
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moestro.data import standard_library
from moestro.data.corpus import Corpus, load_corpus, split_documents
from moestro.data.sources import Document
from moestro.data.spool import WINDOW
from moestro.errors import Misuse


def document(text: str, domain: str = "prose") -> Document:
    return Document(text=text, domain=domain, source=f"{domain}:{text[:9]}")


def numbered(count: int, domain: str = "prose") -> list[Document]:
    return [document(f"document {number} of {domain}\n", domain) for number in range(count)]


def contents(corpus: Corpus) -> tuple:
    return tuple(corpus.train), corpus.held_out, corpus.hash, corpus.left_out, corpus.leaked


def texts(documents: Iterable[Document], domain: str | None = None) -> list[str]:
    return [document.text for document in documents if domain in (None, document.domain)]


def num_bytes(documents: Iterable[Document]) -> int:
    return sum(len(document.text.encode()) for document in documents)


def test_about_the_wanted_share_is_held_out_and_nothing_is_lost():
    documents = numbered(2000)
    corpus = split_documents(documents, held_out_fraction=0.1)
    assert 150 < len(corpus.held_out) < 250
    assert sorted(texts(corpus.train) + texts(corpus.held_out)) == sorted(texts(tuple(documents)))


def test_a_documents_side_does_not_depend_on_the_other_documents():
    small, large = split_documents(numbered(100)), split_documents(numbered(200))
    assert set(texts(small.held_out)) == {text for text in texts(large.held_out) if int(text.split()[1]) < 100}


@given(st.permutations(numbered(30, "a") + numbered(25, "b")))
def test_the_order_of_reading_changes_nothing(documents: list[Document]):
    assert contents(split_documents(documents)) == contents(split_documents(numbered(25, "b") + numbered(30, "a")))


def test_domains_are_mixed_in_the_order_of_training():
    order = [document.domain for document in split_documents(numbered(300, "a") + numbered(300, "b")).train]
    changes = sum(one != other for one, other in pairwise(order))
    assert changes > len(order) / 3


@given(st.integers(1, 60), st.floats(0.001, 0.999))
def test_both_sides_of_a_domain_hold_something(count: int, fraction: float):
    corpus = split_documents(numbered(count) + numbered(30, "other"), held_out_fraction=fraction)
    assert texts(corpus.train, "prose")
    assert bool(texts(corpus.held_out, "prose")) == (count > 1)


def test_a_domain_without_held_out_text_is_said(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        corpus = split_documents([*numbered(1), *numbered(30, "other")])
    assert "domain prose is one short text" in caplog.text
    assert corpus.domains == ("other", "prose")


def test_duplicates_are_dropped_and_counted_over_all_domains():
    documents = numbered(40)
    copies = [document(other.text, "copies") for other in documents[:5]]
    corpus = split_documents([*documents, *documents[:7], *copies])
    assert corpus.duplicates == 12
    assert corpus.domains == ("prose",)
    assert corpus.hash == split_documents(documents).hash


@given(st.lists(st.text("ab \n", min_size=1, max_size=20).filter(str.strip), min_size=1, max_size=50))
def test_no_text_is_on_both_sides(lines: list[str]):
    corpus = split_documents([document(line) for line in lines])
    assert not set(texts(corpus.train)) & set(texts(corpus.held_out))


def test_one_long_text_is_cut_at_line_ends_and_split():
    lines = "".join(f"line {number} of a play without any separators\n" for number in range(30_000))
    corpus = split_documents([document(lines)])
    windows = [*texts(corpus.train), *texts(corpus.held_out)]
    assert sorted(line for window in windows for line in window.splitlines()) == sorted(lines.splitlines())
    assert all(window.endswith("\n") and len(window) <= WINDOW for window in windows)
    assert 0 < num_bytes(corpus.held_out) < 0.2 * len(lines)
    assert len({document.source for document in (*corpus.train, *corpus.held_out)}) == len(windows)


@pytest.mark.parametrize("separator", ["", " ", "\n", "✓", "\r\n\r\n"])
def test_windows_put_together_are_the_text(separator: str):
    text = separator.join(map(str, range(20_000)))
    corpus = split_documents([document(text)])
    windows = sorted(
        (*corpus.train, *corpus.held_out), key=lambda window: int(window.source.rpartition("[")[2].rstrip("]"))
    )
    assert 20 <= len(windows) <= 22
    assert "".join(window.text for window in windows) == text


def test_windows_of_white_space_are_dropped():
    corpus = split_documents([document("\n" * 30_000 + "the end")])
    assert "".join(texts(corpus.train)).strip() == "the end"
    assert len(list(corpus.train)) == 1


def test_windows_of_a_long_document_stay_on_its_side():
    novels = [document("".join(f"{n}: {line}\n" for line in range(20_000)), "novels") for n in range(40)]
    corpus = split_documents(novels, held_out_fraction=0.2, max_held_out_bytes=10**9)
    titles = [{window.text.split(":")[0] for window in side} for side in (corpus.train, corpus.held_out)]
    assert len(list(corpus.train)) > len(titles[0])
    assert len(titles[1]) > 1
    assert len(titles[0] | titles[1]) == 40
    assert not titles[0] & titles[1]


@given(st.integers(1, 3000), st.integers(1, 300))
def test_limits_hold_to_the_byte_and_never_move_a_document(max_bytes: int, max_held_out_bytes: int):
    documents = [document(f"{number}: é✓ " * 5) for number in range(60)]
    free = split_documents(documents)
    corpus = split_documents(documents, max_bytes=max_bytes, max_held_out_bytes=max_held_out_bytes)
    assert max_bytes - 3 < num_bytes(corpus.train) <= max_bytes or num_bytes(corpus.train) == num_bytes(free.train)
    assert num_bytes(corpus.held_out) <= max_held_out_bytes
    for limited, all_of_them in ((corpus.train, free.train), (corpus.held_out, free.held_out)):
        assert all(any(whole.startswith(text) for whole in texts(all_of_them)) for text in texts(limited))
    kept = num_bytes(corpus.train) + num_bytes(corpus.held_out)
    assert corpus.left_out == {"prose": num_bytes(free.train) + num_bytes(free.held_out) - kept}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"held_out_fraction": 0.0}, "held_out_fraction must lie between 0 and 1, got 0.0"),
        ({"held_out_fraction": 1.0}, "held_out_fraction must lie between 0 and 1, got 1.0"),
        ({"max_bytes": 0}, "max_bytes must be at least 1, got 0"),
        ({"max_held_out_bytes": -1}, "max_held_out_bytes must be at least 1, got -1"),
    ],
)
def test_impossible_options(options: dict, message: str):
    with pytest.raises(Misuse, match=message):
        split_documents(numbered(3), **options)


def test_the_hash_covers_text_domain_and_side():
    documents = numbered(50)
    base = split_documents(documents).hash
    assert base != split_documents(documents[1:]).hash
    assert base != split_documents([document(other.text, "verse") for other in documents]).hash
    assert base != split_documents(documents, held_out_fraction=0.5).hash


def test_sources_are_read_and_labelled(tmp_path: Path):
    (tmp_path / "a.txt").write_text("one text")
    (tmp_path / "b.jsonl").write_text('{"question": "q"}\n')
    corpus = load_corpus([f"prose={tmp_path}/a.txt", f"{tmp_path}/b.jsonl::question"])
    assert corpus.domains == ("b", "prose")
    assert texts(corpus.train, "b") == ["q"]


@pytest.fixture
def small_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An interpreter with a standard library of a few files."""
    for name, content in {
        "lib/abc.py": b"import this",
        "lib/json/decoder.py": b"decode = None",
        "lib/test/test_abc.py": b"test abc",
        "lib/tkinter/test/test_widgets.py": b"test widgets",
        "lib/idlelib/idle_test/test_run.py": b"test idle",
        "lib/test/bad_encoding.py": b"caf\xe9",
        "lib/site-packages/numpy/core.py": b"not ours",
        "lib/pydoc_data/topics.py": b"topics = ...",
        "lib/_sysconfigdata_linux.py": b"build_time_vars = {}",
        "lib/LICENSE.txt": b"licence",
        "include/Python.h": b"#define PYTHON",
        "include/cpython/dict.h": b"#define DICT",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    places = {"stdlib": str(tmp_path / "lib"), "include": str(tmp_path / "include")}
    monkeypatch.setattr(standard_library.sysconfig, "get_path", places.__getitem__)
    topics = types.SimpleNamespace(topics={"lambda": "An expression.", "assert": "A statement."})
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", topics)  # type: ignore[arg-type]
    return tmp_path


def test_domains_of_the_standard_library(small_library: Path):
    documents, missing = standard_library.read_standard_library()
    assert [(document.domain, document.source) for document in documents] == [
        ("library", "abc.py:1"),
        ("tests", "idlelib/idle_test/test_run.py:1"),
        ("library", "json/decoder.py:1"),
        ("tests", "test/test_abc.py:1"),
        ("tests", "tkinter/test/test_widgets.py:1"),
        ("documentation", "pydoc_data.topics:assert"),
        ("documentation", "pydoc_data.topics:lambda"),
        ("headers", "Python.h:1"),
        ("headers", "cpython/dict.h:1"),
    ]
    assert missing == ()


def test_missing_domains_are_said(small_library: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    for path in (small_library / "include", small_library / "lib" / "test", small_library / "lib" / "idlelib"):
        path.rename(small_library / f"gone-{path.name}")
    (small_library / "lib" / "tkinter" / "test" / "test_widgets.py").unlink()
    corpus = load_corpus()
    assert corpus.domains == ("library",)
    assert corpus.missing == ("tests", "documentation", "headers")


def test_this_interpreters_own_library_is_the_same_twice():
    first, second = load_corpus(max_bytes=50_000), load_corpus(max_bytes=50_000)
    assert isinstance(first, Corpus)
    assert contents(first) == contents(second)
    assert "library" in first.domains
    assert set(first.domains).isdisjoint(first.missing)
    digest = hashlib.sha256("".join(texts(first.train)).encode()).hexdigest()
    assert digest == hashlib.sha256("".join(texts(second.train)).encode()).hexdigest()
