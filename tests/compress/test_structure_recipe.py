"""Recipes that change a model's shape: read, refused, and carried out to an artifact that is served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_model
import yaml
from support import tiny_graph

from hasten import LLM, SamplingParams, checkpoint
from hasten.backends import reference
from hasten.cli import compress
from hasten.compress import restructure, structure_recipe
from hasten.compress.recipe import parse
from hasten.errors import InputError
from hasten.evaluate import perplexity
from hasten.graph.structure import LowRank, Narrow, Structure, restructured

MLP, ATTENTION = "model.layers.{}.mlp.{}_proj.weight", "model.layers.{}.self_attn.{}_proj.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model.write(
        tmp_path_factory.mktemp("models") / "original", num_hidden_layers=3, tie_word_embeddings=False
    )


def recipe(structure: Any, tensors: Any = None) -> str:
    return yaml.safe_dump({"structure": structure, **({"tensors": tensors} if tensors else {})})


WRONG = [
    (3, "'structure' must be a mapping"),
    ({}, "'structure' changes nothing"),
    ({"drop": [1]}, "'structure' has the unknown key 'drop'"),
    ({"drop_blocks": 1}, "drop_blocks: blocks are a list"),
    ({"drop_blocks": [1, 1]}, "drop_blocks: block 1 stands twice"),
    ({"drop_blocks": [-1]}, "drop_blocks: blocks are a list"),
    ({"drop_blocks": [3]}, "names block 3; the model has blocks 0 to 2"),
    ({"drop_blocks": [0, 1, 2]}, "drops 3 of 3 blocks, one at least must stay"),
    ({"drop_blocks": {"count": 3}}, "drops 3 of 3 blocks"),
    ({"drop_blocks": {"count": 0}}, "'count' must be a whole number of blocks"),
    ({"drop_blocks": {"count": 1, "by": "luck"}}, "'by' is 'luck', must be loss or similarity"),
    ({"feed_forward": {}}, "feed_forward: say with 'keep' how much stays"),
    ({"feed_forward": []}, "feed_forward: at least one rule"),
    ({"feed_forward": {"keep": 0.75}}, "feed_forward: 'keep' is 0.75, must be a whole number, 1 or more, or a share"),
    ({"feed_forward": {"keep": "0%"}}, "'keep' is '0%'"),
    ({"feed_forward": {"keep": "101%"}}, "'keep' is '101%'"),
    ({"feed_forward": {"keep": 97}}, "keeps 97 feed-forward channels in block 0, there are 96"),
    ({"feed_forward": {"keep": 8, "per_group": 2}}, "unknown key 'per_group'"),
    ({"feed_forward": {"keep": 8, "blocks": [7]}}, "names block 7"),
    (
        {"feed_forward": [{"keep": 8, "blocks": [0]}, {"keep": 9, "blocks": [0]}]},
        "two rules of feed_forward name block 0",
    ),
    ({"feed_forward": [{"keep": 8}, {"keep": 9}]}, "two rules of feed_forward stand for all blocks"),
    ({"drop_blocks": [0], "feed_forward": {"keep": 8, "blocks": [0]}}, "drops block 0, and feed_forward names it"),
    ({"heads": {"keep": 3}}, "keeps 3 key heads in block 0, there are 2"),
    ({"heads": {"per_group": 3}}, "keeps 3 query heads for each key head in block 0, there are 2"),
    ({"low_rank": [{"match": "*.up_proj.weight"}]}, "with one of rank, keep and energy"),
    ({"low_rank": [{"match": "*.up_proj.weight", "rank": 2, "keep": "50%"}]}, "with one of rank, keep and energy"),
    ({"low_rank": [{"match": "*.up_proj.weight", "rank": "50%"}]}, "'rank' must be a number"),
    ({"low_rank": [{"match": "*.up_proj.weight", "keep": 5}]}, "'keep' must be a share"),
    ({"low_rank": [{"match": "*.up_proj.weight", "rank": 5, "residual": 1}]}, "'residual' must be true or false"),
    ({"low_rank": [{"rank": 5}]}, "'match' must be a pattern"),
    ({"low_rank": [{"match": "*.nothing.*", "rank": 5}]}, "pattern '*.nothing.*' matches no matrix"),
    ({"low_rank": [{"match": "*.norm.weight", "rank": 5}]}, "matches no matrix"),
    ({"low_rank": [{"match": "*.embed_tokens.*", "rank": 5}]}, "is not a matrix that one linear alone multiplies by"),
    ({"low_rank": [{"match": "*.up_*", "rank": 39}]}, "[96, 64] at rank 39 would not be smaller"),
    ({"low_rank": [{"match": "*.up_*", "rank": 65, "residual": True}]}, "cannot have rank 65, must be 1 to 64"),
    ({"low_rank": [{"match": "*.up_*", "rank": 2}, {"match": "*.mlp.*", "rank": 3}]}, "is matched by '*.up_*' and by"),
    ({"drop_blocks": [1], "low_rank": [{"match": "*.1.mlp.*", "rank": 2}]}, "matches no matrix that is left"),
    ({"feed_forward": {"keep": 8}, "low_rank": [{"match": "*.up_*", "rank": 8}]}, "at rank 8 would not be smaller"),
]


@pytest.mark.parametrize(("structure", "said"), WRONG, ids=[m[:50] for _, m in WRONG])
def test_wrong_recipes(original: Path, structure: Any, said: str) -> None:
    model = checkpoint.open(str(original))
    with pytest.raises(InputError) as caught:
        parse(recipe(structure)).structure.plan(model.graph, model.structure)  # type: ignore[union-attr]
    assert said in caught.value.message


def test_amounts_and_which_blocks(original: Path) -> None:
    model = checkpoint.open(str(original))
    found = parse(
        recipe(
            {
                "drop_blocks": [1],
                "heads": {"per_group": "50%"},
                "feed_forward": [{"keep": 10, "blocks": [2]}, {"keep": "60%"}],
                "low_rank": {"match": "*.o_proj.weight", "energy": "90%"},
            }
        )
    ).structure
    assert found
    plan = found.plan(model.graph, model.structure)
    assert plan.dropped == (1,)
    assert plan.heads == {0: (2, 1), 2: (2, 1)}
    assert plan.channels == {0: 64, 2: 10}  # 60% of 96 in whole groups of 32
    assert sorted(plan.factored) == [ATTENTION.format(i, "o") for i in (0, 2)]
    assert ATTENTION.format(2, "o") + ".left" in plan.names


CASES: dict[str, tuple[Any, Any, Structure | None]] = {
    "dropped": ({"drop_blocks": [1]}, None, Structure((1,))),
    "least missed": ({"drop_blocks": {"count": 1}}, None, None),
    "least like": ({"drop_blocks": {"count": 1, "by": "similarity"}}, None, None),
    "channels": (
        {"feed_forward": {"keep": "67%"}},
        None,
        Structure((), {i: Narrow(feed_forward=64) for i in range(3)}),
    ),
    "heads": ({"heads": {"keep": 1, "blocks": [0]}}, None, Structure((), {0: Narrow(2, 1)})),
    "query heads": ({"heads": {"per_group": 1, "blocks": [2]}}, None, Structure((), {2: Narrow(2, 2)})),
    "low rank": (
        {"low_rank": [{"match": "*.1.mlp.up*", "rank": 30}]},
        None,
        Structure((), {}, {MLP.format(1, "up"): LowRank(30)}),
    ),
    "energy": ({"low_rank": [{"match": "*_proj.weight", "energy": "70%"}]}, None, None),
    "share": ({"low_rank": [{"match": "*_proj.weight", "keep": "60%"}]}, None, None),
    "head": (
        {"low_rank": [{"match": "lm_head.weight", "rank": 40}]},
        None,
        Structure((), {}, {"lm_head.weight": LowRank(40)}),
    ),
    "residual": (
        {"low_rank": [{"match": "*.down_proj.weight", "rank": 8, "residual": True}]},
        [{"match": "*_proj.weight", "format": "int3-g64"}, {"match": "*.left", "format": "int8-g64"}],
        Structure((), {}, {MLP.format(i, "down"): LowRank(8, True) for i in range(3)}),
    ),
    "all": (
        {
            "drop_blocks": {"count": 1},
            "heads": {"keep": "50%", "per_group": 1},
            "feed_forward": {"keep": 80},
            "low_rank": [
                {"match": "*.v_proj.weight", "rank": 9},
                {"match": "*.down_proj.weight", "rank": 8, "residual": True},
            ],
        },
        [{"match": "*.mlp.*", "format": "int4-g32"}],
        None,
    ),
}


@pytest.mark.parametrize(("structure", "tensors", "expected"), CASES.values(), ids=CASES)
def test_from_recipe_to_served_model(
    original: Path, tmp_path: Path, structure: Any, tensors: Any, expected: Structure | None
) -> None:
    (tmp_path / "r.yaml").write_text(recipe(structure, tensors))
    (tmp_path / "text").write_text("".join(np.random.default_rng(0).choice(list("abcdefgh \n"), 1500)))
    options = compress.Options(str(original), tmp_path / "out", tmp_path / "r.yaml", tmp_path / "text")
    assert compress.run(options) == 0
    made = checkpoint.open(str(tmp_path / "out"))
    checkpoint.verify(made.path)
    assert made.structure
    assert expected is None or made.structure == expected
    assert made.graph.parameters() < checkpoint.open(str(original)).graph.parameters() or "residual" in str(structure)
    assert made.facts["recipe"]["structure"] == structure

    ids = made.tokenizer.encode("abc defg abcd")
    logits = reference.forward(made.graph, reference.dense_weights(made.weights()), np.array(ids))
    answer = LLM(tmp_path / "out", context=64).generate(
        [ids], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    )
    exact = not any("int" in name for name in made.formats.values())
    assert not exact or answer[0].outputs[0].token_ids[0] == int(np.argmax(logits[-1]))
    evaluation = perplexity.measure(made.graph, made.weights(), [np.array(ids * 3, np.int32)])
    assert np.isfinite(evaluation.logprobs[0]).all()


def test_corrections_come_nearer(original: Path, tmp_path: Path) -> None:
    """With factors beside them, matrices of three bits are nearer to the original's output than alone."""
    text = "".join(np.random.default_rng(0).choice(list("abcdefgh \n"), 3000))
    (tmp_path / "text").write_text(text)
    tensors = [{"match": "*.down_proj.weight", "format": "int2-g64"}]
    rule = [{"match": "*.down_proj.weight", "rank": 16, "residual": True}]
    for name, body in (
        ("plain", {"tensors": tensors}),
        ("nearer", {"structure": {"low_rank": rule}, "tensors": tensors}),
    ):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(body))
        compress.run(compress.Options(str(original), tmp_path / name, tmp_path / f"{name}.yaml", tmp_path / "text"))
    before = checkpoint.open(str(original))
    ids = np.array(before.tokenizer.encode(text[:300]), np.int32)
    logits = {
        m.source: reference.forward(m.graph, reference.dense_weights(m.weights()), ids)
        for m in (before, *(checkpoint.open(str(tmp_path / n)) for n in ("plain", "nearer")))
    }
    expected, plain, nearer = logits.values()
    assert ((nearer - expected) ** 2).mean() < 0.9 * ((plain - expected) ** 2).mean()


