"""Norms, rope, activations and vocabulary reductions of every instruction set against float64 formulas."""

from __future__ import annotations

import math
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from hasten import _native

ISAS = _native.available_isas()
SIZES = [1, 7, 15, 16, 17, 31, 48, 63, 64, 65, 100, 172, 257, 896]
isas = pytest.mark.parametrize("isa", ISAS)


def gelu(x):
    return x * 0.5 * np.array([math.erfc(-v / math.sqrt(2)) for v in x])


ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": gelu,
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
    "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
}


def random(seed, *shape, spread=1.0):
    return (np.random.default_rng(seed).standard_normal(shape) * spread).astype(np.float32)


def close(found, expected, relative=1e-6, absolute=1e-6):
    np.testing.assert_allclose(np.asarray(found, dtype=np.float64), expected, rtol=relative, atol=absolute)


@isas
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norm(isa, n, kind):
    x, weight, bias = random(n, 3, n, spread=5) + np.float32(2), random(n + 1, n), random(n + 2, n)
    wide = x.astype(np.float64)
    centred = wide - (wide.mean(1, keepdims=True) if kind == "layer" else 0)
    plain = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5)
    # A layer norm of one element divides rounding by sqrt(eps); of many, rounding of the mean by the deviation.
    bounds = {"relative": 3e-6, "absolute": 3e-6}
    close(_native.ops_norm(isa, kind, x, weight, bias, 1e-5), plain * weight + bias, **bounds)
    close(_native.ops_norm(isa, kind, x, weight, None, 1e-5), plain * weight, **bounds)
    close(_native.ops_norm(isa, kind, x, None, None, 1e-5), plain, **bounds)


@isas
@pytest.mark.parametrize(("head_dim", "rotary"), [(8, 8), (64, 64), (80, 80), (80, 32), (128, 128), (36, 18), (96, 6)])
def test_rope(isa, head_dim, rotary):
    x, half = random(head_dim, 5, head_dim), rotary // 2
    angle = np.random.default_rng(1).uniform(-3, 3, half)
    cosine, sine = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    wide = x.astype(np.float64)
    a, b = wide[:, :half], wide[:, half:rotary]
    expected = np.concatenate([a * cosine - b * sine, b * cosine + a * sine, wide[:, rotary:]], axis=1)
    close(_native.ops_rope(isa, x, cosine, sine), expected)


@isas
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activation(isa, kind):
    x = np.concatenate([np.linspace(-30, 30, 4001), np.linspace(-0.7, 0.7, 1001), [0.0, -1e-6, 1e-6]]).astype(
        np.float32
    )
    # Relative in the tails too, where a result is not lost in cancellation.
    with np.errstate(over="ignore"):
        expected = ACTIVATIONS[kind](x.astype(np.float64))
    wide = {"gelu": 2e-4, "gelu_tanh": 2e-4}.get(kind, 2e-6)  # e^-450 carries its argument's rounding
    inner = np.abs(x) < 4
    found = np.asarray(_native.ops_activation(isa, kind, x))
    close(found[inner], expected[inner], relative=4e-6, absolute=2e-7)
    close(found, expected, relative=wide, absolute=1e-6)


@isas
@pytest.mark.parametrize("n", SIZES)
def test_elementwise(isa, n):
    a, b = random(n, n, spread=3), random(n + 9, n)
    x, y = a.astype(np.float64), b.astype(np.float64)
    close(_native.ops_elementwise(isa, "add", a, b), x + y)
    close(_native.ops_elementwise(isa, "multiply", a, b), x * y)
    close(_native.ops_elementwise(isa, "scale", a, None, 0.37), x * 0.37)
    close(_native.ops_elementwise(isa, "softcap", a, None, 2.5), 2.5 * np.tanh(x / 2.5))
    for kind, formula in ACTIVATIONS.items():
        close(_native.ops_elementwise(isa, kind, a, b), formula(x) * y, relative=3e-6)


@isas
def test_extremes(isa):
    x = np.array([-np.inf, -1000, -104, -88, 88, 1000, np.inf, np.nan], dtype=np.float32)
    np.testing.assert_array_equal(
        _native.ops_activation(isa, "sigmoid", x) > 0.5, [False, False, False, False, True, True, True, False]
    )
    assert np.isnan(_native.ops_activation(isa, "sigmoid", x)[-1])
    assert _native.ops_activation(isa, "sigmoid", x)[0] == 0
    np.testing.assert_array_equal(_native.ops_activation(isa, "tanh", x)[[0, 1, 5, 6]], [-1, -1, 1, 1])
    np.testing.assert_array_equal(_native.ops_activation(isa, "relu", x)[:7], np.maximum(x[:7], 0))


