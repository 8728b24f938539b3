"""`hasten chat`: a conversation in the terminal. Ctrl-C stops an answer, /clear forgets, /exit or Ctrl-D ends."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING

from hasten.cli.cache import Room
from hasten.cli.options import argument, group, option
from hasten.cli.progress import reporter
from hasten.cli.sampling import Sampling
from hasten.errors import InputError

if TYPE_CHECKING:
    from hasten.engine.llm import LLM
    from hasten.engine.request import SamplingParams

HELP = "talk to a model that has a chat template"
COMMANDS = "/clear forgets the conversation, /exit or Ctrl-D ends, Ctrl-C stops an answer"


@dataclass(frozen=True)
class Options:
    model: str = argument(help="directory, hub id or hasten artifact")
    system: str | None = option(None, help="what the model is told before the conversation")
    tokens: int | None = option(None, "-n", help="tokens of one answer at most (default: what the context leaves)")
    sampling: Sampling = group(Sampling)
    context: int | None = option(None, help="tokens of the whole conversation (default: the model's, at most 4096)")
    cache: Room = group(Room)
    threads: int = option(0, help="0: one a core")


def run(options: Options) -> None:
    from hasten import checkpoint
    from hasten.engine.llm import LLM

    model = checkpoint.open(options.model)
    if not model.tokenizer.has_chat_template:
        raise InputError(f"{options.model} has no chat template", "`hasten generate` continues plain text")
    params = options.sampling.params(model.generation, max_tokens=options.tokens)
    with reporter() as report:
        llm = LLM(
            model,
            context=options.context,
            max_batch=1,
            threads=options.threads,
            kv_format=options.cache.kv_format,
            memory=options.cache.budget,
            report=report,
        )
    print(COMMANDS, file=sys.stderr)
    _converse(llm, params, [{"role": "system", "content": options.system}] if options.system else [])


def _converse(llm: LLM, params: SamplingParams, start: list[dict[str, str]]) -> None:
    history = list(start)
    interrupts: list[int] = []
    # Outside _listen Ctrl-C is noted instead of raised, so that no step is torn apart.
    with _on_interrupt(lambda number, frame: interrupts.append(number)):
        while (said := _listen()) is not None:
            command = said.strip()
            if command == "/exit":
                return
            if command == "/clear":
                history = list(start)
                print("forgotten", file=sys.stderr)
            elif command.startswith("/") and " " not in command:
                print(f"unknown command {command}: {COMMANDS}", file=sys.stderr)
            elif command:
                asked = [*history, {"role": "user", "content": said}]
                interrupts.clear()
                try:
                    answer = _answer(llm, params, asked, interrupts)
                except InputError as error:
                    print(f"error: {error.message}\nhint: /clear begins anew", file=sys.stderr)
                else:
                    history = [*asked, {"role": "assistant", "content": answer}]


def _listen() -> str | None:
    """What the user says; None at the end of input."""
    while True:
        try:
            with _on_interrupt(signal.default_int_handler):
                if sys.stdin.isatty():
                    import readline  # noqa: F401 - gives input() its line editing

                    return input("> ")
                line = sys.stdin.readline()
                return line.rstrip("\n") if line else None
        except EOFError:
            print(file=sys.stderr)
            return None
        except KeyboardInterrupt:
            print(f"\n{COMMANDS}", file=sys.stderr)


def _answer(llm: LLM, params: SamplingParams, messages: list[dict[str, str]], interrupts: list[int]) -> str:
    """Write the answer as it comes, until an interrupt is noted."""
    stream = llm.stream(llm.chat_prompt(messages), params)
    for piece in stream:
        print(piece, end="", flush=True)
        if interrupts:
            break
    stream.close()
    print(flush=True)
    if interrupts:
        print("(stopped)", file=sys.stderr)
    return stream.output.outputs[0].text


@contextmanager
def _on_interrupt(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Ctrl-C calls `handler` for the length of the with-block."""
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
