from __future__ import annotations

from pathlib import Path

import pytest

from hasten.errors import BudgetError, ContextError, HastenError, InputError
from hasten.search import objective
from hasten.search.objective import Objective, Target


def make(name=None, batch=None, lengths=None, trace=None, target=None, cap=None, context=4096, say=lambda text: None):
    return objective.make(name, batch, lengths, trace, target, cap, context, say)


def test_defaults() -> None:
    assert make() == Objective("decode", 1, 512, 64)
    assert make("throughput").batch == 16
    assert (make(context=256).prompt, make(context=256).new) == (128, 64)
    assert make(target="prefill=2000tok/s") == Objective("prefill", target=Target("prefill", 2000.0))
    assert make(target=" Decode = 1.5 tokens/s ").target == Target("decode", 1.5)


def test_a_round_of_throughput_is_all_its_tokens() -> None:
    """16 prompts of 100 tokens in steps of 512, then 20 steps of 16 tokens; the head sees each sequence once a step."""
    phases = make("throughput", 16, "100:20").phases
    assert sum(p.tokens * p.count for p in phases) == pytest.approx(16 * 100 + 16 * 20)
    assert sum(p.rows * p.count for p in phases) == pytest.approx(16 + 16 * 20, rel=0.02)
    assert [(p.tokens, p.count) for p in phases] == [(512, 3.125), (16, 20.0)]
    one = make("throughput", 1, "100:20").phases
    assert [(p.tokens, p.rows, p.count) for p in one] == [(100, 1, 1.0), (1, 1, 20.0)]
    assert [(p.tokens, p.rows) for p in make("decode", 8).phases] == [(8, 8)]
    assert make("memory").phases == ()


@pytest.mark.parametrize(
    ("given", "kind", "said"),
    [
        ({"name": "speed"}, InputError, "unknown objective"),
        ({"batch": 0}, InputError, "batch is 0"),
        ({"batch": 5000}, InputError, "from 1 to 1024"),
        ({"lengths": "5"}, InputError, "as 512:64"),
        ({"lengths": "0:4"}, InputError, "as 512:64"),
        ({"lengths": "4000:100"}, ContextError, "4100 tokens, the model's context is 4096"),
        ({"lengths": "4:4", "trace": Path("t")}, InputError, "contradict"),
        ({"trace": Path("missing.csv")}, InputError, "cannot be read"),
        ({"target": "decode=50"}, BudgetError, "cannot read the target"),
        ({"target": "memory=50tok/s"}, BudgetError, "cannot read the target"),
        ({"target": "decode=0tok/s"}, BudgetError, "more than 0"),
        ({"target": "decode=-1tok/s"}, BudgetError, "cannot read"),
        ({"target": "decode=5tok/s", "name": "prefill"}, BudgetError, "contradicts the objective prefill"),
        ({"target": "decode=5tok/s", "name": "memory"}, BudgetError, "contradicts"),
    ],
)
def test_what_makes_no_sense(given, kind: type[HastenError], said: str) -> None:
    with pytest.raises(kind, match=said):
        make(**given)


def test_a_trace_gives_the_lengths(tmp_path: Path) -> None:
    rows = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    rows += [f"2023-11-16 18:17:0{i},{p},{n}" for i, (p, n) in enumerate([(100, 10), (300, 30), (5000, 5)])]
    (tmp_path / "t.csv").write_text("\n".join(rows))
    said: list[str] = []
    found = make("throughput", trace=tmp_path / "t.csv", say=said.append)
    assert (found.prompt, found.new) == (200, 20)
    assert "2 of 3 requests" in said[0]
    with pytest.raises(InputError, match="none of the 3 requests"):
        make(trace=tmp_path / "t.csv", context=50)