@isas
@pytest.mark.parametrize("n", [*SIZES, 5003])
def test_logsumexp(isa, n):
    x = random(n, n, spread=4)
    wide = x.astype(np.float64)
    expected = wide.max() + np.log(np.exp(wide - wide.max()).sum())
    assert _native.ops_logsumexp(isa, x) == pytest.approx(expected, rel=2e-7, abs=2e-7)
    x[::3] = -np.inf
    if n > 1:
        wide = x[np.isfinite(x)].astype(np.float64)
        assert _native.ops_logsumexp(isa, x) == pytest.approx(
            wide.max() + np.log(np.exp(wide - wide.max()).sum()), rel=2e-7, abs=2e-7
        )
    assert _native.ops_logsumexp(isa, np.full(n, -np.inf, np.float32)) == -np.inf


@isas
@pytest.mark.parametrize("n", [*SIZES, 5003])
def test_divergence(isa, n):
    p, q = random(n, n, spread=3), random(n, n, spread=3) + random(n + 1, n, spread=0.2) + np.float32(7)
    a, b = (v.astype(np.float64) - np.log(np.exp(v.astype(np.float64)).sum()) for v in (p, q))
    assert _native.ops_divergence(isa, p, q) == pytest.approx((np.exp(a) * (a - b)).sum(), rel=1e-4, abs=2e-7)
    assert _native.ops_divergence(isa, p, p) == 0
    both, one = np.append(p, np.float32(-np.inf)), np.append(q, np.float32(-np.inf))
    assert _native.ops_divergence(isa, both, one) == pytest.approx((np.exp(a) * (a - b)).sum(), rel=1e-4, abs=2e-7)
    assert _native.ops_divergence(isa, np.append(p, np.float32(1)), one) == np.inf


@isas
@pytest.mark.parametrize("n", [*SIZES, 5003])
def test_argmax(isa, n):
    rng = np.random.default_rng(n)
    for _ in range(20):
        x = rng.integers(-5, 5, n).astype(np.float32)  # ties abound
        assert _native.ops_argmax(isa, x) == int(np.argmax(x))
    x[:] = -np.inf
    assert _native.ops_argmax(isa, x) == 0
    x[n // 2] = -1e30
    assert _native.ops_argmax(isa, x) == n // 2
    if n > 1:
        x[n // 2 - 1] = np.nan
        assert _native.ops_argmax(isa, x) == n // 2


@isas
def test_results_do_not_depend_on_alignment_or_neighbours(isa):
    """The same numbers at every offset from a cache line, and beside NaN, give the same bits."""
    weight = random(2, 157)
    for seed in range(6):
        x = random(seed, 157)
        norm = np.asarray(_native.ops_norm(isa, "rms", x[None], weight, None, 1e-6))
        total, silu = _native.ops_logsumexp(isa, x), np.asarray(_native.ops_activation(isa, "silu", x))
        for offset in range(16):
            room = np.full(200, np.nan, np.float32)
            room[offset : offset + 157] = x
            moved = room[offset : offset + 157]
            np.testing.assert_array_equal(_native.ops_norm(isa, "rms", moved[None], weight, None, 1e-6), norm)
            assert _native.ops_logsumexp(isa, moved) == total
            np.testing.assert_array_equal(_native.ops_activation(isa, "silu", moved[3:]), silu[3:])


def test_each_instruction_set_keeps_its_code_to_itself():
    """A weak symbol compiled for one instruction set may be the one the linker keeps for all."""
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    build = Path(__file__).parents[2] / "build"
    objects: dict[str, Path] = {}
    for path in sorted(build.glob("**/native/isa/*.cpp.o"), key=lambda p: p.stat().st_mtime):
        if "sanitize" not in str(path):  # sanitizers add shared symbols of their own
            objects[path.name.removesuffix(".cpp.o")] = path
    objects.pop("dispatch", None)
    if not objects:
        pytest.skip(f"no objects of instruction sets under {build}")
    for name, path in objects.items():
        lines = subprocess.run(["nm", "-C", "--defined-only", path], capture_output=True, text=True, check=True).stdout
        shared = [line.split(None, 2)[1:] for line in lines.splitlines() if line.split(None, 2)[1] not in "abcdrst"]
        assert shared == [["T", f"hasten::{name}_kernels()"]]
