from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint import making
from models import tiny

from hasten import checkpoint
from hasten.checkpoint.gguf import KINDS, write_gguf
from hasten.checkpoint.gguf.blocks import encode
from hasten.checkpoint.gguf.export import permuted, tensor_name
from hasten.errors import CheckpointError, OutputError

SIZES = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
WIDE = {**tiny.BASE, "model_type": "llama", "hidden_size": 64, "intermediate_size": 96}  # columns in whole blocks


class Reader:
    """A GGUF file as its specification has it, read with nothing of ours."""

    def __init__(self, path: Path) -> None:
        self.data, self.at = path.read_bytes(), 4
        assert self.data[:4] == b"GGUF"
        version, tensors, pairs = self.take("<I"), self.take("<Q"), self.take("<Q")
        assert version == 3
        self.metadata = {self.string(): self.value(self.take("<I")) for _ in range(pairs)}
        self.tensors: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(tensors):
            name = self.string()
            shape = tuple(self.take("<Q") for _ in range(self.take("<I")))[::-1]
            self.tensors[name] = (shape, self.take("<I"), self.take("<Q"))
        self.begin = -(-self.at // 32) * 32

    def take(self, layout: str) -> Any:
        (value,) = struct.unpack_from(layout, self.data, self.at)
        self.at += struct.calcsize(layout)
        return value

    def string(self) -> str:
        size = self.take("<Q")
        self.at += size
        return self.data[self.at - size : self.at].decode()

    def value(self, kind: int) -> Any:
        if kind == 9:
            inner, count = self.take("<I"), self.take("<Q")
            return [self.value(inner) for _ in range(count)]
        return self.string() if kind == 8 else self.take(SIZES[kind])

    def bytes(self, name: str, size: int) -> bytes:
        start = self.begin + self.tensors[name][2]
        assert start % 32 == 0
        return self.data[start : start + size]

    def dense(self, name: str) -> np.ndarray:
        shape, kind, _ = self.tensors[name]
        dtype = {0: np.float32, 1: np.float16}[kind]
        data = self.bytes(name, int(np.prod(shape)) * np.dtype(dtype).itemsize)
        return np.frombuffer(data, dtype).reshape(shape).astype(np.float32)


def written(tmp_path: Path, config: dict[str, Any], kind: str) -> tuple[checkpoint.Model, Reader]:
    model = checkpoint.open(str(making.directory(tmp_path / "model", config)))
    types = write_gguf(model, tmp_path / "out.gguf", kind)
    found = Reader(tmp_path / "out.gguf")
    assert set(types) == {spec.name for spec in model.graph.matrices()}
    assert not list(tmp_path.glob("*.part"))
    return model, found


def q8_0(block: list[float]) -> bytes:
    """quantize_row_q8_0_ref of ggml, word for word, in float32."""
    f = np.float32
    d = max(abs(f(x)) for x in block) / f(127)
    inverse = f(1) / d if d else f(0)
    codes = [int(np.trunc(v + (f(0.5) if v >= 0 else f(-0.5)))) for v in (f(x) * inverse for x in block)]
    return struct.pack("<e32b", d, *codes)


def q4_0(block: list[float]) -> bytes:
    """quantize_row_q4_0_ref of ggml: the extreme becomes -8, a nibble is min(15, int(x / d + 8.5))."""
    f = np.float32
    amax, extreme = f(0), f(0)
    for x in block:
        if abs(f(x)) > amax:
            amax, extreme = abs(f(x)), f(x)
    d = extreme / f(-8)
    inverse = f(1) / d if d else f(0)
    codes = [min(15, int(f(x) * inverse + f(8.5))) for x in block]
    return struct.pack("<e16B", d, *(codes[j] | codes[j + 16] << 4 for j in range(16)))


@pytest.mark.parametrize(("kind", "textbook"), [("q8_0", q8_0), ("q4_0", q4_0)])
def test_blocks_are_the_textbooks(kind: str, textbook: Any) -> None:
    draw = np.random.default_rng(3)
    values = (draw.normal(0, 1, (5, 96)) * 10.0 ** draw.integers(-3, 3, (5, 1))).astype(np.float32)
    values[0, :32] = 0
    values[1, :32] = np.tile(np.array([1.0, -1.0], np.float32), 16)  # a tie: the first one is the extreme
    values[2, :32] = np.arange(32) - 127 + 0.5
    expected = b"".join(textbook(block.tolist()) for block in values.reshape(-1, 32))
    assert encode(values, KINDS[kind]).tobytes() == expected
    assert len(expected) == KINDS[kind].nbytes(5, 96)


@pytest.mark.parametrize(("kind", "number"), [("q8_0", "Q8_0"), ("q4_0", "Q4_0")])
def test_blocks_as_the_gguf_package_has_them(kind: str, number: str) -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
    values = np.random.default_rng(5).normal(0, 0.02, (16, 256)).astype(np.float32)
    expected = gguf.quants.quantize(values, gguf.GGMLQuantizationType[number])
    assert encode(values, KINDS[kind]).tobytes() == expected.tobytes()


def test_rows_pair_neighbours_where_llama_cpp_turns_neighbours() -> None:
    """Turning pairs (i, i + n) and turning pairs (2i, 2i + 1) of permuted rows give the same scores."""
    heads, half, width = 3, 4, 8
    draw = np.random.default_rng(1)
    q, k = draw.normal(size=(2, heads * 2 * half, width))
    x, y = draw.normal(size=(2, width))

    def score(q: np.ndarray, k: np.ndarray, pair: Any) -> np.ndarray:
        found = []
        for head in range(heads):
            turned = []
            for matrix, value, position in ((q, x, 5), (k, y, 2)):
                v = (matrix @ value).reshape(heads, 2 * half)[head].copy()
                for i in range(half):
                    a, b = pair(i)
                    angle = position * 10000.0 ** (-i / half)
                    c, s = np.cos(angle), np.sin(angle)
                    v[a], v[b] = v[a] * c - v[b] * s, v[a] * s + v[b] * c
                turned.append(v)
            found.append(turned[0] @ turned[1])
        return np.array(found)

    expected = score(q, k, lambda i: (i, i + half))
    changed = score(permuted(q, heads), permuted(k, heads), lambda i: (2 * i, 2 * i + 1))
    np.testing.assert_allclose(changed, expected, rtol=1e-12)
    assert not np.allclose(score(q, k, lambda i: (2 * i, 2 * i + 1)), expected)


@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_a_llama_has_its_q_and_k_permuted_and_all_else_as_it_was(tmp_path: Path, kind: str) -> None:
    model, found = written(tmp_path, tiny.CONFIGS["llama"], kind)
    assert set(found.tensors) == {tensor_name(name) for name in model.graph.weights}
    for name, spec in model.graph.weights.items():
        expected = model.tensor(name)
        if "q_proj" in name or "k_proj" in name:
            heads = 4 if "q_proj" in name else 2
            n = spec.shape[0] // heads // 2
            order = [h * 2 * n + i + j * n for h in range(heads) for i in range(n) for j in range(2)]
            expected = expected[order]
        expected = expected if kind == "f32" or not spec.is_matrix else expected.astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(found.dense(tensor_name(name)), expected)


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_others_are_not_permuted(tmp_path: Path, name: str) -> None:
    model, found = written(tmp_path, tiny.CONFIGS[name], "f32")
    for part in ("q_proj", "k_proj"):
        weight = f"model.layers.1.self_attn.{part}.weight"
        np.testing.assert_array_equal(found.dense(tensor_name(weight)), model.tensor(weight))
    assert found.metadata["general.architecture"] == name


def test_header(tmp_path: Path) -> None:
    _, found = written(tmp_path, {**WIDE, "tie_word_embeddings": True, "rope_theta": 500.0}, "q4_0")
    meta = found.metadata
    assert {key: meta[f"llama.{key}"] for key in ("block_count", "context_length", "embedding_length")} == {
        "block_count": 2,
        "context_length": 64,
        "embedding_length": 64,
    }
    assert (meta["llama.attention.head_count"], meta["llama.attention.head_count_kv"]) == (4, 2)
    assert meta["llama.attention.key_length"] == meta["llama.rope.dimension_count"] == 16
    assert meta["llama.rope.freq_base"] == 500.0
    assert meta["general.file_type"] == 2
    assert "output.weight" not in found.tensors  # tied: written once
    assert {kind for shape, kind, _ in found.tensors.values() if len(shape) == 2} == {2}
    assert {kind for shape, kind, _ in found.tensors.values() if len(shape) == 1} == {0}


def test_an_untied_head_is_written_and_odd_columns_are_f16(tmp_path: Path) -> None:
    _, found = written(tmp_path, {**WIDE, "intermediate_size": 44}, "q8_0")
    assert found.tensors["output.weight"][1] == 8
    assert found.tensors["blk.0.ffn_down.weight"][1] == 1  # 44 columns are no whole blocks
    assert found.tensors["blk.0.ffn_up.weight"][1] == 8


def test_scaled_rope_becomes_factors(tmp_path: Path) -> None:
    _, found = written(tmp_path, tiny.CONFIGS["llama-linear"], "f32")
    np.testing.assert_allclose(found.dense("rope_freqs.weight"), 4.0, rtol=1e-6)
    _, plain = written(tmp_path / "plain", tiny.CONFIGS["llama"], "f32")
    assert "rope_freqs.weight" not in plain.tensors


def test_the_demos_tokenizer(tmp_path: Path) -> None:
    model = checkpoint.open("demo")
    write_gguf(model, tmp_path / "demo.gguf", "q8_0")
    meta = Reader(tmp_path / "demo.gguf").metadata
    stated = json.loads((model.path / "tokenizer.json").read_text())
    assert meta["tokenizer.ggml.model"] == "gpt2"
    assert meta["tokenizer.ggml.pre"] == "llama-bpe"
    assert len(meta["tokenizer.ggml.tokens"]) == model.graph.vocabulary
    assert all(meta["tokenizer.ggml.tokens"][i] == token for token, i in stated["model"]["vocab"].items())
    assert len(meta["tokenizer.ggml.merges"]) == len(stated["model"]["merges"])
    special = {token["id"] for token in stated["added_tokens"]}
    assert {i for i, kind in enumerate(meta["tokenizer.ggml.token_type"]) if kind == 3} == special


def test_no_tokenizer_gives_ids_alone(tmp_path: Path) -> None:
    making.directory(tmp_path / "model", WIDE)
    (tmp_path / "model" / "tokenizer.json").unlink()
    write_gguf(checkpoint.open(str(tmp_path / "model")), tmp_path / "out.gguf", "f16")
    meta = Reader(tmp_path / "out.gguf").metadata
    assert meta["tokenizer.ggml.model"] == "no_vocab"
    assert meta["llama.vocab_size"] == 48


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gemma2", "model type 'gemma2' cannot be written"),
        ("phi3", "model type 'phi3' cannot be written"),
        ("llama-biases", "another activation than silu"),
        ("llama-yarn", "rope of a part of a head, or with a factor"),
    ],
)
def test_what_llama_cpp_cannot_say_is_refused(tmp_path: Path, name: str, words: str) -> None:
    model = checkpoint.open(str(making.directory(tmp_path / "model", tiny.CONFIGS[name])))
    with pytest.raises(CheckpointError, match=words):
        write_gguf(model, tmp_path / "out.gguf")
    assert not list(tmp_path.glob("*.gguf*"))


def test_wrong_kinds_places_and_values(tmp_path: Path) -> None:
    model = checkpoint.open(str(making.directory(tmp_path / "model", WIDE)))
    with pytest.raises(CheckpointError, match="no GGUF type 'q9'"):
        write_gguf(model, tmp_path / "out.gguf", "q9")
    with pytest.raises(OutputError, match="cannot be written"):
        write_gguf(model, tmp_path / "none" / "out.gguf")
    with pytest.raises(CheckpointError, match="'big' has values beyond what f16 holds"):
        encode(np.full((1, 32), 1e5, np.float32), KINDS["f16"], "big")
