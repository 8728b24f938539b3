"""Every instruction set's matmul against float64 formulas on the same quantised values; rows alone and in company."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from hasten import _native, formats

kernels = _native.matmul
ISAS = _native.matmul.isas()
SHAPES = [(1, 1), (3, 172), (16, 64), (17, 33), (31, 96), (33, 129), (50, 300), (48, 7), (64, 256), (5, 128)]
QUANTISED = [name for name in formats.names() if formats.get(name).group]
KINDS = sorted({formats.get(name).kind for name in QUANTISED})
GUARD = np.float32(-12345.0)


@pytest.fixture(params=ISAS)
def isa(request):
    return request.param


def native(weight: formats.Weight):
    f = weight.format
    return kernels.Weight(f.kind, *weight.shape, f.group, **weight.arrays)


def guarded(tokens: int, rows: int, offset: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """A view [tokens, rows] that starts off any alignment, and the array around it, all guard values."""
    around = np.full((tokens + 2, rows + offset + 21), GUARD, np.float32)
    return around[1:-1, offset : offset + rows], around


def assert_guards(around: np.ndarray, rows: int, offset: int = 3) -> None:
    outside = around.copy()
    outside[1:-1, offset : offset + rows] = GUARD
    assert (outside == GUARD).all()


def inputs(tokens: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((tokens, columns)).astype(np.float32)


def run_int(isa, weight, x, group, **panels) -> np.ndarray:
    codes, scales, sums = kernels.quantise(isa, x, group)
    out, around = guarded(len(x), weight.shape[0])
    kernels.matmul_int(isa, native(weight), codes, scales, sums, group, out, **panels)
    assert_guards(around, weight.shape[0])
    return out


def run_float(isa, weight, x, **panels) -> np.ndarray:
    if kernels.bf16_inputs(isa) and weight.format.kind == "bf16":
        x = kernels.to_bf16(isa, x)
    out, around = guarded(len(x), weight.shape[0])
    kernels.matmul_float(isa, native(weight), x, out, **panels)
    assert_guards(around, weight.shape[0])
    return out


def run(isa, weight, x, **panels) -> np.ndarray:
    if weight.format.group:
        return run_int(isa, weight, x, weight.format.group, **panels)
    return run_float(isa, weight, x, **panels)


def dequantised(isa, x: np.ndarray, group: int) -> np.ndarray:
    codes, scales, _ = kernels.quantise(isa, x, group)
    spread = np.repeat(scales.astype(np.float64), group, axis=1)[:, : x.shape[1]]
    return codes[:, : x.shape[1]].astype(np.float64) * spread


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("columns", [1, 31, 64, 172, 300])
def test_quantise_rounds_to_nearest(isa, columns, group):
    x = inputs(7, columns) * np.logspace(-20, 20, 7, dtype=np.float32)[:, None]
    x[0, :group] = 0
    codes, scales, sums = kernels.quantise(isa, x, group)
    groups = -(-columns // group)
    padded = np.zeros((7, groups * group))
    padded[:, :columns] = x
    extreme = np.abs(padded.reshape(7, groups, group)).max(axis=2)
    assert scales == pytest.approx(extreme / 127, rel=1e-6)
    exact = padded.reshape(7, groups, group) * 127 / np.where(extreme == 0, 1, extreme)[..., None]
    found = np.zeros((7, groups * group))
    found[:, :columns] = codes[:, :columns]
    grouped = found.reshape(7, groups, group)
    assert (np.abs(grouped - exact) <= 0.5 + 1e-4).all()
    assert (np.abs(grouped).max(axis=2) == np.where(extreme == 0, 0, 127)).all()
    assert (codes[:, columns:] == 0).all()
    assert (sums == grouped.sum(axis=2)).all()


def test_quantise_ties_go_to_even(isa):
    x = np.zeros((1, 32), np.float32)
    x[0, :6] = [127, 0.5, 1.5, 2.5, -0.5, -1.5]
    codes, scales, _ = kernels.quantise(isa, x, 32)
    assert codes[0, :6].tolist() == [127, 0, 2, 2, 0, -2]
    assert scales[0, 0] == 1


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 33, 95, 96, 128])
def test_what_is_not_finite_spoils_its_group_alone(isa, value, place):
    x = inputs(3, 129)
    usual = kernels.quantise(isa, x, 32)
    x[1, place] = value
    found = kernels.quantise(isa, x, 32)
    group = slice(place // 32 * 32, place // 32 * 32 + 32)
    usual[0][1, group] = 0
    usual[1][1, place // 32] = np.nan
    usual[2][1, place // 32] = 0
    for one, other in zip(found, usual, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("tokens", [1, 2, 14])
@pytest.mark.parametrize("name", formats.names())
def test_what_is_not_finite_reaches_every_output_of_its_row(isa, name, tokens):
    weight = formats.get(name).pack(inputs(33, 172, seed=1))
    for value in (np.nan, np.inf):
        x = inputs(tokens, 172)
        x[tokens // 2, 100] = value
        finite = np.isfinite(run(isa, weight, x))
        assert not finite[tokens // 2].any()
        assert np.delete(finite, tokens // 2, axis=0).all()


@pytest.mark.parametrize("tokens", [1, 2, 5, 13])
@pytest.mark.parametrize("name", [f"{kind}-g{32 << i % 3}" for i, kind in enumerate(KINDS)])
def test_integer_parts_are_exact(isa, name, tokens):
    for rows, columns in SHAPES:
        check_integer_parts(isa, name, rows, columns, tokens)


def check_integer_parts(isa, name, rows, columns, tokens):
    fmt = formats.get(name)
    rng = np.random.default_rng(3)
    weight = fmt.random(rows, columns, seed=rows)
    weight.arrays["scales"][:] = 1
    levels = weight.dense().astype(np.int64)
    codes = np.zeros((tokens, -(-columns // 64) * 64), np.int8)
    codes[:, :columns] = rng.choice([-127, 127, 1, 0, -55], (tokens, columns))
    groups = -(-columns // 32)
    padded = np.zeros((tokens, groups * 32), np.int32)
    padded[:, :columns] = codes[:, :columns]
    sums = padded.reshape(tokens, groups, 32).sum(axis=2, dtype=np.int32)
    out, around = guarded(tokens, rows)
    kernels.matmul_int(isa, native(weight), codes, np.ones((tokens, groups), np.float32), sums, 32, out)
    assert_guards(around, rows)
    assert np.array_equal(out, codes[:, :columns].astype(np.int64) @ levels.T)


@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_codes_do_not_saturate(isa, kind, tokens):
    weight = formats.get(f"{kind}-g128").random(16, 256, seed=0)
    weight.arrays["scales"][:] = 1
    if "codebook" in weight.arrays:
        weight.arrays["codebook"][:] = 127
    stored = weight.arrays["codes"][..., :256] if kind == "sparse8" else weight.arrays["codes"]  # not the masks
    for code in (0xFF, 0x01, 0x00, 0x80, 0x7F):
        stored[:] = code
        for sign in (127, -127):
            codes = np.full((tokens, 256), sign, np.int8)
            sums = np.full((tokens, 2), sign * 128, np.int32)
            out = np.empty((tokens, 16), np.float32)
            kernels.matmul_int(isa, native(weight), codes, np.ones((tokens, 2), np.float32), sums, 128, out)
            assert np.array_equal(out, codes.astype(np.int64) @ weight.dense().astype(np.int64).T)


@pytest.mark.parametrize(
    ("name", "group"), [(n, g) for n in QUANTISED for g in (32, 64, 128) if formats.get(n).group % g == 0]
)
def test_matmul_int_is_the_formula(isa, name, group):
    for rows, columns in SHAPES:
        weight = formats.get(name).pack(inputs(rows, columns, seed=1))
        x = inputs(6, columns, seed=2)
        wanted = dequantised(isa, x, group) @ weight.dense().astype(np.float64).T
        size = np.abs(dequantised(isa, x, group)) @ np.abs(weight.dense()).T
        assert (np.abs(run_int(isa, weight, x, group) - wanted) <= 1e-6 * size + 1e-30).all(), (rows, columns)


@pytest.mark.parametrize("tokens", [1, 3, 14])
@pytest.mark.parametrize("name", ["f32", "f16", "bf16"])
def test_matmul_float_is_the_formula(isa, name, tokens):
    for rows, columns in SHAPES:
        check_float_formula(isa, name, rows, columns, tokens)


def check_float_formula(isa, name, rows, columns, tokens):
    weight = formats.get(name).pack(inputs(rows, columns, seed=1))
    x = inputs(tokens, columns, seed=2)
    seen = x
    if kernels.bf16_inputs(isa) and name == "bf16":
        seen = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    wanted = seen.astype(np.float64) @ weight.dense().astype(np.float64).T
    size = np.abs(seen).astype(np.float64) @ np.abs(weight.dense()).T
    assert (np.abs(run_float(isa, weight, x) - wanted) <= 2e-6 * size).all()


@pytest.mark.parametrize(("rows", "columns"), [(50, 300), (33, 172), (16, 64), (7, 33)])
@pytest.mark.parametrize(
    "name", ["f32", "f16", "bf16", "int8-g128", *(f"{k}-g{32 << i % 3}" for i, k in enumerate(KINDS))]
)
def test_a_row_does_not_depend_on_its_company(isa, name, rows, columns):
    weight = formats.get(name).pack(inputs(rows, columns, seed=1))
    x = inputs(40, columns, seed=2)
    alone = np.concatenate([run(isa, weight, x[t : t + 1]) for t in range(40)])
    for tokens in (2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 16, 24, 25, 36, 37, 40):
        assert np.array_equal(run(isa, weight, x[-tokens:]).view(np.uint32), alone[-tokens:].view(np.uint32)), tokens


def test_what_lies_between_rows_of_activations_is_not_read(isa):
    x = inputs(14, 70, seed=2)
    wide = np.full((14, 150), np.nan, np.float32)
    wide[:, :70] = x
    weight = formats.get("f16").pack(inputs(33, 70, seed=1))
    assert np.array_equal(run_float(isa, weight, wide), run_float(isa, weight, x))
    weight = formats.get("int4-g64").pack(inputs(33, 70, seed=1))
    codes, scales, sums = kernels.quantise(isa, x, 64)
    spread = np.concatenate([codes, np.full((14, 64), 99, np.int8)], axis=1)
    out = np.empty((14, 33), np.float32)
    kernels.matmul_int(isa, native(weight), spread, scales, sums, 64, out)
    assert np.array_equal(out, run_int(isa, weight, x, 64))


@pytest.mark.parametrize(
    ("name", "columns"),
    [("bf16", 2051), ("f16", 2050), ("f32", 2049), *((f"{k}-g{32 << i % 3}", 33000) for i, k in enumerate(KINDS))],
)
def test_long_rows_are_cut_into_blocks_without_a_trace(isa, name, columns):
    weight = formats.get(name).pack(inputs(17, columns, seed=1))
    x = inputs(40, columns, seed=2)
    together = run(isa, weight, x)
    for t in (0, 11, 12, 39):
        assert np.array_equal(run(isa, weight, x[t : t + 1])[0], together[t])
    wanted = x.astype(np.float64) @ weight.dense().astype(np.float64).T
    assert (
        np.abs(together - wanted).max()
        <= (0.02 if weight.format.group or kernels.bf16_inputs(isa) else 1e-5) * np.abs(wanted).max()
    )


@pytest.mark.parametrize("tokens", [1, 3, 9, 30])
@pytest.mark.parametrize("name", ["f32", "f16", "bf16", *(f"{k}-g{32 << i % 3}" for i, k in enumerate(KINDS))])
def test_panels_can_be_split_anywhere(isa, name, tokens):
    weight = formats.get(name).pack(inputs(70, 140, seed=1))
    x = inputs(tokens, 140, seed=2)
    whole = run(isa, weight, x)
    for first, last in [(0, 1), (1, 2), (1, 4), (2, 5), (4, 5), (3, 3)]:
        part = run(isa, weight, x, panel0=first, panel1=last)
        inside = slice(first * 16, min(last * 16, 70))
        assert np.array_equal(part[:, inside], whole[:, inside])
        assert (np.delete(part, np.arange(70)[inside], axis=1) == GUARD).all()


@pytest.mark.parametrize("columns", [1, 33, 172])
@pytest.mark.parametrize("name", formats.names())
def test_decoded_rows_are_the_formats_values(isa, name, columns):
    weight = formats.get(name).pack(inputs(19, columns, seed=1))
    handle = native(weight)
    rows = np.concatenate([kernels.decode_row(isa, handle, row) for row in range(19)])
    assert np.array_equal(rows, weight.dense())


def test_hostile_arrays_are_refused():
    for kind in KINDS:
        f = formats.get(f"{kind}-g64")
        arrays = f.random(40, 100, seed=0).arrays
        for name, array in arrays.items():
            with pytest.raises(ValueError, match=f"a weight's {name} must have {array.nbytes} bytes"):
                kernels.Weight(kind, 40, 100, 64, **{**arrays, name: array.reshape(-1)[:-1].copy()})
        if "codebook" in arrays:
            with pytest.raises(ValueError, match="at most 127"):
                kernels.Weight(kind, 40, 100, 64, **{**arrays, "codebook": arrays["codebook"] | np.uint8(128)})
    arrays["codes"][2, 3, 256:] = 0xFF
    with pytest.raises(ValueError, match="must have 256 of 512 bits, has 512"):
        kernels.Weight("sparse8", 40, 100, 64, **arrays)


def test_f16_scales_of_every_kind_are_read_exactly(isa):
    fmt = formats.get("int8-g32")
    weight = fmt.pack(np.ones((16, 32), np.float32))
    tiny = np.array([2**-24, 2**-14, 2**-15, -(2**-24), 65504, -0.0, 1, 1 / 3] * 2, np.float16)
    weight.arrays["scales"][:] = tiny
    row = np.concatenate([kernels.decode_row(isa, native(weight), r) for r in range(16)])
    assert np.array_equal(row[:, 0], tiny.astype(np.float32) * 127)
    x = np.zeros((1, 32), np.float32)
    x[0, 0] = 127  # code 127, scale 1
    assert np.array_equal(run_int(isa, weight, x, 32)[0], tiny.astype(np.float32) * np.float32(127 * 127))


def test_bf16_conversion_rounds_to_nearest_even(isa):
    bits = np.random.default_rng(0).integers(0, 1 << 32, (5, 77), np.uint64).astype(np.uint32)
    x = np.where(np.isfinite(bits.view(np.float32)), bits.view(np.float32), np.float32(1.00390625))
    x = np.where(np.abs(x) < 1e-37, np.float32(1.01171875), x)  # ties; no subnormals, which the instruction flushes
    out = kernels.to_bf16(isa, x)
    assert np.array_equal(out[:, :77], x.astype(ml_dtypes.bfloat16).view(np.uint16))
    assert not out[:, 77:].any()
