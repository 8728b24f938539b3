"""How far the model's output moves when one matrix alone changes: KL(original || changed) on calibration text.

Teacher-forced, over the whole vocabulary, with the kernels that serve. Hidden states are kept at the input of the block
at hand, so only the rest of the model runs. A bounded number is measured; the others are scaled from a measured
neighbour by their weighted error: for small changes the divergence is quadratic in them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np

from hasten.backends import feed, native
from hasten.backends.batch import Float32, Int32, Limits, Program
from hasten.compress import calibrate
from hasten.compress.calibrate import Report, Weights
from hasten.compress.recipe import Choice
from hasten.compress.run import Packer
from hasten.compress.statistics import Hidden
from hasten.errors import FormatError
from hasten.formats import Weight
from hasten.graph.graph import Graph
from hasten.search.candidates import Tensor
from hasten.search.texts import take
from hasten.search.trials import Json, Trials

KINDS = ("int4", "int8", "codebook4")
"""Kinds of format measured for every tensor, as far as time goes: one format of each, group 64 where there is one."""
MOST_TOKENS = 1024
Losses = dict[tuple[str, Choice], float]


@dataclass(frozen=True)
class Plan:
    """What is measured: a format of each of `kinds` for every matrix of each `stride`-th block, on `tokens` tokens."""

    kinds: tuple[str, ...]
    tokens: int
    stride: int = 1


def plan(
    graph: Graph,
    tensors: Sequence[Tensor],
    seconds_per_token: float,
    seconds: float,
    available: int,
    most: int = len(KINDS),
) -> Plan:
    """As much as fits into `seconds`, given what the whole model takes for a token; `most` kinds of format."""
    depth = max(1, len(graph.blocks))
    options = [
        Plan(KINDS[:count], tokens, stride)
        for stride in (1, 2, 4, 8)
        for count, tokens in ((3, MOST_TOKENS), (2, MOST_TOKENS), (1, MOST_TOKENS), (1, 512), (1, 256))
        if count <= most
    ]

    def predicted(option: Plan) -> float:
        parts = [1.0 - max(t.block, 0) / (depth + 1) for t in tensors if _measured(t, option, depth)]
        return sum(parts) * len(option.kinds) * min(option.tokens, available) * seconds_per_token

    return next((option for option in options if predicted(option) <= seconds), options[-1])


def _measured(tensor: Tensor, plan: Plan, depth: int) -> bool:
    return not 0 <= tensor.block < depth or tensor.block % plan.stride == 0


def _typical(tensor: Tensor, plan: Plan) -> list[Choice]:
    """The choices of a matrix to measure: for each kind that of group 64, or the first there is; one at least."""
    found = []
    for kind in plan.kinds:
        own = [c for c in tensor.choices if c.format.split("-")[0] == kind]
        found += sorted(own, key=lambda c: not c.format.endswith("-g64"))[:1]
    return found or [c for c in tensor.choices if not c.is_original][-1:]  # something to scale the others from


def errors(tensors: Sequence[Tensor], packer: Packer, trials: Trials, key: Json, report: Report) -> Losses:
    """The weighted error of every choice of every matrix: made once, and where memory allows packed for good.

    Infinite where a format cannot hold the matrix: `holdable` drops such choices.
    """
    found: Losses = {}
    total, done = sum(len(t.choices) for t in tensors), 0
    for tensor in tensors:
        for choice in tensor.choices:
            report("candidates", done, total)
            done += 1
            if choice.is_original:
                found[tensor.name, choice] = 0.0
                continue
            facts = [key, tensor.name, asdict(choice)]
            found[tensor.name, choice] = trials.measure("error", facts, partial(_error, packer, tensor.name, choice))
    report("candidates", total, total)
    return found


def _error(packer: Packer, name: str, choice: Choice) -> float:
    try:
        return packer.error(name, choice)
    except FormatError:
        return float("inf")


def holdable(tensors: Sequence[Tensor], errors: Losses) -> list[Tensor]:
    """The tensors without the choices whose format cannot hold them (a scale beyond f16, say)."""
    return [
        replace(t, choices=tuple(c for c in t.choices if c.is_original or np.isfinite(errors[t.name, c])))
        for t in tensors
    ]


def measure(
    graph: Graph,
    original: Weights,
    tensors: Sequence[Tensor],
    windows: Sequence[Int32],
    final: Hidden,
    packer: Packer,
    plan: Plan,
    trials: Trials,
    key: Json,
    report: Report,
    limits: Limits,
    enough_time: Callable[[], bool] = lambda: True,
) -> Losses:
    """KL in nats a token of each matrix and format planned; `final`: the original's last hidden states of `windows`.

    Not all of them where `enough_time` says that there is no more; one block at least.
    """
    windows = take(windows, plan.tokens)
    depth = len(graph.blocks)
    wanted = [(t, _typical(t, plan)) for t in tensors if _measured(t, plan, depth)]
    facts = {(t.name, c): [key, plan.tokens, t.name, asdict(c)] for t, choices in wanted for c in choices}
    found: Losses = {}
    for place, fact in facts.items():
        value = trials.get("sensitivity", fact)
        if value is not None:
            found[place] = value
            trials.reused += 1
    reference = native.compile(graph.tail(depth), _own(graph.tail(depth), original), limits, tune=True)
    hidden: Hidden | None = None
    for block in range(-1, depth + 1):
        here = [(t, [c for c in choices if (t.name, c) not in found]) for t, choices in wanted if t.block == block]
        section = graph if block < 0 else graph.tail(block)
        if block >= 0:
            hidden = _advance(graph, original, windows, hidden, block, limits, final)
        for tensor, choices in here:
            if not choices or (found and block > 0 and not enough_time()):
                continue
            report("sensitivity", len(found), len(facts))
            changed = [{**_own(section, original), tensor.name: packer.pack(tensor.name, c)} for c in choices]
            values = divergences(section, changed, windows, hidden, reference, final, limits)
            for choice, value in zip(choices, values, strict=True):
                trials.put("sensitivity", facts[tensor.name, choice], value)
                trials.made += 1
                found[tensor.name, choice] = value
    report("sensitivity", len(facts), len(facts))
    return found


def _advance(
    graph: Graph,
    weights: Weights,
    windows: Sequence[Int32],
    hidden: Hidden | None,
    block: int,
    limits: Limits,
    final: Hidden,
) -> Hidden:
    """Hidden states at the input of `block`."""
    if block == 0 or hidden is None:
        return calibrate.embed(graph, weights, windows, limits)
    if block == len(graph.blocks):
        return final
    return calibrate.run(graph.block(block - 1), weights, windows, hidden, limits)


def divergences(
    section: Graph,
    changed: Sequence[Weights],
    windows: Sequence[Int32],
    hidden: Hidden | None,
    reference: Program,
    final: Hidden,
    limits: Limits,
) -> list[float]:
    """Mean KL(reference || section with each set of weights), in nats a token; infinite where one's output is broken.

    In lockstep: no logits are stored.
    """
    programs = [native.compile(section, weights, limits, tune=True) for weights in changed]
    sums = np.zeros(len(programs))
    for index, start, batch in feed.windows(windows, limits):
        stop = start + len(batch.tokens)
        batch.hidden = np.ascontiguousarray(final[index][start:stop])
        expected = reference.step(batch)
        batch.hidden = None if hidden is None else np.ascontiguousarray(hidden[index][start:stop])
        for i, program in enumerate(programs):
            sums[i] += program.step(batch).divergence(expected).sum()
    return [max(0.0, float(s)) if np.isfinite(s) else float("inf") for s in sums / sum(len(w) for w in windows)]


def estimate(tensors: Sequence[Tensor], measured: Losses, errors: Losses) -> Losses:
    """A loss for every choice of every matrix: measured, or scaled from the nearest that was."""
    found: Losses = {}
    for tensor in tensors:
        for choice in tensor.choices:
            place = (tensor.name, choice)
            if choice.is_original:
                found[place] = 0.0
            elif place in measured:
                found[place] = measured[place]
            else:
                anchor = _anchor(tensor, choice, tensors, measured, errors)
                found[place] = measured[anchor] * errors[place] / errors[anchor] if anchor else float("inf")
    return found


def _anchor(
    tensor: Tensor, choice: Choice, tensors: Sequence[Tensor], measured: Losses, errors: Losses
) -> tuple[str, Choice] | None:
    """What was measured nearest to a choice: the same kind of format before others, then the same block."""
    kind = choice.format.split("-")[0]
    alike = {t.name: t for t in tensors if t.role == tensor.role or t.name == tensor.name}
    near = [p for p in measured if p[0] in alike and errors[p] > 0 and np.isfinite(measured[p])]

    def distance(place: tuple[str, Choice]) -> tuple[int, int, float]:
        same_kind = place[1].format.split("-")[0] == kind
        return (abs(alike[place[0]].block - tensor.block), not same_kind, abs(np.log(errors[place])))

    return min(near, key=distance) if near else None


def _own(section: Graph, weights: Weights) -> dict[str, Weight | Float32]:
    return {name: weights[name] for name in section.weights}
