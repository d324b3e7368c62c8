"""Charts are well-formed SVG whatever they are given, and shades follow the values."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlduet.reports import charts
from vlduet.reports.charts import LineChart, Series

NUMBERS = st.one_of(st.floats(-1e6, 1e6), st.sampled_from([math.nan, math.inf, -math.inf]))


def draw(*series: Series, title: str = "Loss", percent: bool = False) -> ElementTree.Element:
    """Return the parsed SVG of a chart."""
    return ElementTree.fromstring(
        charts.line_chart(LineChart(title, "", series, x_label="steps", percent=percent))
    )


def axis_labels(svg: ElementTree.Element) -> list[str]:
    """Return the labels of the y axis, which end at its left edge."""
    texts = [text for text in svg.iter("text") if "text-anchor: end" in text.attrib["style"]]
    left = min(float(text.attrib["x"]) for text in texts)
    return [text.text or "" for text in texts if float(text.attrib["x"]) == left]


@given(st.lists(st.tuples(st.floats(0, 1e4), NUMBERS), max_size=30), st.booleans())
@settings(max_examples=60, deadline=None)
def test_line_chart_is_well_formed_and_stays_inside_its_box(
    points: list[tuple[float, float]], percent: bool
) -> None:
    line = Series('a < b & "c"', tuple(sorted(points)))
    chart = LineChart("<loss>", "", (line, Series("empty", ())), percent=percent)
    text = charts.line_chart(chart)
    assert "nan" not in text and "inf" not in text
    svg = ElementTree.fromstring(text)
    if svg.tag == "p":
        assert not [y for _, y in points if math.isfinite(y)]
        return
    assert svg.attrib["aria-label"].startswith('<loss>: a < b & "c" from ')
    width, height = map(float, svg.attrib["viewBox"].split()[2:])
    for label in svg.iter("text"):
        assert 0 <= float(label.attrib["x"]) <= width
        assert 0 <= float(label.attrib["y"]) <= height


def test_chart_without_points_says_so() -> None:
    text = charts.line_chart(LineChart("<Loss>", "", (Series("x", ((0, math.nan),)),)))
    assert text == "<p class='note'>&lt;Loss&gt;: nothing was measured.</p>"


def test_chart_is_reproducible_and_has_no_ids_references_styles_or_addresses() -> None:
    chart = LineChart("t", "", (Series("a", ((0, 1.0), (1, 2.0))), Series("b", ((0, 3.0), (1, 1)))))
    text = charts.line_chart(chart)
    assert text == charts.line_chart(chart)
    for forbidden in (" id=", "url(", "<style", "http", "xlink", "<use", "font-family"):
        assert forbidden not in text


def test_lines_and_texts_have_the_colours_of_the_page() -> None:
    svg = draw(Series("a", ((0, 1.0), (1, 2.0))), Series("b", ((0, 3.0), (1, 1.5))))
    styles = [element.attrib["style"] for element in svg.iter() if "style" in element.attrib]
    assert not [style for style in styles if "#" in style], "every colour is a CSS variable"
    ends = {text.text: text.attrib["style"] for text in svg.iter("text")}
    assert "fill: var(--a)" in ends["2.00"] and "fill: var(--b)" in ends["1.50"]
    strokes = [style for style in styles if "stroke: var(--a)" in style]
    assert len(strokes) == 1


@given(st.floats(-1e4, 1e4), st.floats(0, 1e4), st.booleans())
@settings(max_examples=60, deadline=None)
def test_every_tick_of_an_axis_has_another_label(low: float, span: float, percent: bool) -> None:
    labels = axis_labels(draw(Series("a", ((0, low), (1, low + span))), percent=percent))
    assert 2 <= len(labels) <= 8 and len(set(labels)) == len(labels)


def test_fractions_are_labelled_in_percent_from_zero() -> None:
    labels = axis_labels(draw(Series("a", ((0, 0.4), (1, 0.6))), percent=True))
    assert labels[0] == "0 %" and labels[-1] == "60 %"


def test_line_of_many_points_is_smoothed() -> None:
    points = tuple((float(i), float(i % 2)) for i in range(1000))
    svg = draw(Series("a", points))
    assert svg.attrib["aria-label"] == "Loss: a from 0.48 to 0.52"
    assert draw(Series("a", points[:50])).attrib["aria-label"] == "Loss: a from 0.00 to 1.00"


def test_moving_average_is_centred() -> None:
    points = [(0, 0.0), (1, 3.0), (2, 0.0)]
    assert charts.moving_average(points, 3) == [(0, 1.5), (1, 1.0), (2, 1.5)]
    assert charts.moving_average([(0, 5.0), (1, 7.0)], 1) == [(0, 5.0), (1, 7.0)]


@pytest.mark.parametrize(
    ("value", "percent"),
    [(0.0, "0.00"), (0.5, "25.00"), (7.0, "100.00"), (-1.0, "0.00"), (math.nan, "0.00")],
)
def test_bar_stays_on_its_track(value: float, percent: str) -> None:
    assert charts.percent_of(value, 2.0) == percent


def test_cell_opacities_rise_from_the_lowest_to_the_highest_value() -> None:
    opacities = charts.cell_opacities([[0.1, math.nan], [0.3, 0.9]])
    np.testing.assert_allclose(opacities, [[0.04, 0.04], [0.04 + 0.96 * 0.25**1.5, 1.0]])
    np.testing.assert_allclose(charts.cell_opacities([[0.5, 0.5]]), 0.04)
    assert charts.finite_range([[0.1, math.inf], [0.3, 0.9]]) == (0.1, 0.9)
    assert charts.finite_range([[math.nan]]) == (0.0, 0.0)


def test_weight_opacities_are_relative_to_the_largest_weight() -> None:
    opacities = charts.weight_opacities([[0.0, 0.2, math.nan], [0.4, 0.1, -1.0]])
    np.testing.assert_allclose(opacities, [[0.0, 0.3, 0.0], [0.6, 0.15, 0.0]])
    assert charts.weight_opacities([[0.0]]).tolist() == [[0.0]]


def test_values_are_relative_to_the_maximum_of_their_row() -> None:
    shares = charts.relative_to_row_maximum([[1.0, 2.0], [0.5, 0.25]])
    assert shares.tolist() == [[0.5, 1.0], [1.0, 0.5]]
