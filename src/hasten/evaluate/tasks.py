"""Accuracy on a file of questions: the right one among choices, or an answer word for word.

A line is a JSON object. `{"question" or "prompt", "choices": [...], "answer": index or letter}` is answered by the
choice whose tokens, after the question, have the highest log-probability for each byte of their text (`acc_norm` of
EleutherAI's lm-evaluation-harness). `{"question" or "prompt", "answer": text}` is answered by what the model writes
greedily: its first line must be the answer; where the answer ends in `#### X`, as in GSM8K, the last number must be X.
A "question" is shown as `Question: ...` and `Answer:` on a line of its own, a "prompt" as it stands.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hasten.backends.batch import Batch, Float32, Int32, Limits
from hasten.backends.cache import KvFormat
from hasten.engine import memory
from hasten.errors import InputError
from hasten.formats import Weight
from hasten.graph.graph import Graph

Weights = Mapping[str, Weight | Float32]
Report = Callable[[str, int, int], None]
KEYS = ("question", "prompt", "choices", "answer", "max_tokens")
HINT = 'a line is {"question": TEXT, "choices": [TEXT, ...], "answer": 0} or {"prompt": TEXT, "answer": TEXT}'
LINE_BYTES = 1 << 20
MOST_ITEMS = 100_000
MOST_CHOICES = 64
WRITTEN_LONG = 256
"""Tokens for an answer that is reasoned out before it is given (`#### X`)."""
STEP_TOKENS = 512
LOGITS_AT_ONCE = 2**24
BLOCK = 32
AT_ONCE = 8
"""Answers written together."""
_MARK = re.compile(r"####\s*(.+?)\s*$", re.DOTALL)
_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")


class Tokenizer(Protocol):
    def encode(self, text: str, special: bool = True) -> list[int]: ...


@dataclass(frozen=True)
class Item:
    """A line of the file. `choices` is empty where the answer is to be written."""

    line: int
    prompt: str
    choices: tuple[str, ...]
    answer: int | str
    """The right choice's index, or the text."""
    max_tokens: int | None = None


@dataclass(frozen=True)
class Question:
    """An item in tokens: the prompt's, and of each choice those that follow it."""

    item: Item
    prompt: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]
    new: int
    """Tokens to write at most; 0 where there are choices."""


@dataclass(frozen=True)
class Task:
    """Questions for one tokenizer, with what is needed to ask them."""

    path: Path
    questions: tuple[Question, ...]
    tokenizer: Any
    eos: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.questions)

    def part(self, start: int, stop: int) -> Task:
        return replace(self, questions=self.questions[start:stop])

    def digest(self) -> str:
        facts = [[q.prompt, q.choices, q.item.answer, q.new] for q in self.questions]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]

    def longest(self) -> int:
        return max(len(q.prompt) + max([len(c) for c in q.choices], default=q.new) for q in self.questions)

    def chance(self) -> float:
        """The accuracy of guessing."""
        return float(np.mean([1 / len(q.choices) if q.choices else 0.0 for q in self.questions]))

    def right(
        self,
        graph: Graph,
        weights: Weights,
        threads: int = 0,
        report: Report | None = None,
        kv_format: KvFormat = "auto",
    ) -> npt.NDArray[Any]:
        """Whether each question is answered right: bool [questions]. Output that is no number is wrong."""
        right = np.zeros(len(self.questions), bool)
        scored = [i for i, q in enumerate(self.questions) if q.choices]
        written = [i for i, q in enumerate(self.questions) if not q.choices]
        stored = memory.kv_format((w.format.name for w in weights.values() if isinstance(w, Weight)), kv_format)
        if scored:
            right[scored] = _choose(graph, weights, [self.questions[i] for i in scored], stored, threads, report)
        if written:
            right[written] = _write(graph, weights, self, [self.questions[i] for i in written], stored, threads, report)
        return right


def load(path: Path, tokenizer: Any, eos: Sequence[int], context: int, seed: int = 0) -> Task:
    """The file's questions, in a drawn order. Raises InputError naming the line where one is wrong or too long."""
    questions = [_question(path, item, tokenizer, context) for item in read(path)]
    order = np.random.default_rng(seed).permutation(len(questions))
    return Task(path, tuple(questions[i] for i in order), tokenizer, tuple(eos))


def read(path: Path) -> list[Item]:
    """Raises InputError that names the line and what is wrong with it."""
    try:
        with path.open("rb") as file:
            items = [_item(line, f"{path}, line {number}", number) for number, line in _lines(path, file)]
    except OSError as error:
        raise InputError(f"cannot read the task {path}: {error.strerror}", HINT) from None
    if not items:
        raise InputError(f"the task {path} is empty: it has no question", HINT)
    return items


def _lines(path: Path, file: Any) -> Iterator[tuple[int, bytes]]:
    number = kept = 0
    while line := file.readline(LINE_BYTES + 1):
        number += 1
        if len(line) > LINE_BYTES:
            raise InputError(f"{path}, line {number}: longer than {LINE_BYTES} bytes", HINT)
        if line.strip():
            kept += 1
            if kept > MOST_ITEMS:
                raise InputError(f"the task {path} has more than {MOST_ITEMS} questions", "give a part of it")
            yield number, line


