from __future__ import annotations

import math
from pathlib import Path

import pytest

from hasten.errors import BudgetError
from hasten.search.budget import UNBOUNDED, Budget, parse, parse_all


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("ppl=1%", Budget("ppl", 0.01)),
        (" PPL = 0.5 % ", Budget("ppl", 0.005)),
        ("ppl=0%", Budget("ppl", 0.0)),
        ("kl=0.02", Budget("kl", 0.02)),
        ("kl=1e-3", Budget("kl", 0.001)),
        ("agree=97%", Budget("agree", 0.03)),
        ("task=a:b.jsonl:-1pt", Budget("task", 0.01, Path("a:b.jsonl"))),
        ("TASK = x.jsonl : - 2.5 points", Budget("task", 0.025, Path("x.jsonl"))),
    ],
)
def test_reads(text: str, budget: Budget) -> None:
    found = parse(text)
    assert found.measure == budget.measure
    assert math.isclose(found.limit, budget.limit)
    assert parse(str(found)).measure == found.measure
    assert math.isclose(parse(str(found)).limit, found.limit)


@pytest.mark.parametrize(
    "text",
    [
        *("", "1%", "ppl", "ppl=", "ppl=1", "ppl=-1%", "ppl=nan%", "ppl=inf%", "ppl=1%%", "ppl=1e9%", "ppl=one%"),
        *("agree=100%", "agree=0%", "agree=97", "agree=-3%", "task=", "task=a.jsonl", "task=a.jsonl:1pt", "task=:-1pt"),
        *("task=a.jsonl:-0pt", "task=a.jsonl:-100pt", "task=a.jsonl:-1", "task=a.jsonl:-nanpt"),
        *("kl=2%", "kl=-1", "kl=nan", "kl=1e9", "acc=1%", "ppl=1%,kl=2", "ppl==1%", "ppl=1_0%", "ppl=１%"),
    ],
)
def test_refuses(text: str) -> None:
    with pytest.raises(BudgetError) as caught:
        parse(text)
    assert text in caught.value.message
    assert "ppl=1%" in (caught.value.hint or "")


def test_several() -> None:
    found = parse_all(["ppl=1%,kl=0.02", "task=a,b.jsonl:-1pt"])
    assert [b.measure for b in found.parts] == ["ppl", "kl", "task"]
    assert found.parts[2].file == Path("a,b.jsonl")
    assert parse_all(str(found)) == found
    assert found.nats == min(b.nats for b in found.parts)
    assert [b.measure for b in found.on_text] == ["ppl", "kl"]
    assert not UNBOUNDED.bounded
    two = parse_all("task=a.jsonl:-1pt, task=b.jsonl:-1pt")  # of two files
    assert len(two.tasks) == 2


@pytest.mark.parametrize("text", ["ppl=1%,ppl=2%", "kl=0.1,ppl=1%,kl=0.1", "task=a:-1pt,task=a:-2pt"])
def test_a_measure_stated_twice(text: str) -> None:
    with pytest.raises(BudgetError, match="twice"):
        parse_all(text)


@pytest.mark.parametrize("text", ["", "ppl=1%,", "ppl=1%,acc=2%", []])
def test_several_of_which_one_is_wrong(text) -> None:
    with pytest.raises(BudgetError):
        parse_all(text)


def test_nats_are_what_the_ratio_means() -> None:
    assert math.isclose(math.exp(parse("ppl=1%").nats), 1.01)
