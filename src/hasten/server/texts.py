"""What streams of marked-up text share."""

from __future__ import annotations


def split_at(text: str, mark: str) -> tuple[str, str, bool]:
    """(what stands before `mark`, the rest, whether it was found).

    Where it was not, the rest is the end of `text` that may be the mark's beginning.
    """
    before, found, after = text.partition(mark)
    if found:
        return before, after, True
    keep = next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:n])), 0)
    return text[: len(text) - keep], text[len(text) - keep :], False
