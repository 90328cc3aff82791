"""How much of the held-out text occurs in training text: the fast measure against a slow one, and what is cut."""

import random
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moestro.data.corpus import Corpus, split_documents
from moestro.data.decontamination import leaked_characters, overlap_notes, unseen_parts
from moestro.data.overlap import SPAN, Windows, search
from moestro.data.sources import Document, read_source
from moestro.data.spool import fingerprint
from moestro.data.standard_library import read_standard_library

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


def document(text: str, domain: str = "prose") -> Document:
    return Document(text=text, domain=domain, source=f"{domain}:{text[:9]}")


def words(count: int, seed: int) -> str:
    """Text that nothing else repeats."""
    draw = random.Random(seed)
    return " ".join("".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 9))) for _ in range(count))


def slow_leak(held_out: Iterable[Document], train: Iterable[Document], span: int = SPAN) -> int:
    """Characters of held-out text in windows of `span` that training text has: sets of strings, nothing clever."""
    known = {other.text[i : i + span] for other in train for i in range(len(other.text) - span + 1)}
    count = 0
    for text in (each.text for each in held_out):
        leaked: set[int] = set()
        for i in range(len(text) - span + 1):
            if text[i : i + span] in known:
                leaked.update(range(i, i + span))
        count += len(leaked)
    return count


def share(corpus: Corpus) -> float:
    """What the slow measure says of a corpus; the corpus itself must say the same."""
    leaked = slow_leak(corpus.held_out, corpus.train)
    assert leaked == sum(count for count, _ in corpus.leaked.values())
    return leaked / sum(len(each.text) for each in corpus.held_out)


SMALL_TEXTS = st.lists(st.text("ab é✓\n", max_size=60), max_size=6)


@given(SMALL_TEXTS, SMALL_TEXTS, st.integers(1, 9), st.booleans())
def test_windows_are_found_where_sets_of_strings_find_them(
    here: list[str], there: list[str], length: int, spaces: bool
):
    windows = Windows(here, length, spaces=spaces)
    search(there, windows)
    if not spaces:
        here, there = (["".join(text.split()) for text in texts] for texts in (here, there))
    known = {text[i : i + length] for text in there for i in range(len(text) - length + 1)}
    for text, covered in zip(here, windows.covered(), strict=True):
        found = {i for i in range(len(text) - length + 1) if text[i : i + length] in known}
        assert covered.tolist() == [
            any(start in found for start in range(i - length + 1, i + 1)) for i in range(len(text))
        ]


def test_passages_across_blocks_are_found():
    passage = words(100, 1)
    for offset in (0, 131_072 - 150, 131_072 - 1, 2 * 131_072 - 40):
        text = words(70_000, 2)[: offset - 1] + " " * (offset > 0) + passage + words(9, 3)
        assert leaked_characters([document(passage)], [text]) == {"prose": (len(passage), len(passage))}


def test_a_passage_is_cut_out_and_the_rest_stays_in_parts():
    licence, before, after = words(60, 0), words(50, 1), words(50, 2)
    [parts] = unseen_parts([document(before + "\n" + licence + "\n" + after)], [words(50, 3) + licence + words(50, 4)])
    assert [part.text for part in parts] == [before + "\n", "\n" + after]


def test_near_duplicates_and_short_rests_are_dropped():
    text = words(200, 0)
    changed = "".join(f"{text[i : i + 150]}#" for i in range(0, len(text), 150))  # no span of 200 is left
    reflowed = text.replace(" ", "\n  ")
    other = words(200, 1)
    parts = unseen_parts([document(changed), document(reflowed), document("x" + text + "y"), document(other)], [text])
    assert [[part.text for part in each] for each in parts] == [[], [], [], [other]]


def within_another(seed: int) -> list[Document]:
    """Topics, and pages that hold a topic each between text of their own."""
    topics = [words(80, seed + n) for n in range(150)]
    pages = [words(40, seed + 1000 + n) + topic + words(40, seed + 2000 + n) for n, topic in enumerate(topics)]
    return [document(text) for text in (*topics, *pages)]


def shared_preambles(seed: int) -> list[Document]:
    """The same long licence above everything."""
    licence = words(200, seed)
    return [document(f"{licence}\n{words(60, seed + n + 1)}") for n in range(200)]


