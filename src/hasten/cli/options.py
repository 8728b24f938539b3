"""A command's flags, defaults and help, derived from the fields of its frozen `Options` dataclass.

@dataclass(frozen=True)
class Options:
    model: str = argument(help="what to run")
    tokens: int = option(128, "-n", help="tokens to make at most")
    batch: tuple[int, ...] = option((1, 4), help="batch sizes")      # --batch 1,4
    json: bool = option(False, help="print JSON")                    # --json
    data: Path = required(help="text to score")                      # --data FILE must be given
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

from hasten.errors import InputError


def argument(*, help: str, metavar: str | None = None, default: Any = dataclasses.MISSING) -> Any:
    """A positional argument; with a `default` it may be left out."""
    return dataclasses.field(default=default, metadata={"positional": True, "help": help, "metavar": metavar})


def option(
    default: Any,
    *flags: str,
    help: str,
    choices: Iterable[str] | None = None,
    metavar: str | None = None,
    repeat: bool = False,
) -> Any:
    """An option named after its field, `--like-this`, and by any further `flags`.

    With `repeat`, a tuple's option may be given several times, each time with one value, which is not cut at commas.
    """
    if isinstance(default, list):
        default = tuple(default)
    return dataclasses.field(
        default=default,
        metadata={
            "flags": flags,
            "help": help,
            "choices": list(choices) if choices else None,
            "metavar": metavar,
            "repeat": repeat,
        },
    )


def required(*flags: str, help: str, metavar: str | None = None) -> Any:
    """An option that must be given. Stands before fields with defaults."""
    return dataclasses.field(metadata={"flags": flags, "help": help, "metavar": metavar, "required": True})


def group(options: type[Any]) -> Any:
    """The options of another dataclass, among this command's own."""
    return dataclasses.field(default_factory=options)


def parse(options: type[Any], arguments: list[str], *, prog: str, description: str) -> Any:
    """An instance of `options` from command line `arguments`. Raises InputError naming what is wrong."""
    parser = _Parser(prog=prog, description=description, allow_abbrev=False)
    _declare(parser, options)
    return _build(options, vars(parser.parse_args(arguments)))


class _Parser(argparse.ArgumentParser):
    """Wrong arguments become InputError, so that they are shown like every other error."""

    def error(self, message: str) -> NoReturn:
        hint = f"{self.prog} --help lists what it takes"
        if message.startswith("unrecognized arguments: "):
            unknown = message.split(": ", 1)[1].split()[0].split("=")[0]
            close = difflib.get_close_matches(unknown, [f for a in self._actions for f in a.option_strings], 1)
            hint = f"did you mean {close[0]}?" if close else hint
        raise InputError(message, hint)


class _Extend(argparse.Action):
    """Every time the option is given its value is added."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, (*getattr(namespace, self.dest), values))


def _declare(parser: argparse.ArgumentParser, options: type[Any]) -> None:
    hints = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        kind = hints[field.name]
        if _is_group(kind):
            _declare(parser, kind)
        else:
            _add(parser, field, kind)


def _is_group(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind)


def _build(options: type[Any], values: dict[str, Any]) -> Any:
    hints = typing.get_type_hints(options)
    given = {name: _build(kind, values) if _is_group(kind) else values[name] for name, kind in hints.items()}
    return options(**given)


def _add(parser: argparse.ArgumentParser, field: dataclasses.Field[Any], kind: Any) -> None:
    name, facts = field.name, field.metadata
    help = facts["help"].replace("%", "%%")
    if facts.get("positional"):
        given: dict[str, Any] = {} if field.default is dataclasses.MISSING else {"nargs": "?", "default": field.default}
        parser.add_argument(name, type=_reader(kind), help=help, metavar=facts["metavar"] or name.upper(), **given)
        return
    flags = [*facts["flags"], "--" + name.replace("_", "-")]
    if kind is bool:
        parser.add_argument(*flags, dest=name, action="store_true", help=help)
        return
    if facts.get("repeat"):
        (one, *_) = typing.get_args(kind)
        help += _shown(field.default)
        metavar = facts["metavar"] or name.upper()
        parser.add_argument(
            *flags, dest=name, type=_reader(one), action=_Extend, default=(), help=help, metavar=metavar
        )
        return
    must = bool(facts.get("required"))
    default = None if must else field.default
    parser.add_argument(
        *flags,
        dest=name,
        type=_reader(kind),
        default=default,
        required=must,
        choices=facts.get("choices"),
        metavar=facts["metavar"] or (None if facts.get("choices") else name.upper()),
        help=help + _shown(default),
    )


def _shown(default: Any) -> str:
    if default is None or default == "" or default == ():
        return ""
    text = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
    return f" (default: {text.replace('%', '%%')})"


def _reader(kind: Any) -> Callable[[str], Any]:
    """str -> value of a field's type: str, int, float, Path, any of them or None, tuple[...] or list[...] of one."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        (kind,) = (k for k in inner if k is not type(None))
        return _reader(kind)
    if origin in (tuple, list):
        one = _reader(inner[0])

        def read_list(text: str) -> Any:
            values = [one(part.strip()) for part in text.split(",")]
            return tuple(values) if origin is tuple else values

        return read_list
    words = {int: "a whole number", float: "a number"}

    def read(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is not {words.get(kind, f'a {kind.__name__}')}") from None

    assert kind in (str, int, float, Path), f"no way to read {kind} from a command line"
    return read
