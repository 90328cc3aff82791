"""Rows in every format and compression are the same rows."""

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moestro.data.sources import read_source
from moestro.errors import Misuse


def arrow_compressed(codec: str) -> Callable[[bytes], bytes]:
    def compress(data: bytes) -> bytes:
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, codec) as stream:
            stream.write(data)
        return sink.getvalue().to_pybytes()

    return compress


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".lzma": lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE),
    ".zst": arrow_compressed("zstd"),
    ".lz4": arrow_compressed("lz4"),
}


def json_lines(rows: list[str], end: str = "\n") -> bytes:
    return "".join(json.dumps({"text": row}) + end for row in rows).encode()


def as_csv(rows: list[str]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([["text", "n"], *([row, str(number)] for number, row in enumerate(rows))])
    return text.getvalue().encode()


def table_of(rows: list[str]) -> pa.Table:
    return pa.table({"text": pa.array(rows, pa.string()), "n": list(range(len(rows)))})


def as_parquet(rows: list[str]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table_of(rows), sink, row_group_size=2)
    return sink.getvalue()


def as_stream(rows: list[str]) -> bytes:
    sink = io.BytesIO()
    table = table_of(rows)
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return sink.getvalue()


def as_feather(rows: list[str]) -> bytes:
    sink = io.BytesIO()
    pyarrow.feather.write_feather(table_of(rows), sink)
    return sink.getvalue()


FORMATS: dict[str, Callable[[list[str]], bytes]] = {
    "a.jsonl": json_lines,
    "a.ndjson": json_lines,
    "a.jsonlines": lambda rows: json_lines(rows, "\r\n"),
    "a.jl": lambda rows: b"\xef\xbb\xbf" + json_lines(rows),
    "b.jsonl": lambda rows: json_lines(rows).decode().encode("utf-16"),
    "c.jsonl": lambda rows: json.dumps([{"text": row} for row in rows]).encode(),
    "d.jsonl": lambda rows: "\n".join(json.dumps({"text": row}, indent=1) for row in rows).encode(),
    "a.json": lambda rows: json.dumps([{"text": row} for row in rows], indent=2).encode(),
    "b.json": json_lines,
    "a.txt": json_lines,
    "lines": json_lines,
    "a.csv": as_csv,
    "a.parquet": as_parquet,
    "a.pq": as_parquet,
    "a.arrow": as_stream,
    "b.arrow": as_feather,
    "a.feather": as_feather,
}


def texts(spec: object) -> list[str]:
    return [document.text for document in read_source(str(spec))]


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r")), min_size=1),
    data=st.data(),
)
def test_drawn_rows_are_the_same_in_every_format_and_compression(tmp_path: Path, rows: list[str], data: st.DataObject):
    rows = ["one row with text", *rows]
    expected = [row for row in rows if row.strip()]
    for name, write in FORMATS.items():
        ending = data.draw(st.sampled_from(sorted(COMPRESSIONS)))
        path = tmp_path / f"{name}{ending}"
        path.write_bytes(COMPRESSIONS[ending](write(rows)))
        assert texts(path) == expected, path.name


@pytest.mark.parametrize("ending", COMPRESSIONS)
def test_every_compression_is_read_in_a_folder_by_name_and_under_a_wrong_ending(tmp_path: Path, ending: str):
    packed = COMPRESSIONS[ending](json_lines([f"row {i}" for i in range(50)]))
    (tmp_path / f"a.jsonl{ending}").write_bytes(packed)
    assert len(texts(tmp_path / f"a.jsonl{ending}")) == len(texts(tmp_path)) == 50
    if ending != ".lzma":  # has no first bytes of its own
        (tmp_path / "wrong.jsonl").write_bytes(packed)
        assert len(texts(tmp_path / "wrong.jsonl")) == 50


