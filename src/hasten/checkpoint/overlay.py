"""A model's weights with some of them replaced, or new ones beside them: a model in the making, not written yet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from hasten.formats.base import Float32, Weight
from hasten.graph.graph import WeightSpec

if TYPE_CHECKING:
    from hasten.checkpoint.model import Store


class Overlay:
    """`new` first, then `store`. `bytes_on_disk` are those of `store`."""

    def __init__(self, store: Store, new: Mapping[str, Weight | Float32]) -> None:
        self._store, self._new = store, dict(new)
        self.dtype, self.bytes_on_disk = store.dtype, store.bytes_on_disk

    def format(self, spec: WeightSpec) -> str:
        own = self._new.get(spec.name)
        return own.format.name if isinstance(own, Weight) else self._store.format(spec)

    def tensor(self, spec: WeightSpec) -> Float32:
        own = self._new.get(spec.name)
        if own is None:
            return self._store.tensor(spec)
        return own.dense() if isinstance(own, Weight) else np.array(own)

    def weight(self, spec: WeightSpec) -> Weight | Float32:
        own = self._new.get(spec.name)
        return self._store.weight(spec) if own is None else own
