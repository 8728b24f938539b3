"""What calibration found: of every value that a linear reads, how large its features are and how they go together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from hasten.backends.batch import Float32
from hasten.compress.methods import Inputs
from hasten.compress.moments import Moments
from hasten.errors import CheckpointError, unwritable

Hidden = list[Float32]
"""One array [tokens, width] a window."""
VECTORS = ("moments", "magnitudes", "peaks")


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
            raise unwritable(folder, error) from None

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
            raise unwritable(folder, error) from None

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
        self._moments: dict[str, Moments] = {}

    def add(self, site: str, x: Float32) -> None:
        """x [tokens, width]."""
        if site not in self._moments:
            self._moments[site] = Moments(x.shape[1], site in self._hessians)
        self._moments[site].add(x)

    def found(self) -> dict[str, Inputs]:
        """Site -> what was seen of it. Raises CheckpointError naming a weight whose input is not finite."""
        made = {}
        for site, sums in self._moments.items():
            sums.settle()
            if not np.isfinite(sums.squares).all():
                what = f"what flows into '{self.sites[site][0]}' holds a NaN or an infinity, or is too large"
                raise CheckpointError(what, "the weights may be damaged")
            made[site] = Inputs(sums.squares / sums.tokens, sums.magnitudes / sums.tokens, sums.peaks, sums.second())
        self._moments.clear()
        return made
