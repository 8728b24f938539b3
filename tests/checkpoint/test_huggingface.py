"""Hugging Face directories: whole, sharded, every dtype, and what must be refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint import making
from models import tiny

from hasten import checkpoint
from hasten.errors import CheckpointError, ConfigError, ContextError, HastenError, HubError
from hasten.formats import Weight

LLAMA = tiny.CONFIGS["llama"]


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_every_dtype_whole_and_sharded(tmp_path: Path, dtype: str, shards: int) -> None:
    making.directory(tmp_path, LLAMA, dtype, shards)
    model = checkpoint.open(str(tmp_path))
    assert model.kind == "huggingface"
    assert model.dtype == dtype.lower()
    assert set(model.formats.values()) == {dtype.lower()}
    calls: list[tuple[str, int, int]] = []
    weights = model.weights(lambda *call: calls.append(call))
    assert calls[-1][1:] == (len(weights), len(weights))
    for name, values in tiny.weights(model.graph).items():
        stored = making.decoded(making.encoded(values, dtype), dtype)
        found = weights[name]
        assert np.array_equal(found.dense() if isinstance(found, Weight) else found, stored)
        assert np.array_equal(model.tensor(name), stored)


@pytest.mark.parametrize("case", ["phi3", "phi3-partial", "llama-tied", "qwen2", "gemma3"])
def test_fused_tied_and_biased_layouts(tmp_path: Path, case: str) -> None:
    model = checkpoint.open(str(making.directory(tmp_path, tiny.CONFIGS[case])))
    for name, values in tiny.weights(model.graph).items():
        assert np.array_equal(model.tensor(name), values)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_gemma3_inside_its_vision_model(tmp_path: Path, prefix: str) -> None:
    config = tiny.CONFIGS["gemma3"]
    making.directory(tmp_path, config)
    made = {n.replace("model.", prefix, 1): t for n, t in making.tensors(config).items()}
    vision = {"vision_tower.x.weight": ("F32", np.zeros((2, 2), np.float32))}
    (tmp_path / "model.safetensors").write_bytes(making.safetensors_bytes({**made, **vision}))
    model = checkpoint.open(str(tmp_path))
    assert all(np.array_equal(model.tensor(n), w) for n, w in tiny.weights(model.graph).items())


def test_harmless_extra_tensors(tmp_path: Path) -> None:
    config = tiny.CONFIGS["llama-tied"]
    making.directory(tmp_path, config)
    extra = {
        "lm_head.weight": ("F32", np.zeros((48, 32), np.float32)),
        "model.layers.0.self_attn.rotary_emb.inv_freq": ("F32", np.zeros(4, np.float32)),
    }
    (tmp_path / "model.safetensors").write_bytes(making.safetensors_bytes({**making.tensors(config), **extra}))
    checkpoint.open(str(tmp_path))


def replaced(path: Path, name: str, tensor: tuple[str, np.ndarray] | None) -> None:
    made = making.tensors(LLAMA)
    if tensor is None:
        del made[name]
    else:
        made[name] = tensor
    (path / "model.safetensors").write_bytes(making.safetensors_bytes(made))


UP = "model.layers.1.mlp.up_proj.weight"
CONTRADICTIONS: list[tuple[str, tuple[str, np.ndarray] | None, str]] = [
    (UP, None, f"tensor '{UP}' is missing"),
    (UP, ("F32", np.zeros((44, 31), np.float32)), r"has shape \[44, 31\], config.json asks for \[44, 32\]"),
    (UP, ("F32", np.zeros((44 * 32,), np.float32)), r"has shape \[1408\]"),
    (UP, ("I8", np.zeros((44, 32), np.int8)), "is I8, must be one of F32, F16, BF16"),
    (UP, ("F64", np.zeros((44, 32))), "is F64"),
    ("model.layers.0.self_attn.q_proj.bias", ("F32", np.zeros(32, np.float32)), "is not used by model type 'llama'"),
    ("model.layers.2.mlp.up_proj.weight", ("F32", np.zeros((44, 32), np.float32)), "is not used by"),
]


@pytest.mark.parametrize(("name", "tensor", "message"), CONTRADICTIONS, ids=[m[:40] for *_, m in CONTRADICTIONS])
def test_weights_that_contradict_the_config(
    tmp_path: Path, name: str, tensor: tuple[str, np.ndarray] | None, message: str
) -> None:
    making.directory(tmp_path, LLAMA)
    replaced(tmp_path, name, tensor)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.open(str(tmp_path))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [UP, "model.norm.weight"])
def test_values_that_are_no_numbers(tmp_path: Path, name: str, value: float) -> None:
    making.directory(tmp_path, LLAMA)
    made = making.tensors(LLAMA)
    made[name][1].reshape(-1)[5] = value
    (tmp_path / "model.safetensors").write_bytes(making.safetensors_bytes(made))
    model = checkpoint.open(str(tmp_path))
    with pytest.raises(CheckpointError, match=f"'{name}' holds NaN or infinite"):
        model.weights()


INDEXES: list[tuple[Any, str]] = [
    ([], "holds a JSON list"),
    ({}, "weight_map must map"),
    ({"weight_map": {}}, "weight_map must map"),
    ({"weight_map": [1]}, "weight_map must map"),
    ({"weight_map": {UP: "../model-00001-of-00002.safetensors"}}, "must be a plain name"),
    ({"weight_map": {UP: "/etc/passwd.safetensors"}}, "must be a plain name"),
    ({"weight_map": {UP: "a\\b.safetensors"}}, "must be a plain name"),
    ({"weight_map": {UP: "a\0.safetensors"}}, "must be a plain name"),
    ({"weight_map": {UP: ".."}}, "must be a plain name"),
    ({"weight_map": {UP: "model.bin"}}, "must be a plain name ending in .safetensors"),
    ({"weight_map": {UP: 3}}, "must be a plain name"),
    ({"weight_map": {UP: "absent.safetensors"}}, "absent.safetensors is missing"),
    ({"weight_map": {"no.such": "model-00001-of-00002.safetensors"}}, "places tensor 'no.such' in"),
    ({"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}, "does not hold it|does not place there"),
]


@pytest.mark.parametrize(("index", "message"), INDEXES, ids=[m[:40] for _, m in INDEXES])
def test_lying_indexes(tmp_path: Path, index: Any, message: str) -> None:
    making.directory(tmp_path, LLAMA, shards=2)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        checkpoint.open(str(tmp_path))


def test_truncated_shard_and_truncated_index(tmp_path: Path) -> None:
    making.directory(tmp_path, LLAMA, shards=2)
    shard, index = tmp_path / "model-00002-of-00002.safetensors", tmp_path / "model.safetensors.index.json"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="header speaks of"):
        checkpoint.open(str(tmp_path))
    shard.write_bytes(whole)
    index.write_bytes(index.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="not valid JSON"):
        checkpoint.open(str(tmp_path))


def test_symbolic_links_as_the_hub_cache_makes_them(tmp_path: Path) -> None:
    making.directory(tmp_path / "blobs", LLAMA)
    (tmp_path / "snapshot").mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    checkpoint.open(str(tmp_path / "snapshot")).weights()


def test_nothing_in_the_directory_is_executed(tmp_path: Path) -> None:
    making.directory(tmp_path, {**LLAMA, "auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}})
    (tmp_path / "modeling_evil.py").write_text("raise SystemExit('executed')")
    (tmp_path / "sitecustomize.py").write_text("raise SystemExit('executed')")
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch executed'\ntR.")
    checkpoint.open(str(tmp_path)).weights()
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin, which could run code"):
        checkpoint.open(str(tmp_path))


def test_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    config_only = tmp_path / "config-only"
    config_only.mkdir()
    (config_only / "config.json").write_text(json.dumps(LLAMA))
    for source, message in {
        "nothing here": "there is no model at 'nothing here'",
        "../../etc": "there is no model|is not a model|config.json is missing",
        str(tmp_path / "file.txt"): "is not a model directory",
        str(tmp_path / "empty"): "config.json is missing",
        str(config_only): "holds no weights",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            checkpoint.open(source)
    assert checkpoint.open(str(config_only), weights=False).graph.hidden == 32
    assert checkpoint.open(str(config_only / "config.json"), weights=False).kind == "config"


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\udcff", "[" * 100_000, '{"model_type": "llama",'])
def test_config_that_is_no_object(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        checkpoint.open(str(tmp_path))


def test_oversized_config(tmp_path: Path) -> None:
    with open(tmp_path / "config.json", "wb") as file:
        os.truncate(file.fileno(), 1 << 33)  # sparse
    with pytest.raises(CheckpointError, match="8589934592 bytes, more than"):
        checkpoint.open(str(tmp_path))


def test_unknown_type_through_open(tmp_path: Path) -> None:
    making.directory(tmp_path, LLAMA)
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "model_type": "mamba"}))
    with pytest.raises(ConfigError, match="'mamba' is not supported"):
        checkpoint.open(str(tmp_path))


def test_context_of_a_model(tmp_path: Path) -> None:
    model = checkpoint.open(str(making.directory(tmp_path, tiny.CONFIGS["phi3-longrope-long"])))
    assert model.at_context(16).graph.context == 16
    assert model.at_context(16).graph.nodes != model.graph.nodes
    with pytest.raises(ContextError):
        model.at_context(65)


def test_end_of_text_tokens(tmp_path: Path) -> None:
    path = making.directory(tmp_path, LLAMA)
    assert checkpoint.open(str(path)).eos_token_ids == (2,)
    (path / "generation_config.json").write_text('{"eos_token_id": [5, 7], "temperature": 0.6}')
    model = checkpoint.open(str(path))
    assert model.eos_token_ids == (5, 7)
    assert model.generation["temperature"] == 0.6
    (path / "generation_config.json").write_text('{"eos_token_id": [5, 700]}')
    assert checkpoint.open(str(path)).eos_token_ids == (2,)


def test_a_hub_id_without_network_gives_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(*args: object, **kwargs: object) -> str:
        assert "*.bin" not in kwargs["allow_patterns"]
        raise OSError("network is unreachable\nmore lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(HubError, match=r"'org/name' is no local directory .*: network is unreachable$"):
        checkpoint.open("org/name")


def test_nothing_but_a_hub_id_reaches_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    path = making.directory(tmp_path, LLAMA)
    checkpoint.open(str(path)).weights()
    for source in ("no-such-model", "a/b/c", "./a/b", "/a/b", "a/../b", "~/x"):
        with pytest.raises(HastenError):
            checkpoint.open(source)


@pytest.mark.parametrize("format_name", ["f32", "bf16", "int8-g64", "int4-g128", "codebook4-g32"])
def test_random_weights(tmp_path: Path, format_name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny.CONFIGS["gemma2"]))
    graph = checkpoint.open(str(tmp_path), weights=False).graph
    weights = checkpoint.random_weights(graph, format_name)
    assert set(weights) == set(graph.weights)
    for spec in graph.weights.values():
        weight = weights[spec.name]
        assert weight.shape == spec.shape
        if isinstance(weight, Weight):
            assert weight.format.name == format_name
    assert abs(float(np.mean(weights["model.norm.weight"]))) < 0.1  # Gemma stores norms less one