def test_a_residual_beside_nothing_is_refused(original: Path, tmp_path: Path) -> None:
    rule = {"low_rank": [{"match": "*.down_proj.weight", "rank": 8, "residual": True}]}
    (tmp_path / "r.yaml").write_text(recipe(rule))
    with pytest.raises(InputError, match="stays as it is, so there is nothing"):
        compress.run(compress.Options(str(original), tmp_path / "out", tmp_path / "r.yaml"))
    assert not (tmp_path / "out").exists()


def test_a_restructured_artifact_is_restructured_again(original: Path, tmp_path: Path) -> None:
    """Blocks keep their numbers."""
    source = original
    for number, structure in enumerate([{"drop_blocks": [0]}, {"feed_forward": {"keep": 40, "blocks": [2]}}]):
        (tmp_path / "r.yaml").write_text(recipe(structure))
        out = tmp_path / f"out{number}"
        compress.run(compress.Options(str(source), out, tmp_path / "r.yaml", json=True))
        source = out
    assert checkpoint.open(str(source)).structure == Structure((0,), {2: Narrow(feed_forward=40)})
    assert json.loads((source / "hasten.json").read_text())["blocks"][1]["feed_forward"] == 40
    (tmp_path / "r.yaml").write_text(recipe({"drop_blocks": [0]}))
    with pytest.raises(InputError, match="names block 0; the model has blocks 1 to 2"):
        compress.run(compress.Options(str(source), tmp_path / "x", tmp_path / "r.yaml"))


