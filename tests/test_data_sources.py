import csv
import gzip
import io
import json
import logging
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moestro.data.sources import Document, parse_source, read_source
from moestro.errors import Misuse

ROWS = [
    {"text": "first\nrow, with commas", "answer": "one"},
    {"text": 'say "second" ✓', "answer": "two"},
]


def as_bytes(ending: str) -> bytes:
    """The two rows of text in a format that keeps rows."""
    if ending == ".jsonl":
        return b"\n\n".join(json.dumps(row).encode() for row in ROWS)
    if ending == ".json":
        return json.dumps(ROWS, indent=2).encode()
    if ending == ".parquet":
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(ROWS), buffer)
        return buffer.getvalue()
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["text", "answer"])
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def texts(spec: object, **options: str) -> list[str]:
    return [document.text for document in read_source(str(spec), **options)]


@pytest.mark.parametrize("compressed", ["", ".gz"])
@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".parquet"])
def test_rows_of_every_format_are_documents(tmp_path: Path, ending: str, compressed: str):
    path = write(tmp_path / f"rows{ending}{compressed}", as_bytes(ending))
    assert list(read_source(str(path))) == [
        Document(text=row["text"], domain="rows", source=f"{path}:{number}") for number, row in enumerate(ROWS, 1)
    ]


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.rst", "a.py", "a.txt.gz", "a.PY.gz", "README", "a.tex", "a.gz"])
def test_a_file_of_text_is_one_document_of_unchanged_text(tmp_path: Path, name: str):
    assert texts(write(tmp_path / name, "One\r\n\r\ntwo ✓\n")) == ["One\r\n\r\ntwo ✓\n"]


def test_python_files_are_read_in_the_encoding_that_they_declare(tmp_path: Path):
    path = write(tmp_path / "old.py", "# coding: latin-1\nname = 'café'\n".encode("latin-1"))
    assert "café" in texts(path)[0]


def test_tab_separated_values_know_no_quoting(tmp_path: Path):
    path = write(tmp_path / "a.tsv", 'text\tanswer\n"open quote\tone\nsecond\ttwo\n')
    assert texts(path) == ['"open quote', "second"]


def test_json_lines_under_the_name_of_json(tmp_path: Path):
    assert texts(write(tmp_path / "a.json", as_bytes(".jsonl"))) == [row["text"] for row in ROWS]


def test_fields_longer_than_the_stock_limit_of_csv(tmp_path: Path):
    assert len(texts(write(tmp_path / "a.csv", "text\n" + "x" * 200_000 + "\n"))[0]) == 200_000


