"""Others' quantised checkpoints, written here by an independent statement of each format, one number at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint import making
from models import tiny

from hasten import checkpoint, models
from hasten.checkpoint.quantized import supported
from hasten.errors import CheckpointError

CONFIG = {**tiny.BASE, "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "torch_dtype": "float16"}
Array = np.ndarray


def stream(codes: list[int], bits: int) -> list[int]:
    """A stream of bits as 32-bit words: number i at bit i * bits, low bits first."""
    whole = sum(int(code) << (i * bits) for i, code in enumerate(codes))
    count = -(-len(codes) * bits // 32)
    return [(whole >> (32 * i)) & 0xFFFFFFFF for i in range(count)]


def signed(words: Any) -> Array:
    return np.array(words, np.uint32).view(np.int32)


def gptq(
    codes: Array, zeros: Array, scales: Array, group_of: Array, bits: int, v2: bool, g_idx: bool
) -> dict[str, Any]:
    """codes [out, in], zeros and scales [out, groups]."""
    qweight = signed([stream(row, bits) for row in codes.tolist()]).T
    stored = zeros if v2 else (zeros - 1) % (1 << bits)
    qzeros = signed([stream(column, bits) for column in stored.T.tolist()])
    made = {
        "qweight": ("I32", np.ascontiguousarray(qweight)),
        "qzeros": ("I32", qzeros),
        "scales": ("F16", np.ascontiguousarray(scales.T.astype(np.float16))),
    }
    return {**made, "g_idx": ("I32", group_of.astype(np.int32))} if g_idx else made


def awq(codes: Array, zeros: Array, scales: Array) -> dict[str, Any]:
    """Of eight neighbours (along the output) number ORDER[k] has the k-th lowest four bits of their word."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def words(matrix: Array) -> Array:  # [n, out] -> [n, out / 8]
        return signed(
            [
                [sum(int(row[8 * w + order[k]]) << (4 * k) for k in range(8)) for w in range(len(row) // 8)]
                for row in matrix.tolist()
            ]
        )

    return {
        "qweight": ("I32", words(codes.T)),
        "qzeros": ("I32", words(zeros.T)),
        "scales": ("F16", np.ascontiguousarray(scales.T.astype(np.float16))),
    }


def packed(codes: Array, zeros: Array | None, scales: Array, bits: int, group_of: Array | None) -> dict[str, Any]:
    """compressed-tensors: codes and zeros here are unsigned, as they are packed."""
    made = {
        "weight_packed": ("I32", signed([stream(row, bits) for row in codes.tolist()])),
        "weight_scale": ("F16", scales.astype(np.float16)),
        "weight_shape": ("I64", np.array(codes.shape, np.int64)),
    }
    if zeros is not None:
        made["weight_zero_point"] = ("I32", signed([stream(c, bits) for c in zeros.T.tolist()]).T.copy())
    if group_of is not None:
        made["weight_g_idx"] = ("I32", group_of.astype(np.int32))
    return made


class Made:
    """A checkpoint on disk, and what its matrices should be: float64, by value = (code - zero) * scale."""

    def __init__(self, path: Path, quantization: dict[str, Any], config: dict[str, Any] = CONFIG) -> None:
        self.path, self.config = path, {**config, "quantization_config": quantization}
        path.mkdir()
        self.tensors = making.tensors(config, "F16")
        self.expected: dict[str, Array] = {}
        self.stored = np.zeros(0, np.float32)
        self.rng = np.random.default_rng(5)

    def quantise(self, bits: int, group: int, symmetric: bool, act_order: bool, write: Any, source: str = "") -> None:
        """Replaces every matrix of the blocks (or those of `source`) by what `write` makes of its codes and scales."""
        for name in [n for n in self.tensors if ".layers." in n and "proj" in n and source in n]:
            rows, columns = self.tensors.pop(name)[1].shape
            size = columns if group == -1 else group
            groups = -(-columns // size)
            codes = self.rng.integers(0, 1 << bits, (rows, columns))
            middle = 1 << (bits - 1)
            zeros = np.full((rows, groups), middle)
            if not symmetric:
                zeros = self.rng.integers(1, 1 << bits, (rows, groups))
            scales = (self.rng.uniform(0.01, 0.02, (rows, groups)) * 8 / middle).astype(np.float16)
            group_of = np.arange(columns) // size
            if act_order:
                group_of = self.rng.permutation(group_of)
            stem = name.removesuffix("weight")
            for part, tensor in write(codes, zeros, scales, group_of).items():  # which may change what it is given
                self.tensors[stem + part] = tensor
            self.expected[name] = (codes - zeros[:, group_of]) * scales.astype(np.float64)[:, group_of]

    def open(self, file: str = "model.safetensors", **config: Any) -> checkpoint.Model:
        (self.path / "config.json").write_text(json.dumps({**self.config, **config}))
        (self.path / file).write_bytes(making.safetensors_bytes(self.tensors))
        return checkpoint.open(str(self.path))

    def check(self, model: checkpoint.Model, format: str) -> None:
        """Every quantised matrix is `format` and has the values it should; all others are as they were.

        {columns} in a format: one group a row.
        """
        for spec in model.graph.matrices():
            held = model.weight(spec.name)
            expected = self.expected.get(spec.source)
            if expected is None:
                assert model.formats[spec.name] == "f16"
                continue
            expected = expected[slice(*spec.rows)] if spec.rows else expected
            np.testing.assert_array_equal(model.tensor(spec.name), expected.astype(np.float32))
            assert model.formats[spec.name] == held.format.name == format.format(columns=expected.shape[1])  # type: ignore[union-attr]
            as_held = expected.astype(np.float16) if format == "f16" else expected
            np.testing.assert_array_equal(held.dense(), as_held.astype(np.float32))  # type: ignore[union-attr]


def test_the_methods_are_the_files() -> None:
    assert supported() == ["awq", "compressed-tensors", "gptq"]


@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "v2", "act_order", "format"),
    [
        (4, 32, True, False, False, "int4-g32"),
        (4, 64, True, True, False, "int4-g64"),
        (4, -1, True, False, False, "int4-g{columns}"),
        (4, 32, False, False, False, "int8-g32"),
        (4, 32, False, True, False, "int8-g32"),
        (4, 32, True, False, True, "f16"),
        (4, 32, False, False, True, "f16"),
        (3, 32, True, False, False, "int3-g32"),
        (3, 64, False, False, False, "int4-g64"),
        (2, 32, True, False, False, "codebook2-g32"),
        (2, 32, False, True, False, "int3-g32"),
        (8, 32, True, False, False, "f16"),  # -128 occurs
        (4, 16, True, False, False, "f16"),
    ],
)
def test_gptq(tmp_path: Path, bits: int, group: int, symmetric: bool, v2: bool, act_order: bool, format: str) -> None:
    layout = "gptq_v2" if v2 else "gptq"
    quantization = {"quant_method": "gptq", "bits": bits, "group_size": group, "checkpoint_format": layout}
    made = Made(tmp_path / "m", {**quantization, "desc_act": act_order, "sym": symmetric})
    made.quantise(bits, group, symmetric, act_order, lambda c, z, s, g: gptq(c, z, s, g, bits, v2, True))
    model = made.open()
    assert (model.kind, model.dtype) == ("quantized", "f16")
    made.check(model, format)
    assert bool(model.notes) == (format == "f16")


def test_int8_holds_eight_bits_where_the_lowest_code_is_not_used(tmp_path: Path) -> None:
    made = Made(tmp_path / "m", {"quant_method": "gptq", "bits": 8, "group_size": 32})

    def write(codes: Array, zeros: Array, scales: Array, group_of: Array) -> dict[str, Any]:
        codes[codes == 0] = 1
        return gptq(codes, zeros, scales, group_of, 8, False, False)

    made.quantise(8, 32, True, False, write)
    made.check(made.open(), "int8-g32")


def test_gptq_with_layers_of_other_bits_an_old_file_name_and_empty_biases(tmp_path: Path) -> None:
    """AutoGPTQ names its file itself, keeps its settings in quantize_config.json and writes biases of zeros."""
    made = Made(tmp_path / "m", {})
    made.config.pop("quantization_config")
    made.quantise(4, 32, True, False, lambda c, z, s, g: gptq(c, z, s, g, 4, False, True), "mlp")
    made.quantise(3, 32, True, False, lambda c, z, s, g: gptq(c, z, s, g, 3, False, False), "self_attn")
    for name in list(made.tensors):
        if name.endswith("qweight"):
            made.tensors[name.replace("qweight", "bias")] = (
                "F16",
                np.zeros(made.tensors[name][1].shape[1], np.float16),
            )
    (made.path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32, "desc_act": False}))
    model = made.open("gptq_model-4bit-32g.safetensors")
    assert {f for n, f in model.formats.items() if "mlp" in n} == {"int4-g32"}
    assert {f for n, f in model.formats.items() if "self_attn" in n} == {"int3-g32"}
    for spec in model.graph.matrices():
        if spec.source in made.expected:
            np.testing.assert_array_equal(model.tensor(spec.name), made.expected[spec.source].astype(np.float32))


