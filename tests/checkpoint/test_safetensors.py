"""The safetensors reader believes nothing; the writer makes what the reference library reads."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint.making import safetensors_bytes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hasten.checkpoint import safetensors
from hasten.errors import CheckpointError

A = ("F32", np.arange(6, dtype=np.float32).reshape(2, 3))
B = ("BF16", np.array([0x3F80, 0xC000], dtype=np.uint16))
GOOD = safetensors_bytes({"a": A, "b": B})


def opened(tmp_path: Path, data: bytes) -> safetensors.File:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    return safetensors.File(path)


def entry(dtype: Any = "F32", shape: Any = (2, 3), offsets: Any = (0, 24)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_reads_what_is_there(tmp_path: Path) -> None:
    file = opened(tmp_path, GOOD)
    assert np.array_equal(file.array("a"), A[1])
    assert file.tensors["b"].dtype == "BF16"
    assert file.array("b").dtype == np.uint16
    assert safetensors.to_float32(file.array("b"), "BF16").tolist() == [1.0, -2.0]
    assert not file.array("a").flags.writeable


HOSTILE = [
    (b"", "too few for a safetensors file"),
    (b"\x01\x00\x00", "too few"),
    (b"\xff" * 8 + b"{}", "states a header of 18446744073709551615 bytes"),
    ((1 << 31).to_bytes(8, "little") + b"{}", "states a header of 2147483648 bytes, but has 2 left"),
    ((2).to_bytes(8, "little") + b"[]", "holds a JSON list, must hold an object"),
    ((2).to_bytes(8, "little") + b"{]", "is not valid JSON"),
    ((2).to_bytes(8, "little") + b"\xff\xfe", "is not valid JSON"),
    ((60_000).to_bytes(8, "little") + b"[" * 60_000, "nested too deep|not valid JSON"),
    (GOOD[:-1], "header speaks of"),
    (GOOD + b"\0", "header speaks of"),
    (safetensors_bytes({"a": A}, a=entry("F99")), "unknown dtype 'F99'"),
    (safetensors_bytes({"a": A}, a=entry(["F32"])), "unknown dtype"),
    (safetensors_bytes({"a": A}, a=entry(shape=[2, -3])), "has shape"),
    (safetensors_bytes({"a": A}, a=entry(shape=[True, 6])), "has shape"),
    (safetensors_bytes({"a": A}, a=entry(shape=[1] * 9 + [6])), "has shape"),
    (safetensors_bytes({"a": A}, a=entry(shape=[1 << 61, 1 << 61, 16])), "its offsets give 24"),
    (safetensors_bytes({"a": A}, a=entry(shape=[2, 4])), "needs 32 bytes, its offsets give 24"),
    (safetensors_bytes({"a": A}, a=entry(offsets=[24, 0])), "offsets give -24"),
    (safetensors_bytes({"a": A}, a=entry(offsets=[4, 28])), "must begin at"),
    (safetensors_bytes({"a": A}, a=entry(offsets=[0, 24, 48])), "has data_offsets"),
    (safetensors_bytes({"a": A}, a={"dtype": "F32"}), "must have dtype, shape and data_offsets"),
    (safetensors_bytes({"a": A}, a=7), "must have dtype"),
    (safetensors_bytes({"a": A}, b=entry()), "tensors overlap or leave a gap"),
    (safetensors_bytes({"a": A}, __metadata__=["x"]), "__metadata__"),
    (safetensors_bytes({"a": A}, __metadata__={"x": 1}), "__metadata__"),
]


@pytest.mark.parametrize(("data", "message"), HOSTILE, ids=[m[:30] for _, m in HOSTILE])
def test_lying_files_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        opened(tmp_path, data)


def test_a_name_given_twice_is_refused(tmp_path: Path) -> None:
    one = json.dumps(entry())
    text = f'{{"a": {one}, "a": {one}}}'.encode()
    with pytest.raises(CheckpointError, match="given twice"):
        opened(tmp_path, len(text).to_bytes(8, "little") + text + bytes(24))


def test_header_above_the_cap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors, "LARGEST_HEADER", 40)
    with pytest.raises(CheckpointError, match="more than 40"):
        opened(tmp_path, GOOD)


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # opening one would wait for ever
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, message in {
        "pipe": "not a regular file",
        ".": "not a regular file",
        "missing": "is missing",
        "dangling": "is missing",
        "loop": "cannot be read",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            safetensors.File(tmp_path / name)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_refused_or_harmless(tmp_path: Path, data: st.DataObject) -> None:
    """Bytes changed, cut out or put in: a typed error, or tensors that lie within the file."""
    damaged = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(damaged) - 1)) if damaged else 0
        kind = data.draw(st.sampled_from(["set", "cut", "insert"]))
        if kind == "set" and damaged:
            damaged[at] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del damaged[at : at + data.draw(st.integers(1, 12))]
        else:
            damaged[at:at] = data.draw(st.binary(max_size=8))
    with contextlib.suppress(CheckpointError):
        file = opened(tmp_path, bytes(damaged))
        for name, tensor in file.tensors.items():
            assert 8 <= tensor.begin <= tensor.end <= len(damaged)
            with contextlib.suppress(CheckpointError):
                assert file.array(name).shape == tensor.shape


arrays = st.dictionaries(
    st.text(min_size=1, max_size=12).filter(lambda n: n != "__metadata__" and not n.startswith("padding.")),
    st.tuples(st.sampled_from([np.float32, np.uint16, np.int8, np.uint8]), st.lists(st.integers(0, 5), max_size=3)),
    max_size=5,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(specs=arrays)
def test_written_files_read_back_aligned(tmp_path: Path, specs: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    made = {n: rng.integers(0, 100, shape).astype(dtype) for n, (dtype, shape) in specs.items()}
    path = tmp_path / "w.safetensors"
    path.unlink(missing_ok=True)
    safetensors.write(path, made, {"format": "hasten"})
    assert path.stat().st_size == safetensors.layout(made, {"format": "hasten"})[1]
    file = safetensors.File(path)
    assert {n for n in file.tensors if not n.startswith(safetensors.PADDING)} == set(made)
    for name, array in made.items():
        assert np.array_equal(file.array(name), array)
        assert file.tensors[name].begin % 64 == 0


def test_the_reference_library_reads_what_we_write(tmp_path: Path) -> None:
    reference = pytest.importorskip("safetensors.numpy")
    made = {"codes": np.arange(10, dtype=np.int8), "norm": np.linspace(0, 1, 7, dtype=np.float32)}
    safetensors.write(tmp_path / "w.safetensors", made, {"format": "hasten"})
    read = reference.load_file(str(tmp_path / "w.safetensors"))
    assert all(np.array_equal(read[n], a) for n, a in made.items())
