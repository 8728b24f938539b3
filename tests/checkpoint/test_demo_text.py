"""The demo's evaluation text: three splits that share nothing, also where Python has no sources."""

from __future__ import annotations

import ast
import sysconfig
from pathlib import Path

import pytest

from hasten import checkpoint
from hasten.checkpoint import demo
from hasten.errors import InputError


def lines(text: str) -> set[str]:
    return {s for line in text.splitlines() if len(s := line.strip()) > 40}


def test_splits_come_from_the_standard_library() -> None:
    texts = {split: checkpoint.demo_text(split) for split in demo.SPLITS}
    assert all(len(t) > 50_000 for t in texts.values())
    assert "class ArgumentParser" in texts["final"]
    assert "class ArgumentParser" not in texts["calibration"] + texts["search"]


def test_fallback_where_python_has_no_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    texts = [checkpoint.demo_text(split) for split in demo.SPLITS]
    assert all(len(t) > 10_000 for t in texts)
    shared = [a & b for a, b in zip(texts, texts[1:] + texts[:1], strict=True) for a, b in [(lines(a), lines(b))]]
    assert all(len(s) < 5 for s in shared)


def test_the_fallback_is_python() -> None:
    ast.parse((demo.directory() / "fallback.txt").read_text(encoding="utf-8"))


def test_unknown_split() -> None:
    with pytest.raises(InputError, match="unknown split 'train'"):
        checkpoint.demo_text("train")
