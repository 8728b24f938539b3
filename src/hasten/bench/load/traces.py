"""Real traces of requests: Azure's LLM inference CSV and Mooncake's JSONL, read line by line.

Azure (github.com/Azure/AzurePublicDataset, 2023 and 2024): `TIMESTAMP,ContextTokens,GeneratedTokens`.
Mooncake (github.com/kvcache-ai/Mooncake, FAST25-release): `{"timestamp": ms, "input_length", "output_length",
"hash_ids"}`; each hash id stands for 512 tokens of the prompt, the last one for what is left, and the same id for the
same tokens after the same beginning.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from hasten.errors import InputError

AZURE_HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"
MOONCAKE_BLOCK = 512  # tokens of a hash id
LINE_BYTES = 1 << 20
MOST_TOKENS = 1 << 24
MOST_MILLISECONDS = 10**12
TIMESTAMP = re.compile(r"(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)(\.\d{1,9})?(?:Z|\+00:00)?", re.ASCII)
COUNT = re.compile(r"\d{1,9}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request: seconds after the start, tokens of its prompt, tokens to make.

    `blocks` name the prompt's beginning, `block` tokens each: equal names, equal tokens.
    """

    at: float
    prompt: int
    new: int
    blocks: tuple[int, ...] = ()
    block: int = MOONCAKE_BLOCK


def read(path: Path) -> Iterator[Arrival]:
    """The requests of a trace in order, the first at 0 seconds. The file's first line says which format it has.

    Raises InputError that names the line and the field: not the trace's format, a number out of range, time that runs
    backwards, an overlong line, text that is not UTF-8, no request at all.
    """
    try:
        with open(path, "rb") as file:
            yield from _read(path, file)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None


def _read(path: Path, file: BinaryIO) -> Iterator[Arrival]:
    lines = _lines(path, file)
    first = next(lines, None)
    if first is None:
        raise InputError(f"{path} is empty: a trace has at least one request")
    if first[1].startswith("{"):
        parse, rows = _mooncake, _again(first, lines)
    elif first[1] == AZURE_HEADER:
        parse, rows = _azure, lines
    else:
        raise InputError(
            f"{path}, line {first[0]}: neither format of traces begins so: {_shown(first[1])}",
            f"Azure's begins with {AZURE_HEADER}; in Mooncake's each line is a JSON object",
        )
    origin: float | None = None
    last = 0.0
    for number, line in rows:
        where = f"{path}, line {number}"
        arrival = parse(line, where)
        origin = arrival.at if origin is None else origin
        if arrival.at - origin < last:
            raise InputError(f"{where}: the request comes before the one above it", "sort the trace by its time")
        last = arrival.at - origin
        yield Arrival(last, arrival.prompt, arrival.new, arrival.blocks)
    if origin is None:
        raise InputError(f"{path} has a header and no request")


def _again(first: tuple[int, str], rest: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    yield first
    yield from rest


def _lines(path: Path, file: BinaryIO) -> Iterator[tuple[int, str]]:
    """(number, text) of each line that holds something. No line is read further than LINE_BYTES."""
    number = 0
    while line := file.readline(LINE_BYTES + 1):
        number += 1
        if len(line) > LINE_BYTES:
            raise InputError(f"{path}, line {number}: longer than {LINE_BYTES} bytes, which no request of a trace is")
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError:
            raise InputError(f"{path}, line {number}: not UTF-8 text") from None
        if text:
            yield number, text


def _azure(line: str, where: str) -> Arrival:
    fields = line.split(",")
    if len(fields) != 3:
        raise InputError(f"{where}: {len(fields)} fields, must be 3: {AZURE_HEADER}")
    stamp = TIMESTAMP.fullmatch(fields[0])
    try:
        whole = datetime.fromisoformat(stamp[1]) if stamp else None
    except ValueError:  # a thirteenth month
        whole = None
    if not stamp or not whole:
        raise InputError(f"{where}: TIMESTAMP is {_shown(fields[0])}, must be like 2023-11-16 18:17:03.9799600")
    counts = []
    for name, text in zip(AZURE_HEADER.split(",")[1:], fields[1:], strict=True):
        if not COUNT.fullmatch(text):
            raise InputError(f"{where}: {name} is {_shown(text)}, must be a whole number")
        counts.append(_count(int(text), name, where))
    at = whole.replace(tzinfo=UTC).timestamp() + float(stamp[2] or 0)
    return Arrival(at, counts[0], counts[1])


def _mooncake(line: str, where: str) -> Arrival:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise InputError(f"{where}: not valid JSON: {_shown(line)}") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: must be a JSON object, is {_shown(line)}")
    at = _number(row, "timestamp", where)
    if not 0 <= at <= MOST_MILLISECONDS:
        raise InputError(f"{where}: timestamp is {at}, must be milliseconds from 0 to {MOST_MILLISECONDS}")
    prompt = _count(_number(row, "input_length", where), "input_length", where)
    new = _count(_number(row, "output_length", where), "output_length", where)
    blocks = row.get("hash_ids", [])
    if not isinstance(blocks, list) or not all(type(b) is int and 0 <= b < 1 << 63 for b in blocks):
        raise InputError(f"{where}: hash_ids must be a list of whole numbers from 0 to 2^63 - 1")
    if len(blocks) > -(-prompt // MOONCAKE_BLOCK):
        raise InputError(
            f"{where}: hash_ids names {len(blocks)} blocks of {MOONCAKE_BLOCK} tokens, input_length is {prompt}"
        )
    return Arrival(at / 1e3, prompt, new, tuple(blocks))


def _number(row: dict[str, Any], name: str, where: str) -> int:
    if name not in row:
        raise InputError(f"{where}: {name} is missing")
    value = row[name]
    if type(value) is not int:
        raise InputError(f"{where}: {name} is {_shown(json.dumps(value))}, must be a whole number")
    return value


def _count(value: int, name: str, where: str) -> int:
    if not 1 <= value <= MOST_TOKENS:
        raise InputError(f"{where}: {name} is {value}, must be from 1 to {MOST_TOKENS}")
    return value


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
