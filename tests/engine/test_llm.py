from __future__ import annotations

from pathlib import Path

import pytest
import small_model
from support import need_shared_data

from hasten import LLM, SamplingParams, checkpoint
from hasten.engine import memory
from hasten.engine.request import Sequence as Choice
from hasten.errors import BackendError, CheckpointError, ContextError, InputError, MemoryLimitError

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
DRAWN = SamplingParams(seed=11, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model.write(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="module")
def llm(directory: Path) -> LLM:
    return LLM(directory, context=512, max_batch=4, threads=1)


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> None:
    yield  # type: ignore[misc]
    if "llm" in request.fixturenames:
        engine = request.getfixturevalue("llm").engine
        assert not engine.busy
        assert engine.blocks.free == engine.blocks.count
        assert not engine._streams


@pytest.mark.parametrize("messages", ["hi", 5, ["hi"], [{"content": "hi"}], [[{"role": 3}]], None])
def test_what_is_no_conversation(llm: LLM, messages: object) -> None:
    with pytest.raises(InputError, match="must be a list of messages"):
        llm.chat(messages)  # type: ignore[arg-type]


def test_min_tokens_fit_beside_the_prompt(llm: LLM) -> None:
    room = llm.engine.room
    with pytest.raises(InputError, match=f"min_tokens is {room}, must be {room - 2} or less"):
        llm.generate([[1, 2]], SamplingParams(max_tokens=None, min_tokens=room))


def test_the_known_text_of_stories260k() -> None:
    expected = need_shared_data("models", "stories260K", "expected_greedy_200.txt").read_text()
    stories = LLM(need_shared_data("models", "stories260K-hf"), max_batch=2)
    (found,) = stories.generate([[1]], SamplingParams(temperature=0, max_tokens=200))
    assert found.outputs[0].text.strip() == expected.strip()


@pytest.mark.parametrize("prompt", ["Once", "Once upon", "He said.\n", "a\n\n", "\u00e9", "Lily and\n\u00e9"])
def test_text_goes_on_from_the_prompts(prompt: str) -> None:
    """Prompt and output joined are the text of all tokens: no space is lost, no end of the prompt repeated."""
    stories = LLM(need_shared_data("models", "stories260K-hf"), max_batch=2)
    for seed in range(6):
        params = SamplingParams(seed=seed, max_tokens=12, temperature=1.5, ignore_eos=True)
        (found,) = stories.generate(prompt, params)
        tokens = found.prompt_token_ids + found.outputs[0].token_ids
        assert prompt + found.outputs[0].text == stories.tokenizer.decode(tokens)


def test_outputs_come_in_the_order_of_prompts(llm: LLM) -> None:
    prompts = ["abc", "x", "hello there " * 9, "yz", "q", "last"]
    together = llm.generate(prompts, GREEDY)
    assert [o.prompt for o in together] == prompts
    for output in together:
        (alone,) = llm.generate(output.prompt or "", GREEDY)
        assert alone.outputs[0].token_ids == output.outputs[0].token_ids
        assert len(output.outputs[0].token_ids) == 24
        assert output.outputs[0].finish_reason == "length"
        assert output.outputs[0].text == llm.tokenizer.decode(output.outputs[0].token_ids)


def test_text_and_token_ids_are_the_same_prompt(llm: LLM) -> None:
    ids = llm.tokenizer.encode("some words")
    (by_text,), (by_ids,) = llm.generate("some words", DRAWN), llm.generate([ids], DRAWN)
    assert by_text.outputs == by_ids.outputs
    assert (by_ids.prompt, by_ids.prompt_token_ids) == (None, ids)


def test_prompts_may_be_dicts(llm: LLM) -> None:
    ids = llm.tokenizer.encode("some words")
    expected = llm.generate("some words", DRAWN)[0].outputs
    assert llm.generate({"prompt": "some words"}, DRAWN)[0].outputs == expected
    both = llm.generate([{"prompt_token_ids": ids}, {"prompt": "some words"}], DRAWN)
    assert [o.outputs for o in both] == [expected, expected]
    assert [o.prompt for o in both] == [None, "some words"]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([1, 2, 3], "prompt 0 is 1, must be"),
        ([None], "prompt 0 is None"),
        (5, "prompt 0 is 5"),
        (["fine", {"text": "x"}], "prompt 1 is {'text': 'x'}"),
        ([[1, "a"]], r"prompt 0 is \[1, 'a'\]"),
        ([[True]], r"prompt 0 is \[True\]"),
        ([b"abc"], "prompt 0 is b'abc'"),
    ],
)
def test_what_is_no_prompt_is_named(llm: LLM, prompts: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        llm.generate(prompts)  # type: ignore[arg-type]


def test_outputs_say_what_stopped_them(llm: LLM) -> None:
    free = llm.generate("abc", GREEDY)[0].outputs[0]
    assert free.stop_reason is None
    by_token = llm.generate("abc", SamplingParams(temperature=0, stop_token_ids=[free.token_ids[0]], ignore_eos=True))
    assert (by_token[0].outputs[0].finish_reason, by_token[0].outputs[0].stop_reason) == ("stop", free.token_ids[0])
    by_text = llm.generate("abc", SamplingParams(temperature=0, stop=["\0", free.text[1]], ignore_eos=True))
    assert by_text[0].outputs[0].stop_reason == free.text[1]


def test_each_prompt_may_have_its_own_parameters(llm: LLM) -> None:
    both = llm.generate(["a", "a"], [GREEDY, DRAWN])
    assert both[0].outputs == llm.generate("a", GREEDY)[0].outputs
    assert both[1].outputs == llm.generate("a", DRAWN)[0].outputs
    with pytest.raises(InputError, match="2 sampling parameters for 1 prompts"):
        llm.generate(["a"], [GREEDY, DRAWN])
    assert llm.generate([], GREEDY) == []


def test_choices_differ_and_seeds_repeat(llm: LLM) -> None:
    several = SamplingParams(seed=4, n=3, max_tokens=12, ignore_eos=True)
    (first,), (again,) = llm.generate("abc", several), llm.generate("abc", several)
    assert first.outputs == again.outputs
    assert len({tuple(o.token_ids) for o in first.outputs}) == 3
    assert [o.index for o in first.outputs] == [0, 1, 2]
    unseeded = SamplingParams(max_tokens=12, ignore_eos=True)
    (one,), (two,) = llm.generate("abc", unseeded), llm.generate("abc", unseeded)
    assert one.outputs[0].token_ids != two.outputs[0].token_ids


def test_logprobs(llm: LLM) -> None:
    (greedy,) = llm.generate("abc", SamplingParams(temperature=0, max_tokens=8, logprobs=4, ignore_eos=True))
    (choice,) = greedy.outputs
    assert choice.logprobs is not None
    for token, given in zip(choice.token_ids, choice.logprobs, strict=True):
        values = [v.logprob for v in given.values()]
        assert next(iter(given)) == token
        assert values == sorted(values, reverse=True)
        assert len(given) == 4  # the drawn token is the likeliest
    assert choice.cumulative_logprob == sum(
        g[t].logprob for t, g in zip(choice.token_ids, choice.logprobs, strict=True)
    )
    (drawn,) = llm.generate("abc", SamplingParams(seed=5, max_tokens=8, logprobs=0))
    assert drawn.outputs[0].logprobs is not None
    assert [list(g) for g in drawn.outputs[0].logprobs] == [[t] for t in drawn.outputs[0].token_ids]
    assert llm.generate("abc", DRAWN)[0].outputs[0].logprobs is None


def test_a_stop_text_ends_the_output_and_is_no_part_of_it(llm: LLM) -> None:
    (free,) = llm.generate("abc", GREEDY)
    text = free.outputs[0].text
    stop = next(text[i : i + 2] for i in range(3, len(text) - 1) if text[i : i + 2].isascii())
    (found,) = llm.generate("abc", SamplingParams(temperature=0, max_tokens=24, stop=["never", stop], ignore_eos=True))
    assert found.outputs[0].text == text[: text.index(stop)]
    params = SamplingParams(
        temperature=0, max_tokens=24, stop=["never", stop], ignore_eos=True, include_stop_str_in_output=True
    )
    (kept,) = llm.generate("abc", params)
    assert kept.outputs[0].text == text[: text.index(stop) + len(stop)]
    assert (kept.outputs[0].token_ids, kept.outputs[0].stop_reason) == (found.outputs[0].token_ids, stop)
    assert found.outputs[0].finish_reason == "stop"


def test_stop_tokens_and_min_tokens(llm: LLM) -> None:
    (free,) = llm.generate("abc", DRAWN)
    tokens = free.outputs[0].token_ids
    stop = tokens[3]
    first = tokens.index(stop)
    (found,) = llm.generate("abc", SamplingParams(seed=11, max_tokens=24, stop_token_ids=[stop], ignore_eos=True))
    assert found.outputs[0].token_ids == tokens[: first + 1]
    assert found.outputs[0].finish_reason == "stop"
    late = SamplingParams(seed=11, max_tokens=24, stop_token_ids=[stop], min_tokens=24, ignore_eos=True)
    written = llm.generate("abc", late)[0].outputs[0].token_ids
    assert written[:first] == tokens[:first]  # the keys of the draws are the same
    assert stop not in written
    assert len(written) == 24


def test_the_end_of_sequence_token(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    (free,) = llm.generate("abc", DRAWN)
    tokens = free.outputs[0].token_ids
    monkeypatch.setattr(llm.engine, "eos_token_ids", frozenset([tokens[2]]))
    at = tokens.index(tokens[2])
    (found,) = llm.generate("abc", SamplingParams(seed=11, max_tokens=24))
    assert found.outputs[0].token_ids == tokens[: at + 1]
    assert found.outputs[0].text == llm.tokenizer.decode(tokens[:at])
    assert found.outputs[0].finish_reason == "stop"
    assert llm.generate("abc", DRAWN)[0].outputs[0].token_ids == tokens  # ignore_eos
    late = SamplingParams(seed=11, max_tokens=24, min_tokens=at + 3)
    written = llm.generate("abc", late)[0].outputs[0].token_ids
    assert written[:at] == tokens[:at]
    assert tokens[2] not in written[: at + 3]


def test_the_context_ends_the_output(llm: LLM) -> None:
    (found,) = llm.generate("a" * 500, SamplingParams(temperature=0, max_tokens=None, ignore_eos=True))
    assert len(found.outputs[0].token_ids) == 12
    assert found.outputs[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ("", InputError, "the prompt is empty"),
        ([[]], InputError, "the prompt is empty"),
        ([[1, 258]], InputError, "token id 258 is not in the vocabulary of 258 tokens"),
        ([[-1]], InputError, "token id -1"),
        (["fine", "a" * 512], ContextError, "the prompt has 512 tokens; the context holds 512"),
    ],
)
def test_prompts_that_cannot_be_run(llm: LLM, prompt: list[str], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        llm.generate(prompt, GREEDY)


def test_interrupting_leaves_the_engine_ready(llm: LLM) -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llm.generate(["abc", "def"], GREEDY, progress=interrupt)


def test_streams(llm: LLM) -> None:
    stream = llm.stream("abc", DRAWN)
    assert "".join(stream) == stream.output.outputs[0].text == llm.generate("abc", DRAWN)[0].outputs[0].text
    left = llm.stream("abc", DRAWN)
    next(left)
    left.close()
    assert left.output.outputs[0].finish_reason == "abort"
    with pytest.raises(InputError, match="n is 2"):
        llm.stream("abc", SamplingParams(n=2))


def test_chat_is_the_template_without_more_special_tokens(llm: LLM) -> None:
    said = [{"role": "user", "content": "hi"}]
    (found,) = llm.chat(said, DRAWN)
    assert found.prompt_token_ids == llm.tokenizer.encode("user: hi\nassistant: ", special=False)
    several = llm.chat([said, [*said, *said]], DRAWN)
    assert several[0].outputs == found.outputs
    assert len(several) == 2


def test_chat_without_a_template(tmp_path: Path) -> None:
    plain = LLM(small_model.write(tmp_path / "plain", chat=False), context=64)
    with pytest.raises(CheckpointError, match="chat template"):
        plain.chat([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"context": 2049}, ContextError, "a context of 2049 tokens is more than the model's 2048"),
        ({"context": 1}, InputError, "context is 1"),
        ({"max_batch": 0}, InputError, "max_batch is 0"),
        ({"threads": -1}, InputError, "threads is -1"),
        ({"kv_format": "int3"}, InputError, "kv_format is 'int3', must be auto, bf16, int8, int4 or f32"),
        ({"kv_format": "int8,int3"}, InputError, "kv_format is 'int3'"),
        ({"kv_format": ("int8",) * 5}, BackendError, "a cache format is given for 5 layers, the model has 2"),
        ({"kv_format": ""}, InputError, "kv_format is ''"),
        ({"memory": 100_000}, MemoryLimitError, "97.7 KiB are available"),
        ({"contxt": 5}, TypeError, "contxt"),
    ],
)
def test_settings_that_make_no_sense(
    directory: Path, given: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        LLM(directory, **given)  # type: ignore[arg-type]


def test_an_artifacts_own_cache_is_what_auto_means(directory: Path, tmp_path: Path) -> None:
    model = checkpoint.open(str(directory))
    path = checkpoint.write_artifact(tmp_path / "own", model, model.weights(), {}, {}, ["int8", "int4"])

    def cache(source: Path, kv_format: str = "auto") -> object:
        return LLM(source, context=64, kv_format=kv_format).program.limits.kv_format

    assert cache(path) == ("int8", "int4")
    assert cache(path, "bf16") == "bf16"
    assert cache(path, "int4, f32") == ("int4", "f32")
    assert cache(directory) == "f32"
    alike = checkpoint.write_artifact(tmp_path / "alike", model, model.weights(), {}, {}, ["int4", "int4"])
    assert cache(alike) == "int4"


def test_memory_is_what_was_predicted(llm: LLM) -> None:
    model, taken = llm.model, llm.program.memory()
    predicted = memory.predict(
        model.graph, memory.weight_bytes(model.graph, model.formats), llm.program.limits, model.formats
    )
    assert predicted.weights == taken["weights"]
    assert predicted.kv_cache == taken["kv_cache"]
    assert predicted.buffers == pytest.approx(taken["buffers"], rel=0.15)


def test_a_small_budget_makes_a_small_cache(directory: Path) -> None:
    def cache(budget: int | None) -> int:
        found = LLM(directory, context=512, max_batch=8, memory=budget)
        assert budget is None or sum(found.program.memory().values()) <= budget
        return found.program.limits.kv_blocks

    assert cache(None) == 8 * 16
    assert 16 <= cache(3_000_000) < 8 * 16


@pytest.mark.parametrize(
    ("count", "text"), [(5, "5 B"), (1536, "1.5 KiB"), (3 << 20, "3.0 MiB"), (5 << 40, "5120.0 GiB")]
)
def test_sizes_for_people(count: int, text: str) -> None:
    assert memory.size(count) == text


def test_a_full_container_refuses_and_an_unknown_one_does_not(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "memory", lambda: (1 << 30, 0))
    with pytest.raises(MemoryLimitError, match="0 B are available"):
        LLM(directory, context=64, max_batch=2)
    monkeypatch.setattr(memory, "memory", lambda: (None, None))
    assert LLM(directory, context=64, max_batch=2, threads=1).program.limits.kv_blocks == 2 * -(-64 // 32)


def faulty(llm: LLM, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """What appends the token that makes a sequence `at` long fails, before the token is taken."""
    append = llm.engine._append

    def failing(sequence: Choice, token: int) -> None:
        if len(sequence.tokens) + 1 == at:
            raise ValueError("boom")
        append(sequence, token)

    monkeypatch.setattr(llm.engine, "_append", failing)


def test_a_fault_of_one_request_is_raised(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    faulty(llm, monkeypatch, 8)
    with pytest.raises(BackendError, match="ValueError: boom") as caught:
        llm.generate(["a much longer prompt", "abc", "another longer one"], DRAWN)
    assert isinstance(caught.value.__cause__, ValueError)
    stream = llm.stream("abc", DRAWN)
    with pytest.raises(BackendError, match="boom"):
        list(stream)
    (output,) = stream.output.outputs
    assert len(output.token_ids) == 7 - len(stream.output.prompt_token_ids)


def test_no_log_probability_without_its_token(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    faulty(llm, monkeypatch, 8)
    (choice,) = llm.engine.add(llm.tokenizer.encode("abc"), SamplingParams(seed=1, max_tokens=9, logprobs=2))
    while llm.engine.busy:
        llm.engine.step()
    assert len(choice.logprobs) == len(choice.top) == len(choice.output) > 0
    assert isinstance(choice.error, ValueError)