def _item(line: bytes, where: str, number: int) -> Item:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise InputError(f"{where}: not UTF-8 text", HINT) from None
    except (ValueError, RecursionError):
        raise InputError(f"{where}: not valid JSON", HINT) from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: must be a JSON object", HINT)
    both = [key for key in ("question", "prompt") if key in row]
    if len(both) != 1:
        raise InputError(f"{where}: needs one of question and prompt, has {'both' if both else 'none'}", HINT)
    text = row[both[0]]
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{where}: {both[0]} must be text, not {_shown(text)}", HINT)
    prompt = f"Question: {text.strip()}\nAnswer:" if both[0] == "question" else text
    if "answer" not in row:
        raise InputError(f"{where}: answer is missing", HINT)
    tokens = row.get("max_tokens")
    if tokens is not None and (type(tokens) is not int or not 1 <= tokens <= 4096):
        raise InputError(f"{where}: max_tokens is {_shown(tokens)}, must be a whole number from 1 to 4096", HINT)
    choices = row.get("choices")
    if choices is None:
        answer = row["answer"]
        if isinstance(answer, int | float) and not isinstance(answer, bool):
            answer = str(answer)
        if not isinstance(answer, str) or not answer.strip():
            raise InputError(f"{where}: answer is {_shown(answer)}, must be text where there are no choices", HINT)
        return Item(number, prompt, (), answer.strip(), tokens)
    if isinstance(choices, dict) and isinstance(choices.get("text"), list):  # as ARC's files have them
        labels, choices = choices.get("label"), choices["text"]
        if isinstance(labels, list) and len(labels) == len(choices) and row["answer"] in labels:
            row["answer"] = labels.index(row["answer"])
    if not isinstance(choices, list) or not 2 <= len(choices) <= MOST_CHOICES:
        raise InputError(f"{where}: choices must be a list of 2 to {MOST_CHOICES} texts", HINT)
    if not all(isinstance(c, str) and c.strip() for c in choices):
        raise InputError(f"{where}: every choice must be text", HINT)
    if len({c.strip() for c in choices}) < len(choices):
        raise InputError(f"{where}: two choices are the same", HINT)
    return Item(number, prompt, tuple(c.strip() for c in choices), _index(row["answer"], len(choices), where))


def _index(answer: Any, count: int, where: str) -> int:
    index = answer
    if isinstance(answer, str) and len(answer.strip()) == 1:
        letter = answer.strip().upper()
        index = ord(letter) - ord("A") if letter.isalpha() else int(letter) if letter.isdecimal() else None
    if type(index) is not int or not 0 <= index < count:
        last = chr(ord("A") + min(count, 26) - 1)
        limit = f"must be from 0 to {count - 1}, or a letter from A to {last}"
        raise InputError(f"{where}: answer is {_shown(answer)}, {limit}", HINT)
    return index


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _question(path: Path, item: Item, tokenizer: Tokenizer, context: int) -> Question:
    where = f"{path}, line {item.line}"
    prompt = tokenizer.encode(item.prompt)
    if not prompt:
        raise InputError(f"{where}: the prompt has no tokens", HINT)
    following = []
    for choice in item.choices:
        whole = tokenizer.encode(item.prompt + ("" if item.prompt[-1].isspace() else " ") + choice)
        # As lm-evaluation-harness does: what the choice adds is what follows as many tokens as the prompt has alone.
        following.append(tuple(whole[len(prompt) :]) or tuple(whole[-1:]))
    new = 0 if item.choices else item.max_tokens or _length(str(item.answer), tokenizer)
    longest = len(prompt) + max([len(c) for c in following], default=new)
    if longest > context:
        raise InputError(f"{where}: {longest} tokens, the model's context is {context}", "leave the question out")
    return Question(item, tuple(prompt), tuple(following), new)


def _length(answer: str, tokenizer: Tokenizer) -> int:
    return WRITTEN_LONG if _MARK.search(answer) else 8 + 2 * len(tokenizer.encode(answer, special=False))


# --- choices, by their log-probability


def _choose(
    graph: Graph,
    weights: Weights,
    questions: Sequence[Question],
    kv_format: KvFormat,
    threads: int,
    report: Report | None,
) -> list[bool]:
    parts = [(i, c) for i, q in enumerate(questions) for c in range(len(q.choices))]
    steps = list(_steps(questions, parts, graph.vocabulary))
    program = _program(graph, weights, questions, steps, kv_format, threads)
    scores: list[list[float]] = [[-math.inf] * len(q.choices) for q in questions]
    for done, step in enumerate(steps):
        if report:
            report("asking", done, len(steps))
        batch, targets, counts = _batch(questions, step, program.limits)
        logprobs = program.step(batch).score(targets)
        for (i, c), own in zip(step, np.split(logprobs, np.cumsum(counts)[:-1]), strict=True):
            total = float(np.sum(own, dtype=np.float64))
            text = questions[i].item.choices[c]
            scores[i][c] = total / len(text.encode()) if math.isfinite(total) else -math.inf
    if report:
        report("asking", len(steps), len(steps))
    return [
        max(own) > -math.inf and int(np.argmax(own)) == q.item.answer for q, own in zip(questions, scores, strict=True)
    ]


