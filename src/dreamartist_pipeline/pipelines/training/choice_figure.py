"""The scores of a training as a figure, with the bounds and the chosen step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dreamartist_pipeline.pipelines.training.figures import FONT

if TYPE_CHECKING:
    from pandas import DataFrame
    from plotly.graph_objects import Figure
else:  # Kedro evaluates a node's annotations when it registers the pipelines; these imports are slow
    DataFrame = Figure = Any

_CURVE, _CHOSEN, _BEYOND = "#0072b2", "#d55e00", "#cc79a7"  # of Okabe and Ito, told apart without colour vision
_OTHER, _FLOOR = "#009e73", "#6d6d78"
_PANELS = (  # column, title; None: validation losses
    ("fidelity", "fidelity: object and reference's object (×: a bound is passed)"),
    ("agreement", "agreement with prompts"),
    ("drift", "drift of other images from the base model"),
    ("copying", "copying of the reference image"),
    (None, "validation loss"),
)
_LOSSES = {
    "loss_reference": ("reference image", "solid", _CURVE),
    "loss_regularization": ("regularization set", "dash", _OTHER),
}
_ABOVE_ALL = 1.08  # of the largest value or bound: the top of a panel


def draw_choice(scores: DataFrame) -> tuple[Figure, Figure]:
    """Return the figure of a training's scores twice, for kedro-viz and for a page of its own."""
    figure = plot_choice(scores)
    return figure, figure


def plot_choice(scores: DataFrame) -> Figure:
    """Plot every score over the steps: the chosen step marked, what is beyond a bound shaded.

    Args:
        scores: of `choosing.rows_of_scores`; without rows, the figure says so.
    """
    from plotly.subplots import make_subplots

    shown = [(name, title) for name, title in _PANELS if name is None or name in scores]
    titles = [title for _, title in shown]
    figure = make_subplots(rows=len(shown), cols=1, shared_xaxes=True, subplot_titles=titles, vertical_spacing=0.055)
    for row, (name, _) in enumerate(shown, start=1):
        if len(scores) and name is None:
            _add_losses(figure, scores, row)
        elif len(scores):
            _add_score(figure, scores, str(name), row)
    _mark_chosen(figure, scores)
    return _styled(figure, len(shown))


def _add_score(figure: Figure, scores: DataFrame, name: str, row: int) -> None:
    marker = {"size": 8, "symbol": ["circle" if within else "x" for within in scores["within_bounds"]]}
    line = {"color": _CURVE, "width": 2}
    figure.add_scatter(
        x=scores["step"], y=scores[name], mode="lines+markers", line=line, marker=marker, name=name, row=row, col=1
    )
    if f"{name}_of_base" in scores:
        floor = scores[f"{name}_of_base"].iloc[0]
        figure.add_hline(
            floor, line={"color": _FLOOR, "dash": "dot"}, annotation_text=f"base model {floor:.2f}", row=row, col=1
        )
    if f"{name}_bound" in scores:
        _add_bound(figure, name, scores[f"{name}_bound"].iloc[0], scores[name].max(), row)


def _add_bound(figure: Figure, name: str, bound: float, largest: float, row: int) -> None:
    """Shade what is beyond a bound: below that of the agreement, above the others."""
    top = _ABOVE_ALL * max(bound, largest)
    low, high = (0.0, bound) if name == "agreement" else (bound, top)
    text, place = f"beyond the bound, {bound:.2f}", "bottom left" if name == "agreement" else "top left"
    look = {"fillcolor": _BEYOND, "opacity": 0.18, "line_width": 0}
    figure.add_hrect(low, high, annotation_text=text, annotation_position=place, **look, row=row, col=1)
    figure.update_yaxes(range=[0.0 if name == "agreement" else None, top], row=row, col=1)


def _add_losses(figure: Figure, scores: DataFrame, row: int) -> None:
    for name, (label, dash, color) in _LOSSES.items():
        if name in scores:
            line = {"color": color, "width": 2, "dash": dash}
            figure.add_scatter(
                x=scores["step"], y=scores[name], mode="lines+markers", line=line, name=label, row=row, col=1
            )
            end = {
                "x": scores["step"].iloc[-1],
                "y": scores[name].iloc[-1],
                "xanchor": "right",
                "yanchor": "bottom",
                "yshift": 4,
            }
            figure.add_annotation(text=label, showarrow=False, font={"color": color}, **end, row=row, col=1)


def _mark_chosen(figure: Figure, scores: DataFrame) -> None:
    chosen = scores[scores["chosen"].astype(bool)]
    if not len(chosen):
        figure.add_annotation(
            text="This training was not scored.", showarrow=False, xref="paper", yref="paper", x=0.5, y=0.5
        )
        return
    best = chosen.iloc[0]
    figure.add_vline(best["step"], line={"color": _CHOSEN, "width": 2, "dash": "dash"})
    figure.add_annotation(
        text=f"chosen: step {best['step']:.0f}",
        x=best["step"],
        y=1.0,
        yref="y domain",
        yanchor="bottom",
        showarrow=False,
        font={"color": _CHOSEN, "size": 14},
    )
    star = {"color": _CHOSEN, "size": 17, "symbol": "star"}
    figure.add_scatter(x=[best["step"]], y=[best["fidelity"]], mode="markers", marker=star, name="chosen", row=1, col=1)


def _styled(figure: Figure, num_panels: int) -> Figure:
    figure.update_layout(
        template="plotly_white",
        font={"family": FONT, "size": 13},
        height=230 * num_panels,
        margin={"l": 60, "r": 30, "t": 60, "b": 50},
        hovermode="x unified",
        showlegend=False,
    )
    figure.update_xaxes(title_text="step", row=num_panels)
    return figure
