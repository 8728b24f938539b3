"""A batch answers as LLM.generate does, refuses what the server refuses, and bears faults of the engine."""

from __future__ import annotations

import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion
from server import batches
from server.batches import CHAT, EMBEDDINGS, read, request, run, without_company, write
from server.serving import Program

from hasten import LLM, SamplingParams
from hasten.backends.batch import Batch, Outputs
from hasten.engine.engine import Engine
from hasten.errors import BackendError
from hasten.server import batch

PROMPTS = ["def read", "class Parser", "import", "for i in range(", "return", "# 中文 🙂"]
DRAWN = {"temperature": 0.9, "max_tokens": 12}


def by_id(path: Path) -> dict[str, Any]:
    lines = read(path)
    found = {line["custom_id"]: line for line in lines}
    assert len(found) == len(lines), "an answer is there twice"
    return found


def test_answers_are_those_of_generate(llm: LLM, reference: LLM, tmp_path: Path) -> None:
    requests = [request(f"{i}-{p}", prompt=p, seed=i, logprobs=2, n=2, **DRAWN) for i in range(3) for p in PROMPTS]
    requests += [request(f"greedy-{p}", prompt=p, temperature=0, max_tokens=20, model="demo") for p in PROMPTS]
    summary = run(llm, write(tmp_path / "in.jsonl", requests), tmp_path / "out.jsonl")
    found = by_id(tmp_path / "out.jsonl")
    assert set(found) == {r["custom_id"] for r in requests}
    tokens = 0
    for line in requests:
        asked, got = line["body"], found[line["custom_id"]]
        assert re.fullmatch(r"batch_req_[0-9a-f]{32}", got["id"])
        assert re.fullmatch(r"req_[0-9a-f]{24}", got["response"]["request_id"])
        assert (got["error"], got["response"]["status_code"]) == (None, 200)
        body = Completion.model_validate(got["response"]["body"])
        given = {k: v for k, v in asked.items() if k not in ("prompt", "model")}
        (expected,) = reference.generate(asked["prompt"], SamplingParams(**given))
        for choice, other in zip(body.choices, expected.outputs, strict=True):
            assert (choice.text, choice.finish_reason) == (other.text, other.finish_reason)
            tokens += len(other.token_ids)
            if "logprobs" in asked:
                drawn = [d[t].logprob for d, t in zip(other.logprobs, other.token_ids, strict=True)]
                assert choice.logprobs.token_logprobs == drawn
    assert (summary.lines, summary.answered, summary.statuses) == (24, 24, {200: 24})
    assert summary.completion_tokens == tokens
    assert summary.prompt_tokens == sum(len(reference.tokenizer.encode(r["body"]["prompt"])) for r in requests)


def test_conversations_are_answered_as_chat_does(llm: LLM, reference: LLM, tmp_path: Path) -> None:
    said = [{"role": "user", "content": "Write a function."}]
    path = write(tmp_path / "in.jsonl", [request("a", CHAT, messages=said, seed=5, **DRAWN)])
    run(llm, path, tmp_path / "out.jsonl")
    body = ChatCompletion.model_validate(by_id(tmp_path / "out.jsonl")["a"]["response"]["body"])
    (expected,) = reference.chat(said, SamplingParams(seed=5, **DRAWN))
    assert body.choices[0].message.content == expected.outputs[0].text


DEEP: Any = "x"
for _ in range(150):
    DEEP = [DEEP]

REFUSED = {
    "stream": (request("", prompt="a", stream=True), 400, "stream"),
    "stream of chat": (request("", CHAT, messages=[], stream=True), 400, "stream"),
    "embeddings": (request("", EMBEDDINGS, input="a"), 400, "model"),
    "value": (request("", prompt="a", temperature=-1), 400, "temperature"),
    "unknown": (request("", prompt="a", colour="red"), 400, "colour"),
    "no prompt": (request(""), 400, "prompt"),
    "model of another type": (request("", prompt="a", model=5), 400, "model"),
    "too long": (request("", prompt="a b c " * 1000), 400, "prompt"),
    "surrogate": (request("", prompt="\ud800"), 400, None),
    "too large": (request("", prompt="a" * (9 << 20)), 413, None),
    "nested": (request("", prompt="a", response_format={"a": DEEP}), 400, "response_format"),
    "infinite": (request("", prompt="a", temperature=1e999), 400, None),
}


def test_what_the_server_refuses_is_answered_so_and_takes_no_other_with_it(llm: LLM, tmp_path: Path) -> None:
    lines = [{**line, "custom_id": name} for name, (line, _, _) in REFUSED.items()]
    text = "".join(json.dumps(line).replace("Infinity", "1e999") + "\n" for line in lines)
    path = tmp_path / "in.jsonl"
    path.write_text(text + json.dumps(request("good", prompt="a", max_tokens=3)) + "\n")
    summary = run(llm, path, tmp_path / "out.jsonl")
    found = by_id(tmp_path / "out.jsonl")
    for name, (_, status, param) in REFUSED.items():
        response = found[name]["response"]
        assert found[name]["error"] is None
        assert (response["status_code"], response["body"]["error"]["param"]) == (status, param), name
    assert found["good"]["response"]["status_code"] == 200
    assert summary.statuses == {200: 1, 400: 11, 413: 1}


