import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from moestro.data.tokenizer import (
    END_OF_TEXT,
    MIN_VOCABULARY,
    PADDING,
    check_tokenizer,
    decode,
    encode,
    load_tokenizer,
    train_tokenizer,
)
from moestro.errors import Misuse

TEXTS = [f"The {word} of the {other}, twice.\n" for word in ("cat", "dog", "law") for other in ("house", "garden")] * 9


@pytest.fixture(scope="module")
def trained() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 280)


def test_vocabulary_and_special_tokens(trained: PreTrainedTokenizerFast):
    assert len(trained) == 280
    assert (trained.eos_token, trained.bos_token, trained.pad_token) == (END_OF_TEXT, END_OF_TEXT, PADDING)
    assert (trained.eos_token_id, trained.pad_token_id) == (0, 1)
    assert max(len(ids) for ids in encode(trained, TEXTS)) < len(TEXTS[0]) / 2


@given(st.lists(st.text("ab \n\t\r\0é\u0301✓😀<|endoftext|>"), max_size=4))
def test_any_text_survives(trained: PreTrainedTokenizerFast, texts: list[str]):
    assert [decode(trained, ids.tolist()) for ids in encode(trained, texts)] == texts


def test_special_tokens_spelled_out_are_plain_text(trained: PreTrainedTokenizerFast):
    text = f"a{END_OF_TEXT}b{PADDING}"
    (ids,) = encode(trained, [text])
    assert not {0, 1} & set(ids.tolist())
    assert trained(text)["input_ids"] == ids.tolist()
    usual = PreTrainedTokenizerFast(tokenizer_object=trained.backend_tokenizer, eos_token=END_OF_TEXT)
    assert 0 in usual(text)["input_ids"]
    (again,) = encode(usual, [text])
    assert again.tolist() == ids.tolist()


def test_training_is_deterministic(trained: PreTrainedTokenizerFast):
    again = train_tokenizer(iter(TEXTS), 280)
    assert again.backend_tokenizer.to_str() == trained.backend_tokenizer.to_str()


def test_a_saved_tokenizer_is_the_same_in_transformers(trained: PreTrainedTokenizerFast, tmp_path: Path):
    trained.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = f"The cat  of\n\tthe house{END_OF_TEXT} ✓"
    assert loaded(text)["input_ids"] == trained(text)["input_ids"]
    assert (loaded.eos_token_id, loaded.pad_token_id, len(loaded)) == (0, 1, 280)
    assert load_tokenizer(str(tmp_path)).get_vocab() == trained.get_vocab()


def test_a_vocabulary_needs_every_byte():
    with pytest.raises(Misuse, match=f"at least {MIN_VOCABULARY} tokens .* got 257"):
        train_tokenizer(TEXTS, MIN_VOCABULARY - 1)
    assert len(train_tokenizer(TEXTS, MIN_VOCABULARY)) == MIN_VOCABULARY


def test_a_small_corpus_gives_a_smaller_vocabulary():
    assert len(train_tokenizer(["abab"], 1000)) < 262


def test_slow_tokenizers_encode_alike():
    tokenizer = ByT5Tokenizer()
    (ids,) = encode(tokenizer, ["né</s>"])
    assert decode(tokenizer, ids.tolist()) == "né</s>"
    assert len(ids) == len("né</s>".encode())
    check_tokenizer(tokenizer, TEXTS)


def words_only(normalizer: normalizers.Normalizer | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer that knows four words."""
    vocabulary = {word: i for i, word in enumerate(("[UNK]", "</s>", "the", "cat", "of", "house"))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="</s>")


def test_unknown_tokens_are_refused_with_share_and_example():
    with pytest.raises(Misuse, match=r"100% of a sample came back changed, such as 'the dog' as 'the \[UNK\]'"):
        check_tokenizer(words_only(), ["the dog"])
    check_tokenizer(words_only(), ["the cat of the house"])


def test_lossy_tokenizers_are_refused():
    with pytest.raises(Misuse, match=r"such as 'the\\tcat\\n' as 'the cat'"):
        check_tokenizer(words_only(), ["the\tcat\n"])
    with pytest.raises(Misuse, match=r"50% of a sample .* 'The Cat' as 'the cat'"):
        check_tokenizer(words_only(normalizers.Lowercase()), ["The Cat", "the cat"])


def test_rare_losses_and_normalisation_are_tolerated(trained: PreTrainedTokenizerFast):
    check_tokenizer(words_only(), ["the cat"] * 99 + ["the dog"])
    with pytest.raises(Misuse, match="2% of a sample"):
        check_tokenizer(words_only(), ["the cat"] * 98 + ["the dog"] * 2)
    composing = train_tokenizer(TEXTS, 280)
    composing.backend_tokenizer.normalizer = normalizers.NFC()
    check_tokenizer(composing, ["cafe\u0301"])


def test_the_check_looks_at_every_part_of_long_texts():
    long = ["the cat of " * 30_000 + "the dog " * 30_000, "the house"]
    with pytest.raises(Misuse, match=r"4[0-4]% of a sample .* such as 'the dog the dog"):
        check_tokenizer(words_only(), [text.rstrip() for text in long])


@pytest.mark.parametrize("broken", ["tokenizer.json", "tokenizer_config.json", "all"])
def test_what_cannot_be_loaded_is_a_misuse(trained: PreTrainedTokenizerFast, tmp_path: Path, broken: str):
    trained.save_pretrained(tmp_path / "saved")
    if broken == "all":
        shutil.rmtree(tmp_path / "saved")
    else:
        (tmp_path / "saved" / broken).write_text('{"half": ')
    with pytest.raises(Misuse, match="must be a tokenizer's folder or name") as caught:
        load_tokenizer(f"{tmp_path}/saved")
    assert "\n" not in str(caught.value)


def test_a_tokenizer_needs_an_end_of_text_token(tmp_path: Path):
    tokenizer = words_only()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(Misuse, match="must have an end-of-text token"):
        load_tokenizer(str(tmp_path))
