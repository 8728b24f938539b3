"""What calibration found: of every value that a linear reads, how large its features are and how they go together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from hasten.backends.batch import Float32
from hasten.compress.methods import Inputs
from hasten.errors import CheckpointError, OutputError

Hidden = list[Float32]
"""One array [tokens, width] a window."""
VECTORS = ("moments", "magnitudes", "peaks")
ROWS = 8192
"""Tokens gathered before their outer products are added: one large matrix product rather than many small ones."""


@dataclass
class Statistics:
    """`inputs`: value -> what was seen of it; `readers`: weight -> the value that its linear reads.

    `tokens`: how many were seen; `final`: the last block's output.
    """

    sites: dict[str, Inputs] = field(default_factory=dict)
    readers: dict[str, str] = field(default_factory=dict)
    tokens: int = 0
    final: Hidden = field(default_factory=list)

    def inputs(self, name: str) -> Inputs | None:
        """Of the linear whose weight is `name`; None for one that no linear reads."""
        return self.sites.get(self.readers.get(name, ""))

    def save(self, folder: Path) -> None:
        """Into a folder whose statistics.npz stands only when all does. Raises OutputError."""
        arrays: dict[str, Any] = {"tokens": np.array(self.tokens)}
        arrays |= {f"final/{i:06d}": f for i, f in enumerate(self.final)}
        arrays["sites"] = np.array(list(self.sites), dtype=np.str_)
        arrays["readers"] = np.array(list(self.readers.items()), dtype=np.str_).reshape(-1, 2)
        part = folder / "statistics.part"
        self.spill(folder)
        try:
            for number, site in enumerate(self.sites.values()):
                arrays |= {f"{v}/{number}": a for v in VECTORS if (a := getattr(site, v)) is not None}
            with part.open("wb") as stream:
                np.savez(stream, **arrays)
            part.replace(folder / "statistics.npz")
        except OSError as error:
            part.unlink(missing_ok=True)
            raise OutputError(f"cannot write {folder}: {error.strerror}", "is the disk full?") from None

    def spill(self, folder: Path) -> None:
        """Put second moments into files of `folder`, and keep maps of them instead. Raises OutputError."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for number, (name, site) in enumerate(self.sites.items()):
                if site.hessian is None or isinstance(site.hessian, np.memmap):
                    continue
                file = folder / f"hessian-{number:05d}.npy"
                np.save(file, site.hessian)
                self.sites[name] = replace(site, hessian=np.load(file, mmap_mode="r"))
        except OSError as error:
            raise OutputError(f"cannot write {folder}: {error.strerror}", "is the disk full?") from None

    @staticmethod
    def load(folder: Path) -> Statistics:
        """What `save` wrote; second moments are mapped, and read when a method asks for them."""
        with np.load(folder / "statistics.npz") as arrays:
            sites = {}
            for number, name in enumerate(arrays["sites"].tolist()):
                vectors = {v: arrays[f"{v}/{number}"] for v in VECTORS if f"{v}/{number}" in arrays.files}
                file = folder / f"hessian-{number:05d}.npy"
                sites[name] = Inputs(**vectors, hessian=np.load(file, mmap_mode="r") if file.exists() else None)
            readers = dict(arrays["readers"].tolist())
            final = [arrays[n] for n in sorted(arrays.files) if n.startswith("final/")]
            return Statistics(sites, readers, int(arrays["tokens"]), final)


class Gatherer:
    """Adds up what flows through the sites of a section of a model.

    `sites`: value -> weights of the linears that read it; `hessians`: for these sites second moments are gathered too.
    """

    def __init__(self, sites: Mapping[str, list[str]], hessians: frozenset[str] = frozenset()) -> None:
        self.sites = sites
        self._hessians = hessians
        self._sums: dict[str, list[Any]] = {}
        self._second: dict[str, Any] = {}
        self._waiting: dict[str, list[Float32]] = {}
        self._tokens: dict[str, int] = {}

    def add(self, site: str, x: Float32) -> None:
        """x [tokens, width]. Raises CheckpointError naming a weight whose input is not finite."""
        square = np.einsum("ti,ti->i", x, x, dtype=np.float64)
        if not np.isfinite(square).all():
            raise CheckpointError(
                f"what flows into '{self.sites[site][0]}' holds a NaN or an infinity", "the weights may be damaged"
            )
        size = np.abs(x)
        magnitude, peak = size.sum(axis=0, dtype=np.float64), size.max(axis=0)
        known = self._sums.get(site)
        if known is None:
            self._sums[site] = [square, magnitude, peak]
        else:
            known[0] += square
            known[1] += magnitude
            np.maximum(known[2], peak, out=known[2])
        self._tokens[site] = self._tokens.get(site, 0) + len(x)
        if site in self._hessians:
            waiting = self._waiting.setdefault(site, [])
            waiting.append(x)
            if sum(len(w) for w in waiting) >= ROWS:
                self._flush(site)

    def _flush(self, site: str) -> None:
        waiting = self._waiting.pop(site, [])
        if not waiting:
            return
        x = np.concatenate(waiting)
        product = x.T @ x  # [in, in]; one triangle is computed
        if site in self._second:
            self._second[site] += product
        else:
            self._second[site] = product.astype(np.float64)

    def found(self) -> dict[str, Inputs]:
        """Site -> what was seen of it."""
        made = {}
        for site, (square, magnitude, peak) in self._sums.items():
            self._flush(site)
            count = self._tokens[site]
            second = self._second.pop(site, None)
            hessian = None if second is None else (second / count).astype(np.float32)
            made[site] = Inputs(square / count, magnitude / count, peak.astype(np.float64), hessian)
        return made
