"""Compression block by block: the same whatever stops it, better than without, and within the memory foreseen."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from search.tiny_model import write_model, write_text

from hasten import checkpoint, formats
from hasten.cli.compress import predict
from hasten.compress import calibrate, stream
from hasten.compress.recipe import KEEP, Choice
from hasten.errors import CheckpointError, FormatError, OutputError
from hasten.evaluate import perplexity
from hasten.search import texts


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model = checkpoint.open(str(write_model(folder / "tiny")))
    windows, _ = texts.calibration_windows(model.tokenizer, 128, write_text(folder / "text.txt"), 4096)
    return model, windows


def task(made, method: str = "gptq", format: str = "int3-g32", **others) -> stream.Task:
    model, windows = made
    choices = {m.name: Choice(format, method) for m in model.graph.matrices()} | others
    return stream.Task(model, choices, windows, "f32", 2)


def same(first, second) -> bool:
    def arrays(weight):
        return weight.arrays if hasattr(weight, "arrays") else {"": weight}

    return all(
        np.array_equal(a, arrays(second[name])[part]) for name, w in first.items() for part, a in arrays(w).items()
    )


@pytest.mark.parametrize("kept", [1, stream.KEPT])
def test_what_was_stopped_goes_on_and_ends_the_same(made, tmp_path: Path, monkeypatch, kept: int) -> None:
    monkeypatch.setattr(stream, "KEPT", kept)  # of more blocks than there are: they are gone through again
    one = task(made)
    undisturbed = stream.compress(one, tmp_path / "a")
    for stop in range(3):
        seen = []

        def report(stage: str, done: int, total: int, stop: int = stop, seen: list = seen) -> None:
            seen.append(done)
            if done == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            stream.compress(one, tmp_path / f"b{stop}", report)
        sections = sorted(p.name for p in (tmp_path / f"b{stop}").glob("section-*"))
        assert len(sections) == stop
        times = [(tmp_path / f"b{stop}" / name).stat().st_mtime_ns for name in sections]
        again = stream.compress(one, tmp_path / f"b{stop}")
        assert same(undisturbed, again)
        assert times == [(tmp_path / f"b{stop}" / name).stat().st_mtime_ns for name in sections], "made again"


def test_hidden_states_that_were_kept_are_gone_on_from(tmp_path: Path, monkeypatch) -> None:
    """Stopped at any of five blocks, before or after its hidden states are kept, folds and all."""
    monkeypatch.setattr(stream, "KEPT", 2)
    model = checkpoint.open(str(write_model(tmp_path / "five", layers=5)))
    windows = [np.random.default_rng(i).integers(0, 256, 64).astype(np.int32) for i in range(4)]
    one = replace(task((model, windows)), folds=("awq",))
    undisturbed = stream.compress(one, tmp_path / "whole")
    keep = stream.Work.keep
    for stop in (1, 3, 4, 5):

        def killed(self, index: int, packed, stop: int = stop) -> None:
            if index == stop:
                raise KeyboardInterrupt
            keep(self, index, packed)

        work = tmp_path / f"stop{stop}"
        with monkeypatch.context() as patch:
            patch.setattr(stream.Work, "keep", killed)
            with pytest.raises(KeyboardInterrupt):
                stream.compress(one, work)
        hidden = sorted(int(p.stem.split("-")[1]) for p in work.glob("hidden-*"))
        assert hidden == [i for i in (2, 4) if i <= stop + 1]
        assert same(undisturbed, stream.compress(one, work))


def test_work_of_another_task_is_not_taken_up(made, tmp_path: Path) -> None:
    three, four = task(made), task(made, format="int4-g32")
    stream.compress(three, tmp_path / "work")
    found = stream.compress(four, tmp_path / "work")
    assert same(found, stream.compress(four, tmp_path / "fresh"))
    # Folded into the model, which is the same on disk.
    assert replace(four, folds=("hadamard",)).facts() != four.facts()
    shorter = replace(four, windows=four.windows[:3])
    assert not same(found, stream.compress(shorter, tmp_path / "work"))


def test_later_blocks_know_of_earlier_ones(made, tmp_path: Path) -> None:
    """With the first block left alone, the second's weights come out otherwise: its inputs are others."""
    model, _ = made
    kept = {m.name: KEEP for m in model.graph.matrices() if ".layers.0." in m.name}
    whole, half = (stream.compress(t, tmp_path / n) for t, n in ((task(made), "a"), (task(made, **kept), "b")))
    name = "model.layers.1.mlp.up_proj.weight"
    assert not np.array_equal(whole[name].arrays["codes"], half[name].arrays["codes"])
    assert half["model.layers.0.mlp.up_proj.weight"].format.name == "f32"
    assert whole["model.embed_tokens.weight"].format.name == "int3-g32"  # without inputs: by a method that needs none


