"""What bought what: each format's share of the chosen candidate put back, and the whole measured again.

Losses of parts do not add up, so what one brings is the difference that leaving it out makes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from hasten import formats
from hasten.compress import methods
from hasten.compress.recipe import KEEP, Choice
from hasten.errors import FormatError
from hasten.search.quality import Reading
from hasten.search.refine import Choices, Refiner, Tried, facts

NEAREST = "nearest"
MOST = 6
"""Groups that are left out one by one: those with the most bytes."""


@dataclass(frozen=True)
class Contribution:
    """Of the matrices with one choice. Losses are of the whole model, on the search's text, in the first budget's unit.

    `without`: with them as they were; `nearest`: in the same format by nearest rounding, None where that is the method.
    """

    format: str
    method: str
    matrices: int
    bytes_saved: int
    cost_saved: float
    """Of the sum of predicted costs: seconds, or bytes where memory is the objective."""
    without: Reading
    nearest: Reading | None

    def json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "without": self.without.json(),
            "nearest": self.nearest.json() if self.nearest else None,
        }


def contributions(refiner: Refiner, chosen: Tried) -> list[Contribution]:
    """Of each choice in use, the largest first; as many as there is time for."""
    groups: dict[Choice, list[str]] = {}
    for name, choice in chosen.choices.items():
        if not choice.is_original:
            groups.setdefault(choice, []).append(name)
    sizes = {t.name: t.parameters for t in refiner.space.tensors}
    order = sorted(groups, key=lambda c: -sum(sizes[n] for n in groups[c]))[:MOST]
    found = []
    for choice in order:
        if not refiner.enough_time():
            break
        found.append(_contribution(refiner, chosen, choice, groups[choice]))
    return found


def _contribution(refiner: Refiner, chosen: Tried, choice: Choice, names: list[str]) -> Contribution:
    back: Choices = {**chosen.choices, **dict.fromkeys(names, KEEP)}
    plain = Choice(choice.format, NEAREST)
    rounded: Choices = {**chosen.choices, **dict.fromkeys(names, plain)}
    nearest = None
    if choice.method != NEAREST and methods.get(NEAREST).supports(formats.get(choice.format)):
        try:
            nearest = _read(refiner, f"{choice.format} by nearest rounding", rounded)
        except FormatError:  # a scale beyond what the format holds, which the method avoids
            nearest = None
    return Contribution(
        choice.format,
        choice.method,
        len(names),
        refiner.space.bytes(back) - chosen.bytes,
        refiner.space.cost(back) - chosen.cost,
        _read(refiner, f"all but {choice.format}", back),
        nearest,
    )


def _read(refiner: Refiner, name: str, choices: Choices) -> Reading:
    return refiner.judge.read(name, facts(choices), lambda: refiner.model(choices))[0]
