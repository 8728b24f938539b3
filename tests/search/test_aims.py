"""The whole flow under several budgets, targets, caps and mixes, on a tiny random model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from search.test_accelerate import as_fast, files, quick, run, settings  # noqa: F401

from hasten import checkpoint, formats
from hasten.bench import latency
from hasten.cli.main import main
from hasten.engine import memory
from hasten.errors import BudgetError, InputError, MemoryLimitError
from hasten.evaluate import perplexity, tasks
from hasten.search import cap as room
from hasten.search import cost, job, speed, whole
from hasten.search.speed import Gain


def write_task(path: Path, model: Path, count: int = 240) -> Path:
    """Questions that the tiny model answers as it answers them: right nine times in ten."""
    opened, rng, rows = checkpoint.open(str(model)), np.random.default_rng(5), []

    def words(length: int) -> str:
        return "".join(rng.choice(list("abcdefgh"), length))

    for _ in range(count):
        rows.append({"prompt": words(12), "choices": sorted({words(4), words(5), words(6), words(7)}), "answer": 0})
    path.write_text("\n".join(map(json.dumps, rows)))
    task = tasks.load(path, opened.tokenizer, opened.eos_token_ids, 256)
    lines = {q.item.line: q for q in task.questions}
    right = {
        q.item.line: bool(r) for q, r in zip(task.questions, task.right(opened.graph, opened.weights()), strict=True)
    }
    order = sorted(lines)
    for shift in range(1, 7):  # until every answer is the model's
        for row, line in zip(rows, order, strict=True):
            if not right[line]:
                row["answer"] = min(shift, len(row["choices"]) - 1)
        path.write_text("\n".join(map(json.dumps, rows)))
        task = tasks.load(path, opened.tokenizer, opened.eos_token_ids, 256)
        again = task.right(opened.graph, opened.weights())
        right = {q.item.line: bool(r) for q, r in zip(task.questions, again, strict=True)}
    for row in rows[::10]:
        row["answer"] = (row["answer"] + 1) % len(row["choices"])
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_several_budgets_all_hold(files, tmp_path, monkeypatch) -> None:  # noqa: F811
    as_fast(2.0, monkeypatch)
    task = write_task(tmp_path / "task.jsonl", files[0])
    budget = ("ppl=5%,kl=0.05", "agree=70%", f"task={task}:-15pt")
    outcome, _ = run(settings(files, tmp_path / "fast", budget=budget))
    assert outcome.output is not None, outcome.reason
    proof = outcome.document["verdict"]["attempts"][-1]
    assert [r["holds"] for r in proof["readings"]] == [True] * 4
    # The figures anew, from both directories.
    original, made = checkpoint.open(str(files[0])), checkpoint.open(str(tmp_path / "fast"))
    ids = np.asarray(original.tokenizer.encode(files[1].read_text(), special=False), np.int32)
    final = ids[len(ids) // 2 :]
    windows = [w for w in (final[i : i + 256] for i in range(0, len(final), 256)) if len(w) > 1]
    kv = made.kv_formats or "auto"
    reference = original.graph, original.weights()
    found = perplexity.measure(made.graph, made.weights(), windows, reference=reference, kv_format=kv)
    ppl, kl, agree, accuracy = proof["readings"]
    assert kl["estimate"] == pytest.approx(found.kl_divergence)
    assert agree["estimate"] == pytest.approx(1 - found.top1_agreement)
    assert 0 < agree["low"] < agree["high"] <= 0.3
    assert ppl["high"] <= 0.05
    asked = tasks.load(task, original.tokenizer, original.eos_token_ids, 256).part(80, 240)
    before, after = (
        asked.right(m.graph, m.weights(), threads=1, kv_format=m.kv_formats or "auto").mean() for m in (original, made)
    )
    assert accuracy["tokens"] == 160
    assert accuracy["estimate"] == pytest.approx(before - after)
    shown = (tmp_path / "fast" / "report.md").read_text()
    assert "accuracy on task.jsonl, 160 questions" in shown


def test_budgets_that_say_nothing_or_cannot_be_proven(files, tmp_path) -> None:  # noqa: F811
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(json.dumps({"prompt": f"a {i}", "choices": ["x", "yy"], "answer": 0}) for i in range(30)))
    with pytest.raises(BudgetError, match="cannot be proven with 30 questions"):
        run(settings(files, tmp_path / "o", budget=f"task={few}:-1pt"))
    few.write_text("\n".join(json.dumps({"prompt": f"a {i}", "answer": "never that"}) for i in range(60)))
    with pytest.raises(BudgetError, match="answers none of 20 questions right"):  # before calibration
        run(settings(files, tmp_path / "o", budget=f"task={few}:-50pt", objective="memory"))
    with pytest.raises(InputError, match="cannot read the task"):
        run(settings(files, tmp_path / "p", budget=f"task={tmp_path / 'none.jsonl'}:-1pt"))


def rated(monkeypatch, rate) -> None:
    """What a candidate's decoding makes: `rate` of the bytes of its weights; the original's 100 tokens a second."""
    real = speed.compare
    monkeypatch.setattr(
        cost, "seconds", lambda site, cold, threads: 1e-8 * formats.get(site.format).nbytes(*site.shape)
    )

    def compare(original, graph, candidates, **others):
        run, speeds = real(original, graph, candidates, **{**others, "rounds": 1})
        whole = size(original[1])
        rates = [rate(size(c) / whole) for c in candidates]
        first = replace(run, decode_tokens_per_second=100.0)
        return first, [
            replace(s, run=replace(s.run, decode_tokens_per_second=r), decode=Gain(r / 100, r / 100, r / 100))
            for s, r in zip(speeds, rates, strict=True)
        ]

    def size(weights) -> int:
        return sum(w.nbytes for n, w in weights.items() if hasattr(w, "format") and "embed" not in n)

    monkeypatch.setattr(speed, "compare", compare)
    monkeypatch.setattr(whole, "original", lambda job: (1 / 100, 0.1))


def test_a_target_takes_the_least_loss_that_reaches_it(files, tmp_path, monkeypatch) -> None:  # noqa: F811
    rated(monkeypatch, lambda share: 100 / (0.2 + 0.8 * share))
    losses = {}
    for goal in (150, 250):
        outcome, notes = run(settings(files, tmp_path / f"fast{goal}", target=f"decode={goal}tok/s"))
        assert outcome.output is not None, outcome.reason
        assert not any("timed again" in note for note in notes)
        document = outcome.document
        assert document["after"]["rate"] >= goal
        assert document["budget"]["limit"] is None
        assert f"the target is decode={goal}tok/s" in (tmp_path / f"fast{goal}" / "report.md").read_text()
        losses[goal] = document["after"]["kl_divergence"]
        reaching = [c for c in document["candidates"] if (c["rate"] or 0) >= goal]
        chosen = next(c for c in document["candidates"] if c["chosen"])
        assert chosen["estimate"] == min(c["estimate"] for c in reaching)
    assert losses[150] < losses[250]


def test_targets_out_of_reach(files, tmp_path, monkeypatch, capsys) -> None:  # noqa: F811
    rated(monkeypatch, lambda share: 100 / (0.2 + 0.8 * share))
    outcome, _ = run(settings(files, tmp_path / "o", target="decode=100000tok/s"))
    assert outcome.output is None
    assert "nothing reaches the target decode=100000tok/s: the fastest" in outcome.reason
    assert "the original 100.0" in outcome.reason
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(BudgetError, match=r"reaches the target decode=50tok/s already: it makes 100\.0"):
        run(settings(files, tmp_path / "o", target="decode=50tok/s"))
    outcome, _ = run(settings(files, tmp_path / "q", target="decode=250tok/s", budget="kl=1e-9"))
    assert outcome.output is None
    assert "kl=1e-09" in outcome.reason


def test_a_memory_cap(files, tmp_path, monkeypatch) -> None:  # noqa: F811
    """Below what the original takes, it decides even where nothing is faster; below the least it is refused."""
    as_fast(0.9, monkeypatch)
    original = checkpoint.open(str(files[0]))
    limits = latency.limits_for(original.graph, 128, 64, 1, 1, "f32")
    limits = replace(limits, kv_blocks=8, context=256, max_tokens=512)
    beside = memory.predict(original.graph, 0, limits)
    whole = memory.weight_bytes(original.graph, original.formats) + beside.total
    cap = beside.total + 120_000
    assert cap < whole
    prepared = job.prepare(settings(files, tmp_path / "o", memory_cap=cap), lambda *a: None, lambda text: None)
    vectors = sum(4 * s.shape[0] for s in original.graph.weights.values() if not s.is_matrix)
    assert cap - room.serving(prepared).total == 120_000 - vectors
    outcome, notes = run(settings(files, tmp_path / "small", budget="kl=0.5", memory_cap=cap))
    assert outcome.output is not None, outcome.reason
    made = checkpoint.open(str(tmp_path / "small"))
    assert outcome.document["cache"]["chosen"]  # slower as it is timed here, but smaller, and that is asked for
    served = memory.predict(made.graph, 0, replace(limits, kv_format=made.kv_formats))
    assert served.kv_cache < beside.kv_cache
    assert memory.weight_bytes(made.graph, made.formats) + served.total <= cap
    assert any("more than the memory cap" in note for note in notes)
    with pytest.raises(MemoryLimitError, match="the least that any choice of formats takes is"):
        run(settings(files, tmp_path / "o", memory_cap=1000))
    refused, _ = run(settings(files, tmp_path / "o", budget="kl=1e-7", memory_cap=cap))
    assert refused.output is None
    assert "memory cap" in refused.reason


@pytest.mark.parametrize("name", ["throughput", "prefill", "decode"])
def test_mixes(name, files, tmp_path, monkeypatch) -> None:  # noqa: F811
    as_fast(2.0, monkeypatch)
    outcome, _ = run(settings(files, tmp_path / "fast", budget="ppl=5%", objective=name, batch=4, lengths="40:8"))
    assert outcome.output is not None, outcome.reason
    assert outcome.document["timed"] == {"prompt": 40, "new": 8, "batch": 4}
    assert outcome.document["before"]["batch"] == 4
    tokens = {k["tokens"] for k in outcome.document["kernels"]}
    assert tokens == {"throughput": {160, 4}, "prefill": {40, 1}, "decode": {4}}[name]


def test_the_command_says_what_is_wrong(files, tmp_path, capsys) -> None:  # noqa: F811
    base = ["accelerate", str(files[0]), "-o", str(tmp_path / "o"), "--eval", str(files[1])]
    for more, said in (
        (["--budget", "ppl=1%", "--budget", "ppl=2%"], "states ppl twice"),
        (["--memory-cap", "lots"], "'lots' is no size of memory"),
        (["--target", "fast"], "cannot read the target 'fast'"),
        (["--minutes", "-1"], "minutes is -1"),
        (["--minutes", "nan"], "minutes is nan"),
    ):
        assert main([*base, *more]) == 2
        assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
