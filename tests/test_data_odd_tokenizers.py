"""Tokenizers with holes in their ids, broken files, files that would take the memory, and text without spaces."""

import base64
import copy
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from moestro.data import chats
from moestro.data.chats import rendered
from moestro.data.packing import PackedRows, write_stream
from moestro.data.preparation import prepare
from moestro.data.sources import Document
from moestro.data.tokenizer import (
    LONGEST_WORD,
    check_tokenizer,
    encode,
    growth,
    in_words,
    load_tokenizer,
    train_tokenizer,
    vocabulary_size,
)
from moestro.errors import Misuse
from moestro.inspection.texts import Text, packed

TEXTS = [f"The {word} of the {other}, twice.\n" for word in ("cat", "dog", "law") for other in ("house", "garden")] * 9


@pytest.fixture(scope="module")
def stored() -> dict[str, Any]:
    return json.loads(train_tokenizer(TEXTS, 280).backend_tokenizer.to_str())


def saved(folder: Path, content: object) -> str:
    train_tokenizer(TEXTS, 280).save_pretrained(folder)
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "tokenizer.json").write_text(text)
    return str(folder)


def with_end_at(stored: dict[str, Any], number: int) -> dict[str, Any]:
    changed = copy.deepcopy(stored)
    for token in changed["added_tokens"]:
        token["id"] = number if token["id"] == 0 else token["id"]
    changed["model"]["vocab"]["<|endoftext|>"] = number
    return changed


@pytest.mark.parametrize("largest", [339, 65_535, 65_536, 70_000])
def test_holes_in_the_ids_count_in_the_vocabulary(tmp_path: Path, stored: dict[str, Any], largest: int):
    tokenizer = saved(tmp_path / "tokenizer", with_end_at(stored, largest))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"{i} {t}"}) + "\n" for i, t in enumerate(TEXTS * 4)))
    data = prepare([f"{tmp_path}/a.jsonl"], tokenizer=tokenizer, sequence_length=16, cache_dir=tmp_path / "cache")
    assert len(data.tokenizer) == 280
    assert vocabulary_size(data.tokenizer) == data.description["tokenizer"]["vocabulary"] == largest + 1
    ids = data.train.tokens
    assert ids.max() == largest
    assert (np.asarray(ids) == largest).sum() == len(data.train.document_bytes) + 1


def test_ids_beyond_the_vocabulary_are_refused_and_large_ones_kept(tmp_path: Path):
    ids = np.array([5, 65_540, 70_000], dtype=np.uint32)
    options: dict[str, Any] = {"end_of_text": 0, "domain": [0], "num_bytes": [9]}
    with pytest.raises(ValueError, match="ids must be below the vocabulary of 65000, got 70000"):
        write_stream(tmp_path / "wrong", [ids], vocabulary=65_000, **options)
    write_stream(tmp_path / "right", [ids], vocabulary=70_001, **options)
    assert PackedRows(tmp_path / "right", 4)[0]["input_ids"].tolist() == [0, *ids]


def changed(*keys: object, to: object) -> Callable[[dict[str, Any]], object]:
    def change(stored: dict[str, Any]) -> object:
        place: Any = stored
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = to
        return stored

    return change


