"""`hasten COMMAND ...`: finds the command by its file name, reads its options, runs it, and shows errors.

A command is a module beside this one with `HELP: str`, a frozen dataclass `Options` (see options.py) and
`run(options) -> int | None`, the exit status. It imports nothing heavy until it runs. Data goes to stdout, all else to
stderr. Exit status: 0 done; 1 done, but the answer is no; 2 wrong input; 130 interrupted.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import io
import os
import pkgutil
import sys
from types import ModuleType

import hasten
import hasten.cli
from hasten.cli import options
from hasten.errors import HastenError, InputError, OutputError

NOT_COMMANDS = frozenset({"cache", "main", "options", "progress", "sampling"})


def commands() -> list[str]:
    """Every subcommand's name: its file's, with "-" for "_"."""
    return sorted(
        m.name.replace("_", "-") for m in pkgutil.iter_modules(hasten.cli.__path__) if m.name not in NOT_COMMANDS
    )


def load(name: str) -> ModuleType:
    """The module of a subcommand. Raises InputError where there is none of that name."""
    if name not in commands():
        close = difflib.get_close_matches(name, commands(), 1)
        hint = f"did you mean {close[0]}?" if close else f"commands: {', '.join(commands())}"
        raise InputError(f"no such command: {name}", hint)
    return importlib.import_module(f"hasten.cli.{name.replace('-', '_')}")


def main(arguments: list[str] | None = None) -> int:
    """The entry point. Returns the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character is no reason to stop
    try:
        status = _run(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
        return status
    except HastenError as error:
        _show(error)
        return 2
    except MemoryError:
        _show(HastenError("out of memory", "a smaller --context or --batch, or a smaller model, needs less"))
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our stdout went away (`| head`): that is its right
        _drop_output()
        return 141
    except OSError as error:
        what = error.filename or "standard output"
        _show(OutputError(f"{what}: {error.strerror or error}"))
        if error.filename is None:
            _drop_output()
        return 2


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"hasten {hasten.__version__}")
        return 0
    name, *rest = arguments
    if name.startswith("-"):
        raise InputError(f"unknown option: {name}", "hasten --help lists the commands; options stand after one")
    module = load(name)
    try:
        chosen = options.parse(module.Options, rest, prog=f"hasten {name}", description=module.HELP)
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    return int(module.run(chosen) or 0)


def overview() -> str:
    """What `hasten --help` prints."""
    lines = [f"{name:<12}{load(name).HELP}" for name in commands()]
    return "\n  ".join(["usage: hasten COMMAND ...\n\ncommands:", *lines]) + "\n\nhasten COMMAND --help says more."


def _drop_output() -> None:
    """What is still buffered can go nowhere: the interpreter must not try again when it ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show(error: HastenError) -> None:
    print(f"error: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"hint: {error.hint}", file=sys.stderr)