def test_several_compressed_parts_in_one_file_are_all_read(tmp_path: Path):
    for ending in (".gz", ".bz2", ".xz", ".zst"):
        compress = COMPRESSIONS[ending]
        path = tmp_path / f"a.jsonl{ending}"
        path.write_bytes(compress(json_lines(["one"])) + compress(json_lines(["two"])))
        assert texts(path) == ["one", "two"]


@pytest.mark.parametrize("ending", [ending for ending in COMPRESSIONS if ending])
def test_a_truncated_file_is_one_line(tmp_path: Path, ending: str):
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(COMPRESSIONS[ending](json_lines([f"{i * i}" for i in range(500)]))[:-30])
    with pytest.raises(Misuse, match=r"cannot be read|must be a JSON object") as caught:
        texts(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tgz", "a.tar.gz", "a.tar.zst", "a.7z"])
def test_archives_are_refused_by_name_and_counted_in_a_folder(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(Misuse, match="is an archive: unpack it"):
        texts(tmp_path / name)
    (tmp_path / "a.txt").write_text("text")
    assert texts(tmp_path) == ["text"]


def test_text_that_is_no_json_stays_text(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for number, text in enumerate(["{curly} start", '{"a": 1}\nand prose', "[1, 2]", "{", '"text"', "1"]):
        path = tmp_path / f"{number}.txt"
        path.write_text(text)
        assert texts(path) == [text]
    assert not caplog.records
    (tmp_path / "lines.txt").write_text('{"text": "a"}\n{"text": "b"}\n')
    assert texts(tmp_path / "lines.txt") == ["a", "b"]
    assert "lines.txt holds JSON lines: each is read as a row" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"}, {"text": "b"}', "the array is not closed"),
        ('[{"text": "a"} {"text": "b"}]', "a comma is missing"),
        ('[{"text": "a"}] {"text": "b"}', "something follows the array"),
        ('{"text": "a"}\n{"text": "b"', r"a.json:2 must be a JSON object, got '\{\"text\": \"b\"'"),
        ('{"text":\n "a"}\n{"text": \n', "a.json:2 must be a JSON object"),
        ('{"text": "a"}\n["b"]\n', "a.json:2 must be a JSON object, got list"),
        ('{"text": "a", "x": ' + "[" * 100_000, "a.json:1 must be a JSON object"),
        ('{"text": "a", "x": ' + "1" * 10_000 + "}", "a.json:1 must be a JSON object"),
    ],
)
def test_broken_json_is_one_line_with_its_place(tmp_path: Path, content: str, message: str):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(Misuse, match=message) as caught:
        texts(tmp_path / "a.json")
    assert "\n" not in str(caught.value)


def test_a_long_array_is_streamed(tmp_path: Path):
    """Objects that stand across the ends of the window that slides over the file."""
    rows = [f"{i}:" + "x" * (i * 37 % 5000) for i in range(2000)]
    (tmp_path / "a.json").write_text(json.dumps([{"text": row} for row in rows]))
    assert texts(tmp_path / "a.json") == rows


ROWS = [f"{i},This is row {i}." for i in range(1000)]


@pytest.mark.parametrize(
    ("line", "row", "message"),
    [
        (7, '5,"Never closed.', r"a.csv:7 .* \(is a quotation mark in that row not closed\?\)"),
        (1001, '999,"Never closed.', "a.csv:1001 cannot be read as a row of a table"),
        (7, '5,"closed" too early', "a.csv:7 cannot be read as a row of a table"),
        (7, r'5,"say \"hi\" to"', "a.csv:7 cannot be read as a row of a table"),
        (7, "5,This is a row, with a comma", "a.csv:7 must have 2 cells, as the header has, got 3"),
        (900, "5,binary\0", "a.csv:900 cannot be read as a row of a table: it holds NUL bytes"),
    ],
)
def test_a_broken_row_of_a_table_is_named_by_its_line(tmp_path: Path, line: int, row: str, message: str):
    rows = ["id,text", *ROWS]
    rows[line - 1] = row
    (tmp_path / "a.csv").write_text("\n".join(rows) + "\n")
    with pytest.raises(Misuse, match=message):
        texts(tmp_path / "a.csv")


def test_rows_of_a_table_that_lack_their_text_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "a.csv").write_text('id,text\n1,one\n2\n\n3,"two ""quoted"" lines\nof text"\n4,\n')
    assert texts(tmp_path / "a.csv") == ["one", 'two "quoted" lines\nof text']
    assert "documents without text (2)" in caplog.text
    (tmp_path / "twice.csv").write_text("text,text\na,b\n")
    with pytest.raises(Misuse, match="must name each column once"):
        texts(tmp_path / "twice.csv")


