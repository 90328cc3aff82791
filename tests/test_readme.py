"""The README's Python runs as it stands, but for the checkpoint, for which a tiny one of the same family stands in."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from transformers import AutoModelForCausalLM

from test_attach_trl import sentences, tokenizer

__all__ = ["tokenizer"]  # a fixture

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
NAME = '"allenai/OLMoE-1B-7B-0924"'


def title(block: str) -> str:
    words = {
        "reroute(": "reroute",
        "Compete(": "compete",
        "SFTTrainer": "SFTTrainer",
        "TrainingArguments": "Trainer",
        "optimizer.step()": "loop",
    }
    return next((title for word, title in words.items() if word in block), "model")


@pytest.mark.parametrize("block", BLOCKS, ids=title)
def test_a_block_runs(block: str, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch):
    tiny_models.build("olmoe").model.save_pretrained(tmp_path / "checkpoint")
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    lines = [json.dumps({"text": text}) for text in sentences(8)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    variables: dict[str, Any] = {"__name__": "readme"}
    block = block.replace(NAME, '"checkpoint"')
    exec(compile(block, "README.md", "exec"), variables)
    if "aux" in variables:
        expected = {"distillation"} if title(block) == "compete" else {"balance", "orthogonality", "variance"}
        assert variables["aux"].steps > 0 and variables["aux"].last.keys() >= expected
    if title(block) == "model":
        variables["model"].save_pretrained(tmp_path / "saved")
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


def test_every_kind_of_example_is_there():
    assert sorted(map(title, BLOCKS)) == ["SFTTrainer", "Trainer", "compete", "loop", "model", "reroute"]
