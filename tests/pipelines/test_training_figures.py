"""The training figure: four panels, every series in its own."""

from __future__ import annotations

import pandas as pd
import pytest

from dreamartist_pipeline.pipelines.training.figures import plot_history
from dreamartist_pipeline.pipelines.training.reporting import curve_name


def _history(num_steps: int) -> pd.DataFrame:
    rows = [
        {
            "step": step,
            "loss": 1.5,
            "loss_reference": 1.0 / step,
            "loss_regularization": 0.5,
            "guidance_scale": 3.0,
            "lr/unet.0.positive": 1e-3,
            "lr/words.positive.pt1": 5e-3,
            "grad_norm/negative/adapters": 0.1,
            "grad_norm/positive/adapters": 0.2,
            "grad_norm/positive/words": 0.3,
            "seconds": 0.1,
        }
        for step in range(1, num_steps + 1)
    ]
    columns = ["step", "loss", "loss_reference", "guidance_scale", "seconds"]
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=columns)


def test_every_series_has_a_trace_in_its_panel() -> None:
    figure = plot_history(_history(40))
    panels = {(trace.name, trace.yaxis) for trace in figure.data if trace.name}
    assert panels == {
        ("reference", "y"),
        ("regularization", "y"),
        ("unet.0.positive", "y2"),
        ("words.positive.pt1", "y2"),
        ("negative adapters", "y3"),
        ("positive adapters", "y3"),
        ("positive words", "y3"),
        ("mean over rows", "y4"),
    }


def test_the_loss_is_smoothed_over_a_twentieth_of_the_steps() -> None:
    figure = plot_history(_history(40))
    smooth = next(trace for trace in figure.data if trace.name == "reference")
    assert list(smooth.y[:3]) == pytest.approx([1.0, (1 + 1 / 2) / 2, (1 / 2 + 1 / 3) / 2])


def test_a_training_without_regularization_has_no_such_curve() -> None:
    figure = plot_history(_history(3).drop(columns="loss_regularization"))
    assert "regularization" not in {trace.name for trace in figure.data}


def test_a_training_of_no_steps_still_gives_a_figure() -> None:
    assert len(plot_history(_history(0)).data) > 0


def test_branches_keep_their_colours_and_words_are_dotted() -> None:
    lines = {trace.name: trace.line for trace in plot_history(_history(3)).data}
    assert lines["positive adapters"].color == lines["positive words"].color == lines["unet.0.positive"].color
    assert lines["positive adapters"].color != lines["negative adapters"].color
    assert lines["positive words"].dash == lines["words.positive.pt1"].dash == "dot"


def test_every_loss_has_a_curve_and_a_colour_of_its_own() -> None:
    figure = plot_history(_history(40).assign(loss_reconstruction=0.2))
    losses = {trace.name: trace.line.color for trace in figure.data if trace.yaxis == "y" and trace.name}
    assert losses.keys() == {"reference", "regularization", "reconstruction"}
    assert len(set(losses.values())) == 3


@pytest.mark.parametrize(
    ("column", "metric"),
    [
        ("loss", "loss/total"),
        ("loss_regularization", "loss/regularization"),
        ("guidance_scale", "training/guidance_scale"),
        ("lr/unet.0.positive", "training/lr.unet.0.positive"),
        ("grad_norm/words/pt1", "training/grad.words.pt1"),
    ],
)
def test_losses_come_before_what_the_schedules_determine(column: str, metric: str) -> None:
    assert curve_name(column) == metric
