from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from hasten import formats
from hasten.compress import methods
from hasten.compress.methods import Inputs, codebook
from hasten.errors import FormatError, InputError

QUANTISED = [n for n in formats.names() if formats.get(n).group]


def correlated(rows: int = 48, columns: int = 172, tokens: int = 600, seed: int = 0):
    """A matrix with heavy tails and its inputs [tokens, columns], correlated and of very different sizes."""
    rng = np.random.default_rng(seed)
    values = (rng.standard_t(4, (rows, columns)) / columns**0.5).astype(np.float32)
    mix = rng.normal(size=(columns, columns)) * (rng.uniform(size=(columns, columns)) < 0.05) + np.eye(columns)
    sizes = np.exp(rng.normal(size=columns))
    inputs = rng.normal(size=(tokens, columns)) @ mix * sizes
    return values, inputs.astype(np.float32)


def output_error(values, weight, inputs) -> float:
    return float(((inputs @ (values - weight.dense()).T) ** 2).mean())


def seen(inputs) -> Inputs:
    """What calibration would say of raw inputs [tokens, in]."""
    exact = inputs.astype(np.float64)
    return Inputs(
        (exact**2).mean(axis=0), np.abs(exact).mean(axis=0), np.abs(exact).max(axis=0), exact.T @ exact / len(exact)
    )


MADE = [(m, n) for m in methods.names() for n in QUANTISED if methods.get(m).supports(formats.get(n))]
WITHOUT_DATA = ("hqq", "logarithmic", "magnitude", "nearest", "taylor")
"""Of the weights alone, of another loss than the layer's own, or of another grid: tested on their own terms."""


@pytest.mark.parametrize(("method", "name"), [made for made in MADE if made[0] not in WITHOUT_DATA])
def test_less_error_at_the_output_than_nearest(method: str, name: str) -> None:
    format = formats.get(name)
    values, inputs = correlated()
    found = methods.apply(method, values, format, seen(inputs))
    plain = methods.apply("nearest", values, format)
    ratio = 0.999 if format.kind == "int8" else 0.85
    # Held-out inputs of the same kind: not the ones that the method saw.
    fresh = correlated(tokens=2000, seed=0)[1][600:]
    assert output_error(values, found, fresh) < ratio * output_error(values, plain, fresh)


@pytest.mark.parametrize(("method", "name"), [made for made in MADE if methods.get(made[0]).NEEDS == "hessian"])
def test_second_moments_beat_the_best_method_without(method: str, name: str) -> None:
    """By a good margin where bits are few; on inputs that the method did not see."""
    format = formats.get(name)
    values, inputs = correlated(tokens=3000)
    known = seen(inputs[:2000])
    without = methods.apply(methods.best_for(format, hessian=False), values, format, known)
    found = methods.apply(method, values, format, known)
    ratio = 1.02 if format.kind == "int8" else 0.9
    assert output_error(values, found, inputs[2000:]) < ratio * output_error(values, without, inputs[2000:])


@pytest.mark.parametrize("name", [n for n in formats.names() if n not in QUANTISED])
def test_unsupported_formats_are_refused(name: str) -> None:
    for method in methods.names():
        if not methods.get(method).supports(formats.get(name)):
            with pytest.raises(InputError, match=f"'{method}' cannot make {name}"):
                methods.apply(method, np.zeros((2, 32), np.float32), formats.get(name))


@pytest.mark.parametrize(("method", "name"), MADE)
def test_repeatable(method: str, name: str) -> None:
    values, inputs = correlated(40, 70)
    known = replace(seen(inputs), gradients=np.abs(values))
    first, second = (methods.apply(method, values, formats.get(name), known) for _ in range(2))
    assert all(np.array_equal(first.arrays[k], second.arrays[k]) for k in first.arrays)


@pytest.mark.parametrize("name", [n for n in QUANTISED if not n.startswith("int8")])
def test_moments_matter(name: str) -> None:
    """Weighing all columns alike is worse where columns are not alike."""
    values, inputs = correlated()
    format, known = formats.get(name), seen(inputs)
    method = methods.best_for(format, hessian=False)
    found, alike = methods.apply(method, values, format, known), methods.apply(method, values, format)
    error = [float((((values - w.dense()) ** 2) * known.moments).sum()) for w in (found, alike)]
    assert error[0] < error[1]


def test_clip_finds_the_scale_that_trying_many_finds() -> None:
    """Independent statement for one group: the least weighted error over a fine sweep of scales."""
    rng = np.random.default_rng(3)
    values = rng.standard_t(3, (1, 32)).astype(np.float32)
    moments = rng.uniform(0.1, 4, 32)

    def error(scale: float) -> float:
        codes = np.clip(np.rint(values / scale), -8, 7)
        return float(((values - codes * scale) ** 2 * moments).sum())

    extreme = values.flat[np.abs(values).argmax()]
    best = min(error(extreme / -8 * r) for r in np.linspace(0.4, 1.2, 2000))
    weight = methods.apply("clip", values, formats.get("int4-g32"), Inputs(moments))
    assert float(((values - weight.dense()) ** 2 * moments).sum()) <= best * 1.1


