"""The quality a user will give up, as stated on the command line: `ppl=1%` or `kl=0.02`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from hasten.errors import BudgetError

HINT = "write ppl=1% (perplexity may grow by one percent) or kl=0.02 (nats a token from the original)"
_NUMBER = re.compile(r"\d+(\.\d*)?([eE][+-]?\d+)?|\.\d+([eE][+-]?\d+)?", re.ASCII)


@dataclass(frozen=True)
class Budget:
    """`limit` is a growth of perplexity (0.01 for 1%) or a divergence in nats a token."""

    measure: Literal["ppl", "kl"]
    limit: float

    def __str__(self) -> str:
        return f"ppl={self.limit * 100:g}%" if self.measure == "ppl" else f"kl={self.limit:g}"

    def describe(self) -> str:
        if self.measure == "ppl":
            return f"perplexity at most {self.limit * 100:g}% above the original's"
        return f"KL divergence from the original at most {self.limit:g} nats a token"

    @property
    def nats(self) -> float:
        """What the sum of the parts' divergences may be to begin with: a guide, since errors do not simply add."""
        return math.log1p(self.limit) if self.measure == "ppl" else self.limit


def parse(text: str) -> Budget:
    """`ppl=1%`, `kl=0.02` -> Budget. Raises BudgetError."""
    name, equals, value = text.strip().partition("=")
    name, value = name.strip().lower(), value.strip()
    if not equals or name not in ("ppl", "kl"):
        raise BudgetError(f"cannot read the budget '{text}'", HINT)
    percent = value.endswith("%")
    number = value.removesuffix("%").strip()
    if not _NUMBER.fullmatch(number):
        raise BudgetError(f"cannot read the budget '{text}': '{value}' is not a number of zero or more", HINT)
    limit = float(number)
    if name == "ppl":
        if not percent:
            raise BudgetError(f"the budget '{text}' lacks its unit: ppl takes a percentage", HINT)
        if limit > 1000:
            raise BudgetError(f"the budget '{text}' is beyond 1000%", HINT)
        return Budget("ppl", limit / 100)
    if percent:
        raise BudgetError(f"the budget '{text}' has a percentage: kl is in nats a token", HINT)
    if limit > 100:
        raise BudgetError(f"the budget '{text}' is beyond 100 nats a token", HINT)
    return Budget("kl", limit)
