"""`hasten machine`: what this machine is and its measured limits."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from hasten.cli.options import option

HELP = "what this machine is and how fast it can be"


@dataclass(frozen=True)
class Options:
    threads: int = option(0, help="threads to measure with; 0: one a core")
    seconds: float = option(0.5, help="how long to measure each limit")
    json: bool = option(False, help="print one JSON document")


def run(options: Options) -> None:
    from hasten.bench import machine
    from hasten.errors import InputError

    if not 0 < options.seconds <= 60:
        raise InputError(f"--seconds is {options.seconds}, must be above 0 and at most 60")
    if not 0 <= options.threads <= 1024:
        raise InputError(f"--threads is {options.threads}, must be 0 to 1024")
    here = machine.describe()
    limits = machine.limits(options.seconds, options.threads)
    if options.json:
        print(json.dumps({**asdict(here), **asdict(limits)}, indent=1))
        return
    left = "unknown"
    if here.memory_available is not None and here.memory_total is not None:
        left = f"{here.memory_available / 2**30:.1f} of {here.memory_total / 2**30:.1f} GiB left"
    rows = {
        "processor": here.cpu,
        "cores": f"{here.cores} (affinity and container limits count)",
        "instruction set": f"{here.instruction_set} (of {', '.join(here.instruction_sets)})",
        "memory": left,
        "last-level cache": f"{here.last_level_cache / 2**20:.1f} MiB",
        f"limits, {limits.threads} threads": "",
        "  memory read": f"{limits.memory_read_gbs:.1f} GB/s",
        "  int8 products": f"{limits.int8_gmacs:.0f} GMAC/s",
        "  bf16 products": f"{limits.bf16_gmacs:.0f} GMAC/s",
    }
    for name, value in rows.items():
        print(f"{name:<20}{value}".rstrip())
