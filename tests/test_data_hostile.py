"""Files that expand without end, and encodings that are none."""

import gzip
import json
import tracemalloc
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moestro.data.compression import MEBIBYTE
from moestro.data.files import read_text
from moestro.data.sources import read_source
from moestro.errors import Misuse

MEBI = b"a" * MEBIBYTE
TIMES = 24
EXPANDS = r"must expand to at most 100 times its size \(or 1 MiB\), got more than"


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A 64th of the limits, so that the tests are fast."""
    monkeypatch.setattr("moestro.data.compression.FREE_EXPANSION", MEBIBYTE)
    monkeypatch.setattr("moestro.data.plain_text.LONGEST_PART", MEBIBYTE)
    for module in ("json_rows", "tables", "rows"):
        monkeypatch.setattr(f"moestro.data.{module}.LONGEST_ROW", MEBIBYTE // 2)


def packed(path: Path, pieces: Iterable[bytes]) -> Path:
    if path.suffix == ".zst":
        with pa.CompressedOutputStream(str(path), "zstd") as stream:
            for piece in pieces:
                stream.write(piece)
    else:
        with gzip.open(path, "wb", compresslevel=1) as file:
            file.writelines(pieces)
    return path


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize(
    ("name", "pieces", "message"),
    [
        ("a.txt.gz", [MEBI] * TIMES, EXPANDS),
        ("a.txt.zst", [MEBI] * TIMES, EXPANDS),
        ("a.py.gz", [b"#" * MEBIBYTE] * TIMES, EXPANDS),
        ("blank.jsonl.gz", [b"\n" * 20_000], EXPANDS),
        ("rows.json.gz", [b"[", b"{}," * 20_000], EXPANDS),
        ("blank.csv.gz", [b"text\n", b"\n" * 20_000], EXPANDS),
        ("row.jsonl.gz", [b'{"text": "', *[MEBI] * TIMES], "a JSON object of at most 524,288 characters"),
        ("array.json.gz", [b'[{"text": "', *[MEBI] * TIMES], "must be a JSON object"),
        ("row.csv.gz", [b"text\n", *[MEBI] * TIMES], "a row of at most 524,288 characters"),
        ("quote.csv.gz", [b'text\n"', *[(b"a" * 1023 + b"\n") * 1024] * TIMES], "field larger than field limit"),
    ],
)
def test_a_small_file_that_expands_is_refused_in_bounded_memory(
    tmp_path: Path, name: str, pieces: list[bytes], message: str
):
    path = packed(tmp_path / name, pieces)
    tracemalloc.start()
    with pytest.raises(Misuse, match=message) as caught:
        for _ in read_source(str(path)):
            pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert name in str(caught.value)
    assert peak < 32 * MEBIBYTE


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize("with_schema", [True, False])
def test_parquet_of_one_value_many_times_is_refused(tmp_path: Path, with_schema: bool):
    value = pa.array(["x" * 400_000])
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 5000, pa.int32()), value)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": column}), path, dictionary_pagesize_limit=2**30, store_schema=with_schema)
    before = pa.total_allocated_bytes()
    allocated = []
    with pytest.raises(Misuse, match=EXPANDS):
        allocated.extend(pa.total_allocated_bytes() for _ in read_source(str(path)))
    assert max(allocated) - before < 16 * MEBIBYTE


@pytest.mark.usefixtures("small_limits")
def test_parquet_that_compresses_too_well_and_arrow_of_endless_nothing_are_refused(tmp_path: Path):
    pq.write_table(pa.table({"text": ["x" * 8_000_000]}), tmp_path / "a.parquet", compression="zstd")
    with pytest.raises(Misuse, match=EXPANDS):
        list(read_source(f"{tmp_path}/a.parquet"))
    with pa.ipc.new_stream(tmp_path / "a.arrow", pa.schema([("text", pa.null())])) as writer:
        writer.write_batch(pa.record_batch({"text": pa.nulls(2**20)}))
    with pytest.raises(Misuse, match=EXPANDS):
        list(read_source(f"{tmp_path}/a.arrow"))


@pytest.mark.usefixtures("small_limits")
def test_what_compresses_well_but_is_small_is_read(tmp_path: Path):
    path = packed(tmp_path / "a.txt.gz", [b"a" * 900_000])
    assert len(read_text(path)) == 900_000


@pytest.mark.usefixtures("small_limits")
def test_a_long_file_of_text_is_read_in_parts_that_lose_nothing(tmp_path: Path):
    text = "".join(f"Line {i} ✓\n" for i in range(MEBIBYTE // 14))
    text += "x" * (MEBIBYTE + 5)
    (tmp_path / "a.txt").write_text(text)
    parts = [document.text for document in read_source(f"{tmp_path}/a.txt")]
    assert len(parts) == 3
    assert "".join(parts) == text == read_text(tmp_path / "a.txt")
    assert parts[0].endswith("✓\n")


NO_TEXT_ENCODINGS = ["rot13", "hex", "base64", "bz2", "uu", "zlib", "quopri", "punycode", "undefined"]
NO_TEXT_ENCODINGS += ["unicode_escape", "utf-7", "utf-16", "utf-32", "cp037", "klingon"]


@pytest.mark.parametrize("encoding", NO_TEXT_ENCODINGS)
def test_python_in_no_encoding_for_code_is_skipped_and_counted_or_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, encoding: str
):
    (tmp_path / "odd.py").write_text(f"# coding: {encoding}\nname = 'a-b'\n")
    (tmp_path / "plain.py").write_text("name = 'plain'\n" * 9)
    assert [document.text for document in read_source(str(tmp_path))] == ["name = 'plain'\n" * 9]
    assert "files that are not text (1)" in caplog.text
    with pytest.raises(Misuse, match=r"odd\.py") as caught:
        list(read_source(f"{tmp_path}/odd.py"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["latin-1", "koi8-r", "shift_jis", "euc_jp", "gbk", "cp1252", "utf-8", "ascii"])
def test_encodings_of_code_are_kept(tmp_path: Path, encoding: str):
    text = f"# coding: {encoding}\nname = 'a-b~{{}}\\n'\n"
    (tmp_path / "a.py").write_bytes(text.encode(encoding))
    assert read_text(tmp_path / "a.py") == text


def bad_parquet(path: Path) -> None:
    values = pa.array([b"caf\xe9", b"fine"], pa.binary()).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"text": values}), path)


def bad_arrow(path: Path) -> None:
    table = pa.table({"text": pa.array([b"caf\xe9", b"fine"], pa.binary()).cast(pa.string(), safe=False)})
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.csv", "a.tsv", "a.jsonl", "a.json", "a.txt"])
def test_bytes_that_are_not_utf8_are_skipped_and_counted_or_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
):
    path = tmp_path / "in" / name
    path.parent.mkdir()
    if path.suffix == ".parquet":
        bad_parquet(path)
    elif path.suffix == ".arrow":
        bad_arrow(path)
    else:
        path.write_bytes(b'{"text": "caf\xe9"}\n' if path.suffix.startswith(".json") else b"text\ncaf\xe9\n")
    with pytest.raises(Misuse, match=f"{name} is not text in UTF-8"):
        list(read_source(str(path)))
    (path.parent / "b.jsonl").write_text(json.dumps({"text": "good " * 500}))
    assert [document.text for document in read_source(str(path.parent))] == ["good " * 500]
    assert "files that are not text (1)" in caplog.text