def test_a_cache_of_several_formats_loses_the_layers_that_go(original: Path, tmp_path: Path) -> None:
    model = checkpoint.open(str(original))
    kept = {name: model.weight(name) for name in model.graph.weights}
    mixed = checkpoint.write_artifact(tmp_path / "mixed", model, kept, {}, {}, ("int8", "bf16", "f32"))
    opened = checkpoint.open(str(mixed))
    plan = structure_recipe.parse({"drop_blocks": {"count": 1}, "feed_forward": {"keep": 64}})
    run = restructure.Run([np.arange(40, dtype=np.int32)], opened.kv_formats)
    made, weights = restructure.compress(opened, plan.plan(opened.graph, opened.structure), {}, run, tmp_path / "work")
    (gone,) = made.structure.dropped
    assert made.kv_formats == tuple(f for i, f in enumerate(("int8", "bf16", "f32")) if i != gone)
    written = checkpoint.write_artifact(tmp_path / "out", made, weights, {}, {}, made.kv_formats)
    assert len(LLM(written, context=64).generate(["abc"])) == 1


@pytest.mark.parametrize("fold", ["awq", "hadamard"])
def test_folds_go_with_structure_but_not_by_block_with_residuals(original: Path, tmp_path: Path, fold: str) -> None:
    (tmp_path / "text").write_text("".join(np.random.default_rng(0).choice(list("abcdefgh \n"), 1500)))
    before = checkpoint.open(str(original))
    ids = np.array(before.tokenizer.encode("abc defg abcd hgfe"), np.int32)
    shape: dict[str, Any] = {"heads": {"per_group": 1, "blocks": [1]}, "low_rank": [{"match": "*.0.mlp.*", "rank": 35}]}
    logits = {}
    for name, folds in (("plain", []), ("folded", [fold])):
        document = {"structure": shape, "fold": folds, "tensors": [{"match": "*_proj.weight*", "format": "int8-g64"}]}
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(document))
        assert (
            compress.run(compress.Options(str(original), tmp_path / name, tmp_path / "r.yaml", tmp_path / "text")) == 0
        )
        made = checkpoint.open(str(tmp_path / name))
        logits[name] = reference.forward(made.graph, reference.dense_weights(made.weights()), ids)
    spread = float(np.std(logits["plain"]))
    assert np.abs(logits["folded"] - logits["plain"]).mean() < 0.1 * spread
    shape["low_rank"] = [{"match": "*.0.mlp.*", "rank": 8, "residual": True}]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(document))
    if fold == "awq":
        with pytest.raises(InputError, match="with a residual cannot go with fold: awq"):
            compress.run(compress.Options(str(original), tmp_path / "x", tmp_path / "r.yaml", tmp_path / "text"))


def test_factors_are_not_factored_again() -> None:
    graph = restructured(tiny_graph(), Structure(low_rank={"blocks.0.up.weight": LowRank(4)}))
    recipe = structure_recipe.parse({"low_rank": [{"match": "*.right", "rank": 2}]})
    with pytest.raises(InputError, match=r"'\*\.right' matches no matrix that is left"):
        recipe.plan(graph, Structure(low_rank={"blocks.0.up.weight": LowRank(4)}))
    again = structure_recipe.parse({"low_rank": [{"match": "blocks.0.q.*", "rank": 2}]}).plan(graph, Structure())
    assert list(again.factored) == ["blocks.0.q.weight"]
