"""The three texts of a search: calibration (statistics), search (choosing) and final (proof), never the same tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from hasten import checkpoint
from hasten.backends.batch import Int32
from hasten.errors import InputError
from hasten.evaluate import text as reading
from hasten.evaluate.text import Encoder

SPLITS = ("calibration", "search", "final")
FEWEST_TOKENS = 2048
FEWEST_CALIBRATION = 256
LARGEST_WINDOW = 1024
RUN = 16  # tokens in a row that count as the same text
MOST_SHARED = 0.05
NEGLIGIBLE = 0.01
"""Shares of a text that also stand in another: files that share more are refused; what shares less is new."""
MOST_BYTES = 32 << 20
"""Of a file: far more than a search looks at."""
BUILT_IN = "modules of Python's standard library"


@dataclass(frozen=True)
class Texts:
    """Token windows of each text, where each came from, and what the user should know about them."""

    calibration: list[Int32]
    search: list[Int32]
    final: list[Int32]
    context: int
    sources: dict[str, str]
    notes: tuple[str, ...] = ()
    seen: float = 0.0
    """The share of the final text that also stands in one of the others, the larger."""


def choose(
    tokenizer: Encoder, context: int, calibration: Path | None, evaluation: Path | None, demo: bool = False
) -> Texts:
    """Texts for a model of `context` tokens.

    Both files: one calibrates, the other is cut in two. One file, or the same one twice: cut in three. None: modules of
    the standard library, with a note unless the model is the demo, which is made for them. Raises InputError for files
    that are unreadable, too short or largely the same.
    """
    notes: list[str] = []
    if calibration and evaluation and calibration.resolve() != evaluation.resolve():
        tokens = [encode(tokenizer, beginning(calibration, notes)), *_cut(_file(tokenizer, evaluation, notes), (1, 2))]
        names = [str(calibration), f"{evaluation} (first third)", f"{evaluation} (the rest)"]
        return _texts(tokens, context, names, notes)
    if calibration or evaluation:
        path = evaluation or calibration
        assert path is not None
        names = [f"{path} ({part})" for part in ("first quarter", "second quarter", "second half")]
        note = f"{path} is cut in three: the first quarter calibrates, the second is searched on, the rest proves"
        return _texts(_cut(_file(tokenizer, path, notes), (1, 1, 2)), context, names, [note, *notes])
    tokens = [encode(tokenizer, checkpoint.demo_text(split)) for split in SPLITS]
    note = f"no text was given: quality is measured on {BUILT_IN}; --eval FILE takes a text like the model's own use"
    return _texts(tokens, context, [f"{BUILT_IN} ({split})" for split in SPLITS], [] if demo else [note], refuse=False)


def calibration_windows(
    tokenizer: Encoder, context: int, path: Path | None, most_tokens: int
) -> tuple[list[Int32], str]:
    """Windows to calibrate on, at most `most_tokens`, from a file or the built-in text; and where they came from."""
    text = beginning(path) if path else checkpoint.demo_text("calibration")
    if most_tokens < FEWEST_CALIBRATION:
        raise InputError(f"calibration takes {FEWEST_CALIBRATION} tokens or more, not {most_tokens}")
    tokens = encode(tokenizer, text)[:most_tokens]
    if len(tokens) < FEWEST_CALIBRATION:
        what = f"the calibration text is too short: {len(tokens)} tokens, at least {FEWEST_CALIBRATION} are needed"
        raise InputError(what, "give a longer one; thousands of tokens are better")
    return split(tokens, min(context, 512)), str(path) if path else BUILT_IN


def beginning(path: Path, notes: list[str] | None = None) -> str:
    """The text of a file, of a very large one the beginning. Raises InputError as `hasten.evaluate.text.read` does."""
    text = reading.read(path, MOST_BYTES)
    size = path.stat().st_size
    if notes is not None and size > MOST_BYTES:
        notes.append(f"of {path} only the first {MOST_BYTES >> 20} MiB are read, it has {size >> 20}")
    return text


def split(tokens: Int32, context: int) -> list[Int32]:
    """Windows of `context` tokens that do not overlap; a last one of a single token is left out."""
    return [w for w in (tokens[i : i + context] for i in range(0, len(tokens), context)) if len(w) > 1]


def replace_calibration(texts: Texts, windows: list[Int32]) -> Texts:
    return replace(texts, calibration=windows)


def overlap(seen: Int32, text: Int32) -> float:
    """Share of `text` that lies in runs of 16 tokens that also stand in `seen`."""
    known, own = _runs(seen), _runs(text)
    if not len(known) or not len(own):
        return 0.0
    hits = np.flatnonzero(np.isin(own, known))
    covered = np.zeros(len(text), bool)
    for k in range(RUN):
        covered[hits + k] = True
    return float(covered.mean())


def _runs(tokens: Int32) -> np.ndarray:
    """A hash of every run of RUN tokens: [len - RUN + 1]."""
    count = max(0, len(tokens) - RUN + 1)
    factors = np.random.default_rng(0).integers(1, 2**63, RUN, dtype=np.uint64) | np.uint64(1)
    hashes = np.zeros(count, np.uint64)
    for k in range(RUN):
        hashes += tokens[k : k + count].astype(np.uint64) * factors[k]
    return hashes


def encode(tokenizer: Encoder, text: str) -> Int32:
    """The text's tokens, without special ones: [tokens]."""
    return np.asarray(tokenizer.encode(text, special=False), dtype=np.int32)


