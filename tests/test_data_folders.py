"""What of a folder is read, and what is said of the rest."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pytest

from moestro.data.sources import read_source
from moestro.errors import Misuse


def texts(spec: object) -> list[str]:
    return [document.text for document in read_source(str(spec))]


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """30 documents in a folder that is linked twice, one beside, one link to a file, loops and links to nothing."""
    (tmp_path / "store").mkdir()
    (tmp_path / "corpus" / "here").mkdir(parents=True)
    for number in range(30):
        (tmp_path / "store" / f"{number}.txt").write_text(f"Stored document {number}.")
    (tmp_path / "corpus" / "here" / "own.txt").write_text("The one that is here.")
    (tmp_path / "corpus" / "linked").symlink_to(tmp_path / "store")
    (tmp_path / "corpus" / "here" / "again").symlink_to(tmp_path / "store")
    (tmp_path / "corpus" / "here" / "file.txt").symlink_to(tmp_path / "store" / "0.txt")
    (tmp_path / "corpus" / "here" / "loop").symlink_to(tmp_path / "corpus")
    (tmp_path / "corpus" / "here" / "loop2").symlink_to(tmp_path / "corpus")
    (tmp_path / "corpus" / "self").symlink_to(tmp_path / "corpus" / "self")
    (tmp_path / "corpus" / "gone.txt").symlink_to(tmp_path / "nothing.txt")
    return tmp_path / "corpus"


def test_each_real_folder_is_read_once_through_its_links(linked: Path, caplog: pytest.LogCaptureFixture):
    assert len(texts(linked)) == 32
    assert "broken links (2)" in caplog.text
    assert len(texts(f"{linked}/**/*.txt")) == 32
    assert len(texts(f"{linked}/*")) == 32
    assert len(texts(linked / "linked")) == 30


def test_what_a_folder_leaves_out_is_said_by_ending_and_count(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "a.txt").write_text("text " * 100)
    for number in range(3):
        (tmp_path / f"{number}.PNG").write_bytes(b"\x89PNG" * 5000)
    (tmp_path / "old.bin.zst").write_bytes(b"1")
    (tmp_path / "Makefile").write_text("all:")
    os.mkfifo(tmp_path / "pipe.txt")
    assert len(texts(tmp_path)) == 1
    assert "skipped .png (3), no ending (1), .bin.zst (1), devices and pipes (1)" in caplog.text


@pytest.mark.parametrize("name", ["part.warc.zst", "part.7z", "part.docx", "part.bin", "part"])
def test_a_folder_of_which_almost_nothing_is_read_is_refused(tmp_path: Path, name: str):
    (tmp_path / "README.md").write_text("This card describes the corpus.\n" * 10)
    (tmp_path / name).write_bytes(b"x" * 20_000)
    with pytest.raises(
        Misuse, match=r"must be read to at least 5% of its bytes, got 320 of 20,320 \(skipped: "
    ) as caught:
        texts(tmp_path)
    assert "by a glob such as" in str(caught.value)
    assert len(texts(f"{tmp_path}/*.md")) == 1


def test_a_folder_of_files_in_another_encoding_beside_a_readme_is_refused(tmp_path: Path):
    (tmp_path / "README.md").write_text("About.\n")
    (tmp_path / "a.txt").write_bytes("café ".encode("latin-1") * 1000)
    with pytest.raises(Misuse, match=r"must be read to at least 5% .* files that are not text \(1\)"):
        texts(tmp_path)


def write_arrow(path: Path, rows: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"text": rows})
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)


def saved(folder: Path, rows: list[str]) -> None:
    """What `datasets.save_to_disk` writes, and a cache that `map` leaves there."""
    write_arrow(folder / "data-00000-of-00001.arrow", rows)
    write_arrow(folder / "cache-0123.arrow", [row.upper() for row in rows])
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    (folder / "dataset_info.json").write_text(json.dumps({"text": "no document"}))


def test_a_saved_data_set_is_read_without_its_metadata_and_caches(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    rows = [f"Document number {i}." for i in range(500)]
    saved(tmp_path / "saved", rows)
    assert texts(tmp_path / "saved") == rows
    assert "caches of a data set (1), metadata of a data set (2)" in caplog.text
    assert texts(tmp_path / "saved" / "data-00000-of-00001.arrow") == rows
    documents = list(read_source(f"hf:{tmp_path}/saved"))
    assert [document.text for document in documents] == rows
    assert {document.domain for document in documents} == {"saved"}


def test_splits_of_a_saved_data_set(tmp_path: Path):
    saved(tmp_path / "sets" / "train", ["one"])
    saved(tmp_path / "sets" / "test", ["two"])
    (tmp_path / "sets" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    assert texts(tmp_path / "sets") == ["two", "one"]
    assert texts(f"hf:{tmp_path}/sets") == ["one"]
    assert texts(f"hf:{tmp_path}/sets::text") == ["one"]
    assert texts(f"hf:{tmp_path}/sets::text") == texts(f"hf:{tmp_path}/sets:default:train")
    assert texts(f"hf:{tmp_path}/sets:default:test") == ["two"]


def test_what_datasets_itself_saves_is_read(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    rows = [f"Document number {i}." for i in range(50)]
    datasets.Dataset.from_dict({"text": rows}).select(range(10, 40)).save_to_disk(tmp_path / "saved", num_shards=2)
    assert texts(tmp_path / "saved") == rows[10:40]


def test_a_downloaded_data_set_is_read_without_its_card(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder = tmp_path / "hub"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "train.jsonl").write_text('{"text": "one"}\n')
    (folder / "README.md").write_text("---\nlicense: mit\n---\nA card.\n")
    (folder / "dataset_infos.json").write_text("{}")
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    (folder / ".cache" / "huggingface" / "train.jsonl").write_text('{"text": "two"}\n')
    assert texts(folder) == ["one"]
    assert "metadata of a data set (2)" in caplog.text
