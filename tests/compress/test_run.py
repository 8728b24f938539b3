from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from search.tiny_model import write_model, write_text

from hasten import checkpoint, formats
from hasten.cli.main import main
from hasten.compress.methods import Inputs
from hasten.compress.recipe import KEEP, Choice
from hasten.compress.run import Packer
from hasten.errors import FormatError

RECIPE = """
tensors:
  - {match: "*.mlp.*", format: int4-g32}
  - {match: "lm_head.weight", format: codebook4-g64}
  - {match: "*_proj.weight", format: int8-g64, method: nearest}
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("model")
    return write_model(folder / "tiny"), write_text(folder / "text.txt")


def test_a_recipe_by_hand(files, tmp_path, capsys) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    out = tmp_path / "out"
    command = ["compress", str(files[0]), "-o", str(out), "--recipe", str(tmp_path / "recipe.yaml")]
    assert main([*command, "--calibration", str(files[1]), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    made = checkpoint.open(str(out))
    assert made.formats == document["formats"]
    assert made.formats["model.layers.1.mlp.up_proj.weight"] == "int4-g32"
    assert made.formats["model.layers.0.self_attn.k_proj.weight"] == "int8-g64"
    assert made.formats["lm_head.weight"] == "codebook4-g64"
    assert made.formats["model.embed_tokens.weight"] == "f32"
    assert document["bytes_after"] < document["bytes_before"]
    original = checkpoint.open(str(files[0]))
    for name, format in made.formats.items():
        error = np.linalg.norm(made.tensor(name) - original.tensor(name)) / np.linalg.norm(original.tensor(name))
        assert error <= {"f32": 0, "int8-g64": 0.01}.get(format, 0.2)
    # Again onto the same output: refused, and nothing changes.
    assert main(command) == 2
    assert "not empty" in capsys.readouterr().err


def test_a_recipe_says_what_caches_are_in_and_an_artifacts_own_stay(files, tmp_path, capsys) -> None:
    recipe, first, second = tmp_path / "recipe.yaml", tmp_path / "first", tmp_path / "second"
    recipe.write_text("cache: [int8, int4]")
    assert main(["compress", str(files[0]), "-o", str(first), "--recipe", str(recipe)]) == 0
    made = checkpoint.open(str(first))
    assert made.kv_formats == ("int8", "int4")
    assert set(made.formats.values()) == {"f32"}
    recipe.write_text("tensors: [{match: '*.mlp.*', format: int4-g32, method: nearest}]")
    assert main(["compress", str(first), "-o", str(second), "--recipe", str(recipe)]) == 0
    assert checkpoint.open(str(second)).kv_formats == ("int8", "int4")
    capsys.readouterr()
    recipe.write_text("cache: [int8]")
    assert main(["compress", str(files[0]), "-o", str(tmp_path / "third"), "--recipe", str(recipe)]) == 2
    assert "is given for 1 layers, the model has 2" in capsys.readouterr().err
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize("recipe", ["tensors: [{match: 'layers.9.*', format: int8-g64}]", "bits: 4"])
def test_a_wrong_recipe_writes_nothing(files, tmp_path, capsys, recipe) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe)
    command = ["compress", str(files[0]), "-o", str(tmp_path / "out"), "--recipe", str(tmp_path / "recipe.yaml")]
    assert main(command) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert "hint: " in printed
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.yaml"]


def test_packer_keeps_what_memory_allows() -> None:
    rng = np.random.default_rng(0)
    matrices = {n: rng.normal(size=(32, 64)).astype(np.float32) for n in "abc"}
    original = {n: formats.get("f32").pack(v) for n, v in matrices.items()}
    choice, reads = Choice("int4-g32", "clip"), []
    size = formats.get("int4-g32").nbytes(32, 64)
    packer = Packer(original, lambda n: reads.append(n) or matrices[n], {"a": Inputs(np.ones(64))}.get, memory=2 * size)
    first = packer.pack("a", choice)
    assert packer.pack("a", choice) is first
    packer.pack("b", choice)
    packer.pack("c", choice)  # a is the oldest, and goes
    assert reads == ["a", "b", "c"]
    again = packer.pack("a", choice)
    assert again is not first
    assert np.array_equal(again.arrays["codes"], first.arrays["codes"])
    assert packer.pack("a", KEEP) is original["a"]
    assert packer.error("a", KEEP) == 0.0
    expected = ((matrices["b"] - packer.pack("b", choice).dense()) ** 2).sum()
    assert packer.error("b", choice) == pytest.approx(expected, rel=1e-5)


def test_a_matrix_that_a_format_cannot_hold_is_named() -> None:
    huge = np.full((16, 32), 1e30, np.float32)
    packer = Packer({"big": formats.get("f32").pack(huge)}, lambda n: huge, {}.get)
    with pytest.raises(FormatError, match=r"big: .*65504"):
        packer.pack("big", Choice("int8-g64", "clip"))