def _file(tokenizer: Encoder, path: Path, notes: list[str]) -> Int32:
    tokens = encode(tokenizer, beginning(path, notes))
    if len(tokens) < FEWEST_TOKENS:
        raise InputError(
            f"{path} is too short to prove a budget on: {len(tokens)} tokens, at least {FEWEST_TOKENS} are needed",
            "the more text, the narrower the interval; a hundred thousand tokens tell one percent apart well",
        )
    return tokens


def _cut(tokens: Int32, shares: Sequence[int]) -> list[Int32]:
    ends = np.cumsum(shares) * len(tokens) // sum(shares)
    return np.split(tokens, ends[:-1])


def _texts(tokens: list[Int32], context: int, names: list[str], notes: list[str], refuse: bool = True) -> Texts:
    for split_name, part, name in zip(SPLITS, tokens, names, strict=True):
        if len(part) < FEWEST_TOKENS // 4:
            raise InputError(f"the {split_name} text is too short: {len(part)} tokens from {name}")
    seen = 0.0
    for earlier, later in ((0, 1), (0, 2), (1, 2)):
        share = overlap(tokens[earlier], tokens[later])
        where = f"{share:.1%} of the {SPLITS[later]} text also stands in the {SPLITS[earlier]} text"
        if refuse and share > MOST_SHARED:
            raise InputError(
                f"{where} ({names[later]}, {names[earlier]})",
                "held-out text must be new: give different files, without repetitions",
            )
        if share > NEGLIGIBLE:
            notes.append(where)
        if later == 2:
            seen = max(seen, share)
    window = min(context, LARGEST_WINDOW, min(len(t) for t in tokens) // 4)
    windows = [split(t, window) for t in tokens]
    sources = dict(zip(SPLITS, names, strict=True))
    return Texts(windows[0], windows[1], windows[2], window, sources, tuple(notes), seen)


def take(windows: Sequence[Int32], tokens: float) -> list[Int32]:
    """The first windows that hold at least `tokens` tokens together, or all."""
    total, taken = 0, []
    for window in windows:
        if total >= tokens:
            break
        taken.append(window)
        total += len(window)
    return taken


def slices(windows: Sequence[Int32], tokens: float, most: int = 3) -> list[list[Int32]]:
    """Up to `most` disjoint slices of about `tokens` tokens; fewer and shorter where the text does not suffice.

    The first is then twice as long as others: most proofs need no more, and a longer text asks for less margin. A slice
    that largely repeats earlier ones is left out: a second try on it would be the first one over again.
    """
    total = sum(len(w) for w in windows)
    count = int(max(1, min(most, total // min(tokens, 16384), len(windows))))
    found: list[list[Int32]] = []
    rest = list(windows)
    for number in range(count):
        left = sum(len(w) for w in rest)
        part = take(rest, min(tokens, left / (count - number) if number else 2 * left / (count + 1)))
        rest = rest[len(part) :]
        seen = [window for earlier in found for window in earlier]
        if part and not (seen and overlap(np.concatenate(seen), np.concatenate(part)) > MOST_SHARED):
            found.append(part)
    return found


def digest(windows: Sequence[Int32]) -> str:
    """A hash of the tokens and of where they are cut."""
    facts = np.concatenate([*windows, np.array([len(w) for w in windows], np.int32)])
    return hashlib.sha256(facts.tobytes()).hexdigest()[:32]
