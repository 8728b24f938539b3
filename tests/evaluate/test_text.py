from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.errors import ContextError, InputError
from hasten.evaluate import text


class Letters:
    """A tokenizer of one token a character, which adds a special token unless told not to."""

    def encode(self, text: str, special: bool = True) -> list[int]:
        return [99999] * special + [ord(c) for c in text]


@given(st.text(st.characters(codec="ascii"), min_size=2, max_size=50), st.integers(2, 20))
def test_windows_are_the_text_cut_without_overlap(written: str, context: int) -> None:
    found = text.windows(Letters(), written, context)
    rest = [ord(c) for c in written]
    for window in found:
        assert window.dtype == np.int32
        assert window.tolist() == rest[:context]
        rest = rest[context:]
    assert len(rest) <= 1  # a last window of one token scores nothing


@pytest.mark.parametrize("short", ["", "x"])
def test_a_text_too_short_is_refused(short: str) -> None:
    with pytest.raises(InputError, match=f"too short: {len(short)} tokens"):
        text.windows(Letters(), short, 8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"abc\0def", "is binary: byte 3"),
        (b"caf\xe9 au lait", "not UTF-8 text: byte 3"),
    ],
)
def test_files_that_are_no_text(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        text.read(path)


def test_missing_files_and_directories(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        text.read(tmp_path / "none")
    with pytest.raises(InputError, match="Is a directory"):
        text.read(tmp_path)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbfhello")
    assert text.read(path) == "hello"


def test_window_size() -> None:
    assert text.window_size(None, 512) == 512
    assert text.window_size(None, 100_000) == text.DEFAULT_CONTEXT
    assert text.window_size(512, 512) == 512
    with pytest.raises(ContextError, match="513 tokens is more than the model's 512"):
        text.window_size(513, 512)
    with pytest.raises(InputError, match="scores nothing"):
        text.window_size(1, 512)
