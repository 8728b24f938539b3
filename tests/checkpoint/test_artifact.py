"""Artifacts: written whole or not at all, read without copying, tampering found."""

from __future__ import annotations

import errno
import json
import mmap
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint import making
from models import tiny

from hasten import checkpoint, formats
from hasten.checkpoint import safetensors, write
from hasten.checkpoint.model import Model
from hasten.errors import CheckpointError, HastenError, OutputError
from hasten.formats import Weight

NORM = "model.norm.weight"
MIXED = ["int4-g32", "int8-g64", "codebook4-g128", "bf16", "f32"]


def packed(model: Model) -> dict[str, Any]:
    """Every matrix in one of MIXED, in turn."""
    made: dict[str, Any] = {}
    for number, spec in enumerate(model.graph.weights.values()):
        values = model.tensor(spec.name)
        made[spec.name] = formats.get(MIXED[number % len(MIXED)]).pack(values) if spec.is_matrix else values
    return made


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return checkpoint.open(str(making.directory(tmp_path / "original", tiny.CONFIGS["phi3"], "BF16")))


@pytest.fixture
def artifact(tmp_path: Path, model: Model) -> Path:
    return checkpoint.write_artifact(tmp_path / "fast", model, packed(model), {"rules": []}, {"ppl": 1.5})


def test_round_trip(tmp_path: Path, model: Model, artifact: Path) -> None:
    opened = checkpoint.open(str(artifact))
    assert opened.kind == "artifact"
    assert opened.dtype == "bf16"
    assert opened.facts["recipe"] == {"rules": []}
    assert opened.facts["measurements"] == {"ppl": 1.5}
    assert opened.graph == model.graph
    assert set(opened.formats.values()) == set(MIXED)
    assert opened.tokenizer.encode("abc") == model.tokenizer.encode("abc")
    written, read = packed(model), opened.weights()
    for name, weight in written.items():
        found = read[name]
        if isinstance(weight, Weight):
            assert found.format == weight.format
            assert all(np.array_equal(found.arrays[n], a) for n, a in weight.arrays.items())
            assert np.array_equal(opened.tensor(name), weight.dense())
        else:
            assert np.array_equal(found, weight)
    checkpoint.verify(artifact)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fast", "original"]


def test_the_cache_that_an_artifact_was_made_for(tmp_path: Path, model: Model, artifact: Path) -> None:
    assert checkpoint.open(str(artifact)).kv_formats == () == model.kv_formats
    path = checkpoint.write_artifact(tmp_path / "chosen", model, packed(model), {}, {}, ["int8", "int4"])
    assert checkpoint.open(str(path)).kv_formats == ("int8", "int4")
    with pytest.raises(HastenError, match="a cache format is given for 1 layers, the model has 2"):
        checkpoint.write_artifact(tmp_path / "wrong", model, packed(model), {}, {}, ["int8"])


def test_weights_are_mapped_not_copied(artifact: Path) -> None:
    for weight in checkpoint.open(str(artifact)).weights().values():
        arrays = weight.arrays.values() if isinstance(weight, Weight) else [weight]
        for array in arrays:
            assert not array.flags.owndata
            assert not array.flags.writeable
            assert array.__array_interface__["data"][0] % 64 == 0


def test_an_artifact_can_be_written_again(tmp_path: Path, artifact: Path) -> None:
    opened = checkpoint.open(str(artifact))
    again = checkpoint.write_artifact(tmp_path / "again", opened, opened.weights(), {}, {})
    assert checkpoint.open(str(again)).formats == opened.formats


def test_never_mistaken_for_dense_weights(artifact: Path) -> None:
    assert not list(artifact.glob("model*.safetensors"))
    assert (artifact / "hasten-00001.safetensors").is_file()


def test_several_files(tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "SHARD", 3000)
    path = checkpoint.write_artifact(tmp_path / "many", model, packed(model), {}, {})
    assert len(list(path.glob("hasten-*.safetensors"))) > 3
    opened = checkpoint.open(str(path))
    assert all(np.array_equal(opened.tensor(n), dense(w)) for n, w in packed(model).items())


def dense(weight: Any) -> np.ndarray:
    return weight.dense() if isinstance(weight, Weight) else weight


