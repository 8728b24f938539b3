"""Memory: what there is, and what running a model will take, said before it is taken."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hasten import formats
from hasten.backends import cache
from hasten.backends.batch import Limits
from hasten.backends.cache import KvFormat
from hasten.engine.buffers import beside_arena
from hasten.errors import InputError, MemoryLimitError
from hasten.graph.fuse import fuse
from hasten.graph.graph import Graph
from hasten.graph.memory import plan

ROOT = Path("/")


@dataclass(frozen=True)
class Prediction:
    """Bytes that a compiled model takes."""

    weights: int
    kv_cache: int
    buffers: int

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.buffers


def predict(graph: Graph, weights: int, limits: Limits, stored: Mapping[str, str] | None = None) -> Prediction:
    """What `graph` takes when compiled for `limits`, with `weights` bytes of weights in the formats `stored` names."""
    from hasten import _native

    tokens, fused = limits.kv_blocks * limits.block_size, fuse(graph)
    arena = 4 * plan(fused, limits.max_tokens, limits.max_rows).total
    rest = beside_arena(fused, limits, stored, limits.threads or _native.granted_threads())
    return Prediction(weights, tokens * kv_bytes(graph, limits.kv_format), arena + rest)


def kv_bytes(graph: Graph, kv_format: KvFormat) -> int:
    """Bytes of keys and values that one token leaves in the cache, all layers together."""
    formats = cache.formats_of(graph, kv_format)
    slots = {op.layer: op for op in cache.attentions(graph)}
    return sum(2 * op.kv_heads * cache.token_bytes(formats[slot], op.head_dim) for slot, op in slots.items())


def weight_bytes(graph: Graph, stored: Mapping[str, str]) -> int:
    """Bytes of a graph's weights: matrices in the formats `stored` names, vectors in float32."""
    total = 0
    for name, spec in graph.weights.items():
        if spec.is_matrix:
            rows, columns = spec.shape
            total += formats.get(stored[name]).nbytes(rows, columns)
        else:
            total += 4 * spec.shape[0]
    return total


def kv_format(stored: Iterable[str], asked: KvFormat = "auto", own: Sequence[str] = ()) -> KvFormat:
    """The cache's format: what was asked for (a name, or one for each layer, in a text between commas), or the model's
    `own`, or f32 where one of the formats that it is stored in is, else bf16.

    Serving and evaluation both ask here, so that what is measured is what is served. Raises InputError for a format
    that does not exist.
    """
    if asked == "auto":
        return _alike(tuple(own)) if own else "f32" if "f32" in stored else "bf16"
    names = tuple(name.strip() for name in asked.split(",")) if isinstance(asked, str) else tuple(asked)
    for name in names or ("",):
        if name not in cache.FORMATS:
            raise InputError(
                f"kv_format is '{name}', must be auto, {', '.join(cache.FORMATS[:-1])} or {cache.FORMATS[-1]}",
                "or one of them for each layer, between commas",
            )
    return names[0] if len(names) == 1 else names


def _alike(names: tuple[str, ...]) -> KvFormat:
    return names[0] if len(set(names)) == 1 else names


def shown_format(kv_format: KvFormat) -> str:
    """For people: "int8", or "4 layers int4, 1 layer int8"."""
    if isinstance(kv_format, str):
        return kv_format
    return ", ".join(f"{n} layer{'s' * (n > 1)} {name}" for name, n in Counter(kv_format).most_common())


def require(needed: Prediction, available: int | None) -> None:
    """Raise MemoryLimitError where `needed` is more than the `available` bytes (None, not known: nothing is)."""
    if available is not None and needed.total > available:
        parts = f"weights {size(needed.weights)}, cache {size(needed.kv_cache)}, buffers {size(needed.buffers)}"
        raise MemoryLimitError(
            f"running this takes {size(needed.total)} ({parts}); {size(available)} are available",
            "a shorter context, a smaller batch or a compressed model (hasten accelerate) takes less",
        )


def size(count: float) -> str:
    """Bytes for people: 1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"


def memory(root: Path = ROOT) -> tuple[int | None, int | None]:
    """(total, available) bytes, the smaller of machine and container; (None, None) where the system does not tell.

    0 available is what a container at its limit has.
    """
    total: int | None
    available: int | None
    try:
        total = kilobytes(root / "proc/meminfo", "MemTotal")
        available = kilobytes(root / "proc/meminfo", "MemAvailable")
    except OSError:
        try:
            total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (OSError, ValueError, AttributeError):
            total = None
        available = total
    for limit, used in _container_limits(root):
        left = max(limit - used, 0)
        total = limit if total is None else min(total, limit)
        available = left if available is None else min(available, left)
    return total, available


def kilobytes(path: Path, field: str) -> int:
    """A `Field:  123 kB` line of a file in /proc, in bytes."""
    for line in path.read_text().splitlines():
        key, _, value = line.partition(":")
        if key == field:
            return int(value.split()[0]) * 1024
    raise OSError(f"{path} has no {field}")


def _container_limits(root: Path) -> list[tuple[int, int]]:
    """(limit, used) in bytes for each control group with a memory limit, from this process's own group upwards.

    Files cached by the group can be dropped, so they do not count as used.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        parts = [part for part in group.split("/") if part not in ("", "..")]
        for depth in range(len(parts), -1, -1):
            found += _group_limit(base.joinpath(*parts[:depth]), *names)
    return found


def _group_limit(folder: Path, limit_name: str, used_name: str, cached_field: str) -> list[tuple[int, int]]:
    try:
        limit = (folder / limit_name).read_text().strip()
        used = int((folder / used_name).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return []
    if not limit.isdigit() or int(limit) >= 1 << 60:  # "max", or version 1's way to say none
        return []
    return [(int(limit), max(used - int(stat.get(cached_field, 0)), 0))]
