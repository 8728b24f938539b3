"""Progress of offline generation: it moves with tokens, and says nothing of what is over soon."""

from __future__ import annotations

import io

import pytest

from hasten import LLM, SamplingParams
from hasten.engine import progress

LONG = "x = 1\n" * 180


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("demo", context=1024, max_batch=2, threads=1)


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
    assert 512 < prompt < 1000  # it is read in two steps
    assert {(stage, total) for stage, _, total in told} == {("generating", prompt + 20)}
    done = [count for _, count, _ in told]
    assert done == [512, *range(prompt + 1, prompt + 21), prompt + 20]


def test_an_answer_that_ends_early_is_done(llm: LLM) -> None:
    told: list[tuple[str, int, int]] = []
    stop = SamplingParams(max_tokens=500, allowed_token_ids=[5], stop_token_ids=[5])
    llm.generate(["a", "b"], stop, progress=lambda *what: told.append(what))
    assert told[-1][1] == told[-1][2] == 1000 + sum(len(llm.tokenizer.encode(p)) for p in "ab")


def test_lines_tell_of_tokens(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    params = SamplingParams(max_tokens=100, ignore_eos=True)
    (output,) = llm.generate(LONG.replace("x", "y"), params, use_tqdm=True)  # of which nothing is in the cache
    prompt = len(output.prompt_token_ids)
    shown = capsys.readouterr()
    assert shown.out == ""
    lines = shown.err.splitlines()
    assert lines[0] == f"generating: 0 of 1 done, {prompt} tokens read, 1 written, 0.5 tokens/s"
    assert lines[1].startswith(f"generating: 0 of 1 done, {prompt} tokens read, 11 written, ")
    assert len(lines) == 10


def test_a_terminal_has_one_line(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stderr", terminal)
    llm.generate("a", SamplingParams(max_tokens=5, ignore_eos=True), use_tqdm=True)
    shown = terminal.getvalue()
    assert shown.count("\n") == 1
    assert shown.endswith(" 5 written, 0.8 tokens/s\x1b[K\n")


def test_what_is_over_soon_says_nothing(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress.time, "monotonic", lambda: 1.9)
    llm.chat([{"role": "user", "content": "a"}], SamplingParams(max_tokens=5), use_tqdm=True)
    assert capsys.readouterr() == ("", "")
