"""The offline API: a model, and texts that it writes. Its shape is the one that vLLM's users know.

What differs from vLLM: `progress` is a callback, and `use_tqdm=True` shows hasten's own lines on stderr; `logprobs`
may be as many as the vocabulary, and are of the model's own distribution; `rank` is None for a drawn token that is not
among the likeliest asked for; `typical_p` is there; a `logit_bias` outside -100 to 100 is an error, not cut; there are
no beams, logits processors, adapters or images.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hasten.backends.batch import Limits
from hasten.backends.cache import KvFormat
from hasten.engine import memory
from hasten.engine.engine import Engine
from hasten.engine.progress import Progress, Report
from hasten.engine.request import CompletionOutput, Logprob, RequestOutput, SamplingParams
from hasten.engine.request import Sequence as Choice
from hasten.errors import BackendError, ContextError, InputError

if TYPE_CHECKING:
    from hasten.checkpoint import Model

Prompt = str | Sequence[int] | Mapping[str, Any]
"""A text, its token ids, or one of them as {"prompt": ...} or {"prompt_token_ids": ...}."""
Messages = Sequence[Mapping[str, Any]]

DEFAULT_CONTEXT = 4096
"""Tokens a sequence may have where the user names no number, or the model's context where that is less."""
STEP_TOKENS = 512
MAX_THREADS = 1024
KV_SHARE = 0.8
"""Of the memory left beside weights and buffers, what the cache may take unless it must take more for one context."""


