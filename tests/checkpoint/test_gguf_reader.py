"""GGUF files as models: what blocks stand for, by the gguf package; headers that lie, by hand."""

from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint import making
from models import tiny
from support import need_shared_data

from hasten import checkpoint
from hasten.checkpoint.gguf import write_gguf
from hasten.checkpoint.gguf.decode import TYPES
from hasten.checkpoint.gguf.reader import File
from hasten.checkpoint.gguf.tokens import definition
from hasten.errors import CheckpointError, ConfigError, HastenError

WIDE = {**tiny.BASE, "model_type": "llama", "hidden_size": 64, "intermediate_size": 96}
DEEP = {**tiny.BASE, "model_type": "llama", "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def pair(key: str, value: Any) -> bytes:
    """A key-value: int as uint32, float as float32, str, list of str, or (type, bytes) as given."""
    if isinstance(value, tuple):
        return string(key) + struct.pack("<I", value[0]) + value[1]
    if isinstance(value, list):
        return string(key) + struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(string, value))
    if isinstance(value, str):
        return string(key) + struct.pack("<I", 8) + string(value)
    return string(key) + struct.pack(
        "<If" if isinstance(value, float) else "<II", 6 if type(value) is float else 4, value
    )


def info(name: str | bytes, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, offset)


def file_bytes(
    pairs: dict[str, Any], infos: list[bytes], data: bytes = b"", version: int = 3, counts: Any = None
) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, *(counts or (len(infos), len(pairs))))
    head += b"".join(pair(k, v) for k, v in pairs.items()) + b"".join(infos)
    return head + bytes(-len(head) % 32) + data


META: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 1,
    "llama.context_length": 64,
    "llama.embedding_length": 256,
    "llama.feed_forward_length": 256,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 10000.0,
}
SHAPES = {
    "token_embd.weight": (48, 256),
    "output_norm.weight": (256,),
    "blk.0.attn_norm.weight": (256,),
    "blk.0.ffn_norm.weight": (256,),
    "blk.0.attn_q.weight": (256, 256),
    "blk.0.attn_k.weight": (128, 256),
    "blk.0.attn_v.weight": (128, 256),
    "blk.0.attn_output.weight": (256, 256),
    "blk.0.ffn_gate.weight": (256, 256),
    "blk.0.ffn_up.weight": (256, 256),
    "blk.0.ffn_down.weight": (256, 256),
}


