"""Finds the cheapest whole candidates that keep the budget on the search's text.

Losses of parts do not add up to the whole's, so their sum is only a guide: a candidate is allocated under an allowance,
measured whole, and the allowance moved until the measured loss comes close to the budget from below.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from hasten.compress.calibrate import Weights
from hasten.compress.recipe import Choice
from hasten.errors import BudgetError
from hasten.search.allocate import Bound, allocate
from hasten.search.candidates import Tensor, nbytes
from hasten.search.cost import Whole
from hasten.search.quality import Bounds, Judge, Reading, Readings

Choices = dict[str, Choice]
CAREFUL = 0.25
"""Of the allowance that would be next, where there is time for one more only and none has kept the budget."""
ROUNDS = 6
CLOSE = 0.08
"""A candidate whose careful reading comes this near to the budget, relative to it, is near enough."""
NEVER = 1e12
"""Nats or seconds: more than there can be."""
UNIFORM = ("int8-g64", "int4-g64")
"""Formats tried on every matrix at once: what a recipe by hand would do, for comparison and as a candidate."""


@dataclass(frozen=True)
class Tried:
    """A whole candidate, measured. `allowance`: the sum of losses that it was allocated under, nats."""

    name: str
    choices: Choices
    allowance: float | None
    readings: Readings
    cost: float
    bytes: int
    fits: bool
    """Will likely be proven within the budget, and keeps within the memory allowed."""

    @property
    def reading(self) -> Reading:
        """Of the budget's first part."""
        return self.readings[0]


@dataclass(frozen=True)
class Space:
    """What there is to choose from: for each tensor its choices' costs and losses."""

    tensors: Sequence[Tensor]
    costs: Sequence[Sequence[float]]
    losses: Sequence[Sequence[float]]

    def allocate(self, allowance: float, most_bytes: float | None = None) -> Choices:
        """The cheapest choices with losses within `allowance`, and matrices within so many bytes.

        Raises BudgetError where there are none.
        """
        also = [] if most_bytes is None else [Bound(self._bytes(), most_bytes + 0.5, "bytes")]
        return self._picked(allocate(self.costs, self.losses, allowance, also=also))

    def most_faithful(self, cost: float, most_bytes: float | None = None) -> Choices:
        """The choices of least loss that cost no more. Raises BudgetError where there are none."""
        losses = [[min(loss, NEVER) for loss in row] for row in self.losses]
        also = [] if most_bytes is None else [Bound(self._bytes(), most_bytes + 0.5, "bytes")]
        return self._picked(allocate(losses, self.costs, min(cost, NEVER), also=also))

    def _picked(self, picks: Sequence[int]) -> Choices:
        return {t.name: t.choices[c] for t, c in zip(self.tensors, picks, strict=True)}

    def _bytes(self) -> list[list[float]]:
        return [[float(nbytes(t, c)) for c in t.choices] for t in self.tensors]

    before: Space | None = None
    """Of the model that was given, where the search started from another shape of it."""

    whole: Whole | None = None
    """What is known of the given model's time beside its matrices'; the costs are scaled by it already."""

    @property
    def original_cost(self) -> float:
        return self.before.original_cost if self.before else self.cost(self.original)

    @property
    def original_bytes(self) -> int:
        return self.before.original_bytes if self.before else self.bytes(self.original)

    @property
    def original_alone(self) -> float:
        return self.before.original_alone if self.before else self.alone(self.original)

    @property
    def original(self) -> Choices:
        return {t.name: t.choices[0] for t in self.tensors}

    def least_bytes(self) -> int:
        """Of any choices, whatever they lose."""
        return sum(min(nbytes(t, c) for c in t.choices) for t in self.tensors)

    def uniform(self, format: str) -> Choices:
        """One format for every matrix that something multiplies by, where it has that choice."""
        chosen = {}
        for tensor in self.tensors:
            own = [c for c in tensor.choices if c.format == format and tensor.linears]
            chosen[tensor.name] = own[0] if own else tensor.choices[0]
        return chosen

    def cost(self, choices: Mapping[str, Choice]) -> float:
        rows = zip(self.tensors, self.costs, strict=True)
        return sum(row[t.choices.index(choices[t.name])] for t, row in rows)

    def alone(self, choices: Mapping[str, Choice]) -> float:
        """The cost by kernels timed alone, which no whole model has corrected."""
        total = 0.0
        for tensor, row in zip(self.tensors, self.costs, strict=True):
            place = tensor.choices.index(choices[tensor.name])
            total += row[place] / (self.whole.factors(tensor)[place] if self.whole else 1.0)
        return total

    def bytes(self, choices: Mapping[str, Choice]) -> int:
        return sum(nbytes(t, choices[t.name]) for t in self.tensors)


