"""Integers and codebooks: nearest codes, scales given and made, byte layouts as native/core.h states them."""

from __future__ import annotations

import numpy as np
import pytest

from hasten import formats
from hasten.errors import FormatError

GROUPED = [name for name in formats.names() if formats.get(name).group]
LEARNED = np.array([63, -64, -40, -9, -8, -3, -1, 0, 1, 2, 7, 20, 33, 34, 50, -20])


def book_of(fmt) -> np.ndarray:
    """As many of LEARNED as the format has entries, the extremes of both signs among them."""
    return LEARNED[: fmt.entries]


def levels_of(fmt, parameters) -> np.ndarray:
    if "codebook" in fmt.kind:
        return np.asarray(parameters.get("codebook", fmt.pack(np.ones((1, 1), np.float32)).arrays["codebook"] - 64.0))
    levels = {"int4": (-8, 8, 1), "int3": (-4, 4, 1), "int2": (-3, 4, 2), "int1": (-1, 2, 2)}
    return np.arange(*levels.get(fmt.kind, (-127, 128, 1)))


def larger_half(values: np.ndarray) -> np.ndarray:
    """Zeros where a block of 16 rows by 32 columns has 256 larger values: block by block, value by value."""
    padded = np.zeros((-(-values.shape[0] // 16) * 16, -(-values.shape[1] // 32) * 32), values.dtype)
    padded[: values.shape[0], : values.shape[1]] = values
    for row in range(0, len(padded), 16):
        for column in range(0, padded.shape[1], 32):
            block = padded[row : row + 16, column : column + 32]
            block[np.abs(block) < np.sort(np.abs(block), axis=None)[-256]] = 0
    return padded[: values.shape[0], : values.shape[1]]


@pytest.mark.parametrize(
    ("name", "learned"), [(n, b) for n in GROUPED for b in (False, True) if not b or "codebook" in n]
)
@pytest.mark.parametrize("given", [False, True])
def test_every_code_is_the_nearest(name, learned, given):
    fmt = formats.get(name)
    rng = np.random.default_rng(1)
    values = rng.standard_normal((19, 172)).astype(np.float32)
    parameters = {"codebook": book_of(fmt)} if learned else {}
    groups = -(-172 // fmt.group)
    if given:
        parameters["scales"] = (
            rng.standard_normal((19, groups)) * (3 / np.abs(levels_of(fmt, parameters)).max())
        ).astype(np.float32)
    weight = fmt.pack(values, **parameters)
    scales = np.repeat(fmt.scales(weight), fmt.group, axis=1)[:, :172].astype(np.float64)
    if given:
        assert np.array_equal(fmt.scales(weight), parameters["scales"].astype(np.float16).astype(np.float32))
    if fmt.kind == "sparse8":
        kept = larger_half(values)
        assert 0.4 < (kept != 0).mean() < 0.8
        assert not weight.dense()[kept == 0].any()
        values = kept
    distance = np.abs(values[..., None] - scales[..., None] * levels_of(fmt, parameters)).min(axis=-1)
    assert np.abs(values - weight.dense().astype(np.float64)) == pytest.approx(distance, abs=1e-6)
    levels = fmt.levels(weight)
    assert levels.dtype == np.int8
    assert np.isin(levels, levels_of(fmt, parameters)).all()
    assert np.array_equal(levels * scales, weight.dense())


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
    for bits in (3, 2, 1):
        with pytest.raises(FormatError, match=f"must be {2**bits} integers"):
            formats.get(f"codebook{bits}-g64").pack(np.ones((1, 32), np.float32), codebook=book)


@pytest.mark.parametrize("name", [n for n in GROUPED if "codebook" in n])
def test_loading_a_codebook_beyond_seven_bits_is_refused(name):
    fmt = formats.get(name)
    weight = fmt.pack(np.ones((1, 32), np.float32))
    book = weight.arrays["codebook"].copy()
    book[-1] = 128
    with pytest.raises(FormatError, match="at most 127"):
        fmt.load({**weight.arrays, "codebook": book}, weight.shape)


@pytest.mark.parametrize("change", [1, -1])
def test_loading_a_mask_of_another_count_is_refused(change):
    fmt = formats.get("sparse8-g64")
    weight = fmt.random(40, 100, seed=0)
    codes = weight.arrays["codes"].copy()
    mask = codes[2, 3, 256:]
    place = next(i for i in range(512) if (mask[i // 8] >> (i % 8) & 1) == (change < 0))
    mask[place // 8] ^= 1 << (place % 8)
    with pytest.raises(FormatError, match=f"a mask of {256 + change} places, must be 256 of 512"):
        fmt.load({**weight.arrays, "codes": codes}, weight.shape)


@pytest.mark.parametrize("rows", [1, 16, 33])
def test_what_is_half_zeros_is_kept_whole(rows):
    """At most half of every block: nothing is lost but what int8 loses."""
    values = larger_half(np.random.default_rng(2).standard_normal((rows, 100)).astype(np.float32))
    values[:, 33:64:2] = 0  # blocks with less than half
    fmt = formats.get("sparse8-g32")
    dense = fmt.pack(values).dense()
    assert np.array_equal(dense, formats.get("int8-g32").pack(values).dense())


@pytest.mark.parametrize(("name", "planes"), [("int3", (2, 1)), ("int2", (2,)), ("int1", (1,)), ("int4", (4,))])
def test_planes_are_as_stated(name, planes):
    """native/core.h, read place by place."""
    bits = sum(planes)
    rng = np.random.default_rng(4)
    codes = rng.integers(0, 1 << bits, (18, 64))
    levels = codes - (1 << (bits - 1)) if bits > 2 else 2 * codes - ((1 << bits) - 1)
    packed = formats.get(f"{name}-g64").pack(levels.astype(np.float32), scales=np.ones((18, 1), np.float32))
    stored = packed.arrays["codes"].reshape(2, 2, 64 * bits)
    for row in range(18):
        for column in range(64):
            block, line, byte = stored[row // 16, column // 32], column % 32 // 4, row % 16 * 4 + column % 4
            found, low = 0, 0
            for b in planes:
                shift, at = line * b % 8, 64 * low + line * b // 8 * 64 + byte
                found |= (int(block[at]) >> shift & ((1 << b) - 1)) << low
                low += b
            assert found == codes[row, column], (row, column)


def test_sparse_layout():
    values = np.zeros((16, 64), np.float32)
    values[3, 37], values[0, 38], values[15, 63], values[2, 40] = 5, -7, 1, 127
    block = formats.get("sparse8-g64").pack(values, scales=np.ones((16, 1), np.float32)).arrays["codes"][0, 1]
    mask = np.unpackbits(block[256:], bitorder="little")
    stored = {int(p): int(v) for p, v in zip(np.flatnonzero(mask), block[:256].view(np.int8), strict=True) if v}
    assert stored == {64 + 3 * 4 + 1: 5, 64 + 0 * 4 + 2: -7, 7 * 64 + 15 * 4 + 3: 1, 2 * 64 + 2 * 4: 127}
    assert mask.sum() == 256


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
