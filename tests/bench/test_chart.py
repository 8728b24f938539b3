from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ElementTree

import pytest

from hasten.bench.chart import (
    BOTTOM,
    TOP,
    Bars,
    Points,
    bar_chart,
    linear_ticks,
    log_ticks,
    number,
    scatter_chart,
    stack,
)

SVG = "{http://www.w3.org/2000/svg}"


def parse(text: str) -> ElementTree.Element:
    return ElementTree.fromstring(text)


def test_bars_stand_as_high_as_their_values() -> None:
    chart = parse(bar_chart("speed", ["1", "8"], [Bars("a", [10, 20]), Bars("b", [None, 5])], unit="tokens/s"))
    bars = [r for r in chart.iter(f"{SVG}rect") if r.find(f"{SVG}title") is not None]
    heights = [float(r.attrib["height"]) for r in bars]
    assert len(bars) == 3
    assert heights[0] / heights[1] == pytest.approx(0.5, abs=0.01)
    assert heights[2] / heights[1] == pytest.approx(0.25, abs=0.01)
    floors = {round(float(r.attrib["y"]) + float(r.attrib["height"])) for r in bars}
    assert floors == {320 - BOTTOM}
    assert bars[1].findtext(f"{SVG}title") == "a, 8: 20 tokens/s"


def test_intervals_are_drawn_within_the_plot() -> None:
    chart = bar_chart("x", ["1"], [Bars("a", [10.0], [(8.0, 19.0)])])
    low, high = map(float, re.search(r'd="M[\d.]+ ([\d.]+)V([\d.]+)M', chart).groups())  # type: ignore[union-attr]
    assert TOP <= high < low <= 320 - BOTTOM


def test_scatter_logarithmic_axis_spaces_decades_evenly() -> None:
    points = Points("a", [1, 10, 100, 0], [1, 2, 3, 4], ["p", "q", "r", "not positive"], line=True)
    chart = parse(scatter_chart("t", [points], x_label="x", y_label="y", log_x=True))
    x = [float(c.attrib["cx"]) for c in chart.iter(f"{SVG}circle")]
    assert len(x) == 3
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2)
    assert len(list(chart.iter(f"{SVG}polyline"))) == 1


def test_text_is_escaped() -> None:
    chart = bar_chart("<script>&", ["<b>"], [Bars('"<i>', [1.0])])
    assert "<script" not in chart
    assert "<b>" not in chart
    parse(chart)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 97), (3, 3), (0, 0), (-2, 7.5), (0.01, 0.013), (1e5, 2e9)])
def test_linear_ticks_cover_the_range_with_few_round_steps(low: float, high: float) -> None:
    ticks = linear_ticks(low, high)
    assert ticks[0] <= low + 1e-9
    assert ticks[-1] >= high - 1e-9
    assert 2 <= len(ticks) <= 9
    assert len({round(b - a, 12) for a, b in itertools.pairwise(ticks)}) == 1


def test_log_ticks_cover_the_range() -> None:
    assert log_ticks(0.02, 30) == pytest.approx([0.01, 0.1, 1, 10, 100])
    assert log_ticks(10, 10) == pytest.approx([10, 100])


@pytest.mark.parametrize(("value", "shown"), [(0, "0"), (0.01234, "0.0123"), (4.5, "4.5"), (1234.5, "1,234")])
def test_numbers_have_three_digits(value: float, shown: str) -> None:
    assert number(value) == shown


def test_stacked_charts_stand_below_each_other() -> None:
    charts = [bar_chart("a", ["1"], [Bars("x", [1.0])]), bar_chart("b", ["1"], [Bars("x", [1.0])], width=700)]
    root = parse(stack(charts))
    assert (root.attrib["width"], root.attrib["height"]) == ("700", "640")
    assert [child.attrib["y"] for child in root] == ["0", "320"]
