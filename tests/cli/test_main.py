from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from hasten.cli import main as entry
from hasten.cli.main import commands, main
from hasten.errors import InputError


@pytest.mark.parametrize("flag", ["--version", "--help"])
def test_version_and_help_load_nothing_heavy(flag: str) -> None:
    heavy = {"numpy", "torch", "tokenizers", "rich", "jinja2", "highspy", "yaml", "huggingface_hub"}
    code = f"import sys; from hasten.cli.main import main; main(['{flag}']); sys.exit(str({heavy} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr == "set()\n"
    assert done.stdout.startswith("hasten 0." if flag == "--version" else "usage: hasten COMMAND")


def test_the_module_runs() -> None:
    done = subprocess.run([sys.executable, "-m", "hasten", "generat"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: no such command: generat\nhint: did you mean generate?\n"


@pytest.mark.parametrize("command", commands())
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr()
    assert entry.load(command).HELP in shown.out
    assert shown.err == ""


@pytest.mark.parametrize("command", commands())
def test_every_command_refuses_unknown_flags(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--no-such-flag"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert "\nhint: " in shown.err


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["generate", "m"], "the following arguments are required: -p/--prompt"),
        (["generate", "m", "-p", "x", "-n", "few"], "argument -n/--tokens: 'few' is not a whole number"),
        (["--quiet"], "unknown option: --quiet"),
    ],
)
def test_wrong_arguments(arguments: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.err.splitlines()[0] == f"error: {error}"
    assert shown.out == ""


@pytest.mark.parametrize(
    ("raised", "status", "shown"),
    [
        (InputError("it is wrong"), 2, "error: it is wrong\n"),
        (InputError("it is wrong", "mend it"), 2, "error: it is wrong\nhint: mend it\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (MemoryError(), 2, "error: out of memory\n"),
    ],
)
def test_exit_status(
    raised: BaseException, status: int, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(options: object) -> None:
        raise raised

    command = entry.load("machine")
    fake = SimpleNamespace(HELP=command.HELP, Options=command.Options, run=run)
    monkeypatch.setattr(entry, "load", lambda name: fake)
    assert main(["machine"]) == status
    assert capsys.readouterr().err.startswith(shown)


def test_a_reader_that_goes_away_is_no_error() -> None:
    done = subprocess.run(
        f"{sys.executable} -m hasten --help | true", shell=True, capture_output=True, text=True, timeout=60
    )
    assert done.stderr == ""
