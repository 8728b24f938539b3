"""The engine on a thread of its own, and requests to it from asyncio.

The engine's thread sleeps while there is nothing to do. What a step brings is handed to the event loop in one call.
An engine that fails takes the requests it was running with it, and is started anew, where nothing else is said once.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from hasten.engine.engine import Engine
from hasten.engine.request import SamplingParams, Sequence
from hasten.errors import HastenError
from hasten.server.stats import Stats
from hasten.server.ticket import Delta, EngineFault, GivenUp, Item, Overloaded, Ticket, Unavailable

log = logging.getLogger("hasten.server")

State = Literal["serving", "draining", "failed", "stopped"]
SWITCH_SECONDS = 0.0005
"""How long one thread may keep Python from the other: the engine's waits for the event loop's at every token."""


@dataclass(frozen=True)
class ServiceLimits:
    """What a service takes on, and how long its engine may be silent."""

    queue: int = 256
    """Choices that may wait for their turn, besides those that run."""
    stall_seconds: float = 120.0
    """A step that takes longer counts as hung."""
    restarts: int = 1
    """How often an engine that failed is made anew."""


@dataclass(frozen=True)
class Health:
    ok: bool
    status: str
    """serving, draining, failed, stopped or stalled."""
    restarts: int
    cause: str | None
    """Of the last fault of the engine."""
    running: int
    waiting: int
    heartbeat_seconds: float
    """Since the engine last computed something; only tells something while there is work."""


@dataclass(slots=True)
class _Choice:
    """One choice of a ticket while the engine has it: what has been handed out of it, and when."""

    ticket: Ticket
    index: int
    at: float
    text: int = 0
    tokens: int = 0


class Service:
    """Runs the engine that `make_engine` makes, and makes another one when it fails, as often as `limits` say."""

    def __init__(self, make_engine: Callable[[], Engine], limits: ServiceLimits | None = None) -> None:
        self.limits = limits or ServiceLimits()
        self.engine = make_engine()
        self.stats = Stats()
        self.state: State = "serving"
        self.restarts = 0
        self.cause: str | None = None
        self._make_engine = make_engine
        self._changed = threading.Condition()
        self._inbox: deque[Callable[[], None]] = deque()
        self._live: dict[Sequence, _Choice] = {}  # of the engine's thread alone
        self._out: dict[asyncio.AbstractEventLoop, list[tuple[Ticket, Item]]] = {}
        self._active = 0  # choices that were taken on and have not ended
        self._beat = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="hasten-engine", daemon=True)
        self._thread.start()

    # --- from any thread

    @property
    def active(self) -> int:
        """Choices that run or wait."""
        return self._active

    @property
    def places(self) -> int:
        """Choices that may run or wait at once."""
        return self.engine.program.limits.max_sequences + self.limits.queue

    def check_room(self, choices: int) -> None:
        """Raise Unavailable where nothing is taken on any more, Overloaded where there is no room for so many now."""
        if self.state != "serving":
            raise Unavailable(f"the server is not taking requests: {self.state}")
        if self._active + choices > self.places:
            raise self.overloaded()

    def overloaded(self) -> Overloaded:
        """The refusal of one more request, counted."""
        self.stats.refused += 1
        return Overloaded(self._retry_after())

    def submit(self, prompt: list[int], params: SamplingParams, **how: Any) -> Ticket:
        """Take a request on; to be called in a running event loop. `how` is what Engine.add takes besides.

        Raises InputError or ContextError where it cannot be run, Overloaded where the queue is full, Unavailable where
        nothing is taken on any more.
        """
        checked = {k: v for k, v in how.items() if k not in ("cache_salt", "skip_special_tokens")}
        self.engine.check(prompt, params, **checked)
        ticket = Ticket(asyncio.get_running_loop(), params.n, self._cancel)
        with self._changed:
            self.check_room(params.n)
            if not self._active:
                self._beat = time.monotonic()
            self._active += params.n
            self._inbox.append(partial(self._start, ticket, prompt, params, how))
            self._changed.notify_all()
        return ticket

    def health(self) -> Health:
        """Whether requests are answered: not while draining, after a second fault, or when a step hangs."""
        silent = time.monotonic() - self._beat
        status: str = self.state
        if status in ("serving", "draining") and self._active and silent > self.limits.stall_seconds:
            status = "stalled"
        running = len(self.engine.scheduler.running)
        waiting = max(self._active - running, 0)
        return Health(status == "serving", status, self.restarts, self.cause, running, waiting, silent)

    def refuse(self) -> None:
        """Take nothing on any more; what runs goes on. Waits for no lock, so that a signal's handler may call it."""
        if self.state == "serving":
            self.state = "draining"

    def stop(self, seconds: float = 5.0) -> None:
        """End the engine's thread; what is still running fails."""
        self.end()
        self._thread.join(seconds)

    def end(self) -> None:
        """As stop, without waiting for it."""
        with self._changed:
            if self.state != "failed":
                self.state = "stopped"
            self._changed.notify_all()

    def _cancel(self, ticket: Ticket) -> None:
        with self._changed:
            self._inbox.append(partial(self._abort, ticket))
            self._changed.notify_all()

    def _retry_after(self) -> int:
        """Seconds until there is likely to be room: what a request took so far, for each batch that waits."""
        took, count = self.stats.request.sum, sum(self.stats.request.counts)
        batches = self._active / self.engine.program.limits.max_sequences
        return max(1, min(60, math.ceil(took / count * batches / 2))) if count else 1

    # --- the engine's thread

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._inbox or self._live or self.state == "stopped")
                if not self._live:  # there was nothing to do
                    self._beat = time.monotonic()
            if self.state == "stopped":
                self._fail_all(Unavailable("the server is shutting down"))
                return
            try:
                self._turn()
            except BaseException as error:  # also panics of Rust, which are no Exception: a silent end would be worst
                if not self._recover(error):
                    return

    def _turn(self) -> None:
        while self._inbox:
            self._inbox.popleft()()
        before = self.engine.steps
        self._report(self.engine.step())
        if self.engine.steps != before:  # going round without computing anything is no sign of life
            self._beat = time.monotonic()
        self._send()

    def _start(self, ticket: Ticket, prompt: list[int], params: SamplingParams, how: dict[str, Any]) -> None:
        if ticket.cancelled:
            self._release(params.n, "abort")
            return
        try:
            sequences = self.engine.add(prompt, params, **how)
        except BaseException as error:
            self._post(ticket, error if isinstance(error, HastenError) else EngineFault(_reason(error)))
            self._release(params.n, "error")
            if not isinstance(error, Exception):
                raise
            if not isinstance(error, HastenError):
                log.error("a request could not be queued", exc_info=error)
            return
        self.stats.prompt_tokens += len(prompt)
        self._live.update((s, _Choice(ticket, i, ticket.submitted)) for i, s in enumerate(sequences))

    def _abort(self, ticket: Ticket, why: str = "abort") -> None:
        for sequence in [s for s, choice in self._live.items() if choice.ticket is ticket]:
            self.engine.abort(sequence)
            self._end(sequence, why)

    def _report(self, sequences: list[Sequence]) -> None:
        """Hand out what a step has brought."""
        now = time.monotonic()
        for sequence in sequences:
            choice = self._live.get(sequence)
            if choice is None:
                continue
            failure = _failure(sequence)
            if failure:
                self._post(choice.ticket, failure)
                self._abort(choice.ticket, "error")
                continue
            if len(sequence.tokens) - sequence.prompt_length > choice.tokens:
                self._time(choice, now)
            self._post(choice.ticket, _delta(sequence, choice))
            if sequence.finish_reason:
                self._end(sequence, sequence.finish_reason)
        scheduler, stats = self.engine.scheduler, self.stats
        stats.looked_up += scheduler.prompt_tokens
        stats.cached_tokens += scheduler.found_tokens
        stats.preemptions += scheduler.preemptions
        scheduler.prompt_tokens = scheduler.found_tokens = scheduler.preemptions = 0

    def _time(self, choice: _Choice, now: float) -> None:
        histogram = self.stats.between_tokens if choice.tokens else self.stats.first_token
        histogram.observe(now - choice.at)
        choice.at = now
        self.stats.generated_tokens += 1

    def _end(self, sequence: Sequence, why: str) -> None:
        choice = self._live.pop(sequence)
        self.stats.request.observe(time.monotonic() - choice.ticket.submitted)
        self._release(1, why)

    def _release(self, count: int, why: str) -> None:
        self.stats.finished[why] += count
        with self._changed:
            self._active -= count
            self._changed.notify_all()

    def _post(self, ticket: Ticket, item: Item) -> None:
        self._out.setdefault(ticket.loop, []).append((ticket, item))

    def _send(self) -> None:
        """One call into each event loop for all that was posted."""
        posted, self._out = self._out, {}
        for loop, items in posted.items():
            try:
                loop.call_soon_threadsafe(_hand_over, items)
            except RuntimeError:  # the loop is closed: nobody is there to listen
                log.debug("an event loop went away before its answers")

    def _recover(self, error: BaseException) -> bool:
        """Fail what was running; True where there is an engine again."""
        log.error("the engine failed", exc_info=error)
        self.stats.faults += 1
        self.cause = _reason(error)
        fault: Exception = EngineFault(self.cause)
        if self.restarts < self.limits.restarts:
            try:
                self._fail_live(fault)
                self.engine = self._make_engine()
                self.restarts += 1
                log.warning("the engine was started anew after: %s", self.cause)
                return True
            except BaseException as second:  # a panic too: a thread that ends without a word leaves clients waiting
                log.error("the engine cannot be started anew", exc_info=second)
        with self._changed:
            if self.state != "stopped":
                self.state = "failed"
        self._fail_all(fault)
        return False

    def _fail_live(self, error: Exception) -> None:
        for ticket in {choice.ticket for choice in self._live.values()}:
            self._post(ticket, error)
        for sequence in list(self._live):
            self._end(sequence, "error")
        self._send()

    def _fail_all(self, error: Exception) -> None:
        """Also those that the engine has not seen yet: nothing is taken on any more, so these are the last."""
        while self._inbox:
            command = self._inbox.popleft()
            if isinstance(command, partial) and command.func == self._start:
                self._post(command.args[0], error)
                self._release(command.args[2].n, "error")
        self._fail_live(error)


