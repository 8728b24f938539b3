"""llama.cpp itself reads what we write: teacher-forced it says what hasten says, and it cuts text as the model does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support import need_shared_data

from hasten import checkpoint, formats
from hasten.backends import native
from hasten.backends.batch import Batch, Limits
from hasten.bench.contenders import cache_directory
from hasten.bench.peers import llama_cpp
from hasten.bench.peers.common import Environment, Runner
from hasten.checkpoint.gguf import export, write_gguf

INSTALLED = cache_directory() / "peers" / "llama_cpp"  # the user's: while tests run, the cache is another
LOGITS_BOUND = 1e-4
"""Of the largest logit: both add float32 in other orders, and llama.cpp takes exp and sin from tables of its own."""
TEXT = "def encode(text: str) -> bytes:\n    return text.encode('utf-8')  # 12345, and a café\n"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    home = Environment(INSTALLED)
    if not home.ready.exists():
        pytest.skip("llama.cpp is not installed (hasten bench demo --against llama.cpp installs it)")
    log = tmp_path_factory.mktemp("llama") / "log"
    runner = Runner(
        home.python, "run_llama_cpp.py", log, llama_cpp.environment(home), lambda stage, done, total: None, "llama.cpp"
    )
    yield runner
    runner.close()


@pytest.fixture(scope="module", params=["demo", "stories260K-hf"])
def model(request: pytest.FixtureRequest) -> checkpoint.Model:
    return checkpoint.open("demo" if request.param == "demo" else str(need_shared_data("models", request.param)))


def own_logits(model: checkpoint.Model, tokens: list[int]) -> np.ndarray:
    """hasten's in float32 throughout, [tokens, vocabulary]."""
    pack = formats.get("f32").pack
    specs = model.graph.weights.values()
    weights = {s.name: pack(model.tensor(s.name)) if s.is_matrix else model.tensor(s.name) for s in specs}
    count = len(tokens)
    sizes = Limits(
        context=count, max_tokens=count, max_sequences=1, max_rows=count, kv_blocks=-(-count // 32), kv_format="f32"
    )
    program = native.compile(model.graph, weights, sizes)
    every = np.arange(count, dtype=np.int32)
    table = np.arange(sizes.kv_blocks, dtype=np.int32)[None]
    starts = np.array([0, count], np.int32)
    return program.step(Batch(np.array(tokens, np.int32), every, starts, table, every)).logits()


def test_teacher_forced_it_says_the_same(llama: Runner, model: checkpoint.Model, tmp_path: Path) -> None:
    text = checkpoint.demo_text("final") if model.source == "demo" else TEXT * 40
    tokens = list(model.tokenizer.encode(text))[: min(1000, model.graph.context)]
    write_gguf(model, tmp_path / "f32.gguf", "f32")
    llama.call("logits", path=str(tmp_path / "f32.gguf"), out=str(tmp_path / "l.npy"), tokens=tokens, threads=2)
    theirs, ours = np.load(tmp_path / "l.npy"), own_logits(model, tokens)
    assert theirs.shape == ours.shape
    agreed = (theirs.argmax(axis=1) == ours.argmax(axis=1)).mean()
    error = np.abs(theirs - ours).max() / np.abs(ours).max()
    print(f"{model.source}: {len(tokens)} positions, top token agrees at {agreed:.2%}, logits within {error:.1e}")
    assert agreed >= 0.999
    assert error < LOGITS_BOUND


def test_the_comparison_would_see_rows_in_the_wrong_order(
    llama: Runner, model: checkpoint.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "permuted", lambda values, heads: values)
    tokens = list(model.tokenizer.encode(TEXT * 4))[:100]
    write_gguf(model, tmp_path / "f32.gguf", "f32")
    llama.call("logits", path=str(tmp_path / "f32.gguf"), out=str(tmp_path / "l.npy"), tokens=tokens, threads=2)
    theirs, ours = np.load(tmp_path / "l.npy"), own_logits(model, tokens)
    assert np.abs(theirs - ours).max() / np.abs(ours).max() > 100 * LOGITS_BOUND


def test_text_is_cut_the_same(llama: Runner, model: checkpoint.Model, tmp_path: Path) -> None:
    write_gguf(model, tmp_path / "q8.gguf", "q8_0")
    found = llama.call("encode", path=str(tmp_path / "q8.gguf"), text=TEXT)["tokens"]
    assert found == list(model.tokenizer.encode(TEXT))


QUANTISED_BOUND = 0.06
"""Of the largest logit: for quantised weights llama.cpp rounds activations to 8 bits, which float32 does not."""
FILE_TYPES = {"Q4_0": 2, "Q3_K_M": 12, "Q4_K_M": 15}
"""ggml's llama_ftype."""


def forced(llama: Runner, path: Path, tokens: list[int]) -> np.ndarray:
    out = path.with_suffix(".npy")
    llama.call("logits", path=str(path), out=str(out), tokens=tokens, threads=2)
    return np.asarray(np.load(out))


def test_what_it_quantises_is_read_as_it_means_it(llama: Runner, tmp_path: Path) -> None:
    """Its own quantizer writes each type; its logits from that file are ours from that file."""
    demo = checkpoint.open("demo")
    tokens = list(demo.tokenizer.encode(checkpoint.demo_text("final")))[:64]
    write_gguf(demo, tmp_path / "f16.gguf", "f16")
    original = own_logits(demo, tokens)
    for name, file_type in FILE_TYPES.items():
        path = tmp_path / f"{name}.gguf"
        llama.call("quantize", source=str(tmp_path / "f16.gguf"), target=str(path), file_type=file_type, threads=2)
        model = checkpoint.open(str(path))
        theirs, ours = forced(llama, path, tokens), own_logits(model, tokens)
        error, changed = np.abs(theirs - ours).mean(), np.abs(original - ours).mean()
        kinds = ", ".join(sorted(set(model.formats.values())))
        print(f"{name}: held as {kinds}; logits within {error:.3f} of its, {changed:.3f} of the original's")
        assert np.abs(theirs - ours).max() < QUANTISED_BOUND * np.abs(ours).max()
        assert error < 0.7 * changed  # what it rounds while it runs is less than what it rounded in the file


def test_it_runs_an_artifact_of_many_formats(llama: Runner, tmp_path: Path) -> None:
    demo = checkpoint.open("demo")
    tokens = list(demo.tokenizer.encode(checkpoint.demo_text("final")))[:200]
    names = ["int4-g32", "int8-g64", "codebook4-g32", "sparse8-g128", "int3-g32", "bf16", "int4-g128"]
    weights: dict[str, formats.Weight | np.ndarray] = {}
    for number, (name, spec) in enumerate(demo.graph.weights.items()):
        values = demo.tensor(name)
        weights[name] = formats.get(names[number % len(names)]).pack(values) if spec.is_matrix else values
    model = checkpoint.open(str(checkpoint.write_artifact(tmp_path / "a", demo, weights, {}, {})))
    written = write_gguf(model, tmp_path / "mixed.gguf", None)
    assert set(written.values()) == {"q4_0", "q8_0", "bf16"}
    theirs, ours = forced(llama, tmp_path / "mixed.gguf", tokens), own_logits(model, tokens)
    error = np.abs(theirs - ours).max() / np.abs(ours).max()
    print(f"logits within {error:.1e}; agrees {(theirs.argmax(axis=1) == ours.argmax(axis=1)).mean():.1%}")
    assert error < QUANTISED_BOUND