def test_second_moments_pay_in_divergence(made, tmp_path: Path) -> None:
    model, windows = made
    losses = {}
    for method in ("nearest", "clip", "gptq"):
        weights = stream.compress(task(made, method), tmp_path / method)
        found = perplexity.measure(model.graph, weights, windows[:8], reference=(model.graph, model.weights()))
        losses[method] = found.kl_divergence
    assert losses["gptq"] < 0.8 * losses["clip"] < 0.8 * losses["nearest"]


def test_gradients_are_those_of_the_loss(made, tmp_path: Path) -> None:
    """Against differences of the loss itself; and pruning by them hurts less than by size."""
    torch = pytest.importorskip("torch")
    from hasten.backends import reference
    from hasten.compress import gradients

    model, windows = made
    name = "model.layers.1.mlp.up_proj.weight"
    found = gradients.mean_squares(model, windows[:1], [name])[name]
    exact = {n: torch.from_numpy(np.array(model.tensor(n), np.float64)) for n in model.graph.weights}
    tokens = torch.from_numpy(windows[0].astype(np.int64))

    def loss(step: float, row: int, column: int) -> float:
        moved = exact[name].clone()
        moved[row, column] += step
        logits = reference.forward(model.graph, {**exact, name: moved}, tokens[:-1])
        return float(torch.nn.functional.cross_entropy(logits, tokens[1:]))

    for row, column in ((0, 0), (5, 17), (60, 63)):
        slope = (loss(1e-4, row, column) - loss(-1e-4, row, column)) / 2e-4
        assert found[row, column] == pytest.approx(slope**2, rel=1e-2, abs=1e-14)
    losses = {}
    for method in ("magnitude", "taylor"):
        weights = stream.compress(task(made, method, "sparse8-g32"), tmp_path / method)
        other = perplexity.measure(model.graph, weights, windows[:8], reference=(model.graph, model.weights()))
        losses[method] = other.kl_divergence
    assert losses["taylor"] < 0.9 * losses["magnitude"]


def test_faults_are_named(made, tmp_path: Path) -> None:
    one = task(made)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        stream.compress(one, tmp_path / "file" / "work")
    stream.compress(one, tmp_path / "work")
    (tmp_path / "work" / "section-00002.safetensors").unlink()
    (tmp_path / "work" / "section-00001.safetensors").unlink()
    np.save(tmp_path / "work" / "hidden-00001.npy", np.zeros((3, 64), np.float32))
    with pytest.raises(CheckpointError, match="damaged"):
        stream.compress(one, tmp_path / "work")
    broken = one.model.tensor("model.layers.1.mlp.up_proj.weight").copy()
    broken[0, 0] = 1e30
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(one.model), "tensor", lambda self, name: broken)
        with pytest.raises(FormatError, match=r"^model\.layers\.0\.self_attn\.q_proj\.weight: "):
            stream.compress(one, tmp_path / "broken")
    # Looked at in int4, it is left as it is until it is packed, and refused by name.
    section, name = one.model.graph.block(1), "model.layers.1.mlp.up_proj.weight"
    own = {n: one.model.weight(n) for n in section.weights} | {name: formats.get("f32").pack(broken)}
    rough = calibrate.roughly(section, own, list(own))
    assert rough[name] is own[name]
    assert rough["model.layers.1.mlp.gate_proj.weight"].format.name == "int4-g32"


MEASURED = """
import json, sys
from pathlib import Path
from hasten import checkpoint
from hasten.bench.machine import peak_resident
from hasten.cli.compress import predict
from hasten.compress import stream
from hasten.compress.recipe import Choice
import numpy as np
model = checkpoint.open(sys.argv[1])
rng = np.random.default_rng(0)
windows = [rng.integers(0, 256, 256).astype(np.int32) for _ in range(32)]
task = stream.Task(model, {m.name: Choice("int4-g32", "gptq") for m in model.graph.matrices()}, windows, "f32", 2)
before = peak_resident()
stream.compress(task, Path(sys.argv[2]))
print(json.dumps([peak_resident() - before, predict(task).total]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc says what is asked here")
def test_memory_is_what_was_foreseen(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "wide", hidden=512, feed_forward=1536, layers=3)
    command = [sys.executable, "-c", MEASURED, str(folder), str(tmp_path / "work")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    taken, foreseen = json.loads(done.stdout)
    assert 0.4 * foreseen < taken < foreseen


def test_prediction_does_not_grow_with_depth(tmp_path: Path) -> None:
    found = []
    for layers in (2, 6):
        model = checkpoint.open(str(write_model(tmp_path / str(layers), layers=layers)))
        choices = {m.name: Choice("int4-g32", "gptq") for m in model.graph.matrices()}
        found.append(predict(stream.Task(model, choices, [np.zeros(64, np.int32)], "f32")).total)
    assert found[0] == found[1]
