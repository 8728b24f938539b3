"""Text to score: read from a file, tokenised once, cut into windows."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np

from hasten.backends.batch import Int32
from hasten.errors import ContextError, InputError

DEFAULT_CONTEXT = 1024
"""Tokens in a window where the user names none, or the model's context where that is shorter."""


class Encoder(Protocol):
    def encode(self, text: str, special: bool = True) -> list[int]: ...


def read(path: Path, most: int | None = None) -> str:
    """The text of a UTF-8 file, or of its first `most` bytes.

    Raises InputError where it is missing, unreadable, empty or binary.
    """
    try:
        with path.open("rb") as file:
            data = file.read(-1 if most is None else most)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", "give a UTF-8 text file") from None
    if not data.strip():
        raise InputError(f"{path} is empty", "give a text to score")
    if b"\0" in data:
        raise InputError(f"{path} is binary: byte {data.index(0)} is zero", "give a UTF-8 text file")
    if len(data) == most:  # the cut may go through a character
        while data and data[-1] & 0xC0 == 0x80:
            data = data[:-1]
        data = data[: -1 if data and data[-1] >= 0xC0 else None]
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: byte {error.start} is wrong", "convert it to UTF-8") from None


def window_size(context: int | None, model_context: int) -> int:
    """The window asked for, or the default. Raises ContextError where it is longer than the model's context."""
    if context is None:
        return min(DEFAULT_CONTEXT, model_context)
    if context > model_context:
        raise ContextError(
            f"a context of {context} tokens is more than the model's {model_context}",
            f"use --context {model_context} or less",
        )
    if context < 2:
        raise InputError(f"a context of {context} tokens scores nothing", "use 2 or more")
    return context


def windows(tokenizer: Encoder, text: str, context: int) -> list[Int32]:
    """The text's tokens, without special ones, in windows of `context` that do not overlap; the last may be shorter.

    A last window of one token is left out: it scores nothing. Raises InputError where nothing can be scored.
    """
    tokens = np.asarray(tokenizer.encode(text, special=False), dtype=np.int32)
    if len(tokens) < 2:
        raise InputError(f"the text is too short: {len(tokens)} tokens, at least 2 are needed")
    cut = [tokens[i : i + context] for i in range(0, len(tokens), context)]
    return [w for w in cut if len(w) > 1]