def facts(choices: Mapping[str, Choice]) -> dict[str, list[str]]:
    """Choices as JSON."""
    return {name: list(asdict(choice).values()) for name, choice in choices.items()}


@dataclass
class Refiner:
    """Allocates and measures candidates; remembers them in `tried`."""

    space: Space
    judge: Judge
    model: Callable[[Choices], Weights]
    bounds: Bounds
    most_bytes: int | None
    """That the matrices may take."""
    tried: list[Tried]
    enough_time: Callable[[], bool] = lambda: True
    """Whether one more candidate can be measured."""
    slowest: float = 0.0
    """Seconds that a candidate took to measure, at most."""

    def uniforms(self) -> None:
        for format in UNIFORM:
            choices = self.space.uniform(format)
            if not all(c.is_original for c in choices.values()) and self.enough_time():
                self.measure(f"{format} everywhere", choices, None)

    def search(self, rounds: int = ROUNDS) -> None:
        """Moves the allowance towards the largest that still fits every part of the budget."""
        allowance = 0.7 * self.bounds.budgets.nats
        fits: tuple[float, float] | None = None  # (allowance, share of the budget) of the most daring that fits
        fails: tuple[float, float] | None = None  # and of the most careful that does not
        for number in range(1, rounds + 1):
            if number > 1 and not self.enough_time():
                if not any(
                    t.fits for t in self.tried
                ):  # a search that ends with nothing has wasted more time than one candidate takes
                    self.allocated(f"candidate {number}", CAREFUL * allowance)
                return
            one = self.allocated(f"candidate {number}", allowance)
            if one is None:
                return
            share = self.bounds.share(one.readings)
            if one.fits:
                fits = (allowance, share)
            else:
                fails = (allowance, share)
            if one.fits and share > 1 - CLOSE:
                return
            if fits and fails and fails[0] < 1.1 * fits[0]:
                return
            allowance = next_allowance(fits, fails, 1.0)

    def allocated(self, name: str, allowance: float) -> Tried | None:
        """The candidate under an allowance; None where there is none, or it would leave the model as it is.

        Where no choices within the allowance keep the memory allowed, those that keep it with the least loss.
        """
        try:
            choices = self.space.allocate(allowance, self.most_bytes)
        except BudgetError:
            if self.most_bytes is None or self.space.least_bytes() > self.most_bytes:
                return None
            choices = self.space.most_faithful(math.inf, self.most_bytes)
        if all(c.is_original for c in choices.values()):
            return None
        return self.measure(name, choices, allowance)

    def measure(self, name: str, choices: Choices, allowance: float | None) -> Tried:
        same = next((t for t in self.tried if t.choices == choices), None)
        start = time.monotonic()
        readings = same.readings if same else self.judge.read(name, facts(choices), lambda: self.model(choices))
        self.slowest = max(self.slowest, time.monotonic() - start)
        size = self.space.bytes(choices)
        small = self.most_bytes is None or size <= self.most_bytes
        one = Tried(
            name,
            choices,
            allowance,
            readings,
            self.space.cost(choices),
            size,
            small and self.bounds.fits(readings),
        )
        if same is None:
            self.tried.append(one)
        return one


def next_allowance(fits: tuple[float, float] | None, fails: tuple[float, float] | None, limit: float) -> float:
    """Where to look next: in proportion to begin with; once a fit and a failure are known, between them."""
    if fits and fails:
        share = (limit - fits[1]) / (fails[1] - fits[1]) if fails[1] > fits[1] else 0.5
        low, high = math.log(fits[0]), math.log(fails[0])
        return math.exp(low + (high - low) * min(max(share, 0.15), 0.85))
    known = fits or fails
    assert known is not None
    step = limit / known[1] if known[1] > 0 else 4.0
    return known[0] * (min(max(step, 1.15), 4.0) if fits else min(max(step, 0.2), 0.85))