class LLM:
    """A model, ready to write.

    `model`: a Hugging Face directory, a hub id, an artifact, or "demo"; or one of them opened. `context`: tokens a
    sequence may have, its prompt included. `max_batch`: sequences computed together; more wait. `threads`: 0 for one a
    core. `kv_format` of the cache: "auto", "bf16", "int8" (half of bf16's bytes), "int4" (a
    quarter and a little) or "f32", or one of them for each layer, between commas. `memory`: bytes that all of
    it may take, None for what is available. `score_rows`: rows of prompts that one step can score, where that is more
    than `max_batch`. Raises ContextError, InputError, MemoryLimitError (before anything is
    loaded), and what opening a model raises.
    """

    def __init__(
        self,
        model: str | Path | Model,
        *,
        context: int | None = None,
        max_batch: int = 16,
        threads: int = 0,
        kv_format: KvFormat = "auto",
        memory: int | None = None,
        score_rows: int = 0,
        report: Report | None = None,
    ) -> None:
        from hasten import checkpoint
        from hasten.backends import native

        self.model = model if isinstance(model, checkpoint.Model) else checkpoint.open(str(model))
        limits = limits_for(
            self.model,
            context=context,
            max_batch=max_batch,
            threads=threads,
            kv_format=kv_format,
            budget=memory,
            score_rows=score_rows,
        )
        self.model = self.model.at_context(limits.context)  # rope may depend on it
        self.tokenizer = self.model.tokenizer
        self.program = native.compile(self.model.graph, self.model.weights(report), limits, tune=True)
        self.engine = self.make_engine()
        self._ids = itertools.count()

    def make_engine(self) -> Engine:
        """An engine that knows of no request and finds nothing in the cache; the one before must not be used again."""
        return Engine(self.program, self.model.graph.vocabulary, self.tokenizer, self.model.eos_token_ids)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        progress: Report | None = None,
        *,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """An output for each prompt, a text or its token ids, in their order. Raises InputError or ContextError, and
        BackendError where the engine fails over one of them.

        `progress` is told of tokens done and how many there may be; `use_tqdm` shows lines on stderr after 2 seconds.
        """
        given = [plain_prompt(prompt, i) for i, prompt in enumerate(_several(prompts))]
        params = _for_each(sampling_params, len(given))
        started: list[tuple[str | list[int], list[Choice]]] = []
        try:
            for prompt, how in zip(given, params, strict=True):
                started.append((prompt, self.engine.add(self._encode(prompt), how)))
            self._run([choice for _, choices in started for choice in choices], progress, use_tqdm)
        finally:  # an error, or Ctrl-C: nothing keeps running
            self._abort(choice for _, choices in started for choice in choices)
        return [self._output(prompt, choices) for prompt, choices in started]

    def _run(self, choices: list[Choice], report: Report | None, shown: bool) -> None:
        progress = Progress(choices, report, shown)
        whole = False
        try:
            while self.engine.busy:
                self.engine.step()
                _raise_faults(choices)
                progress.step()
            whole = True
        finally:
            progress.close(whole)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        progress: Report | None = None,
        *,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """As generate, from conversations of {"role": ..., "content": ...} through the model's chat template."""
        listed = isinstance(messages, Sequence) and not isinstance(messages, str)
        several: Any = messages if listed and not any(isinstance(m, Mapping) for m in messages[:1]) else [messages]
        return self.generate([self.chat_prompt(m) for m in several], sampling_params, progress, use_tqdm=use_tqdm)

    def chat_prompt(self, messages: Messages) -> list[int]:
        """The token ids of a conversation, up to where the answer begins. Raises InputError where it is none."""
        if not _is_conversation(messages):
            shown = repr(messages)
            raise InputError(
                f"messages is {shown if len(shown) <= 60 else shown[:57] + '...'}, must be a list of messages",
                'for example [{"role": "user", "content": "Hello"}]; several conversations stand in a list',
            )
        text = self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True)
        return list(self.tokenizer.encode(text, special=False))

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Stream:
        """One output, text by text as it comes."""
        params = sampling_params or SamplingParams()
        if params.n != 1:
            raise InputError(f"n is {params.n}; a stream has one choice", "use generate for several")
        plain = plain_prompt(prompt)
        (choice,) = self.engine.add(self._encode(plain), params)
        return Stream(self, plain, choice)

    def _encode(self, prompt: str | list[int]) -> list[int]:
        return list(self.tokenizer.encode(prompt)) if isinstance(prompt, str) else prompt

    def _abort(self, choices: Iterator[Choice]) -> None:
        for choice in choices:
            self.engine.abort(choice)

    def _output(self, prompt: str | list[int], choices: list[Choice]) -> RequestOutput:
        first = choices[0]
        return RequestOutput(
            request_id=str(next(self._ids)),
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=first.tokens[: first.prompt_length].tolist(),
            outputs=[self._completion(i, choice) for i, choice in enumerate(choices)],
        )

    def _completion(self, index: int, choice: Choice) -> CompletionOutput:
        tokens = choice.output.tolist()
        wants = choice.params.logprobs is not None
        return CompletionOutput(
            index=index,
            text=choice.text,
            token_ids=tokens,
            cumulative_logprob=sum(choice.logprobs),
            logprobs=[self._logprobs(choice, i, token) for i, token in enumerate(tokens)] if wants else None,
            finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason,
        )

    def _logprobs(self, choice: Choice, position: int, token: int) -> dict[int, Logprob]:
        likeliest = choice.top[position] if choice.params.logprobs else []
        values = {token: choice.logprobs[position], **dict(likeliest)}
        ranks = {t: rank for rank, (t, _) in enumerate(likeliest, 1)}
        before = choice.tokens[choice.prompt_length + position - 1]
        return {t: Logprob(value, self._text_after(before, t), ranks.get(t)) for t, value in values.items()}

    def _text_after(self, before: int, token: int) -> str:
        """A token's text where it follows another: alone it would lose its leading space."""
        alone = self.tokenizer.decode([before], skip_special=False)
        return self.tokenizer.decode([before, token], skip_special=False)[len(alone) :]


def plain_prompt(prompt: object, number: int = 0) -> str | list[int]:
    """A prompt as its text or its token ids. Raises InputError naming prompt `number` where it is neither."""
    given = prompt
    if isinstance(prompt, Mapping):
        given = prompt.get("prompt_token_ids", prompt.get("prompt"))
    if isinstance(given, str):
        return given
    if isinstance(given, Sequence | np.ndarray) and not isinstance(given, bytes | bytearray):
        tokens = given.tolist() if isinstance(given, np.ndarray) else list(given)
        if isinstance(tokens, list) and all(isinstance(t, int) and not isinstance(t, bool) for t in tokens):
            return tokens
    shown = repr(prompt)
    raise InputError(
        f"prompt {number} is {shown if len(shown) <= 60 else shown[:57] + '...'}, must be a text or its token ids",
        'give a text, a list of token ids, {"prompt": text} or {"prompt_token_ids": ids}; several stand in a list',
    )