def test_optimal_levels_are_optimal() -> None:
    """Against every way to cut a few occupied bins into as many runs as there are levels."""
    rng = np.random.default_rng(1)
    bins = (codebook.HIGH - codebook.LOW) * codebook.STEPS + 1
    for entries in (1, 2, 3):
        where = np.sort(rng.choice(np.arange(0, bins, codebook.STEPS), 9, replace=False))
        mass, moment = np.zeros(bins), np.zeros(bins)
        mass[where] = rng.uniform(0.1, 2, 9)
        places = codebook.LOW + where / codebook.STEPS
        moment[where] = mass[where] * places

        def cost(levels, mass=mass, where=where, places=places) -> float:
            return float((mass[where] * ((places[:, None] - np.asarray(levels)[None]) ** 2).min(axis=1)).sum())

        found = cost(codebook.optimal_levels(mass, moment, entries))
        best = np.inf
        for cuts in itertools.combinations(range(1, 9), entries - 1):
            runs = np.split(np.arange(9), cuts)
            means = [np.average(places[r], weights=mass[where][r]) for r in runs]
            best = min(best, cost(np.rint(means)))
        assert found <= best * (1 + 1e-9)


def test_learned_codebook_beats_nf4_on_a_matrix_of_sixteen_values() -> None:
    rng = np.random.default_rng(5)
    levels = np.sort(rng.choice(np.arange(-63, 64), 15, replace=False))
    # Every group holds its extreme, so its scale can be found exactly.
    values = rng.choice(levels, (32, 64)).astype(np.float32)
    values[:, ::32] = -64
    weight = methods.apply("codebook", values, formats.get("codebook4-g32"))
    assert np.array_equal(weight.dense(), values)


def test_the_codebook_is_learned_for_the_columns_that_matter() -> None:
    """Columns with strong inputs hold few values, the others any: the levels go where the strong ones are."""
    rng = np.random.default_rng(6)
    levels = rng.choice(np.arange(-62, 63), 14, replace=False)
    values = rng.uniform(-63, 63, (32, 64)).astype(np.float32)
    moments = np.full(64, 1e-4)
    strong = np.arange(0, 64, 4)
    values[:, strong] = rng.choice(levels, (32, 16))
    values[:, 1::32] = -64  # every group's extreme
    moments[strong] = 1.0
    weight = methods.apply("codebook", values, formats.get("codebook4-g32"), Inputs(moments))
    assert np.abs(weight.dense() - values)[:, strong].max() < 0.1


@pytest.mark.parametrize(("method", "name"), MADE)
def test_odd_contents(method: str, name: str) -> None:
    format, ones = formats.get(name), np.ones(70)
    even = Inputs(ones, ones, ones, np.eye(70), np.ones((3, 70)))
    if method != "logarithmic":  # its grid has no zero
        zeros = methods.apply(method, np.zeros((3, 70), np.float32), format, even)
        assert not zeros.dense().any()
    silent = Inputs(0 * ones, 0 * ones, 0 * ones, np.zeros((70, 70)), np.zeros((3, 70)))  # inputs that are always zero
    values = correlated(3, 70)[0]
    assert np.isfinite(methods.apply(method, values, format, silent).dense()).all()
    one = Inputs(ones, ones, ones, np.ones((70, 70)), np.ones((3, 70)))  # all features the same: singular
    made = methods.apply(method, values, format, one)
    assert np.abs(made.dense() - values).max() < 8 * np.abs(values).max()
    tiny = methods.apply(method, np.full((3, 70), 1e-30, np.float32), format, even)
    assert np.abs(tiny.dense()).max() < 1e-6
    for bad in (np.nan, np.inf, 1e30):
        with pytest.raises(FormatError):
            methods.apply(method, np.full((3, 70), bad, np.float32), format, even)


def test_statistics_that_cannot_be() -> None:
    values, format = correlated(4, 32)[0], formats.get("int4-g32")
    ones = np.ones(32)
    for bad in (np.nan, np.inf):
        broken = np.eye(32)
        broken[3, 5] = bad
        with pytest.raises(FormatError, match="hessian of the matrix's inputs hold"):
            methods.apply("gptq", values, format, Inputs(ones, hessian=broken))
        with pytest.raises(FormatError, match="moments of the matrix's inputs hold"):
            methods.apply("clip", values, format, Inputs(ones * bad))
    with pytest.raises(FormatError, match="no covariance"):
        methods.apply(
            "gptq",
            values,
            format,
            Inputs(ones, hessian=np.eye(32) + 90 * (np.ones((32, 32)) - np.eye(32)) * (-1) ** np.arange(32)),
        )
    with pytest.raises(InputError, match="'gptq' needs the hessian"):
        methods.apply("gptq", values, format, Inputs(ones))
    with pytest.raises(InputError, match="'taylor' needs the gradients"):
        methods.apply("taylor", values, formats.get("sparse8-g32"), Inputs(ones))
    with pytest.raises(FormatError, match=r"hessian are \[31, 31\], must be \[32, 32\]"):
        methods.apply("gptq", values, format, Inputs(ones, hessian=np.eye(31)))


def test_unknown_method_and_shapes() -> None:
    with pytest.raises(InputError, match="unknown compression method 'magic'"):
        methods.get("magic")
    with pytest.raises(FormatError, match="moments"):
        methods.apply("clip", np.zeros((2, 32), np.float32), formats.get("int4-g32"), Inputs(np.ones(31)))