def test_columns_for_all_sources_or_for_one_are_joined_by_line_ends(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", as_bytes(".jsonl"))
    joined = [f"{row['answer']}\n{row['text']}" for row in ROWS]
    assert texts(f"{path}::answer+text") == joined
    assert texts(path, text_column="answer+text") == joined
    assert texts(f"{path}::answer", text_column="missing") == ["one", "two"]


def test_rows_with_nothing_in_a_column_are_passed_over(tmp_path: Path):
    rows = [{"a": "x", "b": None}, {"a": "x"}, {"a": "x", "b": "y"}, {"a": " ", "b": "\n"}]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    assert texts(f"{path}::a+b") == ["x\ny"]


@pytest.mark.parametrize(
    ("spec", "label", "place", "columns"),
    [
        ("law.txt", None, "law.txt", ("text",)),
        ("law=a/b.txt", "law", "a/b.txt", ("text",)),
        ("a=1/b.txt", "a", "1/b.txt", ("text",)),
        ("x/a=1/b.txt", None, "x/a=1/b.txt", ("text",)),
        ("math=gsm8k::question+answer", "math", "gsm8k", ("question", "answer")),
        ("code=hf:owner/name:config::code", "code", "hf:owner/name:config", ("code",)),
        ("hf:owner/name", None, "hf:owner/name", ("text",)),
    ],
)
def test_parts_of_a_source(spec: str, label: str | None, place: str, columns: tuple[str, ...]):
    source = parse_source(spec)
    assert (source.label, source.place, source.columns) == (label, place, columns)


def test_a_path_that_exists_is_not_taken_for_a_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a=b.txt", "text")
    assert [document.domain for document in read_source("a=b.txt")] == ["a=b"]


@pytest.mark.parametrize("spec", ["", "law=", "=a.txt", "a.jsonl::", "a.jsonl::x+"])
def test_sources_that_make_no_sense(spec: str):
    with pytest.raises(Misuse, match="must read"):
        parse_source(spec)


def test_a_folder_is_read_recursively_in_order_and_its_strays_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    folder = tmp_path / "corpus"
    write(folder / "b" / "two.txt", "two")
    write(folder / "a.jsonl", '{"text": "one"}')
    write(folder / "c.md.gz", "three")
    write(folder / "photo.png", b"\x89PNG")
    write(folder / "photo.zip", b"PK")
    write(folder / "binary.txt", b"a\0b")
    write(folder / ".git" / "config.txt", "hidden")
    write(folder / ".hidden.txt", "hidden")
    with caplog.at_level(logging.WARNING):
        documents = list(read_source(str(folder)))
    assert [document.text for document in documents] == ["one", "three", "two"]
    assert {document.domain for document in documents} == {"corpus"}
    assert "skipped .png (1), .zip (1), files that are not text (1)" in caplog.text


def test_the_domain_of_what_a_glob_finds_is_its_folder(tmp_path: Path):
    write(tmp_path / "law" / "1.txt", "one")
    write(tmp_path / "law" / "2.txt", "two")
    write(tmp_path / "fiction" / "3.txt", "three")
    found = [(document.domain, document.text) for document in read_source(f"{tmp_path}/*/*.txt")]
    assert found == [("fiction", "three"), ("law", "one"), ("law", "two")]
    assert list(read_source(f"{tmp_path}/*")) == list(read_source(f"{tmp_path}/*/*.txt"))
    assert {document.domain for document in read_source(f"all={tmp_path}/**/*.txt")} == {"all"}
    assert len(list(read_source(f"{tmp_path}/**"))) == 3


def test_half_a_surrogate_pair_is_skipped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = write(tmp_path / "a.jsonl", '{"text": "\\ud83d"}\n{"text": "\\ud83d\\ude00"}\n')
    with caplog.at_level(logging.WARNING):
        assert texts(path) == ["😀"]
    assert "rows with half a surrogate pair (1)" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "holds no text"),
        ("blank.txt", b" \n\t", "holds no text"),
        ("empty.jsonl", b"\n", "holds no text"),
        ("empty.csv", b"text,answer\n", "holds no text"),
        ("picture.png", b"\x89PNG\0\0", "is binary, not text: it holds NUL bytes"),
        ("latin.txt", b"caf\xe9", "is not text in UTF-8"),
        ("odd.py", b"# coding: klingon\n", "is not text in UTF-8"),
        ("a.jsonl", b'{"question": "q", "answer": "a"}', r"no column 'text'; it has 'answer', 'question'"),
        ("a.csv", b"question,answer\nq,a\n", r"no column 'text'; it has 'answer', 'question'"),
        ("a.csv", b"text\ncaf\xe9\n", "is not text in UTF-8"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": \n', r"a.jsonl:2 must be a JSON object, got '\{\"text\": "),
        ("a.jsonl", b"[" * 200_000, "a.jsonl:1 must be a JSON object"),
        ("a.json", b'["a", "b"]', "a.json:1 must be a JSON object, got str"),
        ("a.jsonl", b'{"text": 3}', "a.jsonl:1: column 'text' must hold text .or a list of messages., got int"),
        ("a.parquet", b"PAR1 no more", "not a readable Parquet file"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_bad_files_are_a_misuse_that_names_the_file(tmp_path: Path, name: str, content: bytes, message: str):
    path = write(tmp_path / name, content)
    with pytest.raises(Misuse, match=message) as caught:
        texts(path)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_parquet_without_the_column_names_those_that_exist(tmp_path: Path):
    path = write(tmp_path / "a.parquet", as_bytes(".parquet"))
    with pytest.raises(Misuse, match=r"no column 'title'; it has 'answer', 'text' \(choose with --text-column"):
        texts(f"{path}::title+text")


def test_truncated_gzip(tmp_path: Path):
    path = write(tmp_path / "a.txt.gz", "text " * 1000)
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(Misuse, match=r"a\.txt\.gz cannot be read"):
        texts(path)


def test_places_without_text(tmp_path: Path):
    for spec in (f"{tmp_path}/nowhere", f"law={tmp_path}/*.txt"):
        with pytest.raises(Misuse, match="does not exist"):
            texts(spec)
    write(tmp_path / "folder" / "photo.png", b"\x89PNG")
    with pytest.raises(Misuse, match=r"holds no text \(skipped: \.png \(1\)\)"):
        texts(tmp_path / "folder")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(Misuse, match="got a device or a pipe"):
        texts(tmp_path / "pipe")


def test_data_sets_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "poems"
    write(folder / "train.jsonl", as_bytes(".jsonl"))
    assert [(d.text, d.domain) for d in read_source(f"hf:{folder}")] == [(row["text"], "poems") for row in ROWS]
    assert [d.domain for d in read_source(f"verse=hf:{folder}:default:train")] == ["verse", "verse"]
    with pytest.raises(Misuse, match="no column 'title'; it has 'answer', 'text'"):
        texts(f"hf:{folder}::title")
    for spec in (f"hf:{folder}:default:validation", "hf:nobody/nothing"):
        with pytest.raises(Misuse, match="cannot be loaded as a data set of the hub"):
            texts(spec)
