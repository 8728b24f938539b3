"""The loop: plan, run, sample, finish."""

from __future__ import annotations

import secrets
from array import array
from collections.abc import Collection
from typing import Protocol

from hasten.backends.batch import Program
from hasten.engine.batches import Batches
from hasten.engine.blocks import Blocks, salted
from hasten.engine.constraints import Constraints, constraints_for
from hasten.engine.guidance import Grammar, Guidance
from hasten.engine.request import PromptScores, SamplingParams, Sequence, choice_seed
from hasten.engine.sampler import Sampler
from hasten.engine.scheduler import Scheduler
from hasten.engine.scoring import draw
from hasten.engine.text import TextStream, TokenStream
from hasten.errors import ContextError, InputError

PROMPT_TAIL = 16
"""Tokens of the prompt that the first token's text may depend on."""
MAX_PRIORITY = 100
"""Priorities lie between its negative and it."""


class Tokenizer(Protocol):
    """What the engine needs of one: text as tokens come, the tokens of bad words, and all that llguidance reads."""

    def stream(self, skip_special: bool = True) -> TokenStream: ...
    def encode(self, text: str, special: bool = True) -> list[int]: ...
    def definition(self) -> str: ...


class Engine:
    """Serves many requests with one program. Not for several threads at once.

    `vocabulary` bounds prompts' token ids; `eos_token_ids` end an output; without a tokenizer outputs have no text.
    """

    def __init__(
        self, program: Program, vocabulary: int, tokenizer: Tokenizer | None = None, eos_token_ids: Collection[int] = ()
    ) -> None:
        limits = program.limits
        self.program = program
        self.vocabulary = vocabulary
        self.tokenizer = tokenizer
        self.eos_token_ids = frozenset(eos_token_ids)
        self.blocks = Blocks(limits.kv_blocks, limits.block_size)
        sequences = min(limits.max_sequences, limits.max_rows)
        self.scheduler = Scheduler(self.blocks, limits.max_tokens, sequences, limits.max_rows)
        self.sampler = Sampler()
        self.guidance = Guidance(tokenizer, vocabulary, self.eos_token_ids)
        self._batches = Batches(self.blocks)
        self._streams: dict[Sequence, TextStream] = {}
        self.steps = 0
        """Steps that have computed something."""

    @property
    def busy(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting)

    def add(
        self,
        prompt: list[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str = "",
        skip_special_tokens: bool = True,
        prompt_logprobs: int | None = None,
        draws: bool = True,
        grammar: Grammar | None = None,
        constraints: Constraints | None = None,
    ) -> list[Sequence]:
        """Queue a request; one sequence a choice. Raises InputError or ContextError where the prompt cannot be run.

        Lower `priority` runs first. Blocks of the cache are shared only with requests of the same `cache_salt`.
        `prompt_logprobs`: note those of the prompt's tokens, and of so many of the likeliest. Without `draws` the
        prompt is only scored, and nothing is written. `grammar`: what guidance made of params.structured_outputs, and
        `constraints` what `self.constraints` made of params, on another thread; None: they are made here.
        """
        if params.structured_outputs and not grammar:
            grammar = self.guidance.compile(params.structured_outputs, choices=params.n)
        constraints = self.check(
            prompt,
            params,
            priority=priority,
            prompt_logprobs=prompt_logprobs,
            draws=draws,
            grammar=grammar,
            constraints=constraints,
        )
        seed = secrets.randbits(64) if params.seed is None else params.seed
        room = self.room if params.max_tokens is None else min(self.room, len(prompt) + params.max_tokens)
        salt = salted(cache_salt)
        choices = [
            Sequence(
                array("i", prompt),
                len(prompt),
                params,
                choice_seed(seed, i),
                room if draws else len(prompt),
                constraints=constraints,
                guide=grammar.start() if grammar else None,
                priority=priority,
                salt=salt,
                scores=None if prompt_logprobs is None else PromptScores(prompt_logprobs),
            )
            for i in range(params.n)
        ]
        if self.tokenizer:  # what may fail goes first: all of the choices are queued, or none
            texts = [_continue_text(self.tokenizer, prompt, params, skip_special_tokens) for _ in choices]
            self._streams.update(zip(choices, texts, strict=True))
        for sequence in choices:
            self.scheduler.add(sequence)
        return choices

    def step(self) -> list[Sequence]:
        """Run one step. Returns the sequences that gained a token; those with a finish_reason are done."""
        spans = self.scheduler.plan()
        if not spans:
            return []
        outputs = self.program.step(self._batches.batch(spans, self.scheduler.moves))
        self.scheduler.commit(spans)
        self.steps += 1
        drawing = [span.sequence for span in spans if span.draws]
        for sequence, token in zip(drawing, draw(spans, outputs, self.sampler), strict=True):
            try:
                self._append(sequence, token)
            except Exception as error:  # what befalls one is not the others' trouble
                sequence.error = error
                _forget_draw(sequence)
                self._drop(sequence)
        return drawing

    def abort(self, sequence: Sequence) -> None:
        """Drop a sequence that nobody waits for any more."""
        if sequence.finish_reason is None:
            self._drop(sequence)

    def _drop(self, sequence: Sequence) -> None:
        """Without the end of its text, which may be what failed."""
        self._streams.pop(sequence, None)
        self.scheduler.finish(sequence)
        sequence.finish_reason = "abort"

    def _append(self, sequence: Sequence, token: int) -> None:
        if len(sequence.tokens) >= sequence.limit:  # nothing was to be drawn
            sequence.finish_reason = "length"
            _forget_draw(sequence)
            self._finish(sequence)
            return
        sequence.tokens.append(token)
        params, stream = sequence.params, self._streams.get(sequence)
        length = len(sequence.tokens)
        stoppable = length - sequence.prompt_length >= params.min_tokens
        ends = token in self.eos_token_ids and not params.ignore_eos
        stop: int | str | None = None
        if stream and not ends:
            sequence.text += stream.push(token, stoppable=stoppable)
            stop = stream.stopped
        if params.stop_token_ids and not ends and token in params.stop_token_ids:
            stop = token
        if stoppable and (ends or stop is not None):
            sequence.finish_reason, sequence.stop_reason = "stop", stop
        elif length >= sequence.limit:
            sequence.finish_reason = "length"
        if sequence.guide and sequence.guide.error:
            sequence.finish_reason, sequence.stop_reason = "abort", sequence.guide.error
        if sequence.finish_reason:
            self._finish(sequence)

    def _finish(self, sequence: Sequence) -> None:
        self.scheduler.finish(sequence)
        stream = self._streams.pop(sequence, None)
        if stream:
            sequence.text += stream.finish()

    @property
    def room(self) -> int:
        """Tokens that one sequence may have: the context, and what the cache holds of it."""
        return min(self.program.limits.context, self.blocks.count * self.blocks.size)

    def check(
        self,
        prompt: list[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        prompt_logprobs: int | None = None,
        draws: bool = True,
        grammar: Grammar | None = None,
        constraints: Constraints | None = None,
    ) -> Constraints | None:
        """Raise as `add` does, without queueing anything; any thread may ask. Returns what the request is bound by."""
        if not prompt:
            raise InputError("the prompt is empty", "give at least one token")
        if len(prompt) + draws > self.room:
            needs = ", and needs one to answer" if draws else ""
            raise ContextError(
                f"the prompt has {len(prompt)} tokens; the context holds {self.room}{needs}",
                "shorten the prompt, or raise the context if the model's is longer",
            )
        wrong = _outside(prompt, self.vocabulary)
        if wrong is not None:
            raise InputError(f"token id {wrong} is not in the vocabulary of {self.vocabulary} tokens")
        for name, value in (("logprobs", params.logprobs), ("prompt_logprobs", prompt_logprobs)):
            if value is not None and not 0 <= value <= self.vocabulary:
                raise InputError(f"{name} is {value}, must be {self.vocabulary} (the vocabulary) or less")
        if not -MAX_PRIORITY <= priority <= MAX_PRIORITY:
            raise InputError(f"priority is {priority}, must be between -{MAX_PRIORITY} and {MAX_PRIORITY}")
        return constraints or self.constraints(params, grammar)

    def constraints(self, params: SamplingParams, grammar: Grammar | None = None) -> Constraints | None:
        """What binds the output besides numbers; None: nothing does. Any thread may ask.

        Raises InputError where that contradicts itself or the vocabulary.
        """
        found = constraints_for(params, self.vocabulary, self.eos_token_ids, self.tokenizer)
        if found and grammar:
            found.check_beginning(grammar.beginning)
        return found


def _forget_draw(sequence: Sequence) -> None:
    """Log-probabilities of a token that was drawn and not taken."""
    taken = len(sequence.tokens) - sequence.prompt_length
    del sequence.logprobs[taken:], sequence.top[taken:]


def _outside(prompt: list[int], vocabulary: int) -> object:
    """The first element that is no token id; None where all are."""
    try:
        tokens = array("i", prompt)
        if min(tokens) >= 0 and max(tokens) < vocabulary:
            return None
    except (TypeError, OverflowError):
        pass
    return next((t for t in prompt if not (isinstance(t, int) and 0 <= t < vocabulary)), None)


def _continue_text(tokenizer: Tokenizer, prompt: list[int], params: SamplingParams, skip_special: bool) -> TextStream:
    """Text that goes on from the prompt's: a first token decoded alone would lose its leading space."""
    stream, shadow = tokenizer.stream(skip_special), tokenizer.stream(skip_special)
    for token in prompt[-PROMPT_TAIL:]:
        stream.push(token)
        shadow.push(token)
    return TextStream(stream, params.stops, shadow.finish(), kept=params.include_stop_str_in_output)
