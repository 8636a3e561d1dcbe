"""The history and the scores of a training as a figure."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from dreamartist_pipeline.pipelines.training.score_panels import add_panel, titles_of

if TYPE_CHECKING:
    from pandas import DataFrame
    from plotly.graph_objects import Figure
else:  # Kedro evaluates a node's annotations when it registers the pipelines; these imports are slow
    DataFrame = Figure = Any

_LOSS_COLORS = {"loss_reference": "#2a9d8f", "loss_regularization": "#a23b72", "loss_reconstruction": "#d9a441"}
_GUIDANCE_COLOR = "#2a9d8f"
_BRANCH_COLORS = {"positive": "#3457d5", "negative": "#e0662b", "shared": "#8a8a94"}
_DASHES = {"text_encoder": "dash", "words": "dot"}
_SMOOTHING_SHARE = 1 / 20  # window of the running mean, as a share of all steps
_FONT = "Inter, Helvetica, Arial, sans-serif"


def plot_history(history: DataFrame, scores: DataFrame | None = None) -> Figure:
    """Plot a training: loss, learning rates, gradient norms, guidance scale, and a panel for each of its scores.

    Args:
        history: one row per step, or none; columns `step`, `loss_reference`, `guidance_scale`, and optionally
            `loss_regularization`, `loss_reconstruction`, `lr/<group>` and `grad_norm/<branch>/<kind>`.
        scores: of `choosing.rows_of_scores`; one row per scored step, or none.
    """
    from plotly.subplots import make_subplots

    scored = {} if scores is None else titles_of(scores)
    titles = ("loss", "learning rate", "gradient norm before clipping", "guidance scale", *scored.values())
    rows = math.ceil(len(titles) / 2)
    specs: list[list[dict[str, int] | None]] = [[{}, {}] for _ in range(rows)]
    if len(titles) % 2:
        specs[-1] = [{"colspan": 2}, None]
    spacing = {"horizontal_spacing": 0.08, "vertical_spacing": 0.28 / rows}
    figure = make_subplots(rows=rows, cols=2, specs=specs, subplot_titles=titles, **spacing)
    _add_losses(figure, history)
    _add_lines(figure, history, "lr/", "legend2", row=1, col=2)
    _add_lines(figure, history, "grad_norm/", "legend3", row=2, col=1)
    guidance, line = history["guidance_scale"], {"color": _GUIDANCE_COLOR, "width": 2}
    figure.add_scatter(x=history["step"], y=guidance, line=line, name="mean over rows", showlegend=False, row=2, col=2)
    figure.update_yaxes(rangemode="tozero", row=2, col=2)
    for index, name in enumerate(scored):
        add_panel(figure, scores, name, row=3 + index // 2, col=1 + index % 2)
    return _styled(figure, rows)


def draw_curves(history: DataFrame, scores: DataFrame) -> tuple[Figure, Figure]:
    """Return the figure of a training twice, for kedro-viz and for a page of its own."""
    figure = plot_history(history, scores)
    return figure, figure


def _add_losses(figure: Figure, history: DataFrame) -> None:
    """Draw each loss pale, and its running mean: single steps differ by their random timesteps."""
    window = max(1, round(len(history) * _SMOOTHING_SHARE))
    for name, color in _LOSS_COLORS.items():
        if name not in history:
            continue
        raw = {"color": color, "width": 1}
        figure.add_scatter(
            x=history["step"], y=history[name], line=raw, opacity=0.25, showlegend=False, hoverinfo="skip", row=1, col=1
        )
        figure.add_scatter(
            x=history["step"],
            y=history[name].rolling(window, min_periods=1).mean(),
            line={"color": color, "width": 2.5},
            name=name.removeprefix("loss_"),
            legend="legend",
            row=1,
            col=1,
        )


def _add_lines(figure: Figure, history: DataFrame, prefix: str, legend: str, row: int, col: int) -> None:
    """Draw all columns of one prefix, coloured by branch."""
    for name in [name for name in history.columns if name.startswith(prefix)]:
        label = name.removeprefix(prefix)
        figure.add_scatter(
            x=history["step"],
            y=history[name],
            line=_line(label),
            name=label.replace("/", " "),
            legend=legend,
            row=row,
            col=col,
        )
    figure.update_yaxes(type="log", exponentformat="power", row=row, col=col)


def _line(label: str) -> dict[str, Any]:
    """Return the line of a series such as `unet.0.positive` or `negative/words`: colour by branch, dash by kind."""
    parts = re.split(r"[./]", label)
    color = next((_BRANCH_COLORS[part] for part in parts if part in _BRANCH_COLORS), _BRANCH_COLORS["shared"])
    dash = next((_DASHES[part] for part in parts if part in _DASHES), "solid")
    return {"color": color, "width": 2, "dash": dash}


def _styled(figure: Figure, num_rows: int) -> Figure:
    legend = {"xanchor": "right", "yanchor": "top", "bgcolor": "rgba(255,255,255,0.7)", "font": {"size": 11}}
    figure.update_layout(
        template="plotly_white",
        font={"family": _FONT, "size": 13},
        height=360 * num_rows,
        margin={"l": 60, "r": 30, "t": 50, "b": 50},
        hovermode="x unified",
        legend={"x": 0.46, "y": 1.0, **legend},
        legend2={"x": 1.0, "y": 1.0, **legend},
        legend3={"x": 0.46, "y": figure.layout.yaxis3.domain[1], **legend},
    )
    figure.update_xaxes(title_text="step", row=num_rows)
    return figure
