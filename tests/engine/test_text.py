from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hasten.engine.text import TextStream


class Letters:
    """Tokens are characters."""

    def push(self, token: int) -> str:
        return chr(token)

    def finish(self) -> str:
        return ""


def feed(text: str, stops: tuple[str, ...]) -> tuple[list[str], bool]:
    stream, pieces = TextStream(Letters(), stops), []
    for letter in text:
        pieces.append(stream.push(ord(letter)))
        if stream.stopped:
            break
    return [*pieces, stream.finish()], stream.stopped is not None


@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_stop_text_that_is_whole_first(text: str, stops: list[str]) -> None:
    """By hand: the shortest beginning of the text that contains a stop text, cut where the earliest such one begins."""
    expected, hit = text, False
    for end in range(len(text) + 1):
        begins = [text[:end].find(s) for s in stops if s in text[:end]]
        if begins:
            expected, hit = text[: min(begins)], True
            break
    pieces, stopped = feed(text, tuple(stops))
    assert "".join(pieces) == expected
    assert stopped == hit


def test_what_may_begin_a_stop_text_is_held_back() -> None:
    pieces, _ = feed("abcabd", ("abd",))
    assert pieces == ["", "", "abc", "", "", "", ""]


@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_a_stop_text_that_is_kept_is_the_end(text: str, stops: list[str]) -> None:
    """By hand: the shortest beginning of the text that contains a stop text, up to the end of the earliest in it."""
    stream, found = TextStream(Letters(), tuple(stops), kept=True), ""
    for letter in text:
        found += stream.push(ord(letter))
        if stream.stopped:
            break
    found += stream.finish()
    ends = [end for end in range(len(text) + 1) if any(s in text[:end] for s in stops)]
    if not ends:
        assert (found, stream.stopped) == (text, None)
    else:
        first = min(text[: ends[0]].find(s) for s in stops if s in text[: ends[0]])
        assert stream.stopped in stops
        assert found == text[:first] + str(stream.stopped)


def test_what_is_not_stoppable_passes() -> None:
    stream = TextStream(Letters(), ("a",))
    assert stream.push(ord("a"), stoppable=False) == "a"
    assert not stream.stopped
    assert stream.push(ord("a")) == ""
    assert stream.stopped
