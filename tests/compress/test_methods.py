from __future__ import annotations

import itertools

import numpy as np
import pytest

from hasten import formats
from hasten.compress import methods
from hasten.compress.methods import codebook
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


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("method", [m for m in methods.names() if m != "nearest"])
def test_less_error_at_the_output_than_nearest(method: str, name: str) -> None:
    format = formats.get(name)
    if not methods.get(method).supports(format):
        with pytest.raises(InputError, match=f"'{method}' cannot make {name}"):
            methods.apply(method, np.zeros((2, 32), np.float32), format)
        return
    values, inputs = correlated()
    moments = (inputs.astype(np.float64) ** 2).mean(axis=0)
    found = methods.apply(method, values, format, moments)
    plain = methods.apply("nearest", values, format)
    ratio = 0.999 if format.kind == "int8" else 0.85
    # Held-out inputs of the same kind: not the ones whose moments the method saw.
    fresh = correlated(tokens=2000, seed=0)[1][600:]
    assert output_error(values, found, fresh) < ratio * output_error(values, plain, fresh)


@pytest.mark.parametrize("name", QUANTISED)
def test_repeatable_and_weighted(name: str) -> None:
    values, inputs = correlated()
    moments = (inputs.astype(np.float64) ** 2).mean(axis=0)
    format = formats.get(name)
    method = methods.best_for(format)
    first, second = (methods.apply(method, values, format, moments) for _ in range(2))
    assert all(np.array_equal(first.arrays[k], second.arrays[k]) for k in first.arrays)
    # Moments matter: weighing all columns alike is worse where columns are not alike.
    alike = methods.apply(method, values, format)
    error = [float((((values - w.dense()) ** 2) * moments).sum()) for w in (first, alike)]
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
    weight = methods.apply("clip", values, formats.get("int4-g32"), moments)
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
    weight = methods.apply("codebook", values, formats.get("codebook4-g32"), moments)
    assert np.abs(weight.dense() - values)[:, strong].max() < 0.1


@pytest.mark.parametrize("name", QUANTISED)
def test_odd_contents(name: str) -> None:
    format = formats.get(name)
    method = methods.best_for(format)
    zeros = methods.apply(method, np.zeros((3, 70), np.float32), format, np.ones(70))
    assert not zeros.dense().any()
    silent = methods.apply(method, correlated(3, 70)[0], format, np.zeros(70))  # inputs that are always zero
    assert np.isfinite(silent.dense()).all()
    tiny = methods.apply(method, np.full((2, 40), 1e-30, np.float32), format)
    assert np.abs(tiny.dense()).max() < 1e-6
    for bad in (np.nan, np.inf, 1e30):
        with pytest.raises(FormatError):
            methods.apply(method, np.full((2, 40), bad, np.float32), format)


def test_unknown_method_and_shapes() -> None:
    with pytest.raises(InputError, match="unknown compression method 'gptq'"):
        methods.get("gptq")
    with pytest.raises(FormatError, match="moments"):
        methods.apply("clip", np.zeros((2, 32), np.float32), formats.get("int4-g32"), np.ones(31))
