"""Contracts that every weight format keeps, run over all that `formats.names()` discovers."""

from __future__ import annotations

import numpy as np
import pytest

from hasten import formats
from hasten.errors import FormatError

SHAPES = [(1, 1), (3, 172), (16, 32), (17, 33), (50, 300), (31, 7), (33, 128)]
# Of a group's extreme: half the widest step (NF4's is 19 of 63); the far side of int4 and int3 stops a step short.
# One bit has nothing near zero, and what sparse8 drops may be all that a group has.
TOLERANCE = {
    **{
        "f32": 0,
        "f16": 2**-11,
        "bf16": 2**-8,
        "int8": 0.505 / 127,
        "int4": 1.01 / 8,
        "int3": 1.01 / 4,
        "int2": 1.01 / 3,
    },
    **{"int1": 1.001, "codebook4": 9.6 / 63, "codebook3": 16.7 / 63, "codebook2": 21.2 / 63, "codebook1": 1.001},
    "sparse8": 1.0,
}
BITS = {
    **{"f32": 32, "f16": 16, "bf16": 16, "int8": 8, "int4": 4, "int3": 3, "int2": 2, "int1": 1},
    **{"codebook4": 4, "codebook3": 3, "codebook2": 2, "codebook1": 1, "sparse8": 5},  # half of 8, and a bit for each
}


@pytest.fixture(params=formats.names())
def fmt(request):
    return formats.get(request.param)


def values_of(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def group_extremes(values: np.ndarray, group: int) -> np.ndarray:
    """The largest magnitude of each value's group, spread back over [rows, columns]."""
    width = group or 1
    out = np.empty_like(values)
    for start in range(0, values.shape[1], width):
        out[:, start : start + width] = np.abs(values[:, start : start + width]).max(axis=1, keepdims=True)
    return out


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_unpacked_values_are_near(fmt, rows, columns):
    values = values_of(rows, columns)
    weight = fmt.pack(values)
    error = np.abs(weight.dense().astype(np.float64) - values)
    assert (error <= TOLERANCE[fmt.kind] * group_extremes(values, fmt.group)).all()
    assert weight.dense().shape == weight.shape == (rows, columns)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_packing_what_was_unpacked_changes_nothing(fmt, rows, columns):
    weight = fmt.pack(values_of(rows, columns))
    parameters = {"scales": fmt.scales(weight)} if fmt.group else {}
    again = fmt.pack(weight.dense(), **parameters)
    assert np.array_equal(again.dense(), weight.dense())


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_arrays_are_as_specified_and_load_without_copying(fmt, rows, columns):
    weight = fmt.pack(values_of(rows, columns))
    loaded = fmt.load(weight.arrays, weight.shape)
    assert all(loaded.arrays[name] is weight.arrays[name] for name in weight.arrays)
    assert weight.nbytes == fmt.nbytes(rows, columns)
    assert all(a.flags.c_contiguous for a in weight.arrays.values())
    for made in (weight, fmt.random(rows, columns, seed=0)):
        assert all(made.arrays[name].ctypes.data % 64 == 0 for name in ("codes", "scales") if name in made.arrays)


def test_bits_per_weight_are_as_named(fmt):
    overhead = 16 / fmt.group if fmt.group else 0.0
    book = 2 ** int(fmt.kind[-1]) * 8 / (512 * 1024) if "codebook" in fmt.kind else 0.0
    assert fmt.bits_per_weight(512, 1024) == pytest.approx(BITS[fmt.kind] + overhead + book, rel=1e-12)


def test_absent_rows_and_columns_multiply_to_nothing(fmt):
    weight = fmt.pack(values_of(17, 33))
    wide = formats.Weight(fmt, (32, 33), weight.arrays)
    assert not wide.dense()[17:].any()


def test_random_weights_look_like_weights(fmt):
    weight = fmt.random(40, 300, seed=1)
    fmt.load(weight.arrays, weight.shape)
    dense = weight.dense()
    assert np.isfinite(dense).all()
    assert 0.1 * 300**-0.5 < dense.std() < 3 * 300**-0.5
    assert np.array_equal(dense, fmt.random(40, 300, seed=1).dense())
    assert not formats.Weight(fmt, (48, 300), weight.arrays).dense()[40:].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers_are_refused(fmt, bad):
    values = values_of(20, 40)
    values[19, 39] = bad
    with pytest.raises(FormatError, match="NaN or infinite"):
        fmt.pack(values)


@pytest.mark.parametrize("values", [np.zeros((2, 3)), np.zeros(4, np.float32), np.zeros((0, 4), np.float32)])
def test_only_float32_matrices_are_packed(fmt, values):
    with pytest.raises(FormatError, match="packs a float32 matrix"):
        fmt.pack(values)


def test_unknown_parameters_are_refused(fmt):
    with pytest.raises(FormatError, match="spam"):
        fmt.pack(values_of(4, 32), spam=1)


def test_loading_checks_names_dtypes_and_shapes(fmt):
    weight = fmt.pack(values_of(33, 172))
    arrays = weight.arrays
    with pytest.raises(FormatError, match="must hold"):
        fmt.load({}, weight.shape)
    with pytest.raises(FormatError, match="must hold"):
        fmt.load({**arrays, "extra": arrays["codes"]}, weight.shape)
    for name, array in arrays.items():
        with pytest.raises(FormatError, match=f"array '{name}' is"):
            fmt.load({**arrays, name: array[:-1]}, weight.shape)
        with pytest.raises(FormatError, match=f"array '{name}' is"):
            fmt.load({**arrays, name: array.astype(np.int64)}, weight.shape)
    with pytest.raises(FormatError, match="array 'codes' is"):
        fmt.load(arrays, (49, 172))
    with pytest.raises(FormatError, match=r"array '\w+' is"):
        fmt.load(arrays, (33, 400))


def test_an_unknown_format_lists_those_that_exist():
    with pytest.raises(FormatError, match="unknown weight format 'int5'") as caught:
        formats.get("int5")
    assert "int4-g128" in str(caught.value.hint)