def another_header(seed: int) -> list[Document]:
    return [document(f"Copy {copy} of {n}.\n{words(90, seed + n)}") for n in range(100) for copy in range(2)]


def repeated_passages(seed: int) -> list[Document]:
    """One long text, a passage of which returns again and again."""
    refrain = words(60, seed)
    return [document("\n".join(words(150, seed + n + 1) + "\n" + refrain for n in range(200)))]


def tables(seed: int) -> list[Document]:
    """Tables that share most of their rows."""
    rows = [f"{n:#06x}  {words(3, seed + n)}\n" for n in range(120)]
    return [document(words(40, seed + 500 + n) + "\n" + "".join(rows[n % 7 :])) for n in range(80)]


def two_domains(seed: int) -> list[Document]:
    """The same pages in two domains, with another head."""
    return [document(f"{domain}\n{words(90, seed + n)}", domain) for n in range(150) for domain in ("web", "wiki")]


KINDS = (within_another, shared_preambles, another_header, repeated_passages, tables, two_domains)


@pytest.mark.parametrize("kind", KINDS)
def test_what_training_has_is_not_held_out(kind: Callable[[int], list[Document]]):
    corpus = split_documents(kind(7))
    assert share(corpus) == 0
    for domain in corpus.domains:
        assert sum(len(each.text) for each in corpus.held_out if each.domain == domain) > 400
    assert sum(corpus.shared.values()) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_cutting_depends_on_content_alone(kind: Callable[[int], list[Document]]):
    documents = kind(3)
    shuffled = random.Random(0).sample(documents, len(documents))
    one, two = split_documents(documents), split_documents(shuffled)
    assert (one.hash, [d.text for d in one.held_out]) == (two.hash, [d.text for d in two.held_out])


def test_training_text_stays_whole():
    documents = shared_preambles(1)
    corpus = split_documents(documents)
    assert {each.text for each in corpus.train} <= {each.text for each in documents}
    assert len(list(corpus.train)) > 0.85 * len(documents)


def test_text_that_repeats_itself_throughout_is_kept_and_said():
    corpus = split_documents([document("the same line again and again\n" * n) for n in range(20, 80)])
    assert share(corpus) > 0.99
    description = {"overlap": 1.0, "domains": {"prose": {"overlap": 1.0}, "law": {"overlap": 0.009}}}
    assert overlap_notes(description) == [
        "100.0% of the held-out text also occurs in training text, in spans of 200 characters or more",
        "domain prose: 100.0% of the held-out text also occurs in training text, in spans of 200 characters or more",
    ]


def test_the_default_corpus_does_not_leak():
    documents = [each for each in read_standard_library()[0] if each.domain == "documentation"]
    corpus = split_documents(documents, max_held_out_bytes=48 * 2**10)
    assert share(corpus) < 0.01
    assert sum(len(each.text) for each in corpus.held_out) > 10_000


@pytest.mark.slow
@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the shared data sets lie beside a full checkout only")
@pytest.mark.parametrize(
    "place",
    [
        "web_wiki_small/c4_demo.jsonl.gz",
        "tech_docs/rust_rfcs.jsonl.gz",
        "gsm8k/test.jsonl.gz::question+answer",
        "math_latex",
        "code_mbxp/*.gz::prompt+canonical_solution",
        "tinyshakespeare/input.txt.gz",
        "digitalgov_web/digitalgov.jsonl.gz",
    ],
)
def test_corpora_of_other_people_do_not_leak(place: str):
    corpus = split_documents(read_source(f"{SHARED_DATA}/{place}"), max_bytes=2 * 2**20)
    assert share(corpus) < 0.01
    assert sum(len(each.text) for each in corpus.held_out) > 10_000


def test_a_window_that_two_documents_share_does_not_depend_on_their_order():
    shared = "".join(f"{words(9, n)}\n" for n in range(2000))[: 2**16 - 1] + "\n"
    long = [document(shared + words(200, seed)) for seed in range(40)]
    long.sort(key=lambda each: fingerprint(each.text.encode()))  # the first is held out, the last is for training
    one, two = split_documents(long, held_out_fraction=0.5), split_documents(long[::-1], held_out_fraction=0.5)
    assert one.hash == two.hash