def blocks_of(number: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Random bytes of a type, its f16 fields made to be numbers."""
    kind = TYPES[number]
    data = rng.integers(0, 256, (count, kind.block_bytes), dtype=np.uint8)
    places = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "Q4_1": (0, 2), "Q5_1": (0, 2)}
    places |= dict.fromkeys(("Q4_K", "Q5_K"), (0, 2))
    for at in places.get(kind.name, (0,)):
        data[:, at : at + 2] = rng.normal(0, 0.01, count).astype("<f2")[:, None].view(np.uint8)
    return data


def llama_file(number: int, seed: int = 0) -> tuple[bytes, dict[str, np.ndarray]]:
    """A whole model whose matrices are random blocks of one type, and the blocks."""
    rng, infos, data, made = np.random.default_rng(seed), [], b"", {}
    for name, shape in SHAPES.items():
        kind = number if len(shape) == 2 else 0
        if len(shape) == 2 and number > 1 and number != 30:
            blocks = blocks_of(number, shape[0] * shape[1] // TYPES[number].block, rng)
        else:
            values = rng.normal(1 if len(shape) == 1 else 0, 0.1, shape).astype(np.float32)
            stored = {0: values, 1: values.astype("<f2"), 30: (values.view("<u4") >> 16).astype("<u2")}[kind]
            blocks = stored.reshape(-1, 1).view(np.uint8)
        infos.append(info(name, shape, kind, len(data)))
        data += blocks.tobytes() + bytes(-blocks.nbytes % 32)
        made[name] = blocks
    return file_bytes(META, infos, data), made


def unpermuted(values: np.ndarray, heads: int) -> np.ndarray:
    """Row 2i + j of a head back to row i + j * n: from neighbours to halves."""
    n = values.shape[0] // heads // 2
    order = [h * 2 * n + 2 * i + j for h in range(heads) for j in range(2) for i in range(n)]
    return values[order]


@pytest.mark.parametrize("number", sorted(TYPES), ids=lambda n: TYPES[n].name)
def test_every_type_is_what_the_gguf_package_makes_of_it(tmp_path: Path, number: int) -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
    data, blocks = llama_file(number)
    (tmp_path / "x.gguf").write_bytes(data)
    model = checkpoint.open(str(tmp_path / "x.gguf"))
    kind = gguf.GGMLQuantizationType[TYPES[number].name]
    assert kind == number
    names = {"mlp.down_proj": ("ffn_down", 0), "self_attn.q_proj": ("attn_q", 4), "self_attn.k_proj": ("attn_k", 2)}
    for part, (stored, heads) in names.items():
        name = f"blk.0.{stored}.weight"
        expected = gguf.quants.dequantize(blocks[name].reshape(-1), kind).reshape(SHAPES[name])
        expected = unpermuted(expected, heads) if heads else expected
        np.testing.assert_array_equal(model.tensor(f"model.layers.0.{part}.weight"), expected)


EXACT = {0: "f32", 1: "f16", 30: "bf16", 2: "int4-g32", 6: "int8-g32", 20: "int8-g32"}


@pytest.mark.parametrize("number", [0, 1, 2, 6, 12, 14, 20, 30])
def test_grids_are_held_exactly_and_others_as_the_nearest_f16(tmp_path: Path, number: int) -> None:
    (tmp_path / "x.gguf").write_bytes(llama_file(number)[0])
    model = checkpoint.open(str(tmp_path / "x.gguf"))
    assert set(model.formats.values()) == {EXACT.get(number, "f16")}
    for name in model.formats:
        held, values = model.weight(name).dense(), model.tensor(name)  # type: ignore[union-attr]
        if number in EXACT:
            np.testing.assert_array_equal(held, values)
        else:
            np.testing.assert_array_equal(held, values.astype(np.float16).astype(np.float32))
    assert bool(model.notes) == (number not in EXACT)


def test_q8_0_is_int8_unless_a_code_has_no_place_there(tmp_path: Path) -> None:
    data, _ = llama_file(8)  # random bytes: -128 occurs, which int8 formats lack
    (tmp_path / "x.gguf").write_bytes(data)
    assert set(checkpoint.open(str(tmp_path / "x.gguf")).formats.values()) == {"f16"}
    path = making.directory(tmp_path / "model", WIDE)
    write_gguf(checkpoint.open(str(path)), tmp_path / "y.gguf", "q8_0")
    model = checkpoint.open(str(tmp_path / "y.gguf"))
    assert set(model.formats.values()) == {"int8-g32"}
    for name in model.formats:
        np.testing.assert_array_equal(model.weight(name).dense(), model.tensor(name))  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("llama", tiny.CONFIGS["llama"]),
        ("tied", tiny.CONFIGS["llama-tied"]),
        ("wide heads", {**tiny.CONFIGS["llama"], "head_dim": 12, "num_key_value_heads": 1}),
        ("llama3", {**tiny.CONFIGS["llama"], "head_dim": 16, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}),
        ("qwen2", tiny.CONFIGS["qwen2"]),
        ("qwen3", tiny.CONFIGS["qwen3"]),
    ],
)
def test_what_is_written_is_read_again(tmp_path: Path, name: str, config: dict[str, Any]) -> None:
    original = checkpoint.open(str(making.directory(tmp_path / "model", config)))
    write_gguf(original, tmp_path / "x.gguf", "f32")
    model = checkpoint.open(str(tmp_path / "x.gguf"))
    assert model.graph.blocks == original.graph.blocks
    for ours, theirs in zip(model.graph.nodes, original.graph.nodes, strict=True):
        if hasattr(ours.op, "frequencies"):
            np.testing.assert_allclose(ours.op.frequencies, theirs.op.frequencies, rtol=1e-6)
            assert ours.op.factor == theirs.op.factor
        else:
            assert ours.op == theirs.op
    for weight in original.graph.weights:
        np.testing.assert_array_equal(model.tensor(weight), original.tensor(weight))


def test_a_file_of_the_gguf_package_is_read(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
    rng = np.random.default_rng(2)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(256)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    values = {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in SHAPES.items()}
    for name, array in values.items():
        if array.ndim == 1:
            writer.add_tensor(name, array)
            continue
        kind = gguf.GGMLQuantizationType.Q4_0
        writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = checkpoint.open(str(tmp_path / "x.gguf"))
    assert set(model.formats.values()) == {"int4-g32"}
    table = gguf.quants.quantize(values["token_embd.weight"], gguf.GGMLQuantizationType.Q4_0)
    expected = gguf.quants.dequantize(table, gguf.GGMLQuantizationType.Q4_0)
    np.testing.assert_array_equal(model.tensor("model.embed_tokens.weight"), expected)
    assert model.graph.nodes[1].op.eps == 1e-5  # type: ignore[attr-defined]  # not 9.99999974e-06


@pytest.mark.parametrize(
    ("ids", "expected"),
    [({}, ()), ({"eos": 2}, (2,)), ({"eos": 2, "eot": 2}, (2,)), ({"eos": 2, "eot": 5}, (2, 5)), ({"eos": 48}, ())],
)
def test_what_ends_a_text(tmp_path: Path, ids: dict[str, int], expected: tuple[int, ...]) -> None:
    (tmp_path / "x.gguf").write_bytes(changed(**{f"tokenizer__ggml__{k}_token_id": v for k, v in ids.items()}))
    assert checkpoint.open(str(tmp_path / "x.gguf")).eos_token_ids == expected


def test_a_folder_of_one_file_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(llama_file(0)[0])
    model = checkpoint.open(str(tmp_path))
    assert (model.kind, model.location) == ("gguf", tmp_path / "a.gguf")
    (tmp_path / "b.gguf").write_bytes(llama_file(0)[0])
    with pytest.raises(CheckpointError, match="holds 2 GGUF files"):
        checkpoint.open(str(tmp_path))


# --- tokenizers


@pytest.mark.parametrize("name", ["gpt-2", "llama-spm", "phi-3", "mpt", "refact", "starcoder"])
def test_text_is_cut_as_llama_cpp_cuts_it(name: str) -> None:
    """The vectors that llama.cpp tests these vocabularies with."""
    from tokenizers import Tokenizer

    folder = need_shared_data("tokenizers", "llamacpp_vocab")
    made, _ = definition(File(folder / f"ggml-vocab-{name}.gguf").metadata)
    tokenizer = Tokenizer.from_str(json.dumps(made))
    raw = (folder / f"ggml-vocab-{name}.gguf.inp").read_bytes().decode("utf-8")
    texts = raw.removesuffix("\n__ggml_vocab_test__\n").split("\n__ggml_vocab_test__\n")
    expected = (folder / f"ggml-vocab-{name}.gguf.out").read_text().splitlines()
    assert len(texts) == len(expected) > 40
    for text, ids in zip(texts, expected, strict=True):
        assert tokenizer.encode(text, add_special_tokens=False).ids == [int(i) for i in ids.split()], text


@pytest.mark.parametrize("name", ["falcon", "deepseek-llm", "gpt-neox", "bert-bge"])
def test_a_tokenizer_that_is_not_known_is_refused(name: str) -> None:
    file = File(need_shared_data("tokenizers", "llamacpp_vocab") / f"ggml-vocab-{name}.gguf")
    with pytest.raises(CheckpointError, match="is not read") as error:
        definition(file.metadata)
    assert "beside the GGUF file" in str(error.value.hint)


def test_the_demo_keeps_its_tokenizer_and_template(tmp_path: Path) -> None:
    demo = checkpoint.open("demo")
    write_gguf(demo, tmp_path / "demo.gguf", "q8_0")
    model = checkpoint.open(str(tmp_path / "demo.gguf"))
    text = checkpoint.demo_text("final")[:20_000] + "\n<|x|> café 12345\t\t\r\n\n  déjà"
    assert model.tokenizer.encode(text) == demo.tokenizer.encode(text)
    assert model.tokenizer.decode(model.tokenizer.encode(text)) == text
    assert model.eos_token_ids == demo.eos_token_ids
    assert model.tokenizer.has_chat_template == demo.tokenizer.has_chat_template


def test_a_file_without_tokenizer_opens_and_says_so_when_asked(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(llama_file(0)[0])
    model = checkpoint.open(str(tmp_path / "x.gguf"))
    with pytest.raises(CheckpointError, match="tokenizer of kind None is not read") as error:
        _ = model.tokenizer
    assert error.value.hint == "put the model's tokenizer.json beside the GGUF file"
    assert model.eos_token_ids == ()
    (tmp_path / "tokenizer.json").write_text(making.tokenizer_json())
    assert checkpoint.open(str(tmp_path / "x.gguf")).tokenizer.vocabulary_size == 48


def test_without_a_cache_to_write_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "x.gguf").write_bytes(llama_file(0)[0])
    model = checkpoint.open(str(tmp_path / "x.gguf"))
    assert (model.path / "config.json").is_file()


def test_two_files_of_one_shape_are_two_models(tmp_path: Path) -> None:
    """What is remembered of a model by its small files (a search's trials, a batch's answers) must not be mixed up."""
    from hasten.checkpoint.files import fingerprint

    for name, seed in (("a", 1), ("b", 2)):
        (tmp_path / f"{name}.gguf").write_bytes(llama_file(2, seed)[0])
    found = [checkpoint.open(str(tmp_path / f"{name}.gguf")) for name in "ab"]
    assert fingerprint(found[0].path) != fingerprint(found[1].path)
    assert found[0].config != found[1].config


# --- what is refused


def changed(number: int = 0, drop: str | None = None, **pairs: Any) -> bytes:
    """The llama file with other key-values; None drops one."""
    data, _ = llama_file(number)
    keys = {k.replace("__", "."): v for k, v in pairs.items()}
    meta = {k: v for k, v in {**META, **keys}.items() if v is not None}
    infos, body, at = [], b"", 0
    begin = len(file_bytes(META, [info(n, s, number if len(s) == 2 else 0, 0) for n, s in SHAPES.items()]))
    for name, shape in SHAPES.items():
        kind = TYPES[number if len(shape) == 2 else 0]
        size = int(np.prod(shape)) // kind.block * kind.block_bytes
        if name != drop:
            infos.append(info(name, shape, number if len(shape) == 2 else 0, len(body)))
            body += data[begin + at : begin + at + size] + bytes(-size % 32)
        at += size + -size % 32
    return file_bytes(meta, infos, body)


def test_changed_changes_nothing_by_itself(tmp_path: Path) -> None:
    assert changed() == llama_file(0)[0]


REFUSED = {
    "another architecture": ({"general__architecture": "mamba"}, "architecture 'mamba' are not read"),
    "no architecture": ({"general__architecture": None}, "architecture None are not read"),
    "experts": ({"llama__expert_count": 8}, "mixtures of experts"),
    "no blocks stated": ({"llama__block_count": None}, "llama.block_count is missing"),
    "text for a number": ({"llama__block_count": "one"}, "llama.block_count is 'one'"),
    "no heads": ({"llama__attention__head_count": 0}, "llama.attention.key_length is missing"),
    "another width of values": ({"llama__attention__value_length": 32}, "value_length is 32, must be"),
    "rope of half a head": ({"llama__rope__dimension_count": 32}, "dimension_count is 32, must be"),
    "yarn": ({"llama__rope__scaling__type": "yarn"}, "rope scaling 'yarn' is not read"),
    "another width": ({"llama__feed_forward_length": 128}, "shape \\[256, 256\\], its key-values ask for"),
    "more blocks": ({"llama__block_count": 2}, "'blk.1.* is missing"),
    "a part of many": ({"split__count": 3}, "one of 3 parts"),
    "no embedding": ({"drop": "token_embd.weight"}, "'token_embd.weight' is missing"),
    "no norm": ({"drop": "output_norm.weight"}, "'output_norm.weight' is missing"),
    "a million blocks": ({"llama__block_count": 1_000_000}, "num_hidden_layers"),
    "no epsilon": ({"llama__attention__layer_norm_rms_epsilon": None}, "epsilon is None, must be a positive"),
}


@pytest.mark.parametrize("how", REFUSED)
def test_models_that_are_not_read(tmp_path: Path, how: str) -> None:
    pairs, words = REFUSED[how]
    (tmp_path / "x.gguf").write_bytes(changed(**pairs))
    with pytest.raises((CheckpointError, ConfigError), match=words) as error:
        checkpoint.open(str(tmp_path / "x.gguf"))
    assert len(error.value.message) < 600


def test_weights_that_are_not_used_and_values_that_are_no_numbers(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(changed().replace(b"ffn_norm", b"ffn_gnom"))
    with pytest.raises(CheckpointError, match=r"'blk\.0\.ffn_gnom\.weight' is not used by architecture"):
        checkpoint.open(str(tmp_path / "x.gguf"))
    for number, word in ((0, "NaN or infinite"), (2, "a scale is NaN")):
        whole = bytearray(changed(number))
        whole[-4:] = b"\xff\xff\xff\x7f"
        whole[-18 * 4096 :: 18] = b"\xff" * 4096
        whole[-18 * 4096 + 1 :: 18] = b"\x7f" * 4096
        (tmp_path / "x.gguf").write_bytes(whole)
        with pytest.raises(CheckpointError, match=word):
            checkpoint.open(str(tmp_path / "x.gguf")).weights()


ONE = [info("a", (6,), 0, 0)]
HEADERS = {
    "nothing": b"",
    "only the magic": b"GGUF",
    "another magic": b"GGML" + bytes(100),
    "another version": file_bytes({}, ONE, bytes(32), version=9),
    "big-endian": file_bytes({}, ONE, bytes(32), version=3 << 24),
    "a billion tensors": file_bytes({}, ONE, bytes(32), counts=(10**9, 0)),
    "more tensors than there are": file_bytes({}, ONE, bytes(32), counts=(100, 0)),
    "all key-values there could be": file_bytes({}, ONE, bytes(32), counts=(1, 2**64 - 1)),
    "a key longer than the file": b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**63) + b"k",
    "a key given twice": b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + pair("k", 1) * 2,
    "a tensor given twice": file_bytes({}, ONE * 2, bytes(32)),
    "a value of an unknown type": file_bytes({"k": (77, b"")}, ONE, bytes(32)),
    "an array longer than the file": file_bytes({"k": (9, struct.pack("<IQ", 0, 4_000_000))}, ONE, bytes(32)),
    "an array of all numbers there are": file_bytes({"k": (9, struct.pack("<IQ", 5, 2**62))}, ONE, bytes(32)),
    "an array of strings longer than the file": file_bytes({"k": (9, struct.pack("<IQ", 8, 4_000_000))}, ONE),
    "a string in an array longer than the file": file_bytes({"k": (9, struct.pack("<IQQ", 8, 1, 2**60))}, ONE),
    "arrays in arrays": file_bytes({"k": (9, struct.pack("<IQIQ", 9, 1, 9, 1))}, ONE, bytes(32)),
    "text that is no UTF-8": file_bytes({"k": (8, string(b"\xff\xfe"))}, ONE, bytes(32)),
    "strings that are no UTF-8": file_bytes({"k": (9, struct.pack("<IQ", 8, 1) + string(b"\xff"))}, ONE, bytes(32)),
    "a name that is no UTF-8": file_bytes({}, [info(b"\xff\xfe", (6,), 0, 0)], bytes(32)),
    "no dimensions": file_bytes({}, [info("a", (), 0, 0)], bytes(32)),
    "a thousand dimensions": file_bytes({}, [info("a", (1,) * 1000, 0, 0)], bytes(32)),
    "a dimension of nothing": file_bytes({}, [info("a", (0, 6), 0, 0)], bytes(32)),
    "sizes that overflow 64 bits to nothing": file_bytes({}, [info("a", (2**32, 2**32), 0, 0)], bytes(32)),
    "sizes that overflow 64 bits to six": file_bytes({}, [info("a", (2**63 + 3, 2), 0, 0)], bytes(32)),
    "part of a block": file_bytes({}, [info("a", (2, 33), 2, 0)], bytes(64)),
    "a type that is not read": file_bytes({}, [info("a", (256,), 16, 0)], bytes(128)),
    "a type that is none": file_bytes({}, [info("a", (256,), 4_000_000_000, 0)], bytes(128)),
    "data beyond the end": file_bytes({}, [info("a", (6,), 0, 64)], bytes(32)),
    "an offset of all bits": file_bytes({}, [info("a", (6,), 0, 2**64 - 32)], bytes(32)),
    "an offset out of line": file_bytes({}, [info("a", (6,), 0, 4)], bytes(32)),
    "tensors that overlap": file_bytes({}, [info("a", (16,), 0, 0), info("b", (6,), 0, 32)], bytes(64)),
    "the same bytes twice": file_bytes({}, [*ONE, info("b", (6,), 0, 0)], bytes(64)),
    "an alignment of nothing": file_bytes({"general.alignment": 0}, ONE, bytes(32)),
    "an alignment of three": file_bytes({"general.alignment": 3}, ONE, bytes(32)),
    "a huge alignment": file_bytes({"general.alignment": 1 << 31}, ONE, bytes(32)),
    "an alignment that is text": file_bytes({"general.alignment": "32"}, ONE, bytes(32)),
    "cut short": file_bytes({}, ONE, bytes(32))[:-12],
}


@pytest.mark.parametrize("how", HEADERS)
def test_headers_that_lie(tmp_path: Path, how: str) -> None:
    (tmp_path / "x.gguf").write_bytes(HEADERS[how])
    with pytest.raises(CheckpointError) as error:
        File(tmp_path / "x.gguf")
    assert len(error.value.message.removeprefix(str(tmp_path))) < 500
    with pytest.raises(CheckpointError):
        checkpoint.open(str(tmp_path / "x.gguf"))


def test_the_honest_header_is_read(tmp_path: Path) -> None:
    """What the lies above are made from."""
    (tmp_path / "x.gguf").write_bytes(file_bytes({"general.alignment": 32, "k": ["a", "b"]}, ONE, bytes(32)))
    found = File(tmp_path / "x.gguf")
    assert found.metadata["k"] == ["a", "b"]
    assert found.rows("a").shape == (1, 24)


def test_cut_anywhere_and_bits_turned_anywhere(tmp_path: Path) -> None:
    """Whatever happens to a header, it is refused or read: no other error, and nothing read beyond the end."""
    whole = changed(2)
    head = whole.index(b"token_embd") + 900
    rng = np.random.default_rng(0)
    for number in range(300):
        data = bytearray(whole)
        if number % 3 == 0:
            del data[int(rng.integers(0, head)) :]
        else:
            at = int(rng.integers(4, head))
            data[at] ^= 1 << int(rng.integers(0, 8))
        (tmp_path / "x.gguf").write_bytes(data)
        with contextlib.suppress(HastenError):
            checkpoint.open(str(tmp_path / "x.gguf")).formats  # noqa: B018


LONG: dict[str, Any] = {
    "tokenizer.ggml.tokens": [f"{i:04}" + "a" * 1000 for i in range(300)],
    "tokenizer.ggml.scores": np.zeros(300, np.float32),
}
TOKENS: dict[str, Any] = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2"}


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        ({}, "no tokens"),
        ({"tokenizer.ggml.tokens": ["a", "a"], "tokenizer.ggml.merges": []}, "a token twice"),
        ({"tokenizer.ggml.tokens": ["a" * 5000]}, "impossible length"),
        ({"tokenizer.ggml.tokens": ["a", "b"]}, "no merges"),
        ({"tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.token_type": np.ones(3, np.int32)}, "1 tokens and 3 types"),
        ({"tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.model": "llama"}, "no score for each token"),
        ({"tokenizer.ggml.model": "llama", **LONG}, "too long to be told apart"),
        ({"tokenizer.ggml.model": "t5"}, "of kind 't5' is not read"),
        ({"tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.pre": "falcon"}, "cuts words as 'falcon'"),
    ],
)
def test_tokenizers_that_make_no_sense(pairs: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        definition({**TOKENS, **pairs})