BROKEN: dict[str, Callable[[dict[str, Any]], object]] = {
    "null": lambda stored: "null",
    "number": lambda stored: "3",
    "empty": lambda stored: " ",
    "nested": lambda stored: "[" * 100_000,
    "no model": lambda stored: {**stored, "model": None},
    "unknown model": changed("model", "type", to="XYZ"),
    "a list for a vocabulary": changed("model", "vocab", to=[1, 2]),
    "a negative id": changed("model", "vocab", "a", to=-1),
    "an id that is no number": changed("model", "vocab", "a", to="x"),
    "an id of ten billion": changed("added_tokens", 0, "id", to=10**10),
    "an id of four billion": changed("model", "vocab", "a", to=2**32 - 1),
    "an id of five million in the vocabulary": changed("model", "vocab", "a", to=5_000_000),
    "a merge of unknown tokens": changed("model", "merges", to=[["zzz", "qqq"]]),
    "unknown splitting": changed("pre_tokenizer", to={"type": "Nope"}),
    "a broken pattern": changed("normalizer", to={"type": "Replace", "pattern": {"Regex": "("}, "content": "x"}),
    "a panic": changed("normalizer", to={"type": "Precompiled", "precompiled_charsmap": "////////"}),
    "a space of 20,000 characters": changed(
        "normalizer", to={"type": "Replace", "pattern": {"String": " "}, "content": "x" * 20_000}
    ),
    "doubled thirty times": changed(
        "normalizer",
        to={
            "type": "Sequence",
            "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 30,
        },
    ),
    "decoded to 20,000 characters": changed(
        "decoder", to={"type": "Replace", "pattern": {"String": "a"}, "content": "x" * 20_000}
    ),
    "unknown version": changed("version", to="9.9"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_bad_tokenizer_file_is_one_line(
    tmp_path: Path, stored: dict[str, Any], capfd: pytest.CaptureFixture[str], kind: str
):
    folder = saved(tmp_path / "bad", BROKEN[kind](copy.deepcopy(stored)))
    capfd.readouterr()
    with pytest.raises(Misuse, match="tokenizer") as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_a_panic_while_encoding_is_one_line(tmp_path: Path, stored: dict[str, Any], capfd: pytest.CaptureFixture[str]):
    stored = copy.deepcopy(stored) | {"pre_tokenizer": {"type": "FixedLength", "length": 0}}
    tokenizer = load_tokenizer(saved(tmp_path / "bad", stored))
    capfd.readouterr()
    with pytest.raises(Misuse, match="must be able to encode the text: chunk size must be non-zero"):
        check_tokenizer(tokenizer, TEXTS)
    assert capfd.readouterr().err == ""


def test_growth_by_replacements():
    once = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    assert growth(once) == growth({"type": "NFC"}) == growth({"type": "Prepend", "prepend": "▁"}) == 1
    assert growth(once | {"content": "abc"}) == 3
    assert growth(once | {"pattern": {"Regex": "x*"}, "content": "abc"}) == 4
    assert growth({"type": "Sequence", "normalizers": [once | {"content": "ab"}] * 5}) == 32


def test_only_long_words_are_cut():
    ordinary = "The cat " * 500 + "x" * LONGEST_WORD + "\n" + "=" * LONGEST_WORD + " " * LONGEST_WORD + "1" * 9
    assert list(in_words([ordinary, ""])) == [ordinary, ""]
    for text in ("A" * 1000, "中" * 1000, "-" * 1000, " " * 1000, "7" * 1000, "word " + "A" * 700 + " end"):
        pieces = list(in_words([text]))
        assert "".join(pieces) == text
        assert 2 < len(pieces) < 6
        assert max(map(len, pieces)) <= LONGEST_WORD + 5
    mixed = base64.b64encode(bytes(range(256)) * 10).decode()
    assert list(in_words([mixed])) == [mixed]  # its runs of one kind are short


def test_a_tokenizer_is_trained_on_the_words_that_were_cut(monkeypatch: pytest.MonkeyPatch):
    """A word of 60,000 letters would take a hundred times as long: time grows with the square of a word's length."""
    seen: list[str] = []
    monkeypatch.setattr(
        "moestro.data.tokenizer.watched", lambda items, *_: (seen.append(item) or item for item in items)
    )
    train_tokenizer(["ACGT" * 15_000], 300)
    assert max(map(len, seen)) == LONGEST_WORD


TEMPLATE = "{% for m in messages %}<|endoftext|>{{ m.role }}: {{ m.content }}\n{% endfor %}"
CHAT = ({"role": "user", "content": "The cat?"}, {"role": "assistant", "content": "The dog."})


def chat_text() -> Text:
    documents = (
        Document(text="user: The cat?\n\nassistant: The dog.", domain="d", source="a:1", chat=CHAT),
        Document(text="plain", domain="d", source="a:2"),
    )
    return Text(sources=("a",), documents=documents, domains=("d",), left_out={"d": 0})


def stream(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    with packed(chat_text(), tokenizer, None, 10_000) as rows:
        return np.asarray(rows.tokens).tolist()


def test_inspection_puts_chats_in_the_tokenizers_template(stored: dict[str, Any]):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(stored)), eos_token="<|endoftext|>"
    )
    (user, assistant, plain_chat, plain) = (
        ids.tolist()
        for ids in encode(
            tokenizer, ["user: The cat?\n", "assistant: The dog.\n", chat_text().documents[0].text, "plain"]
        )
    )
    assert stream(tokenizer) == [0, *plain_chat, 0, *plain, 0]
    tokenizer.chat_template = TEMPLATE
    assert stream(tokenizer) == [0, 0, *user, 0, *assistant, 0, *plain, 0]
    tokenizer.chat_template = "{{ raise_exception('roles must take turns') }}"
    with pytest.raises(Misuse, match="a:1 must fit the tokenizer's chat template: roles must take turns"):
        stream(tokenizer)


@pytest.mark.parametrize("body", ["", "{{ i ~ j }}", "{% set k = i %}"])
def test_a_chat_template_that_never_ends_is_refused(body: str, monkeypatch):
    monkeypatch.setattr(chats, "PATIENCE", 0.2)
    tokenizer = train_tokenizer(TEXTS, 300)
    loop = "{{% for {} in range(99999) %}}"
    tokenizer.chat_template = loop.format("i") + loop.format("j") + body + "{% endfor %}{% endfor %}"
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(Misuse, match=r"a\.jsonl:1 must be rendered by the chat template within 0\.2 s"):
        rendered(tokenizer, [{"role": "user", "content": "Two and two?"}], "a.jsonl:1")
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_chat_template_that_makes_a_chat_huge_is_refused():
    tokenizer = train_tokenizer(TEXTS, 300)
    messages = [{"role": "user", "content": "Two and two?"}]
    tokenizer.chat_template = "{{ 'a' * 900000 }}"
    assert len(rendered(tokenizer, messages, "a.jsonl:1")) == 900_000
    tokenizer.chat_template = "{{ 'a' * 2000000 }}"
    with pytest.raises(Misuse, match=r"a\.jsonl:1 must have at most 1,049,728 characters in the chat template"):
        rendered(tokenizer, messages, "a.jsonl:1")