AFTER_9999 = 2**62
USER = pa.array(["user"])
REPEATED = pa.StructArray.from_arrays([USER, USER, USER], names=["role", "role", "content"])
DATED = pa.struct([("role", pa.string()), ("content", pa.string()), ("at", pa.timestamp("us"))])


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
@pytest.mark.parametrize(
    ("names", "columns", "message"),
    [
        (["text"], [pa.array([AFTER_9999], pa.timestamp("us"))], "a: column 'text' must hold text"),
        (["text"], [pa.array([2**30], pa.int32()).view(pa.date32())], "a: column 'text' must hold text"),
        (["text"], [pa.array([AFTER_9999], pa.timestamp("us")).dictionary_encode()], "a: column 'text' must hold text"),
        (
            ["messages"],
            [pa.array([[{"role": "user", "content": "Hi", "at": AFTER_9999}]], pa.list_(DATED))],
            "a: column 'messages' must hold text",
        ),
        (["messages"], [pa.ListArray.from_arrays([0, 1], REPEATED)], "a: column 'messages' must hold text"),
        (["text", "text"], [USER, USER], "a must name each column once, got text twice"),
    ],
)
def test_values_that_python_lacks_and_repeated_names_are_one_line(
    tmp_path: Path, ending: str, names: list[str], columns: list[pa.Array], message: str
):
    table, path = pa.Table.from_arrays(columns, names=names), tmp_path / f"a.{ending}"
    if ending == "parquet":
        pq.write_table(table, path)
    else:
        pyarrow.feather.write_feather(table, path)
    with pytest.raises(Misuse, match=message.replace("a", rf"a\.{ending}", 1)):
        texts(path)


CHAT = [{"role": "user", "content": "Two and two?"}, {"role": "assistant", "content": "Four."}]
PLAIN = "user: Two and two?\n\nassistant: Four."


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT},
        {"conversations": [{"from": "human", "value": "Two and two?"}, {"from": "gpt", "value": "Four."}]},
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
        {"prompt": "Two and two?", "completion": "Four."},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Two and two?"}]},
                CHAT[1],
            ]
        },
    ],
)
def test_chats_of_every_form_are_messages_and_plain_text(tmp_path: Path, row: dict[str, Any]):
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    names = ["a.jsonl"]
    if not isinstance(row.get("messages", CHAT)[0]["content"], list):  # Arrow has no column of texts and lists
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
        names.append("a.parquet")
    for name in names:
        (document,) = read_source(str(tmp_path / name))
        assert document.text == PLAIN
        assert [(m["role"], m["content"]) for m in document.chat] == [(m["role"], m["content"]) for m in CHAT]


def test_a_column_of_text_goes_before_a_chat_and_chosen_columns_are_joined(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "plain", "prompt": "p", "completion": "c", "messages": CHAT}))
    assert texts(tmp_path / "a.jsonl") == ["plain"]
    assert texts(f"{tmp_path}/a.jsonl::prompt+completion") == ["p\nc"]
    assert texts(f"{tmp_path}/a.jsonl::messages") == [PLAIN]
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": [1, 2]}))
    with pytest.raises(Misuse, match=r"column 'messages' must hold text \(or a list of messages\), got list"):
        texts(tmp_path / "b.jsonl")
