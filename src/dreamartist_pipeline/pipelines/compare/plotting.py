"""The plots of a comparison, fidelity against controllability and against prior drift, and of a sweep.

They can be read without colours, in print: methods are numbered, those on the Pareto front are filled.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dreamartist_pipeline.pipelines.compare.space import dotted
from dreamartist_pipeline.pipelines.compare.tabulating import BASE, Row, title_of
from dreamartist_pipeline.pipelines.compare.trials import FINISHED, STOPPED, Trial

if TYPE_CHECKING:
    from plotly.graph_objects import Figure
else:  # Kedro evaluates a node's annotations when it registers the pipelines; this import is slow
    Figure = Any

_FRONT, _DOMINATED, _GROUND, _BASE = "#0072b2", "#5f5f5f", "#ffffff", "#d55e00"  # Okabe and Ito; grey
_FONT = "Inter, Helvetica, Arial, sans-serif"
_MARKER_PX = 21
_LABEL_LENGTH, _LABEL_LINES = 16, 3
_LOG_FROM = 8  # times the smallest value, from which an axis is logarithmic
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


def plot_trials(trials: Sequence[Trial]) -> Figure:
    """Plot the score over the values of each parameter, one panel per parameter; trials stopped early are open."""
    from plotly.subplots import make_subplots

    paths = [*trials[0].values]
    figure = make_subplots(rows=1, cols=len(paths), shared_yaxes=True, horizontal_spacing=0.03)
    best = max((one for one in trials if one.state == FINISHED), key=lambda one: one.score, default=None)
    kinds = (
        ("finished", [one for one in trials if one.state == FINISHED and one is not best], _DOMINATED, "circle"),
        ("stopped early", [one for one in trials if one.state == STOPPED], _DOMINATED, "circle-open"),
        ("best", [] if best is None else [best], _FRONT, "star"),
    )
    for column, path in enumerate(paths, start=1):
        all_values = [one.values[path] for one in trials]
        numbers = all(isinstance(value, int | float) for value in all_values)
        labels = {} if numbers else _labels(all_values)
        is_log = numbers and min(all_values) > 0 and max(all_values) >= _LOG_FROM * min(all_values)
        for name, some, color, symbol in kinds:
            values = [one.values[path] for one in some]
            figure.add_scatter(
                x=values if numbers else [labels[_text(value)] for value in values],
                y=[one.score for one in some],
                mode="markers",
                marker={"color": color, "symbol": symbol, "size": 11, "line": {"width": 2, "color": color}},
                name=name,
                legendgroup=name,
                showlegend=column == 1,
                text=[f"trial {one.number}: {one.described()}" for one in some],
                hovertemplate="%{text}<br>score %{y:.4f}<extra></extra>",
                row=1,
                col=column,
            )
        kind = "log" if is_log else "linear" if numbers else "category"
        categories = [*labels.values()]
        order = {"categoryorder": "array", "categoryarray": categories, "range": [-0.5, len(categories) - 0.5]}
        figure.update_xaxes(
            title_text=dotted(path), type=kind, row=1, col=column, **({} if numbers else order), **_AXIS
        )
    figure.update_yaxes(**_AXIS)
    figure.update_yaxes(title_text="score; higher is better", col=1)
    return figure.update_layout(
        paper_bgcolor=_GROUND, plot_bgcolor=_GROUND, font={"family": _FONT, "size": 14}, margin={"t": 40}
    )


def _labels(values: Sequence[Any]) -> dict[str, str]:
    """Return text -> label of the distinct values of a category axis, in their order.

    Long texts go on in further lines; very long ones, such as groups of adapters, are cut and numbered.
    """
    texts = sorted({*map(_text, values)}, key=_place)
    cut = {text: f"{text[:_LABEL_LENGTH]}… #{number}" for number, text in enumerate(texts, start=1)}
    lines = {text: textwrap.wrap(text, _LABEL_LENGTH) for text in texts}
    return {text: "<br>".join(some) if len(some) <= _LABEL_LINES else cut[text] for text, some in lines.items()}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _place(text: str) -> tuple[float, str]:
    """Return where a value stands: numbers first."""
    try:
        return float(text), text
    except ValueError:
        return math.inf, text
