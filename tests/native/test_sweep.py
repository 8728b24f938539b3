"""The sweep of every instruction set against its definition in float64, a row and a column at a time."""

from __future__ import annotations

import numpy as np
import pytest

from hasten import _native
from hasten.compress.methods import clip
from hasten.compress.methods._sweep import HALF_LEVELS, Grid

isas = pytest.mark.parametrize("isa", _native.available_isas())


def table(kind: str = "int4") -> np.ndarray:
    return Grid(np.ones((1, 1), np.float32), np.zeros(1, np.int64), clip.rounding(kind)).levels()


def defined(values, moved, ahead, scales, low, high, weights, kept):
    made, moved, error = np.zeros_like(values), moved.astype(np.float64).copy(), np.zeros(values.shape[1])
    for row in range(values.shape[1]):
        for c in range(len(values)):
            wanted, scale = float(values[c, row]) + moved[c, row], float(scales[c, row])
            made[c, row] = np.clip(np.rint(wanted / scale), low, high) * scale * kept[c, row] if scale else 0
            lost = float(values[c, row]) - float(made[c, row])
            error[row] += weights[c] * (wanted - made[c, row]) ** 2
            moved[c + 1 :, row] += lost * ahead[c, c + 1 :].astype(np.float64)
    return made, values - made, error


@isas
@pytest.mark.parametrize(("columns", "rows"), [(1, 1), (7, 16), (32, 17), (128, 40)])
@pytest.mark.parametrize("pruned", [False, True])
def test_the_sweep_is_its_definition(isa: str, columns: int, rows: int, pruned: bool) -> None:
    rng = np.random.default_rng(columns)
    values, moved = rng.normal(size=(2, columns, rows)).astype(np.float32) * np.float32([[[1]], [[0.1]]])
    ahead = np.triu(rng.normal(size=(columns, columns)) / columns, 1).astype(np.float32)
    scales = rng.uniform(0.05, 0.3, (columns, rows)).astype(np.float32)
    scales[rng.uniform(size=scales.shape) < 0.05] = 0
    kept = (rng.uniform(size=scales.shape) < 0.5).astype(np.float32) if pruned else np.ones_like(scales)
    weights = rng.uniform(0.5, 2, columns).astype(np.float32)
    made, lost, error = _native.sweep(isa, values, moved, ahead, scales, table(), weights, kept if pruned else None)
    expected = defined(values, moved, ahead, scales, -8, 7, weights, kept)
    np.testing.assert_allclose(made, expected[0], atol=1e-6)
    np.testing.assert_allclose(lost, expected[1], atol=1e-6)
    np.testing.assert_allclose(error, expected[2], rtol=1e-4)


@pytest.mark.parametrize("kind", list(clip.LEVELS))
def test_the_table_rounds_as_the_format_does(kind: str) -> None:
    quotients = np.random.default_rng(1).uniform(-140, 140, 5000).astype(np.float32)
    place = np.clip(np.floor(2 * quotients) + HALF_LEVELS // 2, 0, HALF_LEVELS - 1).astype(int)
    np.testing.assert_array_equal(table(kind)[place], clip.rounding(kind)(quotients.copy()))


@isas
def test_shapes_that_do_not_go_together_are_refused(isa: str) -> None:
    one, wide = np.ones((2, 16), np.float32), np.ones((200, 16), np.float32)
    square, weights = np.ones((2, 2), np.float32), np.ones(2, np.float32)
    for values, ahead, levels in (
        (wide, np.ones((200, 200), np.float32), table()),
        (one, np.ones((3, 3), np.float32), table()),
        (one, square, table()[:-1]),
    ):
        with pytest.raises(ValueError, match="do not go together"):
            _native.sweep(isa, values, values, ahead, values, levels, weights, None)
