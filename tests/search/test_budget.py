from __future__ import annotations

import math

import pytest

from hasten.errors import BudgetError
from hasten.search.budget import Budget, parse


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("ppl=1%", Budget("ppl", 0.01)),
        (" PPL = 0.5 % ", Budget("ppl", 0.005)),
        ("ppl=0%", Budget("ppl", 0.0)),
        ("kl=0.02", Budget("kl", 0.02)),
        ("kl=1e-3", Budget("kl", 0.001)),
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
        *("kl=2%", "kl=-1", "kl=nan", "kl=1e9", "acc=1%", "ppl=1%,kl=2", "ppl==1%", "ppl=1_0%", "ppl=１%"),
    ],
)
def test_refuses(text: str) -> None:
    with pytest.raises(BudgetError) as caught:
        parse(text)
    assert text in caught.value.message
    assert "ppl=1%" in (caught.value.hint or "")


def test_nats_are_what_the_ratio_means() -> None:
    assert math.isclose(math.exp(parse("ppl=1%").nats), 1.01)
