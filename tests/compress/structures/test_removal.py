"""Channels and heads removed, against numpy's least squares on the inputs themselves."""

from __future__ import annotations

import numpy as np
import pytest
from correlated import error, hessian, layer
from support import random_arrays, tiny_graph

from hasten.backends import reference
from hasten.compress.structures import channels, heads
from hasten.compress.structures._removal import Removal
from hasten.errors import InputError
from hasten.graph.structure import restructured

TINY = 1e-12  # damping, where the textbook has none


def least_squares(values, inputs, kept):
    """The weights of the features in `kept` that come nearest to inputs @ values.T."""
    return np.linalg.lstsq(inputs[:, kept], inputs @ values.T, rcond=None)[0].T


def spread(values, repaired, kept):
    """The repaired columns in their places, all others zero."""
    made = np.zeros(values.shape)
    made[:, kept] = repaired
    return made


@pytest.mark.parametrize("keep", [1, 11, 33])
def test_channels_are_repaired_by_least_squares(keep: int) -> None:
    values, inputs = layer(16, 44, tokens=400)
    kept, repaired = channels.choose(values, hessian(inputs), keep, damping=TINY)
    assert kept.tolist() == sorted(set(kept.tolist()))
    np.testing.assert_allclose(repaired, least_squares(values, inputs, kept), rtol=1e-3, atol=1e-4)


def test_costs_are_what_least_squares_loses() -> None:
    values, inputs = layer(12, 24, tokens=300)
    moments = hessian(inputs)
    removal = Removal(values, moments, TINY)
    removal.remove(np.array([3, 17]))
    rest = [i for i in range(24) if i not in (3, 17)]
    before = error(values - spread(values, least_squares(values, inputs, rest), rest), inputs)
    np.testing.assert_allclose(removal.weights[:, rest], least_squares(values, inputs, rest), rtol=1e-4, atol=1e-6)
    for group in ([5], [0], [6, 7, 8]):
        kept = [i for i in rest if i not in group]
        after = error(values - spread(values, least_squares(values, inputs, kept), kept), inputs)
        found = removal.costs(np.array([group]), "repair")
        np.testing.assert_allclose(found, [after - before], rtol=1e-4)
        alone = error(removal.weights[:, group], inputs[:, group])
        np.testing.assert_allclose(removal.costs(np.array([group]), "energy"), [alone], rtol=1e-6)


def test_scores_and_repair_pay_on_other_inputs() -> None:
    values, inputs = layer(16, 60, tokens=4000)
    moments, fresh = hessian(inputs[:2000]), inputs[2000:]

    def lost(score: str, repair: bool = True) -> float:
        kept, repaired = channels.choose(values, moments, 40, score)  # type: ignore[arg-type]
        return error(values - spread(values, repaired if repair else values[:, kept], kept), fresh)

    random = np.random.default_rng(1).choice(60, 40, replace=False)
    plain = error(values - spread(values, values[:, random], random), fresh)
    assert lost("repair") < 0.9 * lost("energy") < 0.9 * lost("energy", repair=False) < 0.5 * plain


def test_of_two_channels_alike_one_goes_for_nothing() -> None:
    """Rounds see to it that not both go, though each alone costs nothing."""
    values, inputs = layer(8, 16, tokens=400)
    inputs[:, 9] = inputs[:, 2]
    kept, repaired = channels.choose(values, hessian(inputs), 15, damping=1e-7)
    assert len({2, 9} & set(kept.tolist())) == 1
    assert error(values - spread(values, repaired, kept), inputs) < 1e-6 * error(values, inputs)


def test_gradients_choose_by_taylor() -> None:
    values, inputs = layer(8, 16, tokens=400)
    gradients = np.random.default_rng(3).uniform(size=(8, 16))
    kept, repaired = channels.choose(values, hessian(inputs), 10, gradients=gradients, damping=TINY)
    score = (gradients * values.astype(float) ** 2).sum(axis=0)
    assert set(kept) == set(np.argsort(score)[6:])
    np.testing.assert_allclose(repaired, least_squares(values, inputs, kept), rtol=1e-3, atol=1e-4)