def test_a_fused_tensor_is_cut(tmp_path: Path) -> None:
    config = {**CONFIG, "model_type": "phi3"}
    made = Made(tmp_path / "m", {"quant_method": "gptq", "bits": 4, "group_size": 32}, config)
    made.quantise(4, 32, True, False, lambda c, z, s, g: gptq(c, z, s, g, 4, False, True))
    made.check(made.open(), "int4-g32")


@pytest.mark.parametrize(
    ("group", "symmetric", "format"), [(32, False, "int8-g32"), (64, True, "int4-g64"), (-1, True, "int4-g{columns}")]
)
def test_awq(tmp_path: Path, group: int, symmetric: bool, format: str) -> None:
    quantization = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    made = Made(tmp_path / "m", quantization)
    made.quantise(4, group, symmetric, False, lambda c, z, s, g: awq(c, z, s))
    made.check(made.open(), format)


def scheme(bits: int, group: int, symmetric: bool, **fields: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": group}
    groups = {"group_0": {"targets": ["Linear"], "weights": {**weights, **fields}, "input_activations": None}}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": groups,
        "ignore": ["lm_head"],
    }


@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "act_order", "format"),
    [
        (4, 32, True, False, "int4-g32"),
        (4, -1, True, False, "int4-g{columns}"),
        (4, 64, False, False, "int8-g64"),
        (4, 32, True, True, "f16"),
        (4, 32, False, True, "f16"),
        (3, 32, True, False, "int3-g32"),
        (8, 32, True, False, "f16"),
    ],
)
def test_compressed_tensors(
    tmp_path: Path, bits: int, group: int, symmetric: bool, act_order: bool, format: str
) -> None:
    made = Made(tmp_path / "m", scheme(bits, group, symmetric))
    made.quantise(
        bits, group, symmetric, act_order,
        lambda c, z, s, g: packed(c, None if symmetric else z, s, bits, g if act_order else None),
    )  # fmt: skip
    made.check(made.open(), format)


