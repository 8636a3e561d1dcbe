"""The scores of a training as panels of a figure, with the bounds and the chosen step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pandas import DataFrame
    from plotly.graph_objects import Figure

_CURVE, _CHOSEN, _BEYOND = "#0072b2", "#d55e00", "#cc79a7"  # of Okabe and Ito, told apart without colour vision
_OTHER, _FLOOR = "#009e73", "#6d6d78"
_TITLES = {
    "fidelity": "fidelity of scored steps (×: beyond a bound)",
    "agreement": "agreement with prompts",
    "drift": "drift of other images from the base model",
    "copying": "copying of the reference image",
    "loss_reference": "validation loss",
}
_LOSSES = {
    "loss_reference": ("reference image", "solid", _CURVE),
    "loss_regularization": ("regularization set", "dash", _OTHER),
}
_ABOVE_ALL = 1.08  # of the largest value or bound: the top of a panel


def titles_of(scores: DataFrame) -> dict[str, str]:
    """Return column -> title of its panel; none without scores."""
    return {name: title for name, title in _TITLES.items() if name in scores} if len(scores) else {}


def add_panel(figure: Figure, scores: DataFrame, name: str, row: int, col: int) -> None:
    """Plot one of `titles_of` over the steps: the chosen step marked, what is beyond a bound shaded.

    Args:
        figure: with subplots.
        scores: of `choosing.rows_of_scores`.
        name: the column.
        row: of the panel.
        col: of the panel.
    """
    place = {"row": row, "col": col}
    if name in _LOSSES:
        _add_losses(figure, scores, place)
    else:
        _add_score(figure, scores, name, place)
    chosen = scores[scores["chosen"].astype(bool)].iloc[0]
    label = f"chosen: step {chosen['step']:.0f}" if name == "fidelity" else ""
    line, corner = {"color": _CHOSEN, "width": 2, "dash": "dash"}, _inner_corner(chosen["step"], scores["step"])
    text = {"annotation_text": label, "annotation_font_color": _CHOSEN, "annotation_position": corner}
    figure.add_vline(chosen["step"], line=line, **text, **place)
    if name == "fidelity":
        star = {"color": _CHOSEN, "size": 17, "symbol": "star"}
        _add_points(figure, [chosen["step"]], [chosen[name]], "chosen", place, mode="markers", marker=star)


def _inner_corner(step: int, steps: Sequence[int]) -> str:
    """Return where the label of a step is within the panel."""
    return "top left" if 2 * step > min(steps) + max(steps) else "top right"


def _add_points(figure: Figure, x: Any, y: Any, name: str, place: dict[str, int], **look: Any) -> None:
    figure.add_scatter(x=x, y=y, name=name, showlegend=False, **{"mode": "lines+markers", **look}, **place)


def _add_score(figure: Figure, scores: DataFrame, name: str, place: dict[str, int]) -> None:
    marker = {"size": 8, "symbol": ["circle" if within else "x" for within in scores["within_bounds"]]}
    line = {"color": _CURVE, "width": 2}
    _add_points(figure, scores["step"], scores[name], name, place, line=line, marker=marker)
    if f"{name}_of_base" in scores:
        floor, dots = scores[f"{name}_of_base"].iloc[0], {"color": _FLOOR, "dash": "dot"}
        figure.add_hline(floor, line=dots, annotation_text=f"base model {floor:.2f}", **place)
    if f"{name}_bound" in scores:
        _add_bound(figure, name, scores[f"{name}_bound"].iloc[0], scores[name].max(), place)


def _add_bound(figure: Figure, name: str, bound: float, largest: float, place: dict[str, int]) -> None:
    """Shade what is beyond a bound: below that of the agreement, above the others."""
    top = _ABOVE_ALL * max(bound, largest)
    low, high, corner = (0.0, bound, "bottom left") if name == "agreement" else (bound, top, "top left")
    look = {"fillcolor": _BEYOND, "opacity": 0.18, "line_width": 0}
    text = f"beyond the bound, {bound:.2f}"
    figure.add_hrect(low, high, annotation_text=text, annotation_position=corner, **look, **place)
    figure.update_yaxes(range=[0.0 if name == "agreement" else None, top], **place)


def _add_losses(figure: Figure, scores: DataFrame, place: dict[str, int]) -> None:
    for name, (label, dash, color) in _LOSSES.items():
        if name not in scores:
            continue
        line = {"color": color, "width": 2, "dash": dash}
        _add_points(figure, scores["step"], scores[name], label, place, line=line)
        end = {"x": scores["step"].iloc[-1], "y": scores[name].iloc[-1], "xanchor": "right", "yanchor": "bottom"}
        figure.add_annotation(text=label, showarrow=False, font={"color": color}, yshift=4, **end, **place)
