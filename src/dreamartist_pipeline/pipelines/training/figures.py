"""The training history as a figure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pandas import DataFrame
    from plotly.graph_objects import Figure
else:  # Kedro resolves a node's hints when it registers the pipelines, without importing either
    DataFrame = Figure = Any

_COLORS = ("#2a9d8f", "#a23b72")  # of reference and regularization
_BRANCH_COLORS = {"positive": "#3457d5", "negative": "#e0662b", "shared": "#8a8a94"}
_DASHES = {"text_encoder": "dash", "words": "dot"}
_SMOOTHING_SHARE = 1 / 20  # of all steps, the window of the running mean
_FONT = "Inter, Helvetica, Arial, sans-serif"


def training_figure(history: DataFrame) -> Figure:
    """Plot a training history in four panels: loss, learning rates, gradient norms, guidance scale.

    Args:
        history: one row per step with the columns `step`, `loss_reference`, `guidance_scale`, where there are any
            `loss_regularization`, `loss_reconstruction`, `lr/<group>` and `grad_norm/<branch>/<kind>`. It may have no
            rows.
    """
    from plotly.subplots import make_subplots

    titles = ("loss", "learning rate", "gradient norm before clipping", "guidance scale")
    figure = make_subplots(rows=2, cols=2, subplot_titles=titles, horizontal_spacing=0.08, vertical_spacing=0.14)
    losses = [name for name in ("loss_reference", "loss_regularization", "loss_reconstruction") if name in history]
    _add_smoothed(figure, history, losses)
    _add_lines(figure, history, "lr/", panel=(1, 2))
    _add_lines(figure, history, "grad_norm/", panel=(2, 1))
    _add_guidance(figure, history)
    return _styled(figure)


def _add_smoothed(figure: Figure, history: DataFrame, columns: Sequence[str]) -> None:
    """Draw each loss pale as it was, and its running mean over it: single steps differ by their timesteps' noise."""
    import plotly.graph_objects as go

    window = max(1, round(len(history) * _SMOOTHING_SHARE))
    for name, color in zip(columns, _COLORS, strict=False):
        label = name.removeprefix("loss_")
        raw = {"color": color, "width": 1}
        figure.add_trace(
            go.Scatter(x=history["step"], y=history[name], line=raw, opacity=0.25, showlegend=False, hoverinfo="skip"),
            row=1,
            col=1,
        )
        smooth = history[name].rolling(window, min_periods=1).mean()
        line = {"color": color, "width": 2.5}
        figure.add_trace(go.Scatter(x=history["step"], y=smooth, line=line, name=label, legend="legend"), row=1, col=1)


def _add_lines(figure: Figure, history: DataFrame, prefix: str, panel: tuple[int, int]) -> None:
    """Draw all columns of one prefix; branches keep their colour, whatever the order of the columns."""
    import plotly.graph_objects as go

    columns = [name for name in history.columns if name.startswith(prefix)]
    for name in columns:
        label = name.removeprefix(prefix)
        legend = "legend2" if panel == (1, 2) else "legend3"
        trace = go.Scatter(
            x=history["step"], y=history[name], line=_line(label), name=label.replace("/", " "), legend=legend
        )
        figure.add_trace(trace, row=panel[0], col=panel[1])
    figure.update_yaxes(type="log", exponentformat="power", row=panel[0], col=panel[1])


def _line(label: str) -> dict[str, Any]:
    """Return the line of a series such as `unet.0.positive` or `negative/words`: colour by branch, dash by network."""
    parts = re.split(r"[./]", label)
    color = next((_BRANCH_COLORS[part] for part in parts if part in _BRANCH_COLORS), _BRANCH_COLORS["shared"])
    dash = next((_DASHES[part] for part in parts if part in _DASHES), "solid")
    return {"color": color, "width": 2, "dash": dash}


def _add_guidance(figure: Figure, history: DataFrame) -> None:
    import plotly.graph_objects as go

    line = {"color": _COLORS[0], "width": 2}
    trace = go.Scatter(
        x=history["step"], y=history["guidance_scale"], line=line, name="mean over rows", showlegend=False
    )
    figure.add_trace(trace, row=2, col=2)
    figure.update_yaxes(rangemode="tozero", row=2, col=2)


def _styled(figure: Figure) -> Figure:
    legend = {"xanchor": "right", "yanchor": "top", "bgcolor": "rgba(255,255,255,0.7)", "font": {"size": 11}}
    figure.update_layout(
        template="plotly_white",
        font={"family": _FONT, "size": 13},
        height=720,
        margin={"l": 60, "r": 30, "t": 50, "b": 50},
        hovermode="x unified",
        legend={"x": 0.46, "y": 1.0, **legend},
        legend2={"x": 1.0, "y": 1.0, **legend},
        legend3={"x": 0.46, "y": 0.43, **legend},
    )
    figure.update_xaxes(title_text="step", row=2)
    return figure
