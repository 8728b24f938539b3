"""Structured output: which tokens may follow under a JSON schema, regex, grammar or list of choices, by llguidance.

`Guidance.compile` may run on any thread; a `Guide` follows one choice by its drawn tokens alone, so that preemption and
recomputation are nothing to it. What a model thinks aloud before its answer is free.
"""

from __future__ import annotations

import json
import subprocess
import sys
from array import array
from collections import OrderedDict
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any, Protocol

import numpy as np

from hasten.backends.batch import UInt32
from hasten.engine import trial
from hasten.engine.constraints import bitmask
from hasten.engine.request import StructuredOutputsParams
from hasten.engine.text import TokenStream
from hasten.errors import DependencyError, InputError

LONGEST = 65_536
"""Characters of a schema, regex, grammar or list of choices."""
PATIENCE = 60.0
"""Seconds of waiting for a trial, whose processor time is bounded by itself."""
KNOWN = 64
"""Grammars that are not tried again when they come again."""
BLANKS = r" |\n {0,16}|\n\t{0,8}"
"""What may stand between the parts of a JSON text: a space, or a line's end and an indent. Models that may write blanks
without end do."""


class Definition(Protocol):
    """What is needed of a tokenizer."""

    def definition(self) -> str: ...
    def encode(self, text: str, special: bool = True) -> list[int]: ...
    def stream(self, skip_special: bool = True) -> TokenStream: ...


@dataclass(frozen=True)
class Thought:
    """What may stand before an output that must look like something: any text from the mark `open` to `close`.

    `opened`: the prompt ends with `open`. Else the model may begin with it, where it is a token of its own.
    """

    open: str
    close: str
    opened: bool


