"""The part of a recipe that changes a model's shape:

    structure:
      drop_blocks: [3, 7]                 # or {count: 2, by: loss}; by: loss (measured) or similarity
      heads: {keep: 50%, per_group: 2}    # key heads with their groups, and query heads in each group that is left
      feed_forward:                       # one rule, or a list of them
        - {keep: 75%, blocks: [0, 1]}     # without `blocks`: all that no other rule names
      low_rank:
        - {match: "*.up_proj.weight", keep: 50%}   # or rank: 64, or energy: 95%
        - {match: "*.down_proj.weight", rank: 32, residual: true}

An amount is a whole number, or a share with a percent sign. Blocks are numbered as in the names of tensors.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeVar

from hasten.compress.structures.heads import Kept
from hasten.compress.structures.svd import break_even
from hasten.errors import ConfigError, InputError
from hasten.graph.graph import Graph
from hasten.graph.sites import attention_site, feed_forward_site
from hasten.graph.structure import LEFT, RIGHT, LowRank, Narrow, Structure, restructured

KEYS = ("drop_blocks", "heads", "feed_forward", "low_rank")
EXAMPLE = 'write:\nstructure:\n  feed_forward: {keep: 75%}\n  low_rank: [{match: "*.up_proj.weight", keep: 50%}]'
CHANNELS = 32
"""Channels that a group of quantised weights spans: shares are rounded to so many, where there are as many."""


@dataclass(frozen=True)
class Amount:
    """A count, or a share of what there is."""

    count: int = 0
    share: float = 0.0

    def of(self, most: int, what: str, unit: int = 1) -> int:
        """How many of `most`; a share in multiples of `unit`. Raises InputError where there are not so many."""
        if self.count > most:
            raise InputError(f"the recipe keeps {self.count} {what}, there are {most}")
        if self.count:
            return self.count
        unit = unit if most % unit == 0 else 1
        return max(1, round(self.share * most / unit)) * unit


@dataclass(frozen=True)
class Narrowing:
    """Of these blocks, or of all: how much stays. `per_group`: of query heads in each group that stays."""

    keep: Amount
    per_group: Amount
    blocks: tuple[int, ...] | None


@dataclass(frozen=True)
class Factoring:
    """One of `rank`, `keep` (of the matrix's numbers) and `energy` (of its output) says how much stays."""

    match: str
    by: Literal["rank", "keep", "energy"]
    rank: int
    share: float
    residual: bool


@dataclass(frozen=True)
class Plan:
    """What becomes of a graph, its blocks numbered from 0 as they stand in it. `count` more blocks go, chosen `by`.

    `names`: every matrix that the new model may have, for patterns to match.
    """

    dropped: tuple[int, ...]
    count: int
    by: str
    heads: dict[int, Kept]
    channels: dict[int, int]
    factored: dict[str, Factoring]
    names: tuple[str, ...]

    @property
    def calibrated(self) -> bool:
        """Whether anything is measured on text."""
        return bool(self.count or self.heads or self.channels or self.factored)

    @property
    def corrected(self) -> list[str]:
        """The matrices that get factors beside them, for what packing takes away."""
        return [name for name, rule in self.factored.items() if rule.residual]


@dataclass(frozen=True)
class StructureRecipe:
    dropped: tuple[int, ...] = ()
    count: int = 0
    by: str = "loss"
    heads: tuple[Narrowing, ...] = ()
    feed_forward: tuple[Narrowing, ...] = ()
    low_rank: tuple[Factoring, ...] = ()
    document: dict[str, Any] = field(default_factory=dict, compare=False)
    """As it was written."""

    def plan(self, graph: Graph, already: Structure) -> Plan:
        """For `graph`, which departs from its config as `already` says. Raises InputError for what it cannot be."""
        numbers = already.kept(len(graph.blocks) + len(already.dropped))
        try:
            return _plan(self, graph, numbers)
        except ConfigError as error:
            raise InputError(error.message.removeprefix("structure: "), error.hint) from None


def _plan(recipe: StructureRecipe, graph: Graph, numbers: list[int]) -> Plan:
    dropped = tuple(_position(number, numbers) for number in recipe.dropped)
    count = recipe.count
    if count >= len(numbers) or len(dropped) == len(numbers):
        raise InputError(f"the recipe drops {count or len(dropped)} of {len(numbers)} blocks, one at least must stay")
    heads = {}
    for index, rule in _by_block(recipe.heads, "heads", numbers, dropped).items():
        op = attention_site(graph, index).op
        heads[index] = (
            rule.keep.of(op.kv_heads, f"key heads in block {numbers[index]}"),
            rule.per_group.of(op.heads // op.kv_heads, f"query heads for each key head in block {numbers[index]}"),
        )
    channels = {}
    for index, rule in _by_block(recipe.feed_forward, "feed_forward", numbers, dropped).items():
        width = graph.weights[feed_forward_site(graph, index).output.weights[0]].shape[1]
        channels[index] = rule.keep.of(width, f"feed-forward channels in block {numbers[index]}", CHANNELS)
    narrow = restructured(graph, Structure(narrowed={i: Narrow(kv * n, kv) for i, (kv, n) in heads.items()}))
    narrow = restructured(narrow, Structure(narrowed={i: Narrow(feed_forward=n) for i, n in channels.items()}))
    narrow = restructured(narrow, Structure(dropped))
    factored = _factored(recipe.low_rank, narrow)
    names = [m.name for m in narrow.matrices()]
    names += [name + part for name in factored for part in (LEFT, RIGHT)]
    return Plan(dropped, count, recipe.by, heads, channels, factored, tuple(names))


def _position(number: int, numbers: Sequence[int]) -> int:
    if number not in numbers:
        raise InputError(f"the recipe names block {number}; the model has blocks {_listed(numbers)}")
    return numbers.index(number)


def _listed(numbers: Sequence[int]) -> str:
    whole = list(numbers) == list(range(numbers[0], numbers[-1] + 1))
    return f"{numbers[0]} to {numbers[-1]}" if whole else ", ".join(map(str, numbers))


def _by_block(
    rules: Sequence[Narrowing], what: str, numbers: Sequence[int], dropped: Sequence[int]
) -> dict[int, Narrowing]:
    """Block -> the rule that names it, or the one that names none; without those that are dropped."""
    found: dict[int, Narrowing] = {}
    for rule in rules:
        for number in rule.blocks or ():
            if _position(number, numbers) in dropped:
                raise InputError(f"the recipe drops block {number}, and {what} names it")
            if found.setdefault(numbers.index(number), rule) is not rule:
                raise InputError(f"two rules of {what} name block {number}", "one rule a block")
    others = [rule for rule in rules if rule.blocks is None]
    if len(others) > 1:
        raise InputError(f"two rules of {what} stand for all blocks", "let all but one say which blocks they mean")
    for index in range(len(numbers)):
        if others and index not in dropped:
            found.setdefault(index, others[0])
    return dict(sorted(found.items()))


def _factored(rules: Sequence[Factoring], graph: Graph) -> dict[str, Factoring]:
    names = [m.name for m in graph.matrices() if not m.name.endswith((LEFT, RIGHT))]  # factors are not factored again
    found: dict[str, Factoring] = {}
    for rule in rules:
        own = [name for name in names if fnmatchcase(name, rule.match)]
        if not own:
            near = difflib.get_close_matches(rule.match, names, 1, 0.0)
            hint = f"a tensor is called '{near[0]}'; * stands for any characters" if near else None
            raise InputError(f"low_rank: the pattern '{rule.match}' matches no matrix that is left", hint)
        for name in own:
            if name in found:
                raise InputError(f"low_rank: '{name}' is matched by '{found[name].match}' and by '{rule.match}'")
            found[name] = rule
            out, width = graph.weights[name].shape
            rank = rule.rank or 1
            restructured(graph, Structure(low_rank={name: LowRank(rank, rule.residual)}))
            if not rule.residual and rank > break_even((out, width)):
                raise InputError(
                    f"low_rank: '{name}' [{out}, {width}] at rank {rank} would not be smaller",
                    f"take {break_even((out, width))} at most, or residual: true to keep the matrix beside it",
                )
    return found


# --- reading


def parse(value: Any) -> StructureRecipe:
    """The value of the recipe's key `structure`. Raises InputError."""
    found = _mapping(value, "'structure'", KEYS)
    if not found:
        raise InputError("'structure' changes nothing", EXAMPLE)
    dropped, count, by = _drop(found.get("drop_blocks", []))
    return StructureRecipe(
        dropped,
        count,
        by,
        _rules(found, "heads", lambda rule, where: _narrowing(rule, where, ("keep", "per_group", "blocks"))),
        _rules(found, "feed_forward", lambda rule, where: _narrowing(rule, where, ("keep", "blocks"))),
        _rules(found, "low_rank", _factoring),
        found,
    )


T = TypeVar("T")


def _rules(found: dict[str, Any], key: str, read: Callable[[Any, str], T]) -> tuple[T, ...]:
    if key not in found:
        return ()
    rules = found[key] if isinstance(found[key], list) else [found[key]]
    if not rules:
        raise InputError(f"{key}: at least one rule is needed", EXAMPLE)
    many = len(rules) > 1
    return tuple(read(rule, f"{key}, rule {i}" if many else key) for i, rule in enumerate(rules, 1))


def _drop(value: Any) -> tuple[tuple[int, ...], int, str]:
    if not isinstance(value, dict):
        return _blocks(value, "drop_blocks"), 0, "loss"
    found = _mapping(value, "drop_blocks", ("count", "by"))
    by = found.get("by", "loss")
    if type(found.get("count")) is not int or found["count"] < 1:
        raise InputError("drop_blocks: 'count' must be a whole number of blocks, 1 or more")
    if by not in ("loss", "similarity"):
        raise InputError(f"drop_blocks: 'by' is {by!r}, must be loss or similarity")
    return (), found["count"], by


def _blocks(value: Any, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(i) is int and i >= 0 for i in value):
        raise InputError(f"{where}: blocks are a list of their numbers, such as [2, 3]")
    twice = [i for i in value if value.count(i) > 1]
    if twice:
        raise InputError(f"{where}: block {twice[0]} stands twice")
    return tuple(sorted(value))


def _narrowing(value: Any, where: str, known: tuple[str, ...]) -> Narrowing:
    found = _mapping(value, where, known)
    amounts = {key: _amount(found[key], f"{where}: '{key}'") for key in ("keep", "per_group") if key in found}
    if not amounts:
        raise InputError(f"{where}: say with 'keep' how much stays", EXAMPLE)
    blocks = _blocks(found["blocks"], where) if "blocks" in found else None
    return Narrowing(amounts.get("keep", Amount(share=1.0)), amounts.get("per_group", Amount(share=1.0)), blocks)


def _factoring(value: Any, where: str) -> Factoring:
    found = _mapping(value, where, ("match", "rank", "keep", "energy", "residual"))
    if not isinstance(found.get("match"), str):
        raise InputError(f"{where}: 'match' must be a pattern of tensor names, in quotes", EXAMPLE)
    ways = [key for key in ("rank", "keep", "energy") if key in found]
    if len(ways) != 1:
        raise InputError(f"{where}: say how much stays with one of rank, keep and energy", EXAMPLE)
    residual = found.get("residual", False)
    if type(residual) is not bool:
        raise InputError(f"{where}: 'residual' must be true or false")
    amount = _amount(found[ways[0]], f"{where}: '{ways[0]}'")
    if (ways[0] == "rank") != bool(amount.count):
        raise InputError(f"{where}: '{ways[0]}' must be {'a number' if ways[0] == 'rank' else 'a share such as 50%'}")
    return Factoring(found["match"], ways[0], amount.count, amount.share, residual)


def _amount(value: Any, where: str) -> Amount:
    if type(value) is int and value >= 1:
        return Amount(count=value)
    text = value if isinstance(value, str) else ""
    if re.fullmatch(r"\d{1,3}(\.\d{1,6})?%", text) and 0 < float(text[:-1]) <= 100:
        return Amount(share=float(text[:-1]) / 100)
    raise InputError(f"{where} is {value!r}, must be a whole number, 1 or more, or a share such as 75%")


def _mapping(value: Any, where: str, known: Sequence[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where} must be a mapping with the keys {', '.join(known)}", EXAMPLE)
    for key in value:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, 1)
            hint = f"did you mean '{close[0]}'?" if close else f"known keys: {', '.join(known)}"
            raise InputError(f"{where} has the unknown key '{key}'", hint)
    return value