@pytest.mark.parametrize(
    ("dtype", "factor", "format"),
    [("F32", 1.0, "int4-g32"), ("F32", 1.0001, "f32"), ("BF16", 1.0, "int4-g32"), ("BF16", 2.0**-20, "bf16")],
)
def test_scales_that_f16_does_not_hold(tmp_path: Path, dtype: str, factor: float, format: str) -> None:
    """Those that it does hold make the integer format, whatever type they are stored in."""
    made = Made(tmp_path / "m", scheme(4, 32, True))

    def write(codes: Array, zeros: Array, scales: Array, group_of: Array) -> dict[str, Any]:
        stored = making.encoded((scales.astype(np.float32) * np.float32(factor)), dtype)
        made.stored = making.decoded(stored, dtype)
        return {**packed(codes, None, scales, 4, None), "weight_scale": (dtype, stored)}

    made.quantise(4, 32, True, False, write, "layers.0.mlp.up_proj")
    name = "model.layers.0.mlp.up_proj.weight"
    codes = made.tensors["model.layers.0.mlp.up_proj.weight_packed"][1].view(np.uint8)
    levels = np.stack((codes & 15, codes >> 4), axis=2).reshape(len(codes), -1).astype(np.float32) - 8
    model = made.open()
    assert model.formats[name] == format
    np.testing.assert_array_equal(model.tensor(name), levels * np.repeat(made.stored, 32, axis=1))


