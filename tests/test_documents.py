"""What README and docs cite exists and runs: links, sections, scripts, flags, commands, Python."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from transformers import AutoModelForCausalLM

from command_line import moestro, write_corpus
from documents import LOG, PAGES, ROOT, Passage, anchors, block_commands, flags, inline_commands, python_blocks
from test_attach_trl import sentences, tokenizer
from test_evidence import ELSEWHERE, SMALLEST, WITH_FILES, run

__all__ = ["run", "tokenizer"]  # fixtures

HUB = "allenai/OLMoE-1B-7B-0924"
TEXTS = [
    path for folder in ("src", "scripts", "benchmarks", "examples", "tests") for path in (ROOT / folder).rglob("*.py")
]
SMALL = {
    "--sequence-length": ["32"],
    "--batch-tokens": ["128"],
    "--tokens": ["256"],
    "--vocab-size": ["300"],
    "--dtype": ["float32"],
}
SET = ["hidden_size=16", "num_layers=2", "num_heads=2", "width=8"]


@pytest.mark.parametrize("page", [*PAGES, LOG], ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), target
        assert not anchor or anchor in anchors(other), target


def test_documents_that_the_code_cites_exist():
    for path in TEXTS:
        for cited, anchor in re.findall(r"\b((?:docs/[\w/]+|README|CHANGELOG)\.md)(?:#([\w-]+))?", path.read_text()):
            assert (ROOT / cited).exists(), f"{path}: {cited}"
            assert not anchor or anchor in anchors(ROOT / cited), f"{path}: {cited}#{anchor}"


def test_no_number_stands_for_a_section_or_a_table_of_our_documents():
    for path in [*PAGES, LOG, *TEXTS]:
        number = r"(?:[Ss]ection|[Ff]igure|[Tt]able|§)s? ?\d[\d.]*"
        found = re.search(rf"{number}[^.;()]{{0,20}}(?:docs/|\]\([\w/]+\.md)", path.read_text())
        assert path == Path(__file__) or found is None, f"{path}: {found and found.group()}"


def test_modules_and_tests_that_documents_name_exist():
    for page in PAGES:
        for name in re.findall(r"`((?:src|tests|scripts|benchmarks|examples)/[\w/]+\.py)`", page.read_text()):
            assert (ROOT / name).exists(), f"{page}: {name}"


COMMANDS = [*inline_commands(), *block_commands()]


@pytest.mark.parametrize("passage", COMMANDS, ids=lambda passage: passage.title)
def test_cited_programs_and_flags_exist(
    passage: Passage, run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    program, name, *_ = passage.text.split()
    if program == "make":
        assert re.search(rf"^{name}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    if program == "python":
        assert name in {*SMALLEST, *WITH_FILES, *ELSEWHERE}, "no test runs it"
        code = run(name, "--help")
    else:
        code = moestro(monkeypatch, name, "--help")
    said = capsys.readouterr().out
    assert code == 0
    for flag in flags(passage.text):
        assert re.search(rf"{flag}\b", said), flag


def test_the_list_of_commands_is_not_empty():
    assert {"moestro", "make"} <= {passage.text.split()[0] for passage in block_commands()}
    assert any(passage.text.startswith("python scripts/") for passage in inline_commands())


@pytest.fixture
def files(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that holds what the commands and the Python of README and docs name, small."""
    for name in ("checkpoint", "before", "after"):
        tiny_models.build("olmoe").model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    lines = [json.dumps({"text": text, "content": text}) for text in sentences(200)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    write_corpus(tmp_path / "text")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    return tmp_path


def with_flags(words: list[str], values: dict[str, list[str]]) -> list[str]:
    """The command with these flags set, whatever it says of them."""
    kept, skipping = [], False
    for word in words:
        skipping = word in values or (skipping and not word.startswith("--"))
        if not skipping:
            kept.append(word)
    return [*kept, *(part for flag, given in values.items() for part in (flag, *given))]


def small(command: str, files: Path) -> list[str]:
    """The words of a command of `moestro`, its models, budgets and texts replaced by small ones."""
    words = [word.replace(HUB, "checkpoint") for word in shlex.split(command)[1:]]
    changed: dict[str, list[str]] = {}
    if "--data" in words and words[0] == "inspect":
        changed["--data"] = [str(files / "texts.jsonl")]
    if words[0] in ("train", "compare") and "--dry-run" not in words:
        given = words[words.index("--set") + 1 :] if "--set" in words else []
        fields = [word for word in given if "=" in word and not word.startswith("--")]
        changed |= SMALL | {"--size": ["tiny"], "--set": [*SET, *fields], "--data": [str(files / "text")]}
        changed |= {"--out": ["out"]}
    if "--sweep-tokens" in words:
        changed["--sweep-tokens"] = ["256"]
    if words[0] == "compare" and "--sweep" not in words:
        changed["--seeds"] = ["1"]
    if words[0] == "compare" and "--dry-run" not in words:
        changed["--allow-unequal"] = []  # widths are not what they were
    return with_flags(words, changed)


RUNNABLE = [passage for passage in block_commands() if passage.text.startswith("moestro")]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("passage", RUNNABLE, ids=lambda passage: passage.title)
def test_a_command_runs(passage: Passage, files: Path, monkeypatch: pytest.MonkeyPatch):
    if "MODEL" in passage.text or "..." in passage.text:
        pytest.skip("not a whole command")
    assert moestro(monkeypatch, *small(passage.text, files)) == 0


@pytest.mark.parametrize(
    "passage", [p for p in RUNNABLE if p.text.startswith("moestro compare")], ids=lambda passage: passage.title
)
def test_a_comparison_is_between_equals(passage: Passage, monkeypatch: pytest.MonkeyPatch):
    if "..." in passage.text:
        pytest.skip("not a whole command")
    words = [word for word in shlex.split(passage.text)[1:] if word not in ("--dry-run", "--print-commands")]
    assert moestro(monkeypatch, *with_flags(words, {"--data": ["nowhere"]}), "--dry-run") == 0


TITLES = {
    "reroute(": "reroute",
    "Compete(": "compete",
    "SFTTrainer": "SFTTrainer",
    "TrainingArguments": "Trainer",
    "optimizer.step()": "loop",
}


def title(block: Passage) -> str:
    return next((title for word, title in TITLES.items() if word in block.text), "model")


@pytest.mark.parametrize("block", python_blocks(), ids=lambda block: f"{block.page.stem}: {title(block)}")
def test_a_block_of_python_runs(block: Passage, files: Path):
    (files / "texts.jsonl").write_text("\n".join((files / "texts.jsonl").read_text().splitlines()[:8]))
    variables: dict[str, Any] = {"__name__": "document"}
    exec(compile(block.text.replace(f'"{HUB}"', '"checkpoint"'), str(block.page), "exec"), variables)
    if "aux" in variables:
        expected = {"distillation"} if title(block) == "compete" else {"balance", "orthogonality", "variance"}
        assert variables["aux"].steps > 0 and variables["aux"].last.keys() >= expected
    if title(block) == "model":
        variables["model"].save_pretrained("saved")
        AutoModelForCausalLM.from_pretrained("saved")


def test_every_kind_of_example_is_there():
    kinds = ["SFTTrainer", "Trainer", "Trainer", "compete", "loop", "model", "reroute"]
    assert sorted(map(title, python_blocks())) == kinds  # the README repeats one of them


def test_the_readme_is_short_and_repeats_the_guide():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 150
    blocks = {block.text for block in python_blocks() if block.page.name != "README.md"}
    assert {block.text for block in python_blocks() if block.page.name == "README.md"} <= blocks
