"""Charts from any record: always well-formed, never a crash, and nothing drawn outside the frame."""
import math
import re
import xml.etree.ElementTree as ET

from hypothesis import given, settings
from hypothesis import strategies as st

from fengshen.utils.charts import line_chart, log_ticks, nice_step, sparkline, table_html, thin, tick_label, ticks

VALUES = st.one_of(st.none(), st.floats(), st.integers(-(10**6), 10**6), st.sampled_from([0.0, -0.0, 5e-324, 1e-300, 1e299, math.nan, math.inf]))
TEXT = st.text(st.characters(blacklist_categories=("Cs", "Cc"), blacklist_characters="\ufffe\uffff"), max_size=20)


def coordinates(svg):
    "Every point of the curves of a chart."
    return [tuple(map(float, point.split(","))) for line in re.findall(r'<polyline points="([^"]*)"', svg) for point in line.split()]


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(TEXT, st.lists(st.tuples(st.integers(0, 10**7), VALUES), max_size=30), max_size=3), TEXT, st.booleans())
def test_any_series_gives_a_well_formed_picture(series, words, log_y):
    picture = line_chart(series, words, words, words, log_y=log_y)
    ET.fromstring(picture)
    assert "nan," not in picture and ",nan" not in picture and "inf," not in picture
    assert all(0 <= x <= 640 and 0 <= y <= 300 for x, y in coordinates(picture))
    assert all(0 <= float(x) <= 640 for x in re.findall(r'<path d="M(\S+)', picture))


def test_the_usual_end_of_a_bad_run_is_in_the_picture():
    "The loss becomes NaN and stays so: the axis reaches to the last step."
    picture = line_chart({"train": [(1, 7.0), (2, 9.0), (3, math.nan), (400, math.nan)]})
    assert "<title>400: nan</title>" in picture and "train nan" in picture


@settings(max_examples=200, deadline=None)
@given(st.lists(VALUES, max_size=50))
def test_any_values_give_a_sparkline(values):
    ET.fromstring(sparkline(values))


@settings(max_examples=300, deadline=None)
@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_marks_are_few_inside_and_told_apart(low, span):
    high = low + span
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        return
    step = nice_step(low, high)
    marks = ticks(low, high, step)
    assert 1 <= len(marks) <= 7
    assert all(low - step * 1e-6 <= mark <= high + step * 1e-6 for mark in marks)
    assert len({tick_label(mark, step) for mark in marks}) == len(marks)


@settings(max_examples=200, deadline=None)
@given(st.floats(-290, 290), st.floats(0.01, 300))
def test_logarithmic_marks_lie_inside(exponent, span):
    low, high = 10.0**exponent, 10.0 ** min(exponent + span, 299)
    marks = log_ticks(low, max(low, high))
    assert all(low * 0.99 <= mark <= high * 1.01 for mark in marks) and len(marks) <= 20


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=5000), st.integers(8, 400))
def test_thinning_keeps_ends_order_and_extremes(values, limit):
    run = list(enumerate(values))
    kept = thin(run, limit)
    assert len(kept) <= max(limit, 8) and kept == sorted(kept)
    assert kept[0] == run[0] and kept[-1] == run[-1]
    assert min(values) == min(y for _, y in kept) and max(values) == max(y for _, y in kept)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from(["question", "answer", "<b>&"]), st.one_of(TEXT, VALUES)), max_size=5))
def test_any_rows_give_a_table_without_foreign_markup(rows):
    tree = ET.fromstring(table_html(rows, ["question", "answer", "<b>&"]))
    assert {node.tag for node in tree.iter()} <= {"table", "thead", "tbody", "tr", "th", "td"}
    assert len(tree.findall("tbody/tr")) == len(rows)
