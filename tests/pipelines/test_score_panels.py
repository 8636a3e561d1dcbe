"""The panels of the scores: one for each, the bounds and the chosen step."""

from __future__ import annotations

from typing import Any

from pandas import DataFrame

from dreamartist_pipeline.core.choosing import Bounds, Score, rows_of_scores
from dreamartist_pipeline.pipelines.training.figures import draw_curves, plot_history
from dreamartist_pipeline.pipelines.training.scoring import scores_table

HISTORY = DataFrame({"step": [1, 2], "loss_reference": [0.5, 0.4], "guidance_scale": [3.0, 3.0]})
LOSSES = {"reference image", "regularization set"}
SCORES = {"fidelity", "agreement", "drift", "copying", "chosen"}


def table(agreement: float | None = 0.9, loss_regularization: float | None = 0.2) -> DataFrame:
    found = [
        Score(step, step / 1000, agreement, 0.1, 0.7 if step == 120 else 0.2, 1.0, loss_regularization)
        for step in (40, 80, 120)
    ]
    bounds = Bounds(None if agreement is None else 0.6, drift=0.5, copying=0.4)
    return DataFrame(rows_of_scores(found, bounds, {"fidelity": 0.03}, chosen=80))


def lines(figure: Any) -> dict[str, list[float]]:
    return {trace.name: list(trace.y) for trace in figure.data}


def test_every_score_has_a_curve_and_the_chosen_step_a_star() -> None:
    drawn, plain = lines(plot_history(HISTORY, table())), lines(plot_history(HISTORY))
    assert drawn.keys() - plain.keys() == SCORES | LOSSES
    assert drawn["chosen"] == [0.08]
    unmeasured = lines(plot_history(HISTORY, table(None, None)))
    assert drawn.keys() - unmeasured.keys() == {"agreement", "regularization set"}


def test_bounds_are_shaded_and_steps_beyond_them_crossed() -> None:
    figure = plot_history(HISTORY, table())
    shaded = sorted((shape.y0, shape.y1) for shape in figure.layout.shapes if shape.type == "rect")
    assert [low for low, _ in shaded] == [0.0, 0.4, 0.5] and shaded[0][1] == 0.6
    assert shaded[1][1] > 0.7  # above the highest value, too
    (fidelity,) = (trace for trace in figure.data if trace.name == "fidelity")
    assert list(fidelity.marker.symbol) == ["circle", "circle", "x"]
    texts = " ".join(annotation.text for annotation in figure.layout.annotations)
    assert "step 80" in texts and "0.40" in texts


def test_a_training_without_scores_has_the_figure_of_its_history() -> None:
    figure, again = draw_curves(HISTORY, scores_table(None))
    assert again is figure and figure == plot_history(HISTORY)
