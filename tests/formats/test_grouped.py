"""Integers and codebooks: nearest codes, scales given and made, byte layouts as native/core.h states them."""

from __future__ import annotations

import numpy as np
import pytest

from hasten import formats
from hasten.errors import FormatError

GROUPED = [name for name in formats.names() if formats.get(name).group]
LEARNED = np.array([63, -64, -40, -9, -8, -3, -1, 0, 1, 2, 7, 20, 33, 34, 50, -20])


def levels_of(fmt, parameters) -> np.ndarray:
    if fmt.kind == "int8":
        return np.arange(-127, 128)
    if fmt.kind == "int4":
        return np.arange(-8, 8)
    return np.asarray(parameters.get("codebook", fmt.pack(np.ones((1, 1), np.float32)).arrays["codebook"] - 64.0))


@pytest.mark.parametrize(
    ("name", "learned"), [(n, b) for n in GROUPED for b in (False, True) if not b or "codebook" in n]
)
@pytest.mark.parametrize("given", [False, True])
def test_every_code_is_the_nearest(name, learned, given):
    fmt = formats.get(name)
    rng = np.random.default_rng(1)
    values = rng.standard_normal((19, 172)).astype(np.float32)
    parameters = {"codebook": LEARNED} if learned else {}
    groups = -(-172 // fmt.group)
    if given:
        parameters["scales"] = (
            rng.standard_normal((19, groups)) * (3 / np.abs(levels_of(fmt, parameters)).max())
        ).astype(np.float32)
    weight = fmt.pack(values, **parameters)
    scales = np.repeat(fmt.scales(weight), fmt.group, axis=1)[:, :172].astype(np.float64)
    if given:
        assert np.array_equal(fmt.scales(weight), parameters["scales"].astype(np.float16).astype(np.float32))
    distance = np.abs(values[..., None] - scales[..., None] * levels_of(fmt, parameters)).min(axis=-1)
    assert np.abs(values - weight.dense().astype(np.float64)) == pytest.approx(distance, abs=1e-6)


@pytest.mark.parametrize("name", GROUPED)
def test_extremes_are_kept_without_given_scales(name):
    fmt = formats.get(name)
    values = np.zeros((2, fmt.group * 2), np.float32)
    values[0, 3], values[0, 4], values[1, fmt.group] = 8.0, -4.0, -1.0
    dense = fmt.pack(values).dense()
    assert dense[0, 3] == pytest.approx(8.0, rel=1e-3)
    assert dense[1, fmt.group] == pytest.approx(-1.0, rel=1e-3)
    assert np.array_equal(fmt.pack(values).dense(), fmt.pack(values, scales=fmt.absmax_scales(values)).dense())


@pytest.mark.parametrize("name", GROUPED)
def test_impossible_scales_are_refused(name):
    fmt = formats.get(name)
    with pytest.raises(FormatError, match="f16 holds"):
        fmt.pack(np.full((1, 32), 3e38, np.float32))
    with pytest.raises(FormatError, match="f16 holds"):
        fmt.pack(np.ones((1, 32), np.float32), scales=np.full((1, 1), np.nan, np.float32))
    with pytest.raises(FormatError, match=r"scales are \[1, 2\], must be \[1, 1\]"):
        fmt.pack(np.ones((1, 32), np.float32), scales=np.ones((1, 2), np.float32))
    weight = fmt.pack(np.ones((1, 32), np.float32))
    for bad in (np.nan, np.inf):
        scales = weight.arrays["scales"].copy()
        scales[0, 0, 15] = bad
        with pytest.raises(FormatError, match="NaN or an infinity"):
            fmt.load({**weight.arrays, "scales": scales}, weight.shape)


@pytest.mark.parametrize("name", GROUPED)
def test_zero_and_tiny_groups_are_zeros(name):
    values = np.zeros((3, 70), np.float32)
    values[1] = 1e-30  # its scale is zero in f16
    dense = formats.get(name).pack(values).dense()
    assert not dense.any()


@pytest.mark.parametrize("book", [LEARNED[:15], LEARNED + 1, LEARNED * 0.5, np.zeros(16)])
def test_impossible_codebooks_are_refused(book):
    with pytest.raises(FormatError, match="codebook"):
        formats.get("codebook4-g64").pack(np.ones((1, 32), np.float32), codebook=book)


def test_loading_a_codebook_beyond_seven_bits_is_refused():
    fmt = formats.get("codebook4-g32")
    weight = fmt.pack(np.ones((1, 32), np.float32))
    with pytest.raises(FormatError, match="at most 127"):
        fmt.load({**weight.arrays, "codebook": np.full(16, 128, np.uint8)}, weight.shape)


def test_byte_layouts():
    columns = np.arange(40)
    eight = formats.get("int8-g32").pack(
        (columns[None] - 20).astype(np.float32).repeat(18, 0), scales=np.ones((18, 2), np.float32)
    )
    codes = eight.arrays["codes"]  # [panels, padded / 4, 16, 4]
    assert codes.shape == (2, 16, 16, 4)
    assert [int(c) for c in codes[1, 9, 1]] == [128 + c - 20 for c in (36, 37, 38, 39)]
    assert (codes[:, 10:] == 128).all()
    four = formats.get("int4-g32").pack(
        (columns[None] % 16 - 8).astype(np.float32).repeat(18, 0), scales=np.ones((18, 2), np.float32)
    )
    codes = four.arrays["codes"]  # [panels, padded / 8, 16, 4]: low nibble column 8j+i, high 8j+4+i
    assert codes.shape == (2, 8, 16, 4)
    assert [int(c & 15) for c in codes[1, 3, 1]] == [(24 + i) % 16 for i in range(4)]
    assert [int(c >> 4) for c in codes[1, 3, 1]] == [(28 + i) % 16 for i in range(4)]
    assert four.arrays["scales"].shape == (2, 2, 16)
