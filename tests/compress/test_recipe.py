from __future__ import annotations

from pathlib import Path

import pytest

from hasten.compress.recipe import KEEP, Choice, parse, read
from hasten.errors import InputError

NAMES = ["embed", "layers.0.attn.q", "layers.0.mlp.up", "layers.10.mlp.up", "head"]


def test_first_match_wins_and_the_rest_stays() -> None:
    recipe = parse(
        """
        tensors:
          - {match: "layers.0.*", format: codebook4-g64}
          - {match: "*.mlp.*", format: int4-g32, method: nearest}
          - {match: "head", format: original}
        """
    )
    assert recipe.assign(NAMES) == {
        "embed": KEEP,
        "layers.0.attn.q": Choice("codebook4-g64", "gptq"),
        "layers.0.mlp.up": Choice("codebook4-g64", "gptq"),
        "layers.10.mlp.up": Choice("int4-g32", "nearest"),
        "head": KEEP,
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "mapping with one of the keys 'tensors'"),
        ("- 1", "mapping with one of the keys 'tensors'"),
        ("tensors: [", "not YAML"),
        ("tensors: []", "at least one"),
        ("tensors: 3", "must be a list"),
        ("tensors: [3]", "rule 1 must be a mapping"),
        ("tensors: [{match: '*', format: int8-g64}]\nbits: 4", "unknown key 'bits'"),
        ("tensors: [{match: '*'}]", "rule 1 lacks the key 'format'"),
        ("tensors: [{format: int8-g64}]", "rule 1 lacks the key 'match'"),
        ("tensors: [{match: '*', format: int5-g64}]", "rule 1: unknown weight format 'int5-g64'"),
        ("tensors: [{match: '*', format: int8-g64, method: magic}]", "unknown compression method 'magic'"),
        ("tensors: [{match: '*', format: int8-g64, method: codebook}]", "cannot make int8-g64"),
        ("tensors: [{match: '*', format: original, method: clip}]", "takes no method"),
        ("tensors: [{match: '*', fromat: int8-g64}]", "unknown key 'fromat'"),
        ("tensors: [{match: 3, format: int8-g64}]", "must be text"),
        ("tensors: [{match: a, match: b, format: int8-g64}]", "stands twice"),
        ("tensors: [{match: !!python/object/apply:os.system [x], format: int8-g64}]", "not YAML"),
        ("[" * 5000, "nested too deeply"),
        ("cache: int5", "'cache' is 'int5', must be bf16, int8, int4 or f32, or a list"),
        ("cache: []", "'cache' is []"),
        ("cache: [int8, [int4]]", "'cache' is ['int8', ['int4']]"),
    ],
)
def test_wrong_recipes(text: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(text)
    assert said in caught.value.message


def test_a_misspelt_key_is_guessed() -> None:
    with pytest.raises(InputError) as caught:
        parse("tensors: [{match: '*', fromat: int8-g64}]")
    assert caught.value.hint == "did you mean 'format'?"


def test_a_pattern_that_matches_nothing() -> None:
    recipe = parse("tensors: [{match: 'layers.0.mlp.upp', format: int8-g64}]")
    with pytest.raises(InputError, match=r"'layers.0.mlp.upp' matches no matrix") as caught:
        recipe.assign(NAMES)
    assert "layers.0.mlp.up" in (caught.value.hint or "")


def test_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read the recipe"):
        read(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8"):
        read(tmp_path / "binary.yaml")
    (tmp_path / "wrong.yaml").write_text("bits: 4")
    with pytest.raises(InputError, match=r"wrong.yaml: a recipe is a mapping"):
        read(tmp_path / "wrong.yaml")


def test_a_rule_that_can_never_win_is_refused() -> None:
    twice = parse("tensors: [{match: head, format: int8-g64}, {match: head, format: int4-g64}]")
    with pytest.raises(InputError, match="the pattern 'head' twice"):
        twice.assign(NAMES)
    with pytest.raises(InputError, match=r"'layers\.0\.\*' comes too late"):
        parse("tensors: [{match: '*', format: int8-g64}, {match: 'layers.0.*', format: int4-g64}]").assign(NAMES)
