"""The quality a user will give up, as stated on the command line: `ppl=1%`, `kl=0.02`, `agree=97%`, `task=FILE:-1pt`.

Every measure is a loss with a limit: growth of perplexity, nats a token, share of tokens at which the most likely token
is another one, share of a task's questions answered right that is lost. A budget may have several parts: all must hold.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hasten.errors import BudgetError

HINT = (
    "write ppl=1% (perplexity may grow by one percent), kl=0.02 (nats a token from the original), agree=97% (tokens "
    "whose most likely next one stays the same) or task=FILE.jsonl:-1pt (accuracy may fall by one point)"
)
_NUMBER = re.compile(r"\d+(\.\d*)?([eE][+-]?\d+)?|\.\d+([eE][+-]?\d+)?", re.ASCII)
_POINTS = re.compile(r"-\s*(\d+(?:\.\d*)?|\.\d+)\s*(?:pt|pts|points?)", re.ASCII | re.IGNORECASE)
Measure = Literal["ppl", "kl", "agree", "task"]
MEASURES = ("ppl", "kl", "agree", "task")
SHOWN = {"ppl": (100.0, "%", 2), "kl": (1.0, " nats", 4), "agree": (100.0, "%", 2), "task": (100.0, " points", 2)}
"""How a loss is shown: times what, in which unit, with how many digits."""


@dataclass(frozen=True)
class Budget:
    """`limit`: a growth of perplexity (0.01 for 1%), nats a token, or a share of tokens or questions (0.03 for 97%).

    Infinite where a target and not a budget decides: the loss is then only measured.
    """

    measure: Measure
    limit: float
    file: Path | None = None
    """Of a task."""

    def __str__(self) -> str:
        if self.measure == "ppl":
            return f"ppl={self.limit * 100:g}%"
        if self.measure == "kl":
            return f"kl={self.limit:g}"
        if self.measure == "agree":
            return f"agree={100 - self.limit * 100:g}%"
        return f"task={self.file}:-{self.limit * 100:g}pt"

    def describe(self) -> str:
        if self.measure == "ppl":
            return f"perplexity at most {self.limit * 100:g}% above the original's"
        if self.measure == "kl":
            return f"KL divergence from the original at most {self.limit:g} nats a token"
        if self.measure == "agree":
            return f"the original's most likely token at {100 - self.limit * 100:g}% of places or more"
        return f"accuracy on {self.file} at most {self.limit * 100:g} points below the original's"

    @property
    def what(self) -> str:
        """The loss in words."""
        names = {"ppl": "perplexity", "kl": "divergence", "agree": "other tokens"}
        return names.get(self.measure) or f"accuracy on {self.file.name if self.file else ''} lost"

    def show(self, loss: float, signed: bool = True) -> str:
        """A loss in the budget's unit: '+0.50%', '0.0123 nats'."""
        factor, unit, digits = SHOWN[self.measure]
        sign = "+" if signed and self.measure == "ppl" else ""
        return f"{loss * factor:{sign}.{digits}f}{unit}"

    @property
    def nats(self) -> float:
        """What the sum of the parts' divergences may be to begin with: a guide, since errors do not simply add.

        A share d of other tokens comes with about 6 d^2 nats in the models that this was tried on; of a task's
        questions twice as many change as are lost.
        """
        if self.measure == "ppl":
            return math.log1p(self.limit)
        if self.measure == "kl":
            return self.limit
        return 6 * (self.limit if self.measure == "agree" else 2 * self.limit) ** 2


@dataclass(frozen=True)
class Budgets:
    """All that must hold, at least one part; the first is the one that plots show."""

    parts: tuple[Budget, ...]

    def __str__(self) -> str:
        return ", ".join(map(str, self.parts)) if self.bounded else "none"

    @property
    def first(self) -> Budget:
        return self.parts[0]

    @property
    def bounded(self) -> bool:
        """Whether there is a limit at all."""
        return any(math.isfinite(b.limit) for b in self.parts)

    @property
    def nats(self) -> float:
        return min(b.nats for b in self.parts)

    @property
    def on_text(self) -> tuple[Budget, ...]:
        return tuple(b for b in self.parts if b.measure != "task")

    @property
    def tasks(self) -> tuple[Budget, ...]:
        return tuple(b for b in self.parts if b.measure == "task")


UNBOUNDED = Budgets((Budget("kl", math.inf),))
"""Of a search for the least loss that reaches a target."""


def parse_all(texts: str | Sequence[str]) -> Budgets:
    """`ppl=1%,agree=97%` or several such texts -> Budgets. Raises BudgetError, also for a measure stated twice."""
    given = [texts] if isinstance(texts, str) else list(texts)
    parts = [parse(part) for text in given for part in re.split(r",(?=\s*\w+\s*=)", text)]
    if not parts:
        raise BudgetError("no budget was given", HINT)
    for number, part in enumerate(parts):
        for earlier in parts[:number]:
            if (earlier.measure, earlier.file) == (part.measure, part.file):
                raise BudgetError(
                    f"the budget states {part.measure} twice: {earlier} and {part}",
                    "leave out all but the stricter one",
                )
    return Budgets(tuple(parts))


def parse(text: str) -> Budget:
    """One part, as `kl=0.02` -> Budget. Raises BudgetError."""
    name, equals, value = text.strip().partition("=")
    name, value = name.strip().lower(), value.strip()
    if not equals or name not in MEASURES:
        raise BudgetError(f"cannot read the budget '{text}'", HINT)
    if name == "task":
        return _task(text, value)
    percent = value.endswith("%")
    number = value.removesuffix("%").strip()
    if not _NUMBER.fullmatch(number):
        raise BudgetError(f"cannot read the budget '{text}': '{value}' is not a number of zero or more", HINT)
    limit = float(number)
    if name == "kl":
        if percent:
            raise BudgetError(f"the budget '{text}' has a percentage: kl is in nats a token", HINT)
        if limit > 100:
            raise BudgetError(f"the budget '{text}' is beyond 100 nats a token", HINT)
        return Budget("kl", limit)
    if not percent:
        raise BudgetError(f"the budget '{text}' lacks its unit: {name} takes a percentage", HINT)
    if name == "ppl":
        if limit > 1000:
            raise BudgetError(f"the budget '{text}' is beyond 1000%", HINT)
        return Budget("ppl", limit / 100)
    if limit >= 100:
        raise BudgetError(f"the budget '{text}' leaves no room: only the original always agrees with itself", HINT)
    if limit <= 0:
        raise BudgetError(f"the budget '{text}' says nothing: every model agrees at 0% of tokens or more", HINT)
    return Budget("agree", (100 - limit) / 100)


def _task(text: str, value: str) -> Budget:
    file, colon, loss = value.rpartition(":")
    points = _POINTS.fullmatch(loss.strip())
    if not colon or not file.strip() or not points:
        raise BudgetError(f"cannot read the budget '{text}': a task is FILE.jsonl:-1pt", HINT)
    limit = float(points[1])
    if not 0 < limit < 100:
        raise BudgetError(f"the budget '{text}' must be between 0 and 100 points", HINT)
    return Budget("task", limit / 100, Path(file.strip()))
