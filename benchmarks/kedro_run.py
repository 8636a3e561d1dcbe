"""Compare `kedro run --pipeline train`, MLflow included, with the bare training loop; where the other seconds go.

    python benchmarks/kedro_run.py
    python benchmarks/kedro_run.py --device cuda --steps 400

The steps per second of a run are those between two points of its loss curve in MLflow (wall-clock), without the
intervals that have a preview in them. The bare loop trains the same number of steps with the same rows, without Kedro,
MLflow and progress bar. Runs and bare loops alternate. The subject is `speed`; its MLflow database is temporary.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreamartist_pipeline.core.training import fit
from speed.commands import Finished, kedro_run
from speed.designs import make_data, our_design
from speed.report import ROOT, Report, Row
from speed.settings import Settings, add_options, read_settings
from speed.timing import describe_machine

SUBJECT, EXPERIMENT = "speed", "dreamartist"
BARE, FIRST, LATER = "bare loop", "first run", "later runs"
_CURVE = "loss/total"
_MIN_STEPS = 12
_LOGGING_S = 0.01  # between two points that are logged together


@dataclass(frozen=True, order=True)
class Point:
    """A point of the loss curve: finished steps, and Unix time in seconds."""

    step: int
    time: float


@dataclass(frozen=True)
class Timeline:
    """Where the seconds of a run went.

    Attributes:
        steps_per_second: in the training loop, without previews.
        start_up: until MLflow's run begins: imports, configuration, early checks.
        first_step: from the command to the first step.
        preview: of one preview; None without any.
        after: from the last step to the end of the command.
        whole: the command.
    """

    steps_per_second: float
    start_up: float
    first_step: float
    preview: float | None
    after: float
    whole: float

    def columns(self) -> dict[str, float]:
        """Return the columns of the table."""
        named = {
            "steps per second": self.steps_per_second,
            "start-up, s": self.start_up,
            "start to first step, s": self.first_step,
            "a preview, s": self.preview,
            "after the last step, s": self.after,
            "whole command, s": self.whole,
        }
        return {name: value for name, value in named.items() if value is not None}


def make_timeline(points: Sequence[Point], preview_every: int, run_began: float, command: Finished) -> Timeline:
    """Return the timeline of a run.

    Args:
        points: of the loss curve, in order.
        preview_every: steps between previews; they are drawn after the point of their step. 0 for none.
        run_began: Unix time at which MLflow's run began.
        command: the finished command.
    """
    steps, seconds, previews = 0, 0.0, []
    ends = _ends_of_reads(points)
    for a, b in itertools.pairwise(ends):
        if preview_every and b.step - 1 - (b.step - 1) % preview_every >= max(a.step, 1):
            previews.append((b.step - a.step, b.time - a.time))
        else:
            steps, seconds = steps + b.step - a.step, seconds + b.time - a.time
    step_seconds = seconds / steps
    first = ends[0]
    return Timeline(
        steps / seconds,
        run_began - command.started,
        first.time - first.step * step_seconds - command.started,
        statistics.median(gap - count * step_seconds for count, gap in previews) if previews else None,
        command.started + command.seconds - points[-1].time,
        command.seconds,
    )


def _ends_of_reads(points: Sequence[Point]) -> list[Point]:
    """Return the last point of each group that is logged together: losses are read for several steps at a time."""
    later = [b.time - a.time > _LOGGING_S for a, b in itertools.pairwise(points)]
    return [point for point, is_last in zip(points, [*later, True], strict=True) if is_last]


def read_curve(tracking_uri: str) -> tuple[list[Point], float]:
    """Return the loss curve of the newest run, and the Unix time at which the run began."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None  # the run has succeeded
    (run,) = client.search_runs([experiment.experiment_id], max_results=1)  # the newest first
    history = client.get_metric_history(run.info.run_id, _CURVE)
    points = sorted(Point(metric.step, metric.timestamp / 1000) for metric in history)
    return points, run.info.start_time / 1000


def run_timeline(params: dict[str, Any], folder: Path, threads: int, env: str | None = None) -> Timeline:
    """Train by `kedro run` and return its timeline."""
    tracking_uri = f"sqlite:///{folder}/mlflow.db"
    command = kedro_run("train", params, env=env, tracking_uri=tracking_uri, threads=threads)
    points, began = read_curve(tracking_uri)
    return make_timeline(points, params["training.preview.every"], began, command)


def bare_steps_per_second(settings: Settings, num_steps: int) -> float:
    """Train without Kedro and MLflow."""
    params = settings.params.model_copy(update={"num_steps": num_steps})
    design, data = our_design(settings.backbone, params), make_data(settings.backbone, params, settings.side_px)
    fit(design.model, data, params.model_copy(update={"num_steps": 1}))  # a warm-up
    begun = time.perf_counter()
    fit(design.model, data, params)
    return num_steps / (time.perf_counter() - begun)


def make_rows(bare: Sequence[float], runs: Sequence[Timeline]) -> list[Row]:
    """Return the bare loop, the first run, and the medians of later ones; rates relative to the bare loop."""
    reference = statistics.median(bare)
    rows = [Row(BARE, {"steps per second": reference, "% of the bare loop": 100.0})]
    for label, group in ((FIRST, runs[:1]), (LATER, runs[1:])):
        if group:
            columns = [run.columns() for run in group]
            values = {name: statistics.median(each[name] for each in columns) for name in columns[0]}
            rows.append(Row(label, values | {"% of the bare loop": 100 * values["steps per second"] / reference}))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Alternate bare loops and runs, print and write the table."""
    options = _parse(arguments)
    settings = read_settings(options)
    params = {
        "subject": SUBJECT,
        "image": options.image.resolve(),
        "base_model": options.base_model.resolve(),
        "device": options.device,
        "device.dtype": options.dtype,
        "training.num_steps": options.steps,
        "training.preview.every": options.steps // 2,
        **({"method": options.method} if options.method else {}),
    }
    facts = describe_machine(settings.backbone.device) | settings.facts() | {"steps": options.steps}
    bare, runs = [], []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds):
            bare.append(bare_steps_per_second(settings, options.steps))
            runs.append(run_timeline(params, Path(folder), options.threads, options.env))
    notes = ["The first run draws the regularization set, unless an earlier run of this project has drawn it."]
    title = f"kedro run --pipeline train, {settings.backbone.name}"
    Report("kedro_run", title, facts, make_rows(bare, runs), "steps per second", notes).write(options.output)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.set_defaults(rounds=3)
    parser.add_argument("--steps", type=int, default=100, help="of every training")
    parser.add_argument("--image", type=Path, default=ROOT / "data/01_raw/reference_images/fox.png")
    options = parser.parse_args(arguments)
    if options.steps < _MIN_STEPS:
        parser.error(f"expected --steps of at least {_MIN_STEPS}, for intervals without a preview; got {options.steps}")
    return options


if __name__ == "__main__":
    main()