def test_the_head_that_goes_is_the_one_least_missed() -> None:
    values, inputs = layer(20, 48, tokens=500)  # 6 heads of 8, each a group
    loss = {}
    for gone in range(6):
        kept = [i for i in range(48) if i // 8 != gone]
        loss[gone] = error(values - spread(values, least_squares(values, inputs, kept), kept), inputs)
    groups, found, repaired = heads.choose(values, hessian(inputs), (6, 1), (5, 1), damping=TINY)
    assert set(range(6)) - set(groups.tolist()) == {min(loss, key=lambda head: loss[head])}
    assert groups.tolist() == found.tolist()
    columns = heads.features(found, 8)
    np.testing.assert_allclose(repaired, least_squares(values, inputs, columns), rtol=1e-3, atol=1e-4)
    energies = [error(values[:, 8 * h : 8 * h + 8], inputs[:, 8 * h : 8 * h + 8]) for h in range(6)]
    groups, _, _ = heads.choose(values, hessian(inputs), (6, 1), (5, 1), "energy")
    assert set(range(6)) - set(groups.tolist()) == {int(np.argmin(energies))}


def test_every_group_keeps_as_many_query_heads() -> None:
    values, inputs = layer(20, 48, tokens=500)  # 4 groups of 3 heads of 4
    groups, found, repaired = heads.choose(values, hessian(inputs), (4, 3), (3, 2), damping=TINY)
    assert len(groups) == 3
    assert found.tolist() == sorted(found.tolist())
    assert (found // 3).tolist() == np.repeat(groups, 2).tolist()
    columns = heads.features(found, 4)
    np.testing.assert_allclose(repaired, least_squares(values, inputs, columns), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", [{"bias": True}, {"head_norms": True}, {"post_norms": True}])
def test_restructured_models_come_nearer_than_without_repair(options: dict[str, bool]) -> None:
    graph = tiny_graph(blocks=2, **options)
    arrays = {name: a.astype(np.float32) for name, a in random_arrays(graph).items()}
    rng = np.random.default_rng(4)
    texts = rng.integers(0, 50, (12, 40))
    inputs = [reference.values(graph, arrays, text) for text in texts[:8]]
    moments = {
        f"blocks.{i}.{name}.weight": hessian(np.concatenate([v[f"blocks.{i}.{value}"] for v in inputs]).astype(float))
        for i in range(2)
        for name, value in (("o", "attention"), ("down", "gated"))
    }
    for method, amount, output in ((channels, {0: 28, 1: 30}, "down"), (heads, {0: (1, 2), 1: (2, 1)}, "o")):
        structure, new = method.restructure(graph, arrays.__getitem__, moments, amount)
        again = method.restructure(graph, arrays.__getitem__, moments, amount)[1]
        assert all(np.array_equal(new[name], again[name]) for name in new)
        made = restructured(graph, structure)
        weights = {name: new.get(name, arrays[name]) for name in made.weights}
        plain = dict(weights)
        for i in range(2):
            name = f"blocks.{i}.{output}.weight"
            kept = np.array(
                [np.argmax((arrays[f"blocks.{i}.{w}.weight"] == row).all(axis=1)) for w, row in rows(new, i)]
            )
            plain[name] = arrays[name][:, kept]
        lost = [0.0, 0.0]
        for text in texts[8:]:
            expected = reference.forward(graph, arrays, text)
            for which, own in enumerate((weights, plain)):
                lost[which] += float(((reference.forward(made, own, text) - expected) ** 2).mean())
        assert lost[0] < 0.98 * lost[1]


def rows(new, block: int):
    """(part, row) of the rows of up or q that stayed."""
    part = "up" if f"blocks.{block}.up.weight" in new else "q"
    return [(part, row) for row in new[f"blocks.{block}.{part}.weight"]]


def test_singular_and_infinite_moments() -> None:
    values, inputs = layer(8, 16, tokens=5)
    inputs[:, 3] = 0
    kept, repaired = channels.choose(values, hessian(inputs), 9)
    assert error(values - spread(values, repaired, kept), inputs) < 1e-4 * error(values, inputs)
    kept, repaired = channels.choose(values, np.zeros((16, 16)), 9)
    np.testing.assert_allclose(repaired, values[:, kept], atol=1e-6)
    graph = tiny_graph()
    arrays = {name: a.astype(np.float32) for name, a in random_arrays(graph).items()}
    moments = {"blocks.0.down.weight": np.full((40, 40), np.nan)}
    with pytest.raises(InputError, match="hold a NaN or an infinity"):
        channels.restructure(graph, arrays.__getitem__, moments, {0: 8})