Part = tuple[int, int]


def _steps(questions: Sequence[Question], parts: Sequence[Part], vocabulary: int) -> Iterator[list[Part]]:
    """Sequences that share a step: about STEP_TOKENS tokens, and few enough scored rows for their logits."""
    most_rows = max(1, min(STEP_TOKENS, LOGITS_AT_ONCE // vocabulary))
    step: list[Part] = []
    tokens = rows = 0
    for i, c in parts:
        own, length = len(questions[i].choices[c]), len(questions[i].prompt) + len(questions[i].choices[c]) - 1
        if step and (tokens + length > STEP_TOKENS or rows + own > most_rows):
            yield step
            step, tokens, rows = [], 0, 0
        step.append((i, c))
        tokens, rows = tokens + length, rows + own
    if step:
        yield step


def _program(
    graph: Graph,
    weights: Weights,
    questions: Sequence[Question],
    steps: Sequence[Sequence[Part]],
    kv_format: KvFormat,
    threads: int,
) -> Any:
    from hasten.backends import native

    def length(part: Part) -> int:
        return len(questions[part[0]].prompt) + len(questions[part[0]].choices[part[1]]) - 1

    longest = max(length(p) for step in steps for p in step)
    limits = Limits(
        context=longest,
        max_tokens=max(sum(map(length, step)) for step in steps),
        max_sequences=max(map(len, steps)),
        max_rows=max(sum(len(questions[i].choices[c]) for i, c in step) for step in steps),
        block_size=BLOCK,
        kv_blocks=max(sum(-(-length(p) // BLOCK) for p in step) for step in steps),
        kv_format=kv_format,
        threads=threads,
    )
    return native.compile(graph, weights, limits, tune=True)


def _batch(questions: Sequence[Question], step: Sequence[Part], limits: Limits) -> tuple[Batch, Int32, list[int]]:
    """The step's batch, the token that each wanted row should say next, and how many rows each sequence wants."""
    tokens: list[int] = []
    positions: list[Int32] = []
    starts, rows, targets, counts = [0], [], [], []  # type: ignore[var-annotated]
    tables = np.full((len(step), -(-limits.context // BLOCK)), -1, np.int32)
    block = 0
    for number, (i, c) in enumerate(step):
        own, following = questions[i].prompt, questions[i].choices[c]
        sequence = [*own, *following][:-1]
        blocks = -(-len(sequence) // BLOCK)
        tables[number, :blocks] = np.arange(block, block + blocks)
        block += blocks
        rows += range(starts[-1] + len(own) - 1, starts[-1] + len(sequence))
        targets += following
        counts.append(len(following))
        tokens += sequence
        positions.append(np.arange(len(sequence), dtype=np.int32))
        starts.append(starts[-1] + len(sequence))
    batch = Batch(
        np.array(tokens, np.int32),
        np.concatenate(positions),
        np.array(starts, np.int32),
        tables,
        np.array(rows, np.int32),
    )
    return batch, np.array(targets, np.int32), counts


# --- answers that are written


def _write(
    graph: Graph,
    weights: Weights,
    task: Task,
    questions: Sequence[Question],
    kv_format: KvFormat,
    threads: int,
    report: Report | None,
) -> list[bool]:
    from hasten.backends import native
    from hasten.engine.engine import Engine
    from hasten.engine.request import SamplingParams

    longest = max(len(q.prompt) + q.new for q in questions)
    limits = Limits(
        context=longest,
        max_tokens=max(STEP_TOKENS, AT_ONCE),
        max_sequences=AT_ONCE,
        max_rows=AT_ONCE,
        block_size=BLOCK,
        kv_blocks=-(-longest // BLOCK) * AT_ONCE,
        kv_format=kv_format,
        threads=threads,
    )
    engine = Engine(native.compile(graph, weights, limits), graph.vocabulary, task.tokenizer, task.eos)
    waiting = []
    for question in questions:
        stop = "\nQuestion:" if _MARK.search(str(question.item.answer)) else "\n"
        params = SamplingParams(temperature=0, max_tokens=question.new, stop=stop)
        waiting += engine.add(list(question.prompt), params)
    while engine.busy:
        engine.step()
        if report:
            report("asking", sum(w.finish_reason is not None for w in waiting), len(waiting))
    return [matches(w.text, str(q.item.answer)) for w, q in zip(waiting, questions, strict=True)]


def matches(written: str, answer: str) -> bool:
    """Whether what a model wrote is the answer."""
    marked = _MARK.search(answer)
    if marked is None:
        return written.strip() == answer.strip()
    after = written.split("####")
    numbers = _NUMBER.findall(after[1].split("\n")[0] if len(after) > 1 else written)
    return bool(numbers) and _plain(numbers[0 if len(after) > 1 else -1]) == _plain(marked[1])


def _plain(number: str) -> str:
    text = number.replace(",", "").replace("$", "").strip()
    return text.rstrip("0").rstrip(".") if "." in text else text