class Guidance:
    """Compiles what outputs must look like, for one model's `vocabulary` tokens. Several threads may use it.

    Nothing is imported or built before it is first needed.
    """

    def __init__(self, tokenizer: Definition | None, vocabulary: int, eos_token_ids: Collection[int]) -> None:
        self._tokenizer, self._vocabulary, self._eos = tokenizer, vocabulary, sorted(eos_token_ids)
        self._lock = Lock()
        self._tokens: Any = None
        self._special: list[str] = []
        self._known: OrderedDict[str, None] = OrderedDict()

    def compile(self, wanted: StructuredOutputsParams, thought: Thought | None = None, choices: int = 1) -> Grammar:
        """What `wanted` asks for after a `thought`, ready to start so many `choices`, and slower to start more.

        Takes up to some seconds where it is large and new. Raises InputError where it is not valid, too large, or takes
        too long; DependencyError without llguidance.
        """
        make = partial(self._matcher, *self._tried(wanted))
        ready = [make() for _ in range(choices)]
        return Grammar(make, ready, (self._vocabulary + 31) // 32, self._before(thought) if thought else None)

    def _before(self, thought: Thought) -> Callable[[], _Thinking]:
        """What follows such a thought, once for each choice."""
        assert self._tokenizer is not None
        tokenizer = self._tokenizer
        opening = tokenizer.encode(thought.open, special=False)
        first = opening[0] if len(opening) == 1 and not thought.opened else None
        begins = bitmask([] if first is None else [first], self._vocabulary)
        every, ends = bitmask(range(self._vocabulary), self._vocabulary), bitmask(self._eos, self._vocabulary)
        free = every & ~ends  # a thought does not end the output
        return lambda: _Thinking(thought, tokenizer, first, begins, free)

    def _tried(self, wanted: StructuredOutputsParams) -> tuple[str, str]:
        """(field, the library's own text of the grammar), which can be compiled within the limits."""
        library = _library()
        kind, source = _source(library, wanted)
        self._known_tokens(library)
        with self._lock:
            known = source in self._known
        if not known:
            _try(kind, {"grammar": source, "vocabulary": self._vocabulary, "special": self._special})
        with self._lock:
            self._known[source] = None
            self._known.move_to_end(source)
            while len(self._known) > KNOWN:
                self._known.popitem(last=False)
        return kind, source

    def _matcher(self, kind: str, source: str) -> Any:
        """A new one for each choice: the library's copies share the states of their lexer, and so their limit on them,
        so that what one has written would decide when another is given up."""
        library = _library()
        limits = library.LLParserLimits(
            max_lexer_states=trial.LEXER_STATES, max_grammar_size=trial.GRAMMAR_SIZE, verbose_errors=False
        )
        matcher = library.LLMatcher(self._known_tokens(library), source, log_level=0, limits=limits)
        if matcher.is_error():
            raise _invalid(kind, matcher.get_error())
        return matcher

    def _known_tokens(self, library: Any) -> Any:
        """The tokens as llguidance wants them: about a second for a large vocabulary, once."""
        if self._tokenizer is None:
            raise InputError("structured_outputs need a tokenizer")
        if not self._eos:
            raise InputError("structured_outputs need a token that ends the output, and this model names none")
        with self._lock:
            if self._tokens is None:
                definition = self._tokenizer.definition()
                added = json.loads(definition).get("added_tokens", ())
                self._special = [token["content"] for token in added if token["special"]]
                self._tokens = library.LLTokenizer(definition, n_vocab=self._vocabulary, eos_token=self._eos)
            return self._tokens


class Grammar:
    """Compiled, for one request: starts a guide for each choice. `words`: of 32 tokens each, in a mask.

    A choice takes its matcher when it first needs one, so that those that wait hold none.
    """

    def __init__(
        self, make: Callable[[], Any], ready: list[Any], words: int, before: Callable[[], _Thinking] | None
    ) -> None:
        self._make, self._ready, self._words, self._before = make, ready, words, before
        self._later = 0
        self._submit: Callable[[Callable[[], None]], object] = lambda prepare: None

    def start(self) -> Guide:
        return Guide(self._take, self._words, self._before() if self._before else None)

    def prepare(self) -> None:
        """Make one more ready; on any thread."""
        self._ready.append(self._make())

    def prepare_later(self, count: int, submit: Callable[[Callable[[], None]], object]) -> None:
        """For so many choices that start later, have `submit` run `prepare` as each of those before them starts."""
        self._later, self._submit = count, submit

    def _take(self) -> Any:
        """A matcher that no other choice has."""
        if self._later > 0:
            self._later -= 1
            with suppress(RuntimeError):  # the threads have ended: it is made here
                self._submit(self.prepare)
        try:
            return self._ready.pop()
        except IndexError:
            return self._make()

    @property
    def beginning(self) -> UInt32:
        """[ceil(vocabulary / 32)] a bit for each token that it may begin with, after any thought."""
        if not self._ready:
            self.prepare()
        return _mask(self._ready[-1], self._words)


class Guide:
    """Follows one output. Once it is complete only its end may follow; so too where the library gives up (`error`)."""

    def __init__(self, take: Callable[[], Any], words: int, thinking: _Thinking | None) -> None:
        self._take, self._words, self._thinking, self._taken = take, words, thinking, 0
        self._matcher: Any = None

    def mask(self, output: array[int]) -> UInt32:
        """[ceil(vocabulary / 32)] a bit for each token that may follow `output`, the tokens drawn so far."""
        new = output[self._taken :].tolist()
        self._taken = len(output)
        thinking = self._thinking
        if thinking:
            new = thinking.follow(new)
            if thinking.inside:
                return thinking.free
        if self._matcher is None:
            self._matcher = self._take()
        if new:
            self._matcher.consume_tokens(new)
        mask = _mask(self._matcher, self._words)
        return mask | thinking.begins if thinking and not output else mask

    @property
    def error(self) -> str:
        """Why the library gave up, where a step met its limits; else empty."""
        reason = " ".join(self._matcher.get_error().split()) if self._matcher is not None else ""
        return f"structured output was given up: {reason[:200]}" if reason else ""


class _Thinking:
    """Tells one choice's thought from what follows. `begins` and `free` are masks, before it and within."""

    def __init__(
        self, thought: Thought, tokenizer: Definition, first: int | None, begins: UInt32, free: UInt32
    ) -> None:
        self.inside, self.begins, self.free = thought.opened, begins, free
        self._close, self._first, self._encode = thought.close, first, tokenizer.encode
        self._stream, self._text = tokenizer.stream(False), ""

    def follow(self, tokens: list[int]) -> list[int]:
        """Those of the next drawn `tokens` that come after the thought."""
        if tokens and tokens[0] == self._first:
            self.inside, tokens = True, tokens[1:]
        self._first = None if tokens or self.inside else self._first
        for i, token in enumerate(tokens if self.inside else ()):
            self._text, closed, rest = (self._text + self._stream.push(token)).partition(self._close)
            if closed:  # the same token may begin the answer: to the grammar, text is text however it is cut
                self.inside = False
                rest = rest.lstrip("\n")
                return [*(self._encode(rest, False) if rest else ()), *tokens[i + 1 :]]
            self._text = self._text[-len(self._close) :]
        return [] if self.inside else tokens


def _mask(matcher: Any, words: int) -> UInt32:
    return np.frombuffer(matcher.compute_bitmask(), np.uint32)[:words]


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise DependencyError("llguidance is not installed", "pip install 'hasten[serve]'") from None
    return llguidance


def _source(library: Any, wanted: StructuredOutputsParams) -> tuple[str, str]:
    """(field, the library's own text of the grammar)."""
    kind, value = wanted.kind, getattr(wanted, wanted.kind)
    if kind in ("json", "json_object"):
        text = '{"type": "object"}' if kind == "json_object" else value if isinstance(value, str) else _dump(value)
        _check_length(kind, text)
        try:
            grammar = library.LLMatcher.grammar_from_json_schema(text, defaults={"whitespace_pattern": BLANKS})
        except ValueError as error:
            raise _invalid(kind, str(error)) from None
        return kind, str(grammar)
    # One symbol of the lexer: as many rules, some thousand choices would be too many for the parser.
    text = "start: ONE\nONE: " + " | ".join(map(json.dumps, value)) if kind == "choice" else str(value)
    _check_length(kind, text)
    make = library.LLMatcher.grammar_from_regex if kind == "regex" else library.LLMatcher.grammar_from_lark
    return kind, str(make(text))


def _dump(schema: object) -> str:
    try:
        return json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise _invalid("json", str(error)) from None


def _check_length(kind: str, text: str) -> None:
    if len(text) > LONGEST:
        raise InputError(f"structured_outputs.{kind} has {len(text)} characters, must have {LONGEST} or less")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _invalid(kind, "half of a surrogate pair is no character") from None


def _try(kind: str, task: dict[str, Any]) -> None:
    """Compile in a process that can be stopped. Raises InputError where that fails or takes too much."""
    command = [sys.executable, "-P", trial.__file__]
    try:
        done = subprocess.run(command, input=json.dumps(task).encode(), capture_output=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        done = None
    if done is not None and done.returncode == 0:
        if done.stdout:
            raise _invalid(kind, done.stdout.decode(errors="replace"))
        return
    raise InputError(
        f"structured_outputs.{kind} takes more than {trial.SECONDS} s or {trial.BYTES >> 30} GiB to compile",
        "make it simpler",
    )


def _invalid(kind: str, reason: str) -> InputError:
    lines = " ".join(reason.split())
    return InputError(f"structured_outputs.{kind} is not valid: {lines if len(lines) <= 300 else lines[:297] + '...'}")
