from __future__ import annotations

import pytest

from hasten.cli import progress


def test_short_work_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.progress("reading", 3) as bar:
        for _ in range(3):
            bar.advance()
    assert capsys.readouterr() == ("", "")


def test_long_work_is_told_of_now_and_then_on_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with progress.reporter() as report:
        for second in range(26):
            now = float(second)
            report("reading", second, 100)
        report("writing", 0, 5)
        now += 3
        report("writing", 1, 5)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines() == ["reading: 2/100", "reading: 12/100", "reading: 22/100", "writing: 1/5"]


def test_a_terminal_gets_a_bar_that_leaves_nothing_on_stdout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with progress.progress("reading", 2) as bar:
        bar.advance(2)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "reading" in shown.err
