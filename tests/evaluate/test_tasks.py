"""Questions scored through the native program against the formulas in float64; and what is wrong with a file."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from search.tiny_model import write_model
from support import need_shared_data

from hasten import checkpoint
from hasten.backends.reference import dense_weights, forward
from hasten.errors import InputError
from hasten.evaluate import paired, tasks


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checkpoint.open(str(write_model(tmp_path_factory.mktemp("m") / "tiny")))


def write(path: Path, *rows) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return path


def load(path: Path, model, context: int = 256) -> tasks.Task:
    return tasks.load(path, model.tokenizer, model.eos_token_ids, context)


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_the_likeliest_choice_for_each_byte(model, tmp_path) -> None:
    """Every choice's log-probability from the whole model in float64, one at a time."""
    rng = np.random.default_rng(0)

    def words(count: int) -> str:
        return "".join(rng.choice(list("abcdefgh "), count)).strip() + "x"

    rows = [
        {"prompt": words(int(rng.integers(3, 50))), "choices": [words(int(rng.integers(1, 30))) for _ in range(4)]}
        for _ in range(12)
    ]
    weights, dense = model.weights(), dense_weights(model.weights())
    expected = []
    for row in rows:
        scores = []
        for choice in row["choices"]:
            before, following = list(row["prompt"].encode()), list((" " + choice).encode())
            ids = np.array(model.tokenizer.encode(bytes(before + following).decode(), special=False))
            assert len(ids) == len(before) + len(following)  # a token a byte
            logprobs = log_softmax(forward(model.graph, dense, ids[:-1]))
            own = logprobs[np.arange(len(ids) - 1), ids[1:]][len(before) - 1 :]
            scores.append(own.sum() / len(choice.encode()))
        expected.append(int(np.argmax(scores)))
    for shift in (0, 1):
        given = [{**row, "answer": (e + shift) % 4} for row, e in zip(rows, expected, strict=True)]
        task = load(write(tmp_path / "t.jsonl", *given), model)
        right = task.right(model.graph, weights, threads=1)
        assert right.all() if shift == 0 else not right.any()
        assert task.chance() == 0.25


def test_what_is_written_greedily(model, tmp_path) -> None:
    """The tokens that the formulas would write one after another."""
    dense, rows = dense_weights(model.weights()), []
    for prompt in ("abc def", "the", "xyz. q"):
        ids = model.tokenizer.encode(prompt, special=False)
        for _ in range(6):
            ids.append(int(forward(model.graph, dense, np.array(ids))[-1].argmax()))
        text = model.tokenizer.decode(ids)[len(prompt) :]
        rows.append({"prompt": prompt, "answer": text.split("\n")[0].strip() or "?", "max_tokens": 6})
    right = load(write(tmp_path / "t.jsonl", *rows), model).right(model.graph, model.weights(), threads=1)
    assert right.tolist() == [row["answer"] != "?" for row in _drawn(rows)]
    wrong = [{**row, "answer": row["answer"] + "!"} for row in rows]
    assert not load(write(tmp_path / "t.jsonl", *wrong), model).right(model.graph, model.weights(), threads=1).any()


def _drawn(rows):
    return [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]


