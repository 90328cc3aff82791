import pickle
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from moestro.data.packing import IGNORED, PackedRows, write_stream

END = 0
documents_of_tokens = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=12), min_size=1, max_size=8)


def packed(documents: list[list[int]], sequence_length: int, *, vocabulary: int = 10, **options: bool) -> PackedRows:
    """Rows of documents whose domain is their number modulo 3, and whose bytes are ten times that number."""
    folder = Path(mkdtemp()) / "rows"
    write_stream(
        folder,
        [np.array(tokens, dtype=np.uint32) for tokens in documents],
        end_of_text=END,
        vocabulary=vocabulary,
        domain=[number % 3 for number in range(len(documents))],
        num_bytes=[10 * number for number in range(len(documents))],
    )
    return PackedRows(folder, sequence_length, **options)


def stream_of(documents: list[list[int]]) -> list[int]:
    return [END] + [token for document in documents for token in (*document, END)]


@given(documents_of_tokens, st.integers(2, 9))
def test_train_rows_are_the_stream_without_its_last_partial_row(documents: list[list[int]], sequence_length: int):
    rows = packed(documents, sequence_length)
    stream = stream_of(documents)
    whole = len(stream) // sequence_length * sequence_length
    assert [token for row in rows for token in row["input_ids"].tolist()] == stream[:whole]
    assert rows.num_tokens == len(stream)
    for row in rows:
        assert row.keys() == {"input_ids", "labels"}
        assert row["labels"].tolist() == [IGNORED, *row["input_ids"].tolist()[1:]]


@given(documents_of_tokens, st.data())
def test_held_out_rows_predict_every_token_once_and_charge_it_to_its_document(
    documents: list[list[int]], data: st.DataObject
):
    sequence_length = data.draw(st.integers(2, min(9, len(stream_of(documents)))))
    rows = packed(documents, sequence_length, every_token_once=True)
    charged: dict[int, list[int]] = {number: [] for number in range(len(documents))}
    for row in rows:
        assert all(column.shape == (sequence_length,) and column.dtype == torch.int64 for column in row.values())
        assert row["domain"].tolist() == [number % 3 for number in row["document"].tolist()]
        predicted = row["labels"] != IGNORED
        assert predicted.any()
        assert not predicted[0]
        assert torch.equal(row["labels"][predicted], row["input_ids"][predicted])
        for document, label in zip(row["document"][predicted].tolist(), row["labels"][predicted].tolist(), strict=True):
            charged[document].append(label)
    assert charged == {number: [*document, END] for number, document in enumerate(documents)}
    assert rows.document_tokens.tolist() == [len(document) + 1 for document in documents]
    assert rows.document_bytes.tolist() == [10 * number for number in range(len(documents))]


@given(documents_of_tokens, st.data(), st.booleans())
def test_positions_start_again_at_each_end_of_text(
    documents: list[list[int]], data: st.DataObject, every_token_once: bool
):
    sequence_length = data.draw(st.integers(2, min(9, len(stream_of(documents)))))
    rows = packed(documents, sequence_length, every_token_once=every_token_once, block_diagonal=True)
    for row in rows:
        expected: list[int] = []
        for token in row["input_ids"].tolist():
            expected.append(0 if token == END or not expected else expected[-1] + 1)
        assert row["position_ids"].tolist() == expected


def test_block_diagonal_rows_hide_documents_from_one_another_in_transformers():
    documents = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8, 9, 7]]
    config = LlamaConfig(
        vocab_size=10, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    row = packed(documents, len(stream_of(documents)), block_diagonal=True)[0]
    batch = {name: row[name][None] for name in ("input_ids", "position_ids")}
    with torch.no_grad():
        together = model(**batch, use_cache=False).logits[0]
        place = 0
        for document in documents:
            alone = model(torch.tensor([[END, *document]]), use_cache=False).logits[0]
            torch.testing.assert_close(together[place : place + len(alone)], alone)
            place += len(alone)


@pytest.mark.parametrize(("vocabulary", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_tokens_are_mapped_from_disk_in_the_smallest_type(vocabulary: int, dtype: type):
    rows = packed([[vocabulary - 1, 1], [2]], 3, vocabulary=vocabulary)
    assert isinstance(rows.tokens, np.memmap)
    assert rows.tokens.dtype == dtype
    assert rows[0]["input_ids"].tolist() == [END, vocabulary - 1, 1]


def test_workers_open_the_files_themselves():
    rows = packed([list(range(1, 10))] * 2000, 8, every_token_once=True, block_diagonal=True)
    assert len(pickle.dumps(rows)) < 1000
    copy = pickle.loads(pickle.dumps(rows))
    assert len(copy) == len(rows)
    for name, column in rows[7].items():
        assert torch.equal(copy[7][name], column)


def test_a_loader_batches_rows():
    rows = packed([[1, 2, 3]] * 10, 5, every_token_once=True)
    batches = list(DataLoader(rows, batch_size=4))
    assert sum(len(batch["input_ids"]) for batch in batches) == len(rows) == 10
    assert batches[0]["document"].shape == (4, 5)


def test_rows_out_of_range():
    rows = packed([[1, 2, 3]], 2)
    for index in (-1, 2):
        with pytest.raises(IndexError, match=f"between 0 and 1, got {index}"):
            rows[index]


def test_a_stream_of_no_documents_has_no_rows(tmp_path: Path):
    write_stream(tmp_path / "none", [], end_of_text=END, vocabulary=10, domain=[], num_bytes=[])
    rows = PackedRows(tmp_path / "none", 4, every_token_once=True)
    assert (rows.num_tokens, len(rows), len(rows.document_tokens)) == (1, 0, 0)
    assert len(packed([[1, 2]], 5, every_token_once=True)) == 0
