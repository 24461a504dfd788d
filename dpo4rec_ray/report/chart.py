"""What all charts of the report share: a Vega-Lite specification with a caption, and a text for who cannot see it.

Every chart is a single view as wide as its place, so that it fits a phone. Colours of axes and text are the page's (report.js).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import altair as alt

from dpo4rec_ray.evaluation.systems import Row

HEIGHT = 240  # pixels
PER_ROW = 26  # of a chart with a row per system
ROWS = alt.NamedData("rows")  # of any chart


@dataclass(frozen=True)
class Chart:
    """A chart of the page.

    Attributes:
        key: its id.
        says: the caption: what is shown and how to read it.
        alt: what it shows, in words.
        spec: Vega-Lite, with its data.
    """

    key: str
    title: str
    says: str
    alt: str
    spec: dict[str, Any]


def made(
    key: str, title: str, says: str, alt_text: str, chart: Any, rows: Sequence[Row], height: int = HEIGHT
) -> Chart:
    """The chart over ROWS with its data and size. height: pixels.

    The rows come in after Altair has checked the specification: it would check every one of them too, which takes seconds.
    """
    fit = alt.AutoSizeParams(type="fit", contains="padding")
    sized = chart.properties(width="container", height=height, autosize=fit, description=alt_text)
    spec = sized.to_dict()
    spec["datasets"] = {**spec.get("datasets", {}), ROWS.name: list(rows)}
    return Chart(key, title, says, alt_text, spec)


def zoom(*axes: Literal["x", "y"]) -> alt.Parameter:
    """Drag to move; zoom with the wheel while shift is held, so that the page can be scrolled."""
    return alt.selection_interval(
        name="zoom", bind="scales", encodings=list(axes), zoom="wheel![event.shiftKey]"
    )


def colour(field: str, rows: Sequence[Row]) -> alt.Color:
    """Colours of a column of names; a legend where there are several."""
    several = len({row[field] for row in rows}) > 1
    return alt.Color(f"{field}:N", title=None, legend=alt.Legend(symbolOpacity=1) if several else None)


def tips(*fields: tuple[str, str, str]) -> list[alt.Tooltip]:
    """field with type, title, format."""
    return [
        alt.Tooltip(field, title=title, format=form) if form else alt.Tooltip(field, title=title)
        for field, title, form in fields
    ]


def interval_tips(what: str) -> list[tuple[str, str, str]]:
    """For `tips`: a difference and the ends of its interval."""
    return [("value:Q", what, "+.4f"), ("low:Q", "95 % from", "+.4f"), ("high:Q", "to", "+.4f")]


def zero_line(axis: str) -> alt.Chart:
    """The dashed line of no difference. axis: "x" or "y"."""
    rule = alt.Chart(alt.InlineData([{}])).mark_rule(strokeDash=[4, 3], opacity=0.7)
    return rule.encode(x=alt.XDatum(0)) if axis == "x" else rule.encode(y=alt.YDatum(0))


def intervals(base: Any, axis: Literal["x", "y"], title: str, *lines: Any) -> Any:
    """Dots with their intervals over a dashed line of no difference, along one axis. lines: what lies behind the dots."""
    few = alt.Axis(tickCount=5)  # more numbers in a row would overlap on a phone
    ends = {
        "x": {"x": alt.X("low:Q", title=title, axis=few), "x2": "high:Q"},
        "y": {"y": alt.Y("low:Q", title=title), "y2": "high:Q"},
    }
    dots = base.mark_point(filled=True, size=70, opacity=1).encode(**{axis: "value:Q"})
    rules = base.mark_rule(strokeWidth=2).encode(**ends[axis])
    return alt.layer(*lines, rules, dots, zero_line(axis)).add_params(zoom(axis))
