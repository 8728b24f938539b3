"""The record of finished searches: what goes in comes out, of many processes at once, and what is damaged is said."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from search.test_accelerate import as_fast, files, quick, run, settings  # noqa: F401

from hasten.cli.main import main
from hasten.compress import recipe
from hasten.compress.recipe import Choice
from hasten.errors import InputError, OutputError
from hasten.search import history
from hasten.search.history import History


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "hasten" / "trials.sqlite"


CHOICES = {"one": {"a.weight": Choice("int4-g64", "clip"), "b.weight": Choice("original", "original")}}


def document(model: str = "folder/tiny_model", bytes: int = 1000) -> dict:
    reading = {"budget": "ppl=1%", "measure": "ppl", "estimate": 0.005, "low": 0.0, "high": 0.01}
    gain = {"estimate": 2.0, "low": 1.9, "high": 2.1}
    one = {
        "name": "one", "bytes": bytes, "fits": True, "chosen": True, "readings": [reading], "rate": 10.0, "cost": 1.0,
        "speedup": {"decode": gain, "prefill": gain}, "recipe": "1 int4-g64 by clip", "cost_of_original": 2.0,
        "allowance": None,
    }  # fmt: skip
    return {
        "model": model,
        "objective": "decode",
        "budget": {"text": "ppl=1%"},
        "machine": {"cpu": "some cpu", "instruction_set": "avx2", "threads": 2},
        "output": "out",
        "verdict": {"reason": None},
        "candidates": [one],
    }


def test_a_search_enters_once(files, tmp_path, monkeypatch, capsys) -> None:  # noqa: F811
    as_fast(2.0, monkeypatch)
    outcome, _ = run(settings(files, tmp_path / "fast", budget="ppl=5%", keep_work=True))
    (tmp_path / "fast").rename(tmp_path / "elsewhere")
    _, notes = run(settings(files, tmp_path / "fast", budget="ppl=5%"))  # goes on in the same work folder: the same run
    assert not any("hasten trials" in note for note in notes)
    capsys.readouterr()
    assert main(["trials", "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert len({f["run"] for f in whole}) == 1
    assert main(["trials", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [f["name"] for f in found] == [c["name"] for c in outcome.document["candidates"]]
    chosen = next(f for f in found if f["chosen"])
    assert main(["trials", chosen["id"][:6]]) == 0
    text = capsys.readouterr().out
    given = recipe.read(tmp_path / "elsewhere" / "recipe.yaml")
    assert recipe.parse(text) == given
    assert "# searched for: decode within ppl=5%" in text
    assert main(["trials", "--model", "tiny"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(found) + 3  # beside what they are: head, rule, and whose figures they are
    assert lines[2].startswith(found[0]["id"][:8])
    assert main(["trials", "--model", "no%such"]) == 0
    assert "no trial matches" in capsys.readouterr().out


def test_models_are_found_by_name_and_the_newest_come_first() -> None:
    for number, model in enumerate(["a_model", "axmodel", "other"]):
        history.record(f"run{number}", document(model), "f", CHOICES, f"2026-01-0{number + 1}T00:00:00+00:00")
    with History(history.place()) as known:
        assert [r["model"] for r in known.find()] == ["other", "axmodel", "a_model"]
        assert [r["model"] for r in known.find("a_mod")] == ["a_model"]  # an underscore stands for itself
        assert len(known.find(limit=1)) == 1
        first = known.find("other")[0]
        assert known.get(first["id"])["choices"] == {"a.weight": ["int4-g64", "clip"], "b.weight": ["original"] * 2}
        with pytest.raises(InputError, match="several trials' ids begin with ''"):
            known.get("")
        with pytest.raises(InputError, match="no trial has an id that begins with 'zz'"):
            known.get("zz")


def test_many_processes_at_once() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[2]); from search.test_history import CHOICES, document\n"
        "from hasten.search import history\n"
        "for i in range(12): history.record(f'run{sys.argv[1]}.{i}', document(), 'f', CHOICES, '2026')"
    )
    tests, source = Path(__file__).resolve().parents[1], Path(history.__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(source), str(tests)])}
    running = [subprocess.Popen([sys.executable, "-c", code, str(n), str(tests)], env=environment) for n in range(3)]
    assert [process.wait(120) for process in running] == [0, 0, 0]
    with History(history.place()) as known:
        assert len({row["run"] for row in known.find(limit=1000)}) == 36


def test_what_is_damaged_or_from_the_future(own_home, capsys, files, tmp_path, monkeypatch) -> None:  # noqa: F811
    assert main(["trials"]) == 0
    assert "no search has finished" in capsys.readouterr().out
    assert main(["trials", "abc"]) == 2
    assert main(["trials", "--limit", "0"]) == 2
    capsys.readouterr()
    history.record("run", document(), "f", CHOICES, "2026")
    whole = own_home.read_bytes()
    for damage in (b"not a database at all, just text" * 200, b"", whole[: len(whole) // 2]):
        for file in own_home.parent.iterdir():
            file.unlink()
        own_home.write_bytes(damage)
        assert main(["trials"]) == 2
        assert "damaged" in (said := capsys.readouterr().err)
        assert "move the file away" in said
    base = sqlite3.connect(own_home.parent / "later.sqlite")
    base.execute("PRAGMA user_version = 99")
    base.close()
    with pytest.raises(OutputError, match="later version"):
        History(own_home.parent / "later.sqlite")
    as_fast(2.0, monkeypatch)  # a search does not fail for it
    outcome, notes = run(settings(files, tmp_path / "fast", budget="ppl=5%"))
    assert outcome.output is not None
    assert any("not in `hasten trials`" in note for note in notes)