def test_output_that_exists(tmp_path: Path, model: Model) -> None:
    (tmp_path / "empty").mkdir()
    checkpoint.write_artifact(tmp_path / "empty", model, packed(model), {}, {})
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, message in {"empty": "is not empty", "file": "not a directory", "link": "not a directory"}.items():
        with pytest.raises(OutputError, match=message):
            checkpoint.write_artifact(tmp_path / name, model, packed(model), {}, {})
        with pytest.raises(OutputError, match=message):
            checkpoint.check_output(tmp_path / name)
    with pytest.raises(OutputError, match="not a directory that you may write to"):
        checkpoint.check_output(tmp_path / "file" / "below")
    assert checkpoint.open(str(tmp_path / "empty")).kind == "artifact"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_output_that_cannot_be_written(tmp_path: Path, model: Model) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(OutputError, match="may write to"):
        checkpoint.write_artifact(tmp_path / "closed" / "x", model, packed(model), {}, {})


@pytest.mark.parametrize("after", range(6))
def test_full_disk_leaves_nothing(tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """ENOSPC at each of the six points where something is made durable before the rename."""
    real, calls = os.fsync, []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="the disk is full"):
        checkpoint.write_artifact(tmp_path / "out", model, packed(model), {}, {})
    assert len(calls) == after + 1
    assert [p.name for p in tmp_path.iterdir()] == ["original"]


