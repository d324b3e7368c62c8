"""Charts are well-formed SVG whatever they are given."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlduet.reports import charts
from vlduet.reports.charts import Series

NUMBERS = st.one_of(st.floats(-1e6, 1e6), st.sampled_from([math.nan, math.inf, -math.inf]))


@given(st.lists(st.tuples(st.floats(0, 1e4), NUMBERS), max_size=30), st.booleans())
@settings(max_examples=150, deadline=None)
def test_a_line_chart_is_well_formed_and_keeps_inside_its_box(
    points: list[tuple[float, float]], percent: bool
) -> None:
    series = [Series('a < b & "c"', tuple(sorted(points))), Series("empty", ())]
    drawn = charts.line_chart(series, title="<loss>", x_label="steps", percent=percent)
    tree = ElementTree.fromstring(drawn)
    assert "nan" not in drawn and "inf" not in drawn
    for circle in tree.iter("circle"):
        assert 0 <= float(circle.attrib["cx"]) <= charts.WIDTH
        assert 0 <= float(circle.attrib["cy"]) <= charts.HEIGHT


def test_a_chart_without_points_says_so() -> None:
    assert "nothing was measured" in charts.line_chart(
        [Series("x", ())], title="Loss", x_label="steps"
    )


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6), st.integers(2, 6))
@settings(max_examples=200, deadline=None)
def test_ticks_cover_the_range_and_are_few(low: float, span: float, count: int) -> None:
    found = charts.ticks(low, low + span, count)
    tolerance = 1e-6 * max(abs(low), abs(low + span), 1.0)
    assert found[0] <= low + tolerance and found[-1] >= low + span - tolerance
    assert found == sorted(set(found)) and 2 <= len(found) <= count + 3


@given(st.floats(-1e4, 1e4), st.floats(0, 1e4), st.booleans())
@settings(max_examples=200, deadline=None)
def test_every_tick_of_an_axis_reads_differently(low: float, span: float, percent: bool) -> None:
    drawn = charts.line_chart(
        [Series("a", ((0, low), (1, low + span)))], title="t", x_label="steps", percent=percent
    )
    texts = ElementTree.fromstring(drawn).iter("text")
    axis = [text.text for text in texts if text.attrib["x"] == str(charts.LEFT - 6)]
    assert len(axis) >= 2 and len(set(axis)) == len(axis)


def test_many_points_are_thinned_to_means() -> None:
    points = [(float(i), float(i % 2)) for i in range(3000)]
    thin = charts.thinned(points)
    assert len(thin) == charts.MAX_POINTS
    assert all(y == pytest.approx(0.5) for _, y in thin)
    assert charts.thinned(points[:10]) == points[:10]


def test_smoothing_is_a_centred_mean() -> None:
    found = charts.smoothed([(0, 0.0), (1, 3.0), (2, 0.0)], 3)
    assert found == ((0, 1.5), (1, 1.0), (2, 1.5))
    assert charts.smoothed([(0, 5.0), (1, 7.0)], 1) == ((0, 5.0), (1, 7.0))


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0, 7.0, -1.0, math.nan])
def test_a_bar_stays_on_its_track(value: float) -> None:
    drawn = charts.bar(value, low=value - 0.1, high=value + 0.1, label='hit "rate"')
    for rect in ElementTree.fromstring(drawn).iter("rect"):
        assert 0 <= float(rect.attrib.get("x", 0)) + float(rect.attrib["width"]) <= 100


def test_a_heatmap_marks_and_shortens() -> None:
    name = "<b>" + "long " * 20
    drawn = charts.heatmap(
        [[0.1, math.nan], [0.3, 0.9]],
        rows=[name, "b"],
        columns=["data:,1", "data:,2"],
        marked=[[True, False], [False, True]],
        title="t",
    )
    tree = ElementTree.fromstring(drawn)
    assert len([r for r in tree.iter("rect") if r.attrib["class"] == "mark"]) == 2
    assert len([r for r in tree.iter("rect") if r.attrib["class"] == "cell"]) == 4
    row = next(t for t in tree.iter("text"))
    assert row.text is not None and len(row.text) <= charts.CAPTION_CHARS
    assert [t.text for t in row.iter("title")] == [name]
    assert '="nan' not in drawn


def test_an_overlay_shades_by_weight() -> None:
    drawn = charts.overlay("data:,x", [[0.0, 0.2, math.nan], [0.4, 0.1, -1.0]], title='a "b"')
    tree = ElementTree.fromstring(drawn)
    shades = [float(r.attrib["fill-opacity"]) for r in tree.iter("rect")]
    assert shades == [0.0, 0.3, 0.0, 0.6, 0.15, 0.0] and tree.attrib["viewBox"] == "0 0 66 44"
    assert all(
        r.attrib["fill-opacity"] == "0.00"
        for r in ElementTree.fromstring(charts.overlay("", [[0.0]], title="")).iter("rect")
    )
