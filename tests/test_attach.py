"""Attaching to a stock model of every package with experts: all checks of scripts/attach_checks.py, one test each."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import attach_checks as checks  # scripts is not a package
import tiny_models


@pytest.mark.parametrize("package", checks.ATTACHED)
@pytest.mark.filterwarnings("ignore")
def test_attaching_changes_nothing_but_the_loss(package: str) -> None:
    assert checks.failures(package, checks.outcomes(checks.build(package))) == {}


@pytest.mark.parametrize("package", checks.REFUSED)
def test_what_cannot_be_watched_is_refused_by_name(package: str) -> None:
    assert checks.is_refused(package) is None


def test_no_package_is_left_out() -> None:
    assert sorted(checks.ATTACHED + checks.REFUSED) == sorted(tiny_models.packages())
    assert len(checks.ATTACHED) >= 66
    page = " ".join((Path(__file__).parent.parent / "docs" / "families.md").read_text().split())
    assert all(package in page for package in tiny_models.packages())
    assert all(f"* **{check.column}**: {check.explanation}" in page for check in checks.CHECKS)


def test_exceptions_name_packages_and_checks_that_there_are() -> None:
    columns = {check.column for check in checks.CHECKS}
    assert all(package in checks.ATTACHED and column in columns for package, column in checks.EXCEPTIONS)
