"""Chat templates: Jinja that comes with a model, so it is rendered in a sandbox with bounds on time and size."""

from __future__ import annotations

import datetime
import functools
import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hasten.errors import CheckpointError, InputError

LARGEST_TEMPLATE = 1 << 20
LARGEST_OUTPUT = 16 << 20  # characters
LARGEST_NUMBER = 100_000  # as an argument: repeat counts and field widths
LARGEST_PRODUCT = 1 << 28  # length of what is worked on, times the largest argument (replace, indent, join ...)
LARGEST_GROWTH = 1 << 29  # bytes that the process may grow by
SECONDS = 5.0
WIDE_FIELD = re.compile(r"[0-9]{6}|\*")


class Refused(TemplateError):
    """The template's own raise_exception."""


class TooMuch(SecurityError):
    """The template computes for too long or makes too much."""


class Generation(Extension):
    """{% generation %} ... {% endgeneration %}, which marks the assistant's part for training: here only its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own protocol

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _bounded(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` refusing arguments that would make enormous strings."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        check_arguments((*args, *kwargs.values()))
        return function(*args, **kwargs)

    return call


def check_arguments(values: Sequence[object]) -> None:
    """Raise TooMuch where numbers, or sizes multiplied as replace and indent do, go beyond all reason."""
    if any(isinstance(v, int) and abs(v) > LARGEST_NUMBER for v in values):
        raise TooMuch(f"a number above {LARGEST_NUMBER} as an argument")
    sizes = sorted(_size(v) for v in values)
    if len(sizes) > 1 and sizes[-1] * sizes[-2] > LARGEST_PRODUCT:
        raise TooMuch("a value that long")
    if any(
        isinstance(v, list | tuple) and sum(len(x) for x in v if isinstance(x, str)) > LARGEST_OUTPUT for v in values
    ):
        raise TooMuch("a value that long")


def _size(value: object) -> int:
    if isinstance(value, str | list | tuple):
        return len(value)
    return abs(value) if isinstance(value, int) else 0


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which keeps templates from Python's inside, with sizes bounded too."""

    intercepted_binops = frozenset(["*", "**", "%", "+", "//", "-"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=["jinja2.ext.loopcontrols", Generation]
        )
        self.filters = {name: _bounded(f) for name, f in self.filters.items()}
        self.filters["tojson"] = _to_json
        del self.globals["lipsum"]  # makes up text for ever if asked to; no chat template needs it
        self.globals["raise_exception"] = _raise
        self.globals["strftime_now"] = lambda pattern: datetime.datetime.now().strftime(pattern)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for one, other in ((left, right), (right, left)):
                if hasattr(one, "__len__") and isinstance(other, int) and len(one) * other > LARGEST_OUTPUT:
                    raise TooMuch("a repetition that long")
        if operator == "**" and (not isinstance(right, int | float) or abs(right) > 64 or abs(left) > 1 << 32):
            raise TooMuch("a power that large")
        if operator == "%" and isinstance(left, str) and WIDE_FIELD.search(left):
            raise TooMuch("a field that wide")
        result = super().call_binop(context, operator, left, right)
        if hasattr(result, "__len__") and len(result) > LARGEST_OUTPUT:
            raise TooMuch("a value that long")
        if isinstance(result, int) and result.bit_length() > 4096:
            raise TooMuch("a number that large")
        return result

    def call(*args: Any, **kwargs: Any) -> Any:
        self, context, function, *rest = args
        check_arguments((getattr(function, "__self__", None), *rest, *kwargs.values()))
        return super(Sandbox, self).call(context, function, *rest, **kwargs)

    def wrap_str_format(self, value: Any) -> Any:
        owner = getattr(value, "__self__", None)
        if isinstance(owner, str) and WIDE_FIELD.search(owner):
            raise TooMuch("a field that wide")
        return super().wrap_str_format(value)


def _raise(message: object) -> None:
    raise Refused(str(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers defines it: Jinja's own escapes HTML."""
    if isinstance(indent, int) and indent > 64:
        raise TooMuch("an indentation that wide")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def render(template: str, values: Mapping[str, Any]) -> str:
    """The prompt that `template` makes of `values` (messages, tools, special tokens ...).

    Raises CheckpointError where the template itself is at fault, InputError where it refuses these messages.
    """
    if len(template) > LARGEST_TEMPLATE:
        raise CheckpointError(f"the chat template has {len(template)} characters, more than {LARGEST_TEMPLATE}")
    try:
        compiled = _compiled(template)
    except (TemplateError, SyntaxError, RecursionError, MemoryError, ValueError, OverflowError) as error:
        raise CheckpointError(f"the chat template cannot be read: {_reason(error)}") from None
    try:
        return _within_bounds(lambda: compiled.generate(**values))
    except Refused as error:
        raise InputError(f"the chat template refuses these messages: {_reason(error)}") from None
    except TooMuch as error:
        raise CheckpointError(f"the chat template asks for {_reason(error)}: stopped") from None
    except Exception as error:  # a template may fail in any way that Python code can
        raise CheckpointError(f"the chat template failed: {type(error).__name__}: {_reason(error)}") from None


@functools.lru_cache(maxsize=4)
def _compiled(template: str) -> Any:
    return Sandbox().from_string(template)


def _within_bounds(generate: Callable[[], Any]) -> str:
    """Join what the template yields; every line of it is traced, so that no loop outlives its time."""
    deadline, memory = time.monotonic() + SECONDS, _peak_memory() + LARGEST_GROWTH

    def line(frame: FrameType, event: str, argument: object) -> Any:
        if time.monotonic() > deadline:
            raise TooMuch(f"more than {SECONDS:g} seconds")
        if _peak_memory() > memory:
            raise TooMuch(f"more than {LARGEST_GROWTH} bytes of memory")
        return line

    def entered(frame: FrameType, event: str, argument: object) -> Any:
        line(frame, event, argument)  # Jinja's own functions are held to the bounds where they call one another
        return line if frame.f_code.co_filename == "<template>" else None

    chunks, length, before = [], 0, sys.gettrace()
    sys.settrace(entered)
    try:
        for chunk in generate():
            length += len(chunk)
            if length > LARGEST_OUTPUT:
                raise TooMuch(f"more than {LARGEST_OUTPUT} characters")
            chunks.append(chunk)
    finally:
        sys.settrace(before)
    return "".join(chunks)


def _peak_memory() -> int:
    """Bytes; 0 on systems without the resource module."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _reason(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
