from __future__ import annotations

import json

import pytest

from hasten.cli.main import main


def test_json_and_text_tell_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["machine", "--seconds", "0.02", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["instruction_set"] in found["instruction_sets"]
    assert found["threads"] == found["cores"] >= 1
    assert min(found["memory_read_gbs"], found["int8_gmacs"], found["bf16_gmacs"]) > 0
    assert main(["machine", "--seconds", "0.02"]) == 0
    text = capsys.readouterr().out
    assert found["cpu"] in text
    assert f"limits, {found['threads']} threads" in text


def test_threads_are_as_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["machine", "--seconds", "0.02", "--threads", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["threads"] == 1


@pytest.mark.parametrize(("flag", "value"), [("--seconds", "0"), ("--seconds", "nan"), ("--threads", "-1")])
def test_wrong_numbers_are_refused(flag: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["machine", flag, value]) == 2
    assert f"error: {flag} is" in capsys.readouterr().err
