"""Charts as SVG that takes its colours from the page, so that one chart suits a light, a dark and a printed page."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

_INK, _SOFT, _RULE = "#1c1c22", "#5b5b66", "#d9d9e0"  # the page has variables for these three
_VARIABLES = {_INK: "--ink", _SOFT: "--soft", _RULE: "--rule"}
_FLOOR, _CONCEPT, _CEILING = "#5b5b66", "#3457d5", "#e0662b"  # of Okabe and Ito's kind: blue, orange, grey
_PANEL_INCHES = (4.8, 2.9)
_ROW_INCHES, _ROWS_WIDTH_INCHES = 0.36, 8.2
_TEXT_PT = 9
_LIGHTER = 0.45  # share of white in a colour on a dark page
_COLOR, _STYLES = re.compile(r"#[0-9a-f]{6}\b"), re.compile(r'style="[^"]*"')
_STYLE: Any = {  # the names are a Literal of some hundred
    "svg.fonttype": "none",  # text stays text: it can be searched, read aloud and enlarged
    "text.parse_math": False,  # labels may have a "$"
    "font.family": "DejaVu Sans",
    "font.size": _TEXT_PT,
    "text.color": _INK,
    "axes.edgecolor": _RULE,
    "axes.labelcolor": _SOFT,
    "axes.titlecolor": _INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _RULE,
    "grid.linewidth": 0.6,
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
    "legend.frameon": False,
    "legend.labelcolor": _INK,
}


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        svg: an element that takes the width of its place.
        description: what it shows, for those who do not see it.
        colors: that it uses, apart from those of text and rules.
    """

    svg: Markup
    description: str
    colors: frozenset[str]


@dataclass(frozen=True)
class Interval:
    """An estimate; NaN for a bound that is not known.

    Attributes:
        mean: the estimate.
        low: the lower end.
        high: the upper end.
    """

    mean: float
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class IntervalRow:
    """A row of an interval chart.

    Attributes:
        label: of the row.
        concept: measured.
        floor: of the base model.
        ceiling: of the reference after the autoencoder, or NaN.
    """

    label: str
    concept: Interval
    floor: Interval
    ceiling: float = math.nan


def line_charts(figure: Any, name: str) -> list[Chart]:
    """Draw the panels of a Plotly figure, one chart per panel; notes beside lines are left out.

    Args:
        figure: of scatter traces, lines across panels and shaded ranges of values, in subplots with titles.
        name: prefix of the ids of the charts.
    """
    axes = sorted({trace.yaxis or "y" for trace in figure.data}, key=_axis_number)
    titles = [annotation.text for annotation in figure.layout.annotations]
    return [
        _line_chart(
            [trace for trace in figure.data if (trace.yaxis or "y") == axis],
            [shape for shape in figure.layout.shapes if shape.yref.split()[0] == axis],
            titles[index] if index < len(titles) else "",
            figure.layout[f"yaxis{axis[1:]}"],
            f"{name}-{index}",
        )
        for index, axis in enumerate(axes)
    ]


def _axis_number(axis: str) -> int:
    return int(axis[1:] or 1)


def _line_chart(traces: Sequence[Any], shapes: Sequence[Any], title: str, scale: Any, name: str) -> Chart:
    """Draw traces and shapes; `scale` is the y axis of Plotly's layout."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(*_PANEL_INCHES)
        for shape in shapes:
            _draw_shape(axes, shape)
        for trace in traces:
            _draw_line(axes, trace)
        axes.set_title(title)
        axes.set_xlabel("step")
        if scale.type == "log":
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        elif scale.range:
            axes.set_ylim(*scale.range)
        if scale.rangemode == "tozero":
            axes.set_ylim(bottom=0)
        names = [trace.name for trace in traces if trace.showlegend is not False and trace.name]
        if names:
            figure.legend(fontsize=7.5, loc="outside lower left", ncols=3, columnspacing=1.2)
        steps = max((round(max(trace.x)) for trace in traces if len(trace.x)), default=0)
        description = f"{title} over {steps} steps" + (f": {', '.join(names)}" if names else "")
        return _chart(figure, name, description)


_DASHES = {"dash": "--", "dot": ":", "dashdot": "-."}
_MARKERS = {"x": "x", "star": "*"}


def _draw_shape(axes: Axes, shape: Any) -> None:
    """Draw a shaded range of values, or a line across the panel at one step or at one value."""
    if shape.type == "rect":
        axes.axhspan(shape.y0, shape.y1, facecolor=to_hex(shape.fillcolor), alpha=shape.opacity)
        return
    dash = _DASHES.get(shape.line.dash or "", "-")
    look: Any = {"color": to_hex(shape.line.color), "linestyle": dash, "linewidth": 1.2}
    if shape.yref.endswith("domain"):
        axes.axvline(shape.x0, **look)
    else:
        axes.axhline(shape.y0, **look)


def _draw_line(axes: Axes, trace: Any) -> None:
    steps, values = np.asarray(trace.x, dtype=float), np.asarray(trace.y, dtype=float)
    color = to_hex(trace.line.color or trace.marker.color or _CONCEPT)
    if "markers" in (trace.mode or ""):
        _draw_markers(axes, trace.marker.symbol, steps, values, color)
    axes.plot(
        steps,
        values,
        color=color,
        linestyle=_DASHES.get(trace.line.dash or "", "-"),
        linewidth=0.7 * (trace.line.width or 2),
        alpha=trace.opacity or 1,
        marker="o" if len(values) == 1 and "markers" not in (trace.mode or "") else "",
        label="_" if trace.showlegend is False else trace.name,
    )


def _draw_markers(axes: Axes, symbols: Any, steps: np.ndarray, values: np.ndarray, color: str) -> None:
    """Draw Plotly's symbols: one per point, or one for all."""
    each = [symbols] * len(values) if symbols is None or isinstance(symbols, str) else symbols
    for step, value, symbol in zip(steps, values, each, strict=True):
        axes.plot([step], [value], linestyle="", marker=_MARKERS.get(symbol, "o"), color=color, label="_")


