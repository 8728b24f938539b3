"""f16 and bf16 round as the standard says (ml_dtypes as oracle), and say so when they cannot hold a value."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from hasten import formats
from hasten.errors import FormatError


def test_bf16_rounds_to_nearest_even():
    bits = np.random.default_rng(0).integers(0, 1 << 32, (64, 96), np.uint64).astype(np.uint32)
    values = bits.view(np.float32)
    values = np.where(np.isfinite(values) & (np.abs(values) < 3e38), values, np.float32(1.00390625))  # a tie
    assert np.array_equal(
        formats.get("bf16").pack(values).dense(), values.astype(ml_dtypes.bfloat16).astype(np.float32)
    )


@pytest.mark.parametrize(("name", "value"), [("f16", 65520.0), ("bf16", 3.4e38)])
def test_overflow_is_refused(name, value):
    with pytest.raises(FormatError, match=f"too large for {name}"):
        formats.get(name).pack(np.full((1, 1), value, np.float32))


def test_f32_layout_is_panels_of_sixteen_rows():
    values = np.arange(20 * 3, dtype=np.float32).reshape(20, 3)
    codes = formats.get("f32").pack(values).arrays["codes"]
    assert codes[1, 2, 3] == values[19, 2]
    assert codes[1, 2, 4] == 0


def test_bf16_layout_pairs_neighbouring_columns():
    values = np.arange(20 * 3, dtype=np.float32).reshape(20, 3)
    codes = formats.get("bf16").pack(values).arrays["codes"]
    assert codes.shape == (2, 2, 16, 2)
    assert codes[1, 0, 3, 1] == values[19, 1].astype(ml_dtypes.bfloat16).view(np.uint16)
    assert codes[1, 1, 3, 1] == 0