def test_interrupted_leaves_nothing(tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write_artifact(tmp_path / "out", model, packed(model), {}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["original"]


def test_too_little_space_is_said_before(tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OutputError, match=r"needs .* MB, the disk has 0 MB left"):
        checkpoint.write_artifact(tmp_path / "out", model, packed(model), {}, {})


def change(path: Path, **fields: Any) -> None:
    facts = json.loads((path / "hasten.json").read_text())
    for key, value in fields.items():
        facts[key] = value(facts[key]) if callable(value) else value
    (path / "hasten.json").write_text(json.dumps(facts))


def first(tensors: dict[str, Any], **fields: Any) -> dict[str, Any]:
    name = next(iter(tensors))
    return {**tensors, name: {**tensors[name], **fields}}


TAMPERED: list[tuple[Any, str]] = [
    (lambda p: (p / "hasten.json").unlink(), "holds no weights"),
    (lambda p: (p / "hasten.json").write_text("{"), "not valid JSON"),
    (lambda p: change(p, format_version=3), "format version 3, this hasten reads 1 and 2"),
    (lambda p: change(p, format_version=2), "format version 2, and no other, states a structure"),
    (lambda p: change(p, structure={"dropped": [0]}), "format version 2, and no other, states a structure"),
    (lambda p: change(p, format_version=True), "format version True, this hasten reads 1"),
    (lambda p: change(p, files=lambda f: {k: v for k, v in f.items() if k != "config.json"}), "does not name config"),
    (
        lambda p: change(p, tensors=lambda t: {**t, NORM: {**t[NORM], "format": "int4-g64"}}),
        "vector 'model.norm.weight' has format 'int4-g64', must be f32",
    ),
    (lambda p: change(p, tensors=[]), "tensors is missing or of the wrong type"),
    (
        lambda p: change(p, kv_formats=["int8"]),
        "kv_formats must name one of .*int4, f32 for each of 2 layers",
    ),
    (lambda p: change(p, kv_formats=["int8", "int3"]), "kv_formats must name"),
    (lambda p: change(p, kv_formats=["int8", 4]), "kv_formats must name"),
    (lambda p: change(p, kv_formats="int8"), "kv_formats must name"),
    (lambda p: change(p, dtype="f8"), "dtype is 'f8'"),
    (lambda p: change(p, blocks=[]), "block shapes differ"),
    (lambda p: change(p, tensors=lambda t: {**t, "extra": next(iter(t.values()))}), "disagree about tensor 'extra'"),
    (lambda p: change(p, tensors=lambda t: first(t, format="int3-g7")), "unknown weight format 'int3-g7'"),
    (lambda p: change(p, tensors=lambda t: first(t, format="int8-g32")), "is int8|is uint8"),
    (lambda p: change(p, tensors=lambda t: first(t, format="codebook4-g32")), r"'.*\.codebook' is missing"),
    (lambda p: change(p, tensors=lambda t: first(t, shape=[48, 31])), r"has shape \[48, 31\]"),
    (lambda p: change(p, tensors=lambda t: first(t, file="../x.safetensors")), "one of the files"),
    (lambda p: change(p, files=lambda f: {**f, "../../x": {"bytes": 1, "sha256": ""}}), "must be a plain name"),
    (lambda p: change(p, files=lambda f: first(f, bytes=7)), "hasten.json says 7"),
    (lambda p: change(p, files=lambda f: first(f, bytes="7")), "must have bytes and sha256"),
    (lambda p: (p / "hasten-00001.safetensors").unlink(), "is missing"),
    (lambda p: os.truncate(p / "hasten-00001.safetensors", 5000), "hasten.json says"),
    (lambda p: edit(p / "config.json", b'"vocab_size": 48', b'"vocab_size": 47'), "SHA-256 differs"),
    (lambda p: edit(p / "tokenizer.json", b"<unk>", b"<UNK>"), "SHA-256 differs"),
]


def edit(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))


@pytest.mark.parametrize(("tamper", "message"), TAMPERED, ids=[m[:40] for _, m in TAMPERED])
def test_tampering_is_found(artifact: Path, tamper: Any, message: str) -> None:
    tamper(artifact)
    with pytest.raises(HastenError, match=message):
        checkpoint.open(str(artifact)).weights()


def test_a_changed_weight_byte_is_found_by_verify(artifact: Path) -> None:
    path = artifact / "hasten-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-200] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="SHA-256 differs"):
        checkpoint.verify(artifact)


@pytest.mark.parametrize("name", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_dense_weights_that_are_no_numbers_are_refused(tmp_path: Path, model: Model, name: str, value: float) -> None:
    weights = packed(model)
    spec = model.graph.matrices()[0]
    weight = formats.get(name).pack(model.tensor(spec.name))
    kinds = {"f32": np.array([value], "<f4").view(np.uint32), "f16": np.array([value], "<f2").view(np.uint16)}
    kinds["bf16"] = (kinds["f32"] >> 16).astype(np.uint16)
    codes = weight.arrays["codes"]
    codes.reshape(-1).view(kinds[name].dtype)[-1 - codes.size // 3] = kinds[name][0]
    path = checkpoint.write_artifact(tmp_path / "bad", model, {**weights, spec.name: weight}, {}, {})
    with pytest.raises(CheckpointError, match=f"{spec.name}.*NaN or an infinity"):
        checkpoint.open(str(path)).weights()


def test_misaligned_weights_are_refused(artifact: Path) -> None:
    path = artifact / "hasten-00001.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    shifted = (length + 4).to_bytes(8, "little") + data[8 : 8 + length] + b"    " + data[8 + length :]
    path.write_bytes(shifted)
    change(artifact, files=lambda f: {**f, path.name: {**f[path.name], "bytes": len(shifted)}})
    with pytest.raises(CheckpointError, match="not aligned to 64 bytes"):
        checkpoint.open(str(artifact)).weights()


def test_weights_that_do_not_fit_the_graph(tmp_path: Path, model: Model) -> None:
    weights = packed(model)
    del weights["model.norm.weight"]
    with pytest.raises(CheckpointError, match=r"disagree about 'model\.norm\.weight'"):
        checkpoint.write_artifact(tmp_path / "x", model, weights, {}, {})


def test_int4_opens_without_repacking(tmp_path: Path) -> None:
    """Every array is a view into the mapping of its file, and opening takes no time that grows with packing."""
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "head_dim": 64, "num_hidden_layers": 2}
    plain = checkpoint.open(str(making.directory(tmp_path / "original", {**tiny.CONFIGS["llama"], **shape}, "BF16")))
    packed_in = time.process_time()
    weights = {
        spec.name: formats.get("int4-g64").pack(plain.tensor(spec.name)) if spec.is_matrix else plain.tensor(spec.name)
        for spec in plain.graph.weights.values()
    }
    packed_in = time.process_time() - packed_in
    path = str(checkpoint.write_artifact(tmp_path / "fast", plain, weights, {}, {}))
    seconds = []
    for _ in range(3):
        began = time.process_time()
        opened = checkpoint.open(path)
        read = opened.weights()
        seconds.append(time.process_time() - began)
    for weight in read.values():
        for array in weight.arrays.values() if isinstance(weight, Weight) else [weight]:
            base: Any = array
            while isinstance(base, np.ndarray):
                base = base.base
            assert isinstance(base.obj if isinstance(base, memoryview) else base, mmap.mmap)
    assert min(seconds) < max(packed_in / 3, 0.2)