def _failure(sequence: Sequence) -> Exception | None:
    """What befell a sequence alone."""
    if sequence.error is not None:
        log.error("a request failed alone", exc_info=sequence.error)
        return EngineFault(_reason(sequence.error))
    if sequence.finish_reason == "abort":  # nobody but the engine ends what is still in its steps
        log.warning("%s", sequence.stop_reason)
        return GivenUp(str(sequence.stop_reason))
    return None


def _delta(sequence: Sequence, choice: _Choice) -> Delta:
    """What `sequence` has gained since the last one."""
    begin, first = choice.tokens, choice.tokens == 0
    tokens = sequence.tokens[sequence.prompt_length + begin :].tolist()
    text = sequence.text[choice.text :]
    choice.tokens += len(tokens)
    choice.text += len(text)
    return Delta(
        index=choice.index,
        text=text,
        token_ids=tokens,
        logprobs=sequence.logprobs[begin : choice.tokens],
        top=sequence.top[begin : choice.tokens],
        finish_reason=sequence.finish_reason,
        stop_reason=sequence.stop_reason,
        prompt_scores=sequence.scores if first else None,
        cached_tokens=sequence.cached if first else 0,
    )


def _hand_over(items: list[tuple[Ticket, Item]]) -> None:
    """In the event loop."""
    for ticket, item in items:
        ticket.push(item)


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip() or 'no message'}".splitlines()[0][:300]
