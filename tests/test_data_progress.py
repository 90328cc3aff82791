import pytest
from rich.console import Console

from moestro.data.progress import watched


def test_short_work_and_pipes_see_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    assert list(watched(range(3), "counting")) == [0, 1, 2]
    monkeypatch.setattr(Console, "is_terminal", False)
    assert list(watched(range(3), "counting", patience=0.0)) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_long_work_on_a_terminal_is_shown_on_stderr(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Console, "is_terminal", True)
    monkeypatch.setenv("TERM", "xterm")
    assert list(watched(range(3), "counting", total=3, patience=0.0)) == [0, 1, 2]
    output = capsys.readouterr()
    assert "counting" in output.err
    assert output.out == ""
