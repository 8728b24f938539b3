"""What a client of the service holds while its request is under way. All of it belongs to one event loop."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hasten.engine.request import FinishReason, PromptScores


class Overloaded(Exception):
    """The queue is full. `retry_after`: seconds after which there may be room."""

    def __init__(self, retry_after: int) -> None:
        super().__init__("the server's queue is full")
        self.retry_after = retry_after


class Unavailable(Exception):
    """Nothing is taken on any more: the server is shutting down, or its engine has failed for good."""


class EngineFault(Exception):
    """The engine failed while it had this request."""


class GivenUp(Exception):
    """What the output had to look like met limits midway: what there is of it is not what was asked for."""


@dataclass(slots=True)
class Delta:
    """What one choice has gained. Log-probabilities stand beside the tokens, one each."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[float]
    top: list[list[tuple[int, float]]]
    finish_reason: FinishReason | None
    stop_reason: int | str | None = None
    prompt_scores: PromptScores | None = None
    """With a choice's first delta, where they were asked for."""
    cached_tokens: int = 0
    """Tokens of the prompt that were found in the cache; with a choice's first delta."""

    def extend(self, later: Delta) -> None:
        """Take in what came next of the same choice."""
        self.text += later.text
        self.token_ids += later.token_ids
        self.logprobs += later.logprobs
        self.top += later.top
        self.finish_reason, self.stop_reason = later.finish_reason, later.stop_reason


Item = Delta | Exception


class Ticket:
    """Iterate for deltas of all choices as they come; whatever ended the request early is raised."""

    def __init__(self, loop: asyncio.AbstractEventLoop, choices: int, cancel: Callable[[Ticket], None]) -> None:
        self.loop = loop
        self.submitted = time.monotonic()
        self.cancelled = False
        self._cancel = cancel
        self._items: deque[Item] = deque()
        self._unread: dict[int, Delta] = {}  # of each choice, what stands in _items
        self._waiter: asyncio.Future[None] | None = None
        self._open = choices

    def __aiter__(self) -> Ticket:
        return self

    async def __anext__(self) -> Delta:
        while (delta := self.take()) is None:
            if self.ended:
                raise StopAsyncIteration
            await arrival([self])
        return delta

    @property
    def ended(self) -> bool:
        """Nothing more will come."""
        return not self._open

    def take(self) -> Delta | None:
        """What came first of what was not taken yet, None where there is nothing. Raises what ended the request."""
        if not self._items:
            return None
        item = self._items.popleft()
        if isinstance(item, Exception):
            self._open = 0
            raise item
        del self._unread[item.index]
        self._open -= item.finish_reason is not None
        return item

    def push(self, item: Item) -> None:
        """Where the reader lags behind, what is new joins what it has not read of the same choice, so that it gets
        fewer, larger ones, and never more wait than there are choices."""
        if isinstance(item, Delta) and item.index in self._unread:
            self._unread[item.index].extend(item)
        else:
            self._items.append(item)
            if isinstance(item, Delta):
                self._unread[item.index] = item
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)

    def cancel(self) -> None:
        """Nobody waits for this any more: what it holds is given back. Does nothing where all has ended."""
        if self._open and not self.cancelled:
            self.cancelled = True
            self._cancel(self)


async def arrival(tickets: Sequence[Ticket]) -> None:
    """Wait until something comes for one of them; nobody else may be waiting for them."""
    waiter = tickets[0].loop.create_future()
    for ticket in tickets:
        ticket._waiter = waiter
    await waiter