def _is_conversation(messages: object) -> bool:
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        return False
    return all(isinstance(m, Mapping) and isinstance(m.get("role"), str) for m in messages)


def _several(prompts: object) -> list[object]:
    """One prompt or several, as a list."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    try:
        return list(prompts)  # type: ignore[call-overload, no-any-return]
    except TypeError:
        return [prompts]


def _raise_faults(choices: Sequence[Choice]) -> None:
    """Raise BackendError where the engine dropped one of them for a fault of its own."""
    for choice in choices:
        if choice.error is not None:
            reason = f"{type(choice.error).__name__}: {choice.error}"
            raise BackendError(f"the engine failed over a request: {reason}") from choice.error


class Stream:
    """Iterate for pieces of text; `output` is what there is so far. Closing it early drops the request."""

    def __init__(self, llm: LLM, prompt: str | list[int], choice: Choice) -> None:
        self._llm, self._prompt, self._choice, self._shown = llm, prompt, choice, 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        while self._shown == len(self._choice.text):
            _raise_faults([self._choice])
            if self._choice.finish_reason is not None:
                raise StopIteration
            self._llm.engine.step()
        piece = self._choice.text[self._shown :]
        self._shown = len(self._choice.text)
        return piece

    def close(self) -> None:
        self._llm.engine.abort(self._choice)

    @property
    def output(self) -> RequestOutput:
        return self._llm._output(self._prompt, [self._choice])


def limits_for(
    model: Model,
    *,
    context: int | None = None,
    max_batch: int = 16,
    threads: int = 0,
    kv_format: KvFormat = "auto",
    budget: int | None = None,
    score_rows: int = 0,
) -> Limits:
    """Limits to serve a model by: as large a cache as `max_batch` full contexts need and memory allows.

    Raises ContextError for a context longer than the model's, InputError for numbers that make no sense,
    MemoryLimitError where not even one full context fits beside the weights.
    """
    longest = model.graph.context
    if context is not None and context > longest:
        raise ContextError(
            f"a context of {context} tokens is more than the model's {longest}", f"use {longest} or less"
        )
    wanted = context if context is not None else min(longest, DEFAULT_CONTEXT)
    for name, value, least in (("context", wanted, 2), ("max_batch", max_batch, 1), ("threads", threads, 0)):
        if value < least:
            raise InputError(f"{name} is {value}, must be {least} or more")
    if threads > MAX_THREADS:
        raise InputError(f"threads is {threads}, must be {MAX_THREADS} or less")
    limits = Limits(
        context=wanted,
        max_tokens=max(STEP_TOKENS, max_batch),
        max_sequences=max_batch,
        max_rows=max(max_batch, min(score_rows, STEP_TOKENS)),
        kv_format=memory.kv_format(model.formats.values(), kv_format, model.kv_formats),
        threads=threads,
    )
    return _with_cache(model, limits, memory.memory()[1] if budget is None else budget)


def _with_cache(model: Model, limits: Limits, available: int | None) -> Limits:
    one = -(-limits.context // limits.block_size)
    least = replace(limits, kv_blocks=one)
    needed = memory.predict(model.graph, memory.weight_bytes(model.graph, model.formats), least, model.formats)
    memory.require(needed, available)
    if available is None:
        return replace(limits, kv_blocks=one * limits.max_sequences)
    left = KV_SHARE * (available - needed.weights - needed.buffers)
    fit = int(left // max(needed.kv_cache / one, 1))
    return replace(limits, kv_blocks=min(one * limits.max_sequences, max(one, fit)))


def _for_each(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise InputError(f"{len(params)} sampling parameters for {count} prompts", "give one, or one for each prompt")
    return list(params)