def interval_chart(rows: Sequence[IntervalRow], axis: str, name: str, as_percent: bool = False) -> Chart:
    """Draw measures with their intervals, the floor and the ceiling beside them; one row per measure.

    Shapes differ as well as colours: a ring for the floor, a dot for the concept, a triangle for the ceiling.

    Args:
        rows: from the top.
        axis: name of the values.
        name: prefix of the ids of the chart.
        as_percent: whether values are shares.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(_ROWS_WIDTH_INCHES, 1.05 + _ROW_INCHES * len(rows))
        for index, row in enumerate(rows):
            _draw_interval(axes, index + 0.14, row.floor, _FLOOR, "o", "none", "base model (floor)", index == 0)
            _draw_interval(axes, index - 0.14, row.concept, _CONCEPT, "o", _CONCEPT, "concept", index == 0)
        ceilings = [(row.ceiling, index) for index, row in enumerate(rows) if math.isfinite(row.ceiling)]
        if ceilings:
            places, heights = zip(*ceilings, strict=True)
            axes.plot(
                places, heights, linestyle="", marker="v", color=_CEILING, label="reference after the autoencoder"
            )
        axes.set_yticks(range(len(rows)), [row.label for row in rows])
        axes.tick_params(axis="y", length=0, labelcolor=_INK)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(axis)
        if as_percent:
            axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2, handletextpad=0.4)
        labels = "; ".join(row.label for row in rows)
        return _chart(figure, name, f"{axis} with 95 % intervals, concept beside base model: {labels}")


def _draw_interval(
    axes: Axes, y: float, interval: Interval, color: str, marker: str, fill: str, label: str, is_labelled: bool
) -> None:
    if math.isfinite(interval.low) and math.isfinite(interval.high):
        axes.plot([interval.low, interval.high], [y, y], color=color, linewidth=2, solid_capstyle="butt")
    shown = label if is_labelled else "_"
    axes.plot([interval.mean], [y], linestyle="", marker=marker, color=color, markerfacecolor=fill, label=shown)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _chart(figure: Figure, name: str, description: str) -> Chart:
    """Return a figure as an element of the page."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):  # the same ids each time
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = re.sub(r"<metadata>.*?</metadata>", "", file.getvalue(), flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg[svg.index("<svg") :])  # unique in the page
    opening, rest = svg.split(">", 1)
    opening = re.sub(r' (width|height)="[^"]*"', "", opening)  # of the place on the page; the view box has the shape
    colors = {color for style in _STYLES.findall(rest) for color in _COLOR.findall(style)}
    rest = _STYLES.sub(lambda style: _COLOR.sub(lambda color: f"var({_variable(color[0])})", style[0]), rest)
    svg = f'{opening} role="img" aria-label="{escape(description)}">{rest}'
    return Chart(Markup(svg), description, frozenset(colors - _VARIABLES.keys()))  # matplotlib escapes its texts


def _variable(color: str) -> str:
    return _VARIABLES.get(color, f"--c{color[1:]}")


def color_rules(colors: Iterable[str], is_dark: bool) -> str:
    """Return the declarations of the colours of charts; on a dark page they are lighter."""
    return " ".join(f"{_variable(color)}: {_lighter(color) if is_dark else color};" for color in sorted(set(colors)))


def _lighter(color: str) -> str:
    red, green, blue = (share + (1 - share) * _LIGHTER for share in to_rgb(color))
    return to_hex((red, green, blue))
