"""The names of what a bench beside peers measures: prefill-N, decode-BATCH, depth-N, ttft-cold, ttft-warm, and
serve-CLIENTS where it is asked for."""

from __future__ import annotations

from collections.abc import Sequence

from hasten.bench.peers.common import Workload
from hasten.errors import InputError

DECODE_DEPTH, DECODE_STEPS, DEPTH_STEPS = 128, 16, 16
FIRST_TOKEN_PROMPT = 512
SERVED_PROMPT, SERVED_NEW = 512, 64
ALL = (
    *(f"prefill-{n}" for n in (128, 512, 2048)),
    *(f"decode-{n}" for n in (1, 2, 4, 8, 16)),
    *(f"depth-{n}" for n in (4096, 16384)),
    "ttft-warm",
    "ttft-cold",
)


def parse(name: str) -> Workload:
    """Raises InputError where the name is none of a workload."""
    kind, _, number = name.partition("-")
    if name in ("ttft-cold", "ttft-warm"):
        return Workload(name, name, tokens=FIRST_TOKEN_PROMPT)
    if kind in ("prefill", "decode", "depth", "serve") and number.isdecimal() and 0 < int(number) < 1 << 24:
        size = int(number)
        if kind == "prefill":
            return Workload(name, kind, tokens=size)
        if kind == "serve":
            return Workload(name, kind, tokens=SERVED_PROMPT, batch=size, new=SERVED_NEW)
        if kind == "decode":
            return Workload(name, kind, batch=size, depth=DECODE_DEPTH, new=DECODE_STEPS)
        return Workload(name, kind, depth=size, new=DEPTH_STEPS)
    raise InputError(
        f"no such workload: {name}", f"workloads: {', '.join(ALL)}, serve-8, and the same with other numbers"
    )


def choose(names: Sequence[str], context: int) -> tuple[list[Workload], list[str]]:
    """(those that fit the model's context, names of the others). Raises InputError where none is left."""
    wanted = [parse(name) for name in (names or ALL)]
    fitting = [w for w in wanted if w.length <= context]
    if not fitting:
        raise InputError(f"the model's context of {context} tokens holds none of the workloads: {', '.join(names)}")
    return fitting, [w.name for w in wanted if w.length > context]
