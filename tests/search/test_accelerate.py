"""The whole flow on a tiny random model, within seconds. Speeds are given where a decision hangs on them."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from search.tiny_model import write_model, write_text

from hasten import checkpoint, formats
from hasten.bench.machine import Limits
from hasten.checkpoint import safetensors
from hasten.cli.main import main
from hasten.errors import InputError, MemoryLimitError, OutputError
from hasten.evaluate import perplexity
from hasten.search import accelerate as flow
from hasten.search import job, plots, quality, sections, speed, texts, trials
from hasten.search.accelerate import Outcome, accelerate
from hasten.search.job import Settings
from hasten.search.samples import Sample
from hasten.search.speed import Gain


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("model")
    return write_model(folder / "tiny"), write_text(folder / "text.txt")


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    """No peak-memory processes, short timings, fewer formats."""
    limits = Limits(10.0, 100.0, 100.0, 1)
    monkeypatch.setattr("hasten.bench.machine.limits", lambda seconds=0.0, threads=0: limits)
    monkeypatch.setattr("hasten.search.candidates.FORMATS", ("bf16", "int8-g64", "int4-g32", "codebook4-g64"))
    monkeypatch.setattr("hasten.bench.peak.peak_memory", lambda source, **sizes: 1_000_000)
    monkeypatch.setattr("hasten.bench.latency.ENOUGH_SECONDS", 0.0)
    monkeypatch.setattr("hasten.search.cost.seconds", lambda site, cold, threads: by_size(site))
    monkeypatch.setattr("hasten.search.whole.original", lambda job: (1e-4, 1e-3))
    monkeypatch.setattr("hasten.search.domains.TOKENS", 600)
    monkeypatch.setattr("hasten.search.batches.SIZES", (1, 2))


def by_size(site) -> float:
    """A kernel as fast as memory lets it be."""
    return formats.get(site.format).nbytes(*site.shape) * 1e-10


def as_fast(factor: float, monkeypatch) -> None:
    """Every candidate is `factor` times as fast as the original, whatever the clock says."""
    real = speed.compare

    def compare(*args, **sizes):
        run, speeds = real(*args, **{**sizes, "rounds": 1})
        fixed = Gain(factor, factor * 0.99, factor * 1.01)
        return run, [replace(s, decode=fixed, prefill=fixed, together=fixed) for s in speeds]

    monkeypatch.setattr(speed, "compare", compare)


def settings(files, output: Path, **others) -> Settings:
    return Settings(str(files[0]), output, eval=files[1], threads=1, **others)


def run(given: Settings) -> tuple[Outcome, list[str]]:
    notes: list[str] = []
    return accelerate(given, lambda stage, done, total: None, notes.append), notes


def test_from_model_to_proven_artifact(files, tmp_path, monkeypatch) -> None:
    as_fast(2.0, monkeypatch)
    monkeypatch.setattr(socket.socket, "connect", _no_network)
    monkeypatch.setattr(socket, "getaddrinfo", _no_network)
    out = tmp_path / "fast"
    outcome, notes = run(settings(files, out, budget="ppl=5%"))
    assert outcome.output == out, outcome.reason
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fast"]  # no work folder is left
    assert any("cut in three" in n for n in notes)
    document = json.loads((out / "report.json").read_text())
    assert document == json.loads(json.dumps(outcome.document))
    assert document["verdict"]["holds"]
    assert document["verdict"]["attempts"][-1]["high"] <= 0.05
    assert document["after"]["bytes_on_disk"] < document["before"]["bytes_on_disk"]
    formats = {t["name"]: t["format"] for t in document["tensors"]}
    assert formats == checkpoint.open(str(out)).formats
    assert any(f != "f32" for f in formats.values())
    assert formats["model.embed_tokens.weight"] == "f32"  # looked up, never multiplied by: no time to win

    page = (out / "report.html").read_text()
    for forbidden in ("http://", "https://", "<script", "<link", "@import", "url("):
        assert forbidden not in page.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert page.count("<svg") == 5


def test_the_figures_are_those_of_the_artifact(files, tmp_path, monkeypatch) -> None:
    """Perplexity before and after, computed anew from both directories on the last part of the text."""
    as_fast(2.0, monkeypatch)
    outcome, _ = run(settings(files, tmp_path / "fast", budget="ppl=5%"))
    proof = outcome.document["verdict"]["attempts"][-1]
    original, made = checkpoint.open(str(files[0])), checkpoint.open(str(tmp_path / "fast"))
    tokens = np.asarray(original.tokenizer.encode(files[1].read_text(), special=False), np.int32)
    final = tokens[len(tokens) // 2 :]
    windows = [w for w in (final[i : i + 256] for i in range(0, len(final), 256)) if len(w) > 1]
    for side, model in (("before", original), ("after", made)):
        found = perplexity.measure(model.graph, model.weights(), windows, kv_format=model.kv_formats or "auto")
        assert found.tokens == proof["tokens"]
        assert outcome.document[side]["perplexity"] == pytest.approx(found.perplexity, rel=1e-9)
    cache = outcome.document["cache"]
    assert cache["chosen"]  # all that is timed here is faster
    assert list(made.kv_formats) == cache["layers"]
    assert cache["bytes_after"] < cache["bytes_before"]
    assert 0 < cache["loss"] <= 0.1 * math.log(1.05)
    ratio = outcome.document["after"]["perplexity"] / outcome.document["before"]["perplexity"]
    assert proof["estimate"] == pytest.approx(ratio - 1, abs=1e-9)


def test_the_recipe_in_the_artifact_makes_as_good_a_model(files, tmp_path, monkeypatch) -> None:
    """The same formats, near the original; not the same bits: `compress` sees each block's inputs as packed blocks
    before it leave them, the search sees the original's."""
    as_fast(2.0, monkeypatch)
    run(settings(files, tmp_path / "fast", budget="ppl=5%"))
    calibration = tmp_path / "calibration.txt"
    original = checkpoint.open(str(files[0]))
    ids = original.tokenizer.encode(files[1].read_text(), special=False)
    calibration.write_text(original.tokenizer.decode(ids[: len(ids) // 4]))
    recipe, again = str(tmp_path / "fast" / "recipe.yaml"), tmp_path / "again"
    command = ["compress", str(files[0]), "-o", str(again), "--recipe", recipe, "--calibration", str(calibration)]
    assert main(command) == 0
    first, second = (checkpoint.open(str(p)) for p in (tmp_path / "fast", again))
    assert first.formats == second.formats
    windows = [np.asarray(ids[start : start + 256], np.int32) for start in (3000, 3300, 3600)]
    reference = (original.graph, original.weights())
    lost = [
        perplexity.measure(m.graph, m.weights(), windows, reference=reference).kl_divergence for m in (first, second)
    ]
    assert 0 < lost[1] < 1.5 * lost[0]


def test_it_may_end_with_another_shape(files, tmp_path) -> None:
    """Many of the feed-forward channels reach nothing: the search finds that, and proves the narrower model."""
    folder = write_model(tmp_path / "wide", feed_forward=256)
    file = safetensors.File(folder / "model.safetensors")
    arrays = {name: np.array(file.array(name)) for name in file.tensors if not name.startswith("__")}
    rng = np.random.default_rng(0)
    for block, dead in enumerate((32, 128)):
        values = arrays[f"model.layers.{block}.mlp.down_proj.weight"]
        values[:, rng.choice(256, dead, replace=False)] = 0
    (folder / "model.safetensors").unlink()
    safetensors.write(folder / "model.safetensors", arrays)
    aim = {"budget": "kl=0.05", "objective": "memory"}
    kept, _ = run(settings((folder, files[1]), tmp_path / "kept", **aim, keep_shape=True))
    assert kept.document["shape"] is None
    assert kept.document["shapes"] == []
    outcome, notes = run(settings((folder, files[1]), tmp_path / "fast", **aim))
    document = outcome.document
    assert outcome.output is not None, outcome.reason
    assert document["shape"], document["shapes"]
    name = document["shape"]["name"]
    assert re.fullmatch(r"feed-forwards of \d\d%, by block", name), document["shapes"]
    assert any(f"the search ends with {name}" in note for note in notes)
    made, original = checkpoint.open(str(outcome.output)), checkpoint.open(str(folder))
    first, second = (made.structure.narrowed[block].feed_forward for block in range(2))
    assert second <= 128 < first
    assert document["before"]["bits_per_weight"] == 32
    assert document["after"]["matrix_bytes"] == sum(w.nbytes for w in made.weights().values() if hasattr(w, "arrays"))
    assert document["parameters"] == original.graph.parameters() > made.graph.parameters()
    final = original.tokenizer.encode(files[1].read_text(), special=False)[-1024:]
    windows = [np.asarray(final[i : i + 256], np.int32) for i in range(0, 1024, 256)]
    found = perplexity.measure(made.graph, made.weights(), windows, reference=(original.graph, original.weights()))
    assert found.kl_divergence < 0.1
    assert name in (outcome.output / "report.html").read_text()
    own = next(c for c in document["candidates"] if c["name"] == "int8-g64 everywhere")
    twin = next(c for c in document["others"] if c["name"] == "int8-g64 everywhere, all of the model")
    row = next(row for row in sections.contributions(document).rows if row[0] == name)
    assert plots._original(document, "bytes") == 4 * sum(m.shape[0] * m.shape[1] for m in original.graph.matrices())
    assert row[2] == f"{(twin['bytes'] - own['bytes']) / 1e6:,.2f} MB"
    assert twin["bytes"] > own["bytes"]
    recipe = yaml.safe_load((outcome.output / "recipe.yaml").read_text())
    assert recipe["structure"]["feed_forward"][-1] == {"keep": second, "blocks": [1]}


def test_nothing_faster(files, tmp_path, monkeypatch, capsys) -> None:
    as_fast(0.8, monkeypatch)
    out = tmp_path / "fast"
    outcome, _ = run(settings(files, out, budget="ppl=5%"))
    assert outcome.output is None
    assert "nothing is faster within the budget ppl=5%" in outcome.reason
    assert "0.80 times" in outcome.reason
    assert list(tmp_path.iterdir()) == []
    arguments = ["accelerate", str(files[0]), "-o", str(out), "--budget", "ppl=5%", "--eval", str(files[1])]
    assert main([*arguments, "--json"]) == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out)["output"] is None
    assert "nothing was written" in printed.err
    assert list(tmp_path.iterdir()) == []


def test_no_budget_no_change(files, tmp_path, monkeypatch) -> None:
    as_fast(2.0, monkeypatch)
    outcome, _ = run(settings(files, tmp_path / "fast", budget="ppl=0%"))
    assert outcome.output is None
    assert list(tmp_path.iterdir()) == []


def test_memory_as_objective_and_divergence_as_budget(files, tmp_path) -> None:
    outcome, _ = run(settings(files, tmp_path / "small", budget="kl=0.05", objective="memory"))
    assert outcome.output is not None, outcome.reason
    document = outcome.document
    proof = document["verdict"]["attempts"][-1]
    assert document["after"]["kl_divergence"] == pytest.approx(proof["estimate"])
    assert 0 < proof["low"] < proof["estimate"] < proof["high"] <= 0.05
    assert document["after"]["bits_per_weight"] < 16
    assert {t["name"]: t["format"] for t in document["tensors"]}["model.embed_tokens.weight"] != "f32"


def test_a_failed_proof_takes_a_fresh_slice_and_a_more_careful_candidate(files, tmp_path, monkeypatch) -> None:
    as_fast(2.0, monkeypatch)
    looks: list[bytes] = []
    prove, measure = flow.prove, quality.reading

    def halved(given, refiner, slices, store, *known):
        """This text is short for two attempts; and every more careful candidate is worth one."""
        allocated = refiner.allocated

        def fitting(name, allowance):
            one = allocated(name, allowance)
            refiner.tried[:] = [replace(t, fits=t.fits or t is one) for t in refiner.tried]

        refiner.allocated = fitting
        windows = slices[0].windows
        half = len(windows) // 2
        return prove(given, refiner, [Sample(windows[:half]), Sample(windows[half:])], store, *known)

    def unlucky(budget, evaluation, level):
        """The first look finds the budget exceeded."""
        looks.append(b"".join(w.tobytes() for w in evaluation.reference_logprobs))
        found = measure(budget, evaluation, level)
        return replace(found, high=1.0) if len(looks) == 1 else found

    monkeypatch.setattr(flow, "prove", halved)
    monkeypatch.setattr(quality, "reading", unlucky)
    outcome, notes = run(settings(files, tmp_path / "fast", budget="ppl=5%"))
    attempts = outcome.document["verdict"]["attempts"]
    assert len(attempts) == len(set(looks)) == 2
    assert not attempts[0]["holds"]
    assert any("does not hold the budget" in n for n in notes)
    assert attempts[1]["candidate"] != attempts[0]["candidate"]
    assert [a["level"] for a in attempts] == [0.95, 0.99]
    if outcome.output is None:
        assert sorted(p.name for p in tmp_path.iterdir()) == []


def test_interrupted_and_started_again(files, tmp_path, monkeypatch) -> None:
    """Ctrl-C at a quarter, half and three quarters of what an undisturbed run measures: none is measured again."""
    as_fast(2.0, monkeypatch)
    made: list[str] = []
    stop_at = 10**9
    real = trials.Trials.put

    def put(self, kind, key, value):
        real(self, kind, key, value)
        made.append(trials.digest([kind, key]))
        if len(made) == stop_at:
            raise KeyboardInterrupt

    monkeypatch.setattr(trials.Trials, "put", put)
    out = tmp_path / "fast"
    ample = {"budget": "ppl=5%"}
    undisturbed, _ = run(settings(files, tmp_path / "other", **ample))
    expected = sorted(made)
    made.clear()
    for part in (0.25, 0.5, 0.75):
        stop_at = int(part * len(expected))
        with pytest.raises(KeyboardInterrupt):
            run(settings(files, out, **ample))
        assert not out.exists()
        assert (tmp_path / "fast.work" / "trials.sqlite").exists()
    stop_at = 10**9
    outcome, _ = run(settings(files, out, **ample))
    assert sorted(made) == expected
    assert outcome.output == out
    assert outcome.document["tensors"] == undisturbed.document["tensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fast", "other"]


def test_interrupted_while_writing(files, tmp_path, monkeypatch) -> None:
    as_fast(2.0, monkeypatch)

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("hasten.search.report.write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(settings(files, tmp_path / "fast", budget="ppl=5%"))
    assert [p.name for p in tmp_path.iterdir()] == ["fast.work"]


@pytest.mark.parametrize("place", ["os.fsync", "hasten.search.report.Path.write_text"])
def test_full_disk(files, tmp_path, monkeypatch, place) -> None:
    as_fast(2.0, monkeypatch)

    def full(*args, **others):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(place, full)
    with pytest.raises(OutputError, match=r"full|No space left"):
        run(settings(files, tmp_path / "fast", budget="ppl=5%"))
    assert [p.name for p in tmp_path.iterdir()] == ["fast.work"]


def test_bad_input_is_found_at_once(files, tmp_path, monkeypatch) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("")
    with pytest.raises(OutputError, match="not empty"):
        run(settings(files, tmp_path / "there"))
    with pytest.raises(InputError, match="objective"):
        run(settings(files, tmp_path / "o", objective="speed"))
    for folder, said in ((Path(), "current directory"), (Path("/"), "root directory")):
        with monkeypatch.context() as inside:
            (tmp_path / "empty").mkdir(exist_ok=True)
            inside.chdir(tmp_path / "empty")
            with pytest.raises(OutputError, match=said):
                run(settings(files, folder))
    (tmp_path / "empty").rmdir()
    short = tmp_path / "short.txt"
    short.write_text("a few words")
    with pytest.raises(InputError, match="too short to prove a budget on: 11 tokens"):
        run(replace(settings(files, tmp_path / "o"), eval=short))
    poor = replace(job.machine.describe(), memory_available=1000)
    monkeypatch.setattr(job.machine, "describe", lambda: poor)
    with pytest.raises(MemoryLimitError, match="GB of memory"):
        run(settings(files, tmp_path / "o"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["short.txt", "there"]


def test_packed_matrices_take_what_memory_the_rest_leaves(files, tmp_path) -> None:
    """A budget for them never pushes what else is held beyond what there is."""
    model = checkpoint.open(str(files[0]))
    text = texts.choose(model.tokenizer, 256, None, files[1])
    here = job.machine.describe()
    least = 4 * model.graph.parameters()
    kept = [
        job.check_room(model, text, tmp_path / "o", replace(here, memory_available=n << 20)) for n in (300, 1000, 8000)
    ]
    assert kept[0] <= (300 << 20) - (256 << 20)
    assert least <= kept[0] < kept[1] <= 250 << 20
    assert kept[2] == 2000 << 20
    assert job.check_room(model, text, tmp_path / "o", replace(here, memory_available=None)) == least, "not known"
    with pytest.raises(MemoryLimitError, match=r"0\.0 GB are available"):
        job.check_room(model, text, tmp_path / "o", replace(here, memory_available=0))


def test_the_model_is_proven_as_it_is_served(files, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(job, "DEFAULT_CONTEXT", 128)
    found = job.prepare(settings(files, tmp_path / "o"), lambda *a: None, lambda text: None)
    assert found.graph.context == found.model.graph.context == 128
    assert found.kv_format == "f32"
    assert max(len(w) for w in found.texts.final) <= 128


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_signal_at_the_command_line(files, tmp_path, number, status) -> None:
    """Stopped from outside after some measurements: nothing but the work folder is there, and the rest goes on."""
    out, work = tmp_path / "fast", tmp_path / "fast.work"
    command = [sys.executable, "-m", "hasten", "accelerate", str(files[0]), "-o", str(out), "--eval", str(files[1])]
    environment = {**os.environ, "PYTHONPATH": str(Path(flow.__file__).parents[2])}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as running:
        while not any(work.glob("calibration-*/statistics.npz")):
            assert running.poll() is None, running.stderr.read()
            time.sleep(0.02)
        time.sleep(0.3)  # the file is there a moment before its entry
        running.send_signal(number)
        words = running.communicate(timeout=60)[1]
    assert running.returncode == status
    assert [p.name for p in tmp_path.iterdir()] == ["fast.work"]
    if number == signal.SIGINT:
        assert "Traceback" not in words
        assert "continues from here" in words
    _, notes = run(settings(files, out, budget="ppl=5%", objective="memory"))
    assert any("continuing" in note for note in notes)


def _no_network(*args, **others):
    raise AssertionError("something tried to reach the network")
