"""What this machine is, and how fast it can be at best: the limits that every measured speed is held against."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

from hasten.backends.host import active_isa, cpu_name
from hasten.engine.memory import ROOT, kilobytes, memory

GiB = 1 << 30
MAX_READ_BYTES = GiB  # more than this tells nothing new about memory
LEAST_READ_BYTES = GiB // 64


@dataclass(frozen=True)
class Machine:
    """What there is. Sizes in bytes; a cache that the system does not tell of is 0."""

    cpu: str
    cores: int
    """Cores that affinity and container limits leave to this process."""
    instruction_set: str
    """The one in use: the best there is, or what HASTEN_ISA asks for."""
    instruction_sets: tuple[str, ...]
    """All that this processor runs, best first."""
    memory_total: int | None
    memory_available: int | None
    """What can still be taken, container limits included. None of both: the system does not tell."""
    last_level_cache: int


@dataclass(frozen=True)
class Limits:
    """What `threads` threads reach at best, in the same instruction set as the kernels. Rates in 10^9 a second."""

    memory_read_gbs: float
    int8_gmacs: float
    bf16_gmacs: float
    threads: int

    def best(self, other: Limits) -> Limits:
        """The higher of two measurements, limit by limit: what disturbs a measurement only ever lowers it."""
        return Limits(
            max(self.memory_read_gbs, other.memory_read_gbs),
            max(self.int8_gmacs, other.int8_gmacs),
            max(self.bf16_gmacs, other.bf16_gmacs),
            self.threads,
        )


def describe() -> Machine:
    """This machine as this process may use it. Raises BackendError where HASTEN_ISA asks for what it does not have."""
    from hasten import _native

    return Machine(
        cpu=cpu_name(),
        cores=_native.granted_threads(),
        instruction_set=active_isa(),
        instruction_sets=tuple(_native.available_isas()),
        memory_total=memory()[0],
        memory_available=memory()[1],
        last_level_cache=last_level_cache(),
    )


def limits(seconds: float = 0.2, threads: int = 0) -> Limits:
    """Measure the three limits, `seconds` each. threads 0: as many as `describe().cores`.

    Memory is read from a buffer well past the last-level cache (at most a quarter of the memory left, at least 16 MiB).
    """
    from hasten import _native

    threads = threads or _native.granted_threads()
    size, available = min(max(8 * last_level_cache(), GiB // 4), MAX_READ_BYTES), memory()[1]
    if available is not None:
        size = min(size, max(available // 4, LEAST_READ_BYTES))
    return Limits(
        _native.read_gbs(size, seconds, threads),
        _native.int8_gmacs(seconds, threads),
        _native.bf16_gmacs(seconds, threads),
        threads,
    )


def peak_resident() -> int:
    """The most memory this process has held so far, in bytes, mapped files included; 0 where nothing tells."""
    try:
        return kilobytes(ROOT / "proc/self/status", "VmHWM")
    except OSError:
        pass
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def last_level_cache(root: Path = ROOT) -> int:
    """Bytes of the largest cache that the first core reaches; 0 where the system does not tell."""
    sizes = [0]
    for path in (root / "sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20, "G": GiB}.get(text[-1:], 1)
        digits = text.rstrip("KMG")
        sizes.append(int(digits) * unit if digits.isdigit() else 0)
    return max(sizes)