@pytest.mark.parametrize("by", ["channel", "tensor", "group"])
def test_int_quantized(tmp_path: Path, by: str) -> None:
    made = Made(tmp_path / "m", {**scheme(8, -1, True, strategy=by), "format": "int-quantized"})

    def write(codes: Array, zeros: Array, scales: Array, group_of: Array) -> dict[str, Any]:
        codes[codes == 0] = 1
        scales[:] = scales[0, 0] if by == "tensor" else scales
        stored = scales[:1, 0] if by == "tensor" else scales
        return {"weight": ("I8", (codes - 128).astype(np.int8)), "weight_scale": ("F16", stored.copy())}

    made.quantise(8, 32 if by == "group" else -1, True, False, write)
    made.check(made.open(), "int8-g32" if by == "group" else "int8-g{columns}")


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True), (3, False)])
def test_as_the_compressed_tensors_package_has_it(tmp_path: Path, bits: int, symmetric: bool) -> None:
    """Its own compressor packs, its own decompressor says what the values are."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=32)
    whole = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    made, expected = Made(tmp_path / "m", scheme(bits, 32, symmetric)), {}
    for name in [n for n in made.tensors if "proj" in n]:
        values = torch.tensor(made.tensors.pop(name)[1].astype(np.float32))
        groups = values.reshape(values.shape[0], -1, 32)
        low, high = groups.amin(2), groups.amax(2)
        scale = ((high - low) / (2**bits - 1)) if not symmetric else groups.abs().amax(2) / (2 ** (bits - 1))
        scale = scale.half().float()
        zero = torch.zeros_like(scale, dtype=torch.int8)
        if not symmetric:
            zero = (-(2 ** (bits - 1)) - torch.round(low / scale)).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        state = {"weight": values, "weight_scale": scale, "weight_zero_point": zero.to(torch.int8)}
        found = compressor.compress(state, whole)
        expected[name] = compressor.decompress(found, whole)["weight"].numpy()
        for part, tensor in found.items():
            array = tensor.numpy()
            kind = {"float32": "F32", "int32": "I32", "int64": "I64", "int8": "I8"}[str(array.dtype)]
            made.tensors[f"{name.removesuffix('weight')}{part}"] = (kind, np.ascontiguousarray(array))
    model = made.open()
    for name, values in expected.items():
        np.testing.assert_array_equal(model.tensor(name), values)
    assert set(model.formats.values()) >= {"int8-g32" if bits == 4 and not symmetric else "f16"} or symmetric


# --- what is refused

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        ({"quant_method": "bitsandbytes"}, "quantised by 'bitsandbytes' are not read"),
        ({"quant_method": ["gptq"]}, "are not read"),
        ("gptq", "quantised by 'gptq' are not read"),
        ({"bits": 4}, "quantised by None"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format 'marlin' are not read"),
        ({**GPTQ, "pack_dtype": "int8"}, "pack_dtype is int32"),
        ({**GPTQ, "group_size": "32"}, "group_size '32'"),
        ({**AWQ, "version": "gemv"}, "version 'gemv' are not read"),
        ({**AWQ, "bits": 8}, "AWQ weights of 8 bits"),
        ({**scheme(4, 32, True), "format": "nvfp4-pack-quantized"}, "format 'nvfp4-pack-quantized' is not read"),
        (scheme(8, 32, True, type="float"), "'type': 'float'"),
        ({**scheme(4, 32, True), "config_groups": {}}, "no config_groups"),
        ({**scheme(4, 32, True), "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity 'sparse-24-bitmask'"),
        ({**scheme(4, 32, True), "transform_config": {"config_groups": {"R1": {}}}}, "transforms"),
    ],
)
def test_variants_that_are_not_read(tmp_path: Path, quantization: Any, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        Made(tmp_path / "m", quantization).open()


def damaged(tensors: dict[str, Any], part: str, change: Any) -> None:
    name = next(n for n in tensors if n.endswith(part))
    if change is None:
        del tensors[name]
    else:
        kind, array = tensors[name]
        tensors[name] = change(kind, array)


def nan(kind: str, array: Array) -> tuple[str, Array]:
    array[0, 0] = np.nan
    return kind, array


DAMAGE: dict[str, tuple[str, Any, str]] = {
    "no zero points": ("qzeros", None, "qzeros is missing"),
    "no scales": ("scales", None, "scales is missing"),
    "no codes": ("qweight", None, "are missing|is missing|not used"),
    "codes of another shape": ("qweight", lambda k, a: (k, a[:-1].copy()), "qweight"),
    "codes of floats": ("qweight", lambda k, a: ("F32", a.view(np.float32)), "is F32, must be I32"),
    "zero points of another shape": ("qzeros", lambda k, a: (k, a[:, :-1].copy()), "qzeros has shape"),
    "scales of another shape": ("scales", lambda k, a: (k, a[:, :-1].copy()), "scales are"),
    "scales of a vector": ("scales", lambda k, a: (k, a.reshape(-1).copy()), "scales are"),
    "no scales at all": ("scales", lambda k, a: (k, a[:0].copy()), "scales are"),
    "integers for scales": ("scales", lambda k, a: ("I32", a.astype(np.int32)), "is I32"),
    "a scale that is no number": ("scales", nan, "a scale is NaN"),
}


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_matrices(tmp_path: Path, method: str, how: str) -> None:
    made = Made(tmp_path / "m", GPTQ if method == "gptq" else AWQ)
    write = (
        (lambda c, z, s, g: gptq(c, z, s, g, 4, False, True)) if method == "gptq" else lambda c, z, s, g: awq(c, z, s)
    )
    made.quantise(4, 32, True, False, write)
    part, change, words = DAMAGE[how]
    damaged(made.tensors, f"mlp.down_proj.{part}", change)
    with pytest.raises(CheckpointError, match=words):
        made.open().weights()


@pytest.mark.parametrize("wrong", [-1, 2, 2**31 - 1])
def test_groups_that_do_not_exist(tmp_path: Path, wrong: int) -> None:
    made = Made(tmp_path / "m", GPTQ)
    made.quantise(4, 32, True, False, lambda c, z, s, g: gptq(c, z, s, g, 4, False, True))
    made.tensors["model.layers.0.self_attn.q_proj.g_idx"][1][3] = wrong
    with pytest.raises(CheckpointError, match="g_idx names group"):
        made.open()


CT_DAMAGE: dict[str, tuple[str, Any, str]] = {
    "no scales": ("weight_scale", None, "weight_scale is missing"),
    "scales of another shape": ("weight_scale", lambda k, a: (k, a[1:].copy()), "weight_scale is"),
    "codes of another shape": ("weight_packed", lambda k, a: (k, a[:, 1:].copy()), "weight_packed of"),
    "another shape stated": ("weight_shape", lambda k, a: (k, a[::-1] + 1), "weight_shape says"),
    "zero points of another shape": (
        "weight_zero_point",
        lambda k, a: (k, a[1:].copy()),
        "weight_zero_point has shape",
    ),
    "a scale that is no number": ("weight_scale", nan, "a scale is NaN"),
}


@pytest.mark.parametrize("how", CT_DAMAGE)
def test_damaged_compressed_tensors(tmp_path: Path, how: str) -> None:
    made = Made(tmp_path / "m", scheme(4, 32, False))
    made.quantise(4, 32, False, False, lambda c, z, s, g: packed(c, z, s, 4, None))
    part, change, words = CT_DAMAGE[how]
    damaged(made.tensors, f"mlp.down_proj.{part}", change)
    with pytest.raises(CheckpointError, match=words):
        made.open().weights()


def test_strangers_are_refused_here_too(tmp_path: Path) -> None:
    made = Made(tmp_path / "m", GPTQ)
    made.quantise(4, 32, True, False, lambda c, z, s, g: gptq(c, z, s, g, 4, False, True))
    made.tensors["model.layers.0.mlp.up_proj.bias"] = ("F16", np.ones(128, np.float16))
    with pytest.raises(CheckpointError, match="not used by model type"):
        made.open()


def test_the_config_says_no_more_that_weights_are_quantised(tmp_path: Path) -> None:
    """An artifact made of it would otherwise say so of weights that it holds in its own way."""
    made = Made(tmp_path / "m", GPTQ)
    made.quantise(4, 32, True, False, lambda c, z, s, g: gptq(c, z, s, g, 4, False, True))
    model = made.open()
    assert "quantization_config" not in model.config
    out = checkpoint.write_artifact(tmp_path / "a", model, model.weights(), {}, {})
    again = checkpoint.open(str(out))
    assert again.formats == model.formats
    assert models.build(again.config) == model.graph