def test_many_choices_at_once_are_not_turned_away(llm: LLM, tmp_path: Path) -> None:
    """Far more than the queue of a server holds."""
    body = {"prompt": ["a"] * 128, "n": 16, "max_tokens": 1, "seed": 1}
    path = write(tmp_path / "in.jsonl", [request("many", **body), request("one", prompt="a", max_tokens=1)])
    assert run(llm, path, tmp_path / "out.jsonl").statuses == {200: 2}


class Poisoned(Program):
    """Fails whenever a sequence that begins with `token` is in the batch."""

    token = -1

    def step(self, batch: Batch) -> Outputs:
        if (batch.tokens[batch.positions == 0] == self.token).any():
            self.faults.append(RuntimeError("poisoned"))
        return super().step(batch)


def make_engine_of(llm: LLM, program: Program) -> Any:
    return lambda: Engine(program, llm.model.graph.vocabulary, llm.tokenizer, llm.model.eos_token_ids)


def test_a_fault_of_the_engine_costs_no_answer(llm: LLM, tmp_path: Path) -> None:
    program = Program(llm.program)
    program.faults += [RuntimeError("one"), RuntimeError("two"), RuntimeError("three")]
    requests = [request(str(i), prompt="def read", seed=i, **DRAWN) for i in range(30)]
    path = write(tmp_path / "in.jsonl", requests)
    summary = run(llm, path, tmp_path / "out.jsonl", make_engine=make_engine_of(llm, program))
    assert not program.faults
    assert summary.statuses == {200: 30}
    run(llm, path, tmp_path / "calm.jsonl")
    calm = by_id(tmp_path / "calm.jsonl")
    for name, line in by_id(tmp_path / "out.jsonl").items():
        assert without_company(line) == without_company(calm[name])


def test_a_line_that_fails_alone_too_has_its_fault_as_answer_and_is_tried_again(llm: LLM, tmp_path: Path) -> None:
    program = Poisoned(llm.program)
    (program.token,) = llm.tokenizer.encode(" class", special=False)[:1]
    requests = [request(str(i), prompt="def read", seed=i, **DRAWN) for i in range(30)]
    requests[3]["body"]["prompt"] = requests[17]["body"]["prompt"] = [program.token, 5]
    path, out = write(tmp_path / "in.jsonl", requests), tmp_path / "out.jsonl"
    summary = run(llm, path, out, make_engine=make_engine_of(llm, program))
    assert summary.statuses == {200: 28, 500: 2}
    lines = read(out)
    assert {line["custom_id"] for line in lines[28:]} == {"3", "17"}  # where they can be cut off
    assert "poisoned" in lines[28]["response"]["body"]["error"]["message"]
    assert len(by_id(out)) == 30

    again = run(llm, path, out)
    assert (again.answered, again.statuses) == (2, {200: 30})
    assert read(out)[:28] == lines[:28]
    assert len(by_id(out)) == 30
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_an_engine_that_always_fails_ends_the_batch(llm: LLM, tmp_path: Path) -> None:
    program, out = Program(llm.program), tmp_path / "out.jsonl"
    requests = [request(str(i), prompt="def read", max_tokens=4) for i in range(300)]
    path = write(tmp_path / "in.jsonl", [request("refused", EMBEDDINGS), *requests])
    program.faults += [RuntimeError("no luck")] * 1000
    with pytest.raises(BackendError, match="the engine fails at every request: RuntimeError: no luck") as error:
        run(llm, path, out, make_engine=make_engine_of(llm, program))
    assert error.value.hint == "1 of 301 answers are kept; the same command tries the rest again"
    assert not out.exists()
    assert run(llm, path, out).statuses == {200: 300, 400: 1}


def test_memory_and_requests_under_way_do_not_grow_with_the_file(
    llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An application that answers everything at once stands for the server: what is left is ours."""
    now = most = 0

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await receive()
        await batch.asyncio.sleep(0)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b'{"usage": {"completion_tokens": 1}}'})
        now -= 1

    monkeypatch.setattr(batch, "create_app", lambda service, config: app)
    peaks = []
    for count in (500, 5000):
        path = write(tmp_path / f"{count}.jsonl", (request(f"id {i}", prompt="x" * 2000) for i in range(count)))
        tracemalloc.start()
        assert run(llm, path, tmp_path / f"{count}.out").completion_tokens == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert most == 2 * llm.program.limits.max_sequences
    assert peaks[1] - peaks[0] < 4500 * 100  # bytes a line; a line has 2,080


def test_progress_tells_lines_and_tokens(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "TELL_SECONDS", 0.001)
    told: list[tuple[str, int, int, str]] = []
    path = write(tmp_path / "in.jsonl", [request(str(i), prompt="a", max_tokens=50) for i in range(6)])
    batches.run(llm, path, tmp_path / "out.jsonl", report=lambda *what: told.append(what))
    assert {(stage, total) for stage, _, total, _ in told} == {("answering", 6)}
    assert [done for _, done, _, _ in told] == sorted(done for _, done, _, _ in told)
    rates = [float(detail.removesuffix(" tokens/s")) for _, done, _, detail in told if done == 0]
    assert max(rates) > 0, "nothing moves until the first answer is whole"
