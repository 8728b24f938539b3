from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hasten import checkpoint
from hasten.errors import InputError
from hasten.search import texts


class Bytes:
    """A tokenizer of bytes."""

    def encode(self, text: str, special: bool = True) -> list[int]:
        assert not special
        return list(text.encode())


def write(path: Path, seed: int, length: int = 6000) -> Path:
    path.write_bytes(bytes(np.random.default_rng(seed).integers(97, 123, length).astype(np.uint8)))
    return path


def flat(windows) -> bytes:
    return bytes(np.concatenate(windows).astype(np.uint8))


def test_one_file_is_cut_in_three(tmp_path: Path) -> None:
    path = write(tmp_path / "t", 0)
    for calibration, evaluation in ((path, None), (None, path), (path, path)):
        found = texts.choose(Bytes(), 256, calibration, evaluation)
        parts = [flat(found.calibration), flat(found.search), flat(found.final)]
        assert b"".join(parts) == path.read_bytes()
        assert [len(p) for p in parts] == [1500, 1500, 3000]
        assert "cut in three" in found.notes[0]


def test_two_files(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a", 1), write(tmp_path / "b", 2)
    found = texts.choose(Bytes(), 256, first, second)
    assert flat(found.calibration) == first.read_bytes()
    assert flat(found.search) + flat(found.final) == second.read_bytes()
    assert found.notes == ()
    assert found.context == 256
    copy = tmp_path / "copy"
    copy.write_bytes(b"x" * 100 + first.read_bytes())
    with pytest.raises(InputError, match="also stands in the calibration text"):
        texts.choose(Bytes(), 256, first, copy)


def test_overlap() -> None:
    rng = np.random.default_rng(0)
    seen = rng.integers(0, 50, 4000).astype(np.int32)
    fresh = rng.integers(0, 50, 1000).astype(np.int32)
    assert texts.overlap(seen, fresh) == 0.0
    mixed = np.concatenate([fresh, seen[500:750]])
    assert texts.overlap(seen, mixed) == pytest.approx(0.2)
    assert texts.overlap(seen[:10], mixed) == 0.0


def test_without_files_the_library_speaks_up(monkeypatch) -> None:
    letters = np.random.default_rng(0).integers(97, 123, (3, 3000)).astype(np.uint8)
    monkeypatch.setattr(checkpoint, "demo_text", lambda split: bytes(letters[texts.SPLITS.index(split)]).decode())
    found = texts.choose(Bytes(), 256, None, None)
    assert "no text was given" in found.notes[0]
    assert not any("no text was given" in n for n in texts.choose(Bytes(), 256, None, None, demo=True).notes)


def test_slices_are_disjoint() -> None:
    windows = [np.full(100, i, np.int32) for i in range(600)]
    found = texts.slices(windows, 18_000)
    assert len(found) == 3
    ids = [int(w[0]) for part in found for w in part]
    assert len(ids) == len(set(ids)) == 540
    short = texts.slices(windows[:50], 18_000)
    assert len(short) == 1
    assert len(short[0]) == 50


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "empty"), (b"a\0b" * 3000, "binary"), (b"\xff\xfe" * 3000, "not UTF-8"), (b"abc" * 100, "too short")],
)
def test_bad_files(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "t"
    path.write_bytes(content)
    with pytest.raises(InputError, match=said):
        texts.choose(Bytes(), 256, None, path)


def test_text_that_repeats_itself_is_refused(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a", 1), write(tmp_path / "b", 2)
    twice = tmp_path / "twice"
    twice.write_bytes(second.read_bytes() * 2)
    four = tmp_path / "four"
    four.write_bytes(second.read_bytes() * 4)
    with pytest.raises(InputError, match=r"100.0% of the search text also stands in the calibration text \(.*four"):
        texts.choose(Bytes(), 256, None, four)
    with pytest.raises(InputError, match="of the final text also stands in the"):
        texts.choose(Bytes(), 256, None, twice)
    with pytest.raises(InputError, match=r"of the final text also stands in the search text \(.*the rest.*first third"):
        texts.choose(Bytes(), 256, first, twice)


def test_a_little_overlap_is_said_and_counted(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a", 1), write(tmp_path / "b", 2)
    mixed = tmp_path / "mixed"
    mixed.write_bytes(second.read_bytes() + first.read_bytes()[:100])
    found = texts.choose(Bytes(), 256, first, mixed)
    assert found.seen == pytest.approx(100 / 4067, abs=1e-3)
    assert any("also stands in the calibration text" in n for n in found.notes)
    assert texts.choose(Bytes(), 256, first, second).seen == 0.0


def test_a_slice_that_repeats_an_earlier_one_is_left_out() -> None:
    rng = np.random.default_rng(3)
    own = [rng.integers(0, 5000, 1024).astype(np.int32) for _ in range(40)]
    assert len(texts.slices([*own[:20], *own[20:]], 18_000)) == 2
    assert len(texts.slices([*own[:20], *own[:20]], 18_000)) == 1
