"""Progress of offline generation: it moves with tokens, and says nothing of what is over soon."""

from __future__ import annotations

import io

import pytest

from hasten import LLM, SamplingParams
from hasten.engine import progress

LONG = "def read " * 400


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("demo", context=2048, max_batch=2, threads=1)


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second passes whenever somebody looks."""
    now = iter(range(1, 100_000))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(now)))


def test_one_long_prompt_moves_as_it_is_read_and_answered(llm: LLM) -> None:
    told: list[tuple[str, int, int]] = []
    (output,) = llm.generate(
        LONG, SamplingParams(max_tokens=20, ignore_eos=True), progress=lambda *what: told.append(what)
    )
    prompt = len(output.prompt_token_ids)
    assert prompt > 2 * 512  # it is read in several steps
    assert {(stage, total) for stage, _, total in told} == {("generating", prompt + 20)}
    done = [count for _, count, _ in told]
    assert done[:2] == [512, 1024]
    assert done[-20:] == [*range(prompt + 2, prompt + 20), prompt + 20, prompt + 20]
    assert done == sorted(done)


def test_an_answer_that_ends_early_is_done(llm: LLM) -> None:
    told: list[tuple[str, int, int]] = []
    stop = SamplingParams(max_tokens=500, allowed_token_ids=[5], stop_token_ids=[5])
    llm.generate(["a", "b"], stop, progress=lambda *what: told.append(what))
    assert told[-1][1] == told[-1][2] == 1000 + sum(len(llm.tokenizer.encode(p)) for p in "ab")


def test_lines_tell_of_tokens(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    params = SamplingParams(max_tokens=100, ignore_eos=True)
    (output,) = llm.generate(LONG, params, use_tqdm=True)
    prompt, steps = len(output.prompt_token_ids), -(-len(output.prompt_token_ids) // 512)
    shown = capsys.readouterr()
    assert shown.out == ""
    lines = shown.err.splitlines()
    assert lines[0] == "generating: 0 of 1 done, 1024 tokens read, 0 written, 0.0 tokens/s"
    assert lines[1].startswith(f"generating: 0 of 1 done, {prompt} tokens read, {13 - steps} written, ")
    assert len(lines) == 11


def test_a_terminal_has_one_line(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stderr", terminal)
    llm.generate("a", SamplingParams(max_tokens=5, ignore_eos=True), use_tqdm=True)
    shown = terminal.getvalue()
    assert shown.count("\n") == 1
    assert shown.endswith(" 5 written, 0.7 tokens/s\x1b[K\n")


def test_what_is_over_soon_says_nothing(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress.time, "monotonic", lambda: 1.9)
    llm.chat([{"role": "user", "content": "a"}], SamplingParams(max_tokens=5), use_tqdm=True)
    assert capsys.readouterr() == ("", "")
