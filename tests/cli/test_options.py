from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from hasten.cli.options import argument, option, parse, required
from hasten.errors import InputError


@dataclass(frozen=True)
class Options:
    model: str = argument(help="the model")
    data: Path = required(help="a file, 100% of it")
    tokens: int = option(128, "-n", help="tokens")
    top_p: float = option(1.0, help="nucleus")
    seed: int | None = option(None, help="seed")
    batch: tuple[int, ...] = option([1, 4], help="batch sizes")
    objective: str = option("decode", help="what to speed up", choices=["decode", "prefill"])
    json: bool = option(False, help="JSON")


def read(*arguments: str) -> Options:
    return parse(Options, list(arguments), prog="hasten try", description="tries")


def test_defaults() -> None:
    assert read("m", "--data", "f") == Options("m", Path("f"), 128, 1.0, None, (1, 4), "decode", False)


def test_everything_given() -> None:
    found = read(
        "m", "--data=f", "-n", "5", "--top-p", "0.5", "--seed", "-7", "--batch", "2, 8", "--objective", "prefill"
    )
    assert found == Options("m", Path("f"), 5, 0.5, -7, (2, 8), "prefill", False)
    assert read("m", "--data", "f", "--json").json


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["m"], "--data"),
        (["--data", "f"], "MODEL"),
        (["m", "--data", "f", "-n", "many"], "'many' is not a whole number"),
        (["m", "--data", "f", "--top-p", "x"], "'x' is not a number"),
        (["m", "--data", "f", "--batch", "1,,2"], "'' is not a whole number"),
        (["m", "--data", "f", "--objective", "beauty"], "beauty"),
        (["m", "--data", "f", "--tok", "3"], "unrecognized arguments: --tok"),
    ],
)
def test_wrong_arguments_are_typed_errors(arguments: list[str], message: str) -> None:
    with pytest.raises(InputError) as error:
        read(*arguments)
    assert message in error.value.message
    assert error.value.hint


def test_a_misspelt_flag_is_met_with_the_right_one() -> None:
    with pytest.raises(InputError) as error:
        read("m", "--data", "f", "--topp", "3")
    assert error.value.hint == "did you mean --top-p?"


def test_help_names_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read("--help")
    shown = capsys.readouterr().out
    assert "100% of it" in shown
    assert "(default: 1,4)" in shown
