"""The table of before and after that every report shows, and the outcome in a sentence."""

from __future__ import annotations

from typing import Any

from hasten.search.budget import SHOWN

Json = dict[str, Any]
Row = tuple[str, str, str, str]


def rows(document: Json) -> list[Row]:
    """(what, original, accelerated, change) of the before-and-after table."""
    before, after, gain = document["before"], document["after"], document["speedup"]
    proof = document["verdict"]["attempts"][-1]
    held = {part["measure"]: _loss(document, part, reading) for part, reading in _readings(document, proof)}
    ratio = f"{(after['perplexity'] / before['perplexity'] - 1) * 100:+.2f}%"
    speeds = [
        (
            "prefill, tokens/s (share of limit)",
            _rate(before, "prefill"),
            _rate(after, "prefill"),
            _gain(gain["prefill"]),
        ),
        ("decode, tokens/s (share of limit)", _rate(before, "decode"), _rate(after, "decode"), _gain(gain["decode"])),
    ]
    if document["objective"] == "throughput":
        speeds.append(("both in turn", "", "", _gain(gain["throughput"])))
    return [
        (
            "perplexity (95% interval)",
            _interval(before["perplexity"], before["ci95"]),
            _interval(after["perplexity"], after["ci95"]),
            held.get("ppl", ratio),
        ),
        ("KL divergence to the original, nats", "0", f"{after['kl_divergence']:.4f}", held.get("kl", "")),
        ("top-1 agreement with the original", "100%", f"{after['top1_agreement'] * 100:.1f}%", ""),
        *(
            (
                f"accuracy on {path.rsplit('/')[-1]}, {found['questions']:,} questions",
                f"{found['before']:.1%}",
                f"{found['after']:.1%}",
                f"{(found['after'] - found['before']) * 100:+.1f} points",
            )
            for path, found in proof.get("tasks", {}).items()
        ),
        *speeds,
        (
            "time to first token, ms (share of limit)",
            _first_token(before),
            _first_token(after),
            f"{before['ttft_ms'] / after['ttft_ms']:.2f}x",
        ),
        ("size on disk", *_sizes(before["bytes_on_disk"], after["bytes_on_disk"])),
        ("peak memory", *_sizes(before["peak_memory"], after["peak_memory"])),
        (
            "bits per weight",
            f"{before['bits_per_weight']:.2f}",
            f"{after['bits_per_weight']:.2f}",
            f"{after['bits_per_weight'] / before['bits_per_weight']:.2f}x",
        ),
    ]


def _readings(document: Json, attempt: Json) -> list[tuple[Json, Json]]:
    """Each part of the budget with its reading."""
    return list(zip(document["budget"]["parts"], attempt["readings"], strict=True))


def _interval(value: float, ci95: list[float]) -> str:
    return f"{value:.3f} ({ci95[0]:.3f} to {ci95[1]:.3f})"


def loss(measure: str, value: float | None, unit: bool = True) -> str:
    """A loss in its measure's unit."""
    factor, name, digits = SHOWN[measure]
    if value is None:
        return "not a number"
    return f"{value * factor:{'+' if measure == 'ppl' else ''}.{digits}f}{name if unit else ''}"


def _loss(document: Json, part: Json, reading: Json) -> str:
    level = "" if reading["level"] == 0.95 else f", {reading['level']:.0%} interval"
    ends = [loss(part["measure"], reading[end], unit=False) for end in ("low", "high")]
    shown = loss(part["measure"], reading["estimate"], unit=part["measure"] != "kl")
    return f"{shown} ({ends[0]} to {ends[1]}{level})"


def _rate(side: Json, part: str) -> str:
    return f"{side[f'{part}_tokens_per_second']:,.0f} ({side[f'{part}_share_of_limit'] * 100:.0f}%)"


def _first_token(side: Json) -> str:
    return f"{side['ttft_ms']:,.1f} ({side['ttft_share_of_limit'] * 100:.0f}%)"


def _gain(gain: Json) -> str:
    return f"{gain['estimate']:.2f}x ({gain['low']:.2f} to {gain['high']:.2f})"


def _sizes(before: int | None, after: int | None) -> tuple[str, str, str]:
    texts = [f"{n / 1e6:,.1f} MB" if n else "not measured" for n in (before, after)]
    return texts[0], texts[1], f"{after / before:.2f}x" if before and after else ""


def headline(document: Json) -> str:
    """The outcome in a sentence."""
    if document["after"] is None:
        return str(document["verdict"]["reason"])
    proof, part = document["verdict"]["attempts"][-1], document["objective"]
    part = part if part in document["speedup"] else "decode"
    gain = f"{document['speedup'][part]['estimate']:.2f} times the {part} speed"
    size = document["after"]["bytes_on_disk"] / document["before"]["bytes_on_disk"]
    told = [
        f"{one['what']} {_loss(document, one, reading)} on {reading['tokens']:,} held-out "
        f"{'questions' if one['measure'] == 'task' else 'tokens'}"
        + (f" (at most {loss(one['measure'], reading['high'])})" if one["limit"] is not None else "")
        for one, reading in _readings(document, proof)
    ]
    memory = document["objective"] == "memory"
    first = f"{size:.0%} of the size, at {gain}" if memory else f"{gain} at {size:.0%} of the size"
    first += f"; {'; '.join(told)}"
    if document["aim"]["target"]:
        reached = document["after"]["rate"]
        first += f": it makes {reached:,.1f} tokens a second, the target is {document['aim']['target']}"
    if document["budget"]["limit"] is None:
        return first
    level = f"the {proof['level']:.0%} interval"
    return f"{first}: the budget {document['budget']['text']} holds at the upper end of {level}"