@pytest.mark.parametrize(
    ("written", "answer", "same"),
    [
        (" Paris", "Paris", True),
        ("Paris is", "Paris", False),
        ("so 3 + 4 = 7\n#### 7\n", "3 and 4\n#### 7", True),
        ("it is 1,200 dollars.", "#### 1200", True),
        ("first 18, then 19", "#### 18", False),
        ("#### 18 and 19", "#### 18", True),
        ("$5.00", "#### 5", True),
        ("none", "#### 5", False),
        ("-3", "#### 3", False),
    ],
)
def test_what_is_an_answer(written: str, answer: str, same: bool) -> None:
    assert tasks.matches(written, answer) is same


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("not json", "not valid JSON"),
        ([1], "JSON object"),
        ({"answer": 0, "choices": ["a", "b"]}, "needs one of question and prompt, has none"),
        ({"question": "a", "prompt": "b", "answer": "c"}, "has both"),
        ({"prompt": 3, "answer": "c"}, "prompt must be text, not 3"),
        ({"prompt": "p"}, "answer is missing"),
        ({"prompt": "p", "answer": None}, "answer is null"),
        ({"prompt": "p", "answer": " "}, "must be text"),
        (
            {"prompt": "p", "answer": 2, "choices": ["a", "b"]},
            "answer is 2, must be from 0 to 1, or a letter from A to B",
        ),
        ({"prompt": "p", "answer": "C", "choices": ["a", "b"]}, 'answer is "C"'),
        ({"prompt": "p", "answer": True, "choices": ["a", "b"]}, "answer is true"),
        ({"prompt": "p", "answer": 0, "choices": ["a"]}, "list of 2 to 64"),
        ({"prompt": "p", "answer": 0, "choices": ["a", 1]}, "every choice must be text"),
        ({"prompt": "p", "answer": 0, "choices": ["a", "a "]}, "two choices are the same"),
        ({"prompt": "p", "answer": "c", "max_tokens": 0}, "max_tokens is 0"),
        ({"prompt": "p" * 300, "answer": "c"}, "the model's context is 256"),
    ],
)
def test_a_wrong_line_is_named(row, said: str, model, tmp_path) -> None:
    good = json.dumps({"prompt": "p", "answer": "A", "choices": ["a", "b"]})
    bad = row if isinstance(row, str) else json.dumps(row)
    (tmp_path / "t.jsonl").write_text(f"{good}\n{bad}\n")
    with pytest.raises(InputError, match=r"t\.jsonl, line 2: ") as caught:
        load(tmp_path / "t.jsonl", model)
    assert said in caught.value.message


def test_files_that_are_none(model, tmp_path) -> None:
    for content, said in (
        (b"\n\n", "empty"),
        (b"\xff\xfe\n", "not UTF-8"),
        (b"x" * (tasks.LINE_BYTES + 9), "longer than"),
    ):
        (tmp_path / "t.jsonl").write_bytes(content)
        with pytest.raises(InputError, match=said):
            load(tmp_path / "t.jsonl", model)
    with pytest.raises(InputError, match="cannot read the task"):
        load(tmp_path / "missing.jsonl", model)


def test_letters_indices_and_arcs_labels(model, tmp_path) -> None:
    base = {"prompt": "p", "choices": ["a", "b", "c"]}
    arc = {"question": "q", "choices": {"text": ["a", "b", "c"], "label": ["1", "2", "3"]}, "answer": "2"}
    rows = [{**base, "answer": answer} for answer in (1, "B", "b", "1")]
    found = tasks.read(write(tmp_path / "t.jsonl", *rows, arc))
    assert [item.answer for item in found] == [1] * 5
    assert found[-1].prompt == "Question: q\nAnswer:"


def test_accuracy_lost_covers_the_truth() -> None:
    """Simulated: of many samples of questions, 95% of intervals hold the true loss (Agresti and Min say: or more)."""
    rng, held, draws, number = np.random.default_rng(0), 0, 3000, 150
    chances = np.array([0.6, 0.03, 0.01, 0.36])  # both right, only the original, only the candidate, none
    for _ in range(draws):
        kinds = rng.choice(4, number, p=chances)
        found = paired.accuracy_lost(kinds <= 1, (kinds == 0) | (kinds == 2))
        held += found.low <= 0.02 <= found.high
    assert 0.94 <= held / draws <= 0.99


def test_the_same_answers_prove_no_more_than_their_number() -> None:
    for loss in (0.01, 0.03):
        number = paired.fewest_questions(loss)
        for count, enough in ((number, True), (number - 1, False)):
            answers = np.arange(count) % 2 == 0
            found = paired.accuracy_lost(answers, answers)
            assert found.estimate == 0.0
            assert (found.high <= loss) is enough
    assert math.isclose(paired.accuracy_lost(np.array([True] * 4), np.array([False] + [True] * 3)).estimate, 0.25)


def test_a_real_file(model) -> None:
    """GSM8K as it is published: every line is read, and its answers are numbers."""
    path = need_shared_data("eval/gsm8k/test.jsonl")
    items = tasks.read(path)
    assert len(items) == 1319
    assert items[0].answer.endswith("#### 18")
    assert tasks.matches("#### 18", items[0].answer)
