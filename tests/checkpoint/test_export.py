"""`hasten export`: what is written holds the model's values, by our own readers and by the programs it is meant for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_model
from checkpoint import making
from models import tiny
from models.make_golden import GOLDEN

from hasten import checkpoint, formats, models
from hasten.backends import reference
from hasten.checkpoint import export
from hasten.checkpoint.export import Options
from hasten.checkpoint.model import Model
from hasten.cli.main import main
from hasten.errors import CheckpointError, HastenError, InputError, OutputError

NOTHING = Options()
GROUPED = [n for n in formats.names() if "-g" in n]
TOKENS = np.random.default_rng(3).integers(0, 94, 40)


def artifact(path: Path, choose: Any, **config: Any) -> Model:
    """A small llama with a tokenizer; `choose(name)` is the format of a matrix."""
    folder = path.with_name(f"{path.name}-original")
    if config.get("model_type") == "phi3":  # with tensors that are fused
        making.directory(folder, {**small_model.CONFIG, **config})
    else:
        small_model.write(folder, **config)
    original = checkpoint.open(str(folder))
    weights = {
        name: formats.get(choose(name)).pack(original.tensor(name)) if spec.is_matrix else original.tensor(name)
        for name, spec in original.graph.weights.items()
    }
    return checkpoint.open(str(checkpoint.write_artifact(path, original, weights, {}, {})))


def same_values(found: Model, model: Model, names: Any = None) -> None:
    for name in names or model.graph.weights:
        np.testing.assert_array_equal(found.tensor(name), model.tensor(name), err_msg=name)


def logits(model: Model, tokens: np.ndarray = TOKENS) -> np.ndarray:
    """The formulas in float64, [tokens, vocabulary]."""
    weights = {name: model.tensor(name).astype(np.float64) for name in model.graph.weights}
    return np.asarray(reference.forward(model.graph, weights, tokens))


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()


def empty(folder: Path) -> bool:
    """Nothing of an export is there, hidden or not."""
    return [p.name for p in folder.iterdir() if p.name.startswith((".out", "out"))] == []


def test_the_targets_are_the_files() -> None:
    assert export.targets() == ["compressed-tensors", "gguf", "hf", "onnx"]
    with pytest.raises(InputError, match="no export to 'pt'") as error:
        export.get("pt")
    assert "compressed-tensors, gguf, hf, onnx" in str(error.value.hint)


@pytest.mark.parametrize("target", export.targets())
def test_every_target_refuses_what_means_nothing_to_it(target: str, tmp_path: Path) -> None:
    for option in ("type", "dtype"):
        if option in export.get(target).TAKES:
            with pytest.raises(InputError, match="'f8'"):
                export.export(checkpoint.open("demo"), target, tmp_path / "out", Options(**{option: "f8"}))
        else:
            with pytest.raises(InputError, match=f"--{option} means nothing for --to {target}"):
                export.export(checkpoint.open("demo"), target, tmp_path / "out", Options(**{option: "f16"}))
    assert empty(tmp_path)


# --- gguf


@pytest.mark.parametrize("name", [*GROUPED, "f32", "f16", "bf16"])
def test_gguf_holds_every_format_exactly(name: str, tmp_path: Path) -> None:
    model = artifact(tmp_path / "a", lambda _: name)
    written = export.export(model, "gguf", tmp_path / "out.gguf", NOTHING)
    expected = {"int4": "q4_0", "int3": "q4_0", "int2": "q4_0", "int1": "q4_0"}.get(name.split("-")[0], "q8_0")
    assert set(written.types.values()) == {expected if "-g" in name else name}
    assert written.notes == ()
    same_values(checkpoint.open(str(tmp_path / "out.gguf")), model)


def test_gguf_takes_codes_over_rather_than_quantise_again(tmp_path: Path) -> None:
    """int4 with scales that no extreme has: quantising its values anew would find others."""
    original = checkpoint.open(str(small_model.write(tmp_path / "m")))
    weights: dict[str, Any] = {}
    for name, spec in original.graph.weights.items():
        weights[name] = original.tensor(name)
        if spec.is_matrix:
            format = formats.get("int4-g32")
            scales = format.absmax_scales(weights[name]) * np.float32(1.37)  # type: ignore[attr-defined]
            weights[name] = format.pack(weights[name], scales=scales)
    model = checkpoint.open(str(checkpoint.write_artifact(tmp_path / "a", original, weights, {}, {})))
    export.export(model, "gguf", tmp_path / "out.gguf", Options(type="q4_0"))
    found = checkpoint.open(str(tmp_path / "out.gguf"))
    same_values(found, model)
    assert set(found.formats.values()) == {"int4-g32"}


def test_gguf_rounds_where_a_type_is_asked_for_and_says_so(tmp_path: Path) -> None:
    model = artifact(tmp_path / "a", lambda name: "int8-g32" if "mlp" in name else "int4-g32")
    count = sum("mlp" in name for name in model.formats)
    written = export.export(model, "gguf", tmp_path / "out.gguf", Options(type="q4_0"))
    assert written.notes == (f"{count} matrices are rounded to q4_0",)
    found = checkpoint.open(str(tmp_path / "out.gguf"))
    same_values(found, model, [n for n in model.formats if "mlp" not in n])
    wide = export.export(model, "gguf", tmp_path / "wide.gguf", Options(type="q8_0"))
    assert wide.notes == ()
    same_values(checkpoint.open(str(tmp_path / "wide.gguf")), model)


def test_gguf_says_where_columns_are_no_blocks(tmp_path: Path) -> None:
    model = artifact(tmp_path / "a", lambda _: "int4-g32", intermediate_size=90)
    written = export.export(model, "gguf", tmp_path / "out.gguf", NOTHING)
    assert "2 matrices are written as f16: their columns are no multiple" in written.notes[0]


# --- hf


@pytest.mark.parametrize("name", ["int4-g32", "codebook3-g64", "sparse8-g32"])
def test_hf_holds_the_values(name: str, tmp_path: Path) -> None:
    model = artifact(tmp_path / "a", lambda _: name)
    assert export.export(model, "hf", tmp_path / "out", Options(dtype="f32")).notes == ()
    found = checkpoint.open(str(tmp_path / "out"))
    same_values(found, model)
    assert found.kind == "huggingface"
    assert found.config["torch_dtype"] == "float32"
    text = "def f(x): return 1\n"
    assert found.tokenizer.encode(text) == model.tokenizer.encode(text)
    written = export.export(model, "hf", tmp_path / "out2", NOTHING)
    assert "rounded to f16; --dtype f32 keeps every value" in written.notes[0]
    for weight in model.formats:
        nearest = model.tensor(weight).astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(checkpoint.open(str(tmp_path / "out2")).tensor(weight), nearest)


def test_hf_keeps_the_dtype_of_dense_weights(tmp_path: Path) -> None:
    written = export.export(checkpoint.open("demo"), "hf", tmp_path / "out", NOTHING)
    assert (set(written.types.values()), written.notes) == ({"bf16"}, ())
    same_values(checkpoint.open(str(tmp_path / "out")), checkpoint.open("demo"))


@pytest.mark.parametrize("name", ["llama", "phi3", "gemma3"])
@pytest.mark.filterwarnings("ignore")
def test_transformers_loads_what_hf_is(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = checkpoint.open(str(making.directory(tmp_path / "m", tiny.CONFIGS[name])))
    export.export(model, "hf", tmp_path / "out", NOTHING)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        found = theirs(torch.tensor(tiny.TOKENS[None])).logits[0].numpy()
    assert_close(found, logits(model, tiny.TOKENS))


# --- compressed-tensors

INTEGERS = [f"int{bits}-g{group}" for bits in (8, 4, 3) for group in (32, 64)]


@pytest.mark.parametrize("name", [*INTEGERS, "int2-g32", "int1-g32"])
@pytest.mark.filterwarnings("ignore")
def test_compressed_tensors_holds_the_values(name: str, tmp_path: Path) -> None:
    model = artifact(tmp_path / "a", lambda n: "f16" if "embed" in n else name, intermediate_size=128)
    written = export.export(model, "compressed-tensors", tmp_path / "out", NOTHING)
    bits, group = (8 if "int8" in name else 4), int(name.split("-g")[1])
    assert set(written.types.values()) == {f"int{bits}-g{group}", "f16"}
    assert written.notes == ()
    found = checkpoint.open(str(tmp_path / "out"))
    assert found.kind == "quantized"
    same_values(found, model)


@pytest.mark.parametrize("name", ["int8-g64", "int4-g32", "mixed", "phi3"])
@pytest.mark.filterwarnings("ignore")
def test_transformers_loads_compressed_tensors(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    single = "int4-g32" if name in ("mixed", "phi3") else name

    def choose(weight: str) -> str:
        if "embed" in weight or "lm_head" in weight or (name == "mixed" and ".1.self_attn" in weight):
            return "f16"
        return "int8-g64" if name == "mixed" and "mlp" in weight else single

    config = {"intermediate_size": 128, "tie_word_embeddings": name != "phi3", "pad_token_id": 0}
    model = artifact(tmp_path / "a", choose, **config, model_type="phi3" if name == "phi3" else "llama")
    export.export(model, "compressed-tensors", tmp_path / "out", NOTHING)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        found = theirs(torch.tensor(TOKENS[None])).logits[0].numpy()
    assert_close(found, logits(model))


def test_compressed_tensors_says_what_is_not_as_it_was(tmp_path: Path) -> None:
    def choose(name: str) -> str:
        return "int8-g32" if "q_proj" in name else "int4-g32"

    notes = export.export(artifact(tmp_path / "a", choose), "compressed-tensors", tmp_path / "out", NOTHING).notes
    assert "model.embed_tokens.weight rounded to f16" in notes[0]
    assert "model.layers.0.self_attn: q_proj, k_proj, v_proj differ in format" in notes[1]


@pytest.mark.parametrize(
    ("name", "words", "hint"),
    [
        ("f32", "holds no int4 or int8 matrix", "hasten compress"),
        ("codebook4-g32", "is codebook4-g32, which compressed-tensors has no place for", "--to gguf"),
        ("sparse8-g32", "is sparse8-g32, which compressed-tensors has no place for", "--to gguf"),
        ("int4-g64", "has 96 columns, no multiple of its group of 64", "--to gguf"),
    ],
)
def test_compressed_tensors_refuses(name: str, words: str, hint: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=words) as error:
        export.export(artifact(tmp_path / "a", lambda _: name), "compressed-tensors", tmp_path / "out", NOTHING)
    assert hint in str(error.value.hint)
    assert empty(tmp_path)


def test_parts_of_one_tensor_must_be_alike(tmp_path: Path) -> None:
    model = artifact(tmp_path / "a", lambda n: "int8-g32" if "q_proj" in n else "int4-g32", model_type="phi3")
    with pytest.raises(CheckpointError, match="one tensor there, its parts are stored as int4-g32 and int8-g32"):
        export.export(model, "compressed-tensors", tmp_path / "out", NOTHING)


# --- onnx


def run_onnx(folder: Path, tokens: np.ndarray) -> np.ndarray:
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    session = runtime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["logits"], {"input_ids": tokens.astype(np.int64)})[0])


@pytest.mark.parametrize("name", sorted(tiny.CONFIGS))
def test_every_architecture_as_onnx(name: str, tmp_path: Path) -> None:
    """Logits of onnxruntime against those of transformers, which golden files keep."""
    pytest.importorskip("onnx", reason="onnx is not installed")
    model = checkpoint.open(str(making.directory(tmp_path / "m", tiny.CONFIGS[name])))
    if tiny.context(name):
        model = model.at_context(tiny.context(name) or 0)
    export.export(model, "onnx", tmp_path / "out", NOTHING)
    found = run_onnx(tmp_path / "out", np.stack([tiny.TOKENS, tiny.TOKENS[::-1]]))
    with np.load(GOLDEN) as golden:
        expected = golden[name]
    assert np.abs(found[0][tiny.ROWS] - expected).max() <= 1e-4 * np.abs(expected).max()
    assert not np.allclose(found[1][tiny.ROWS], expected, rtol=1e-2)
    shorter = run_onnx(tmp_path / "out", tiny.TOKENS[None, :7])
    assert np.abs(shorter[0] - found[0][:7]).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
    "name", ["int8-g32", "int4-g32", "int3-g64", "int1-g32", "codebook4-g32", "sparse8-g32", "bf16"]
)
def test_onnx_holds_quantised_weights(name: str, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    model = artifact(tmp_path / "a", lambda _: name)
    written = export.export(model, "onnx", tmp_path / "out", NOTHING)
    assert_close(run_onnx(tmp_path / "out", TOKENS[None])[0], logits(model))
    onnx.checker.check_model(tmp_path / "out" / "model.onnx", full_check=True)
    if name == "int4-g32":
        assert set(written.types.values()) == {"int4"}
        bytes_of_matrices = sum(np.prod(s.shape) for s in model.graph.matrices()) * 4.5 / 8
        assert (tmp_path / "out" / "model.onnx.data").stat().st_size < 1.1 * bytes_of_matrices


# --- wherever


@pytest.mark.parametrize("target", export.targets())
def test_where_nothing_may_be_written(target: str, tmp_path: Path) -> None:
    model = artifact(tmp_path / "a", lambda _: "int4-g32")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "x").write_text("kept")
    (tmp_path / "file").write_text("kept")
    for name in ("there", "file", "file/out"):
        with pytest.raises(OutputError):
            export.export(model, target, tmp_path / name, NOTHING)
    assert (tmp_path / "there" / "x").read_text() == (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("target", export.targets())
@pytest.mark.parametrize("how", ["disk", "weights", "interrupt"])
def test_what_fails_half_way_leaves_nothing(
    target: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = artifact(tmp_path / "a", lambda _: "int4-g32")
    errors = {
        "disk": OSError(28, "No space left"),
        "weights": CheckpointError("broken"),
        "interrupt": KeyboardInterrupt(),
    }
    last = list(model.graph.weights)[-3]

    def failing(self: Any, spec: Any) -> Any:
        if spec.name == last:
            raise errors[how]
        return original(self, spec)

    original = type(model.store).weight
    monkeypatch.setattr(type(model.store), "weight", failing)
    with pytest.raises((HastenError, KeyboardInterrupt)) as error:
        export.export(model, target, tmp_path / "out", NOTHING)
    if how == "disk":
        assert isinstance(error.value, OutputError)
    assert empty(tmp_path)


@pytest.mark.parametrize("target", ["compressed-tensors", "gguf", "hf"])
def test_a_graph_that_its_config_does_not_describe(target: str, tmp_path: Path) -> None:
    """A model whose feed-forward was narrowed in one block: no config.json has words for that."""
    model = artifact(tmp_path / "a", lambda _: "int4-g32")
    narrow = models.build({**model.config, "intermediate_size": 64})
    cut = Model(model.source, model.path, model.config, narrow, "artifact", "f32", store=model.store)
    with pytest.raises(CheckpointError, match="is not of the shape that its config gives") as error:
        export.export(cut, target, tmp_path / "out", NOTHING)
    assert "--to onnx" in str(error.value.hint)
    assert empty(tmp_path)


def test_a_tokenizer_that_gguf_has_no_words_for(tmp_path: Path) -> None:
    model = checkpoint.open(str(making.directory(tmp_path / "m", tiny.CONFIGS["llama"])))
    with pytest.raises(CheckpointError, match="no tokenizer that GGUF can express") as error:
        export.export(model, "gguf", tmp_path / "out.gguf", NOTHING)
    assert "--to hf" in str(error.value.hint)
    assert empty(tmp_path)


# --- the command


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo.gguf"
    assert main(["export", "demo", "--to", "gguf", "-o", str(out), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["target"], facts["bytes"], facts["notes"]) == ("gguf", out.stat().st_size, [])
    assert set(facts["types"].values()) == {"bf16"}
    same_values(checkpoint.open(str(out)), checkpoint.open("demo"))
    assert main(["export", str(out), "--to", "hf", "-o", str(tmp_path / "hf"), "--dtype", "bf16"]) == 0
    shown = capsys.readouterr()
    assert "matrices: 57 bf16" in shown.out
    same_values(checkpoint.open(str(tmp_path / "hf")), checkpoint.open("demo"))


@pytest.mark.parametrize(
    ("arguments", "words", "hint"),
    [
        (["--to", "ggml"], "no export to 'ggml'", "compressed-tensors, gguf, hf, onnx"),
        (["--to", "gguf", "--type", "q3"], "no GGUF type 'q3'", "q4_0"),
        (["--to", "gguf", "--dtype", "f16"], "--dtype means nothing for --to gguf", "it takes --type"),
        (["--to", "onnx", "--type", "f16"], "--type means nothing for --to onnx", "no options"),
        (["--to", "compressed-tensors"], "holds no int4 or int8 matrix", "hasten compress"),
    ],
)
def test_wrong_commands(
    arguments: list[str], words: str, hint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "demo", "-o", str(tmp_path / "out"), *arguments]) == 2
    shown = capsys.readouterr().err
    assert words in shown.splitlines()[0]
    assert hint in shown
    assert empty(tmp_path)
