"""The plots of a comparison: fidelity against controllability, and against prior drift.

They can be read without colours, in print: methods are numbered, those on the Pareto front are filled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dreamartist_pipeline.pipelines.compare.tabulating import BASE, Row, title_of

if TYPE_CHECKING:
    from plotly.graph_objects import Figure
else:  # Kedro evaluates a node's annotations when it registers the pipelines; this import is slow
    Figure = Any

_FRONT, _DOMINATED, _GROUND, _BASE = "#0072b2", "#5f5f5f", "#ffffff", "#d55e00"  # Okabe and Ito; grey
_FONT = "Inter, Helvetica, Arial, sans-serif"
_MARKER_PX = 21
_AXIS: dict[str, Any] = {
    **{"showline": True, "linecolor": "#1c1c22", "ticks": "outside"},
    **{"gridcolor": "#e6e6ea", "zeroline": False},
}
_TITLE = "Means over subjects and seeds, with 95 % intervals; filled: no other method is better in both"


def plot_tradeoff(rows: Sequence[Row], x: str, y: str, front: Sequence[str], better_x: str) -> Figure:
    """Plot every method with its intervals, and the Pareto front as a line.

    Args:
        rows: of the table; the ceiling is left out.
        x: metric of the horizontal axis.
        y: metric of the vertical axis, higher is better.
        front: names of the methods on the front.
        better_x: "higher" or "lower".
    """
    from plotly.graph_objects import Figure

    figure = Figure()
    methods = [row for row in rows if row.is_method]
    on_front = sorted((row for row in methods if row.name in front), key=lambda row: row.estimates[x].mean)
    figure.add_scatter(
        x=[row.estimates[x].mean for row in on_front],
        y=[row.estimates[y].mean for row in on_front],
        mode="lines",
        line={"color": _FRONT, "width": 1.5, "dash": "dash"},
        name="Pareto front",
        hoverinfo="skip",
    )
    for number, row in enumerate(methods, start=1):
        is_best = row.name in front
        _add_point(figure, row, (x, y), str(number), _FRONT if is_best else _DOMINATED, is_best)
    for row in rows:
        if row.name == BASE:
            _add_point(figure, row, (x, y), "B", _BASE, False)
    arrow = {"higher": "higher is better", "lower": "lower is better"}[better_x]
    figure.update_xaxes(title_text=f"{title_of(x)}; {arrow}", **_AXIS)
    figure.update_yaxes(title_text=f"{title_of(y)}; higher is better", **_AXIS)
    figure.update_layout(
        template="plotly_white",
        font={"family": _FONT, "size": 13, "color": "#1c1c22"},
        width=980,
        height=560,
        margin={"l": 70, "r": 20, "t": 50, "b": 60},
        title={"text": _TITLE, "font": {"size": 14}},
        legend={"x": 1.01, "y": 1.0, "font": {"size": 12}, "itemsizing": "trace"},
    )
    return figure


def _add_point(figure: Figure, row: Row, metrics: tuple[str, str], label: str, color: str, filled: bool) -> None:
    """Draw a numbered marker with its intervals; nothing if a value is unknown."""
    x, y = (row.estimates[metric] for metric in metrics)
    if math.isnan(x.mean) or math.isnan(y.mean):
        return
    bars = {
        f"error_{axis}": {
            "array": [one.high - one.mean],
            "arrayminus": [one.mean - one.low],
            "color": color,
            "thickness": 1,
            "width": 3,
        }
        for axis, one in (("x", x), ("y", y))
        if not math.isnan(one.low)
    }
    figure.add_scatter(
        x=[x.mean],
        y=[y.mean],
        mode="markers+text",
        marker={
            "size": _MARKER_PX,
            "color": color if filled else _GROUND,
            "line": {"color": color, "width": 1.5},
            "symbol": "square" if row.name == BASE else "circle",
        },
        text=[label],
        textfont={"size": 11, "color": _GROUND if filled else color},
        name=f"{label}  {row.title}",
        hovertemplate=f"{row.title}<br>%{{x:.3f}}, %{{y:.3f}}<extra></extra>",
        **bars,
    )
