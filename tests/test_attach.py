"""Attaching to a stock model of every package with experts: all checks of scripts/attach, one test per package."""

import re
from pathlib import Path

import pytest
import tiny_models
from attach.building import build
from attach.checks import ATTACHED, CHECKS, EXCEPTIONS, REFUSED, failures, is_refused, outcomes

# One of every kind of router and of experts; the others take a minute more, which CI has.
QUICK = [
    "aria",
    "cohere2_moe",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v4",
    "diffusion_gemma",
    "ernie4_5_moe",
    "gemma4",
    "gpt_oss",
    "granitemoe",
    "hunyuan_v1_moe",
    "inkling",
    "kolibri1",
    "lfm2_moe",
    "minimax_m2",
    "mistral4",
    "mixtral",
    "muse_spark",
    "nemotron_h",
    "olmoe",
    "phimoe",
    "qwen3_5_moe",
    "zaya",
    "dbrx",
    "step3p7",
]


@pytest.mark.parametrize("package", [pytest.param(p, marks=() if p in QUICK else pytest.mark.slow) for p in ATTACHED])
@pytest.mark.filterwarnings("ignore")
def test_attaching_changes_nothing_but_the_loss(package: str) -> None:
    assert failures(package, outcomes(build(package))) == {}


@pytest.mark.parametrize("package", REFUSED)
def test_what_cannot_be_watched_is_refused_by_name(package: str) -> None:
    assert is_refused(package) is None


def test_no_package_is_left_out() -> None:
    assert sorted(ATTACHED + REFUSED) == sorted(tiny_models.packages())
    assert len(ATTACHED) >= 66 and set(QUICK) <= set(ATTACHED)
    page = (Path(__file__).parent.parent / "docs" / "families.md").read_text()
    assert re.findall(r"^\| (\w+)", page, re.MULTILINE) == ["package", *ATTACHED]
    assert "FAILS" not in page
    unwrapped = " ".join(page.split())
    assert all(package in unwrapped for package in REFUSED)
    assert all(f"* **{check.column}**: {check.explanation}" in unwrapped for check in CHECKS)


def test_exceptions_name_packages_and_checks_that_there_are() -> None:
    columns = {check.column for check in CHECKS}
    assert all(package in ATTACHED and column in columns for package, column in EXCEPTIONS)
