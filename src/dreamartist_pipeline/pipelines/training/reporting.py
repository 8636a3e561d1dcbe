"""Progress bar, live curves and previews of a running training; its history as a table, its speed and memory."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence

import pandas as pd
import torch
from PIL import Image
from tqdm import tqdm

from dreamartist_pipeline.backbones.concepts import NewConcept, generate
from dreamartist_pipeline.backbones.placement import on_device
from dreamartist_pipeline.core.devices import peak_memory_bytes
from dreamartist_pipeline.core.figures import CELL_PX, prompt_table
from dreamartist_pipeline.core.images import image_grid
from dreamartist_pipeline.core.tracking import Tracker
from dreamartist_pipeline.core.training import StepRecord
from dreamartist_pipeline.params import TrainingParams
from dreamartist_pipeline.pipelines.training.data import fill_prompt
from dreamartist_pipeline.pipelines.training.trainable import idle_modules

_CURVE_POINTS = 200  # about as many points in live curves; each is a mean over steps
_PREVIEW_KEY = "previews/by step"
_FILMSTRIP_COLUMNS = 12
_GIB = 2**30
_COLUMNS = ("step", "loss", "loss_reference", "guidance_scale", "seconds")

log = logging.getLogger(__name__)


def history_table(history: Sequence[Mapping[str, float]]) -> pd.DataFrame:
    """Return the history as a table; without steps it has columns but no rows."""
    return pd.DataFrame(list(history), columns=None if history else list(_COLUMNS))


class StepReport:
    """Updates a progress bar at each step and logs means to the tracker about 200 times per training."""

    def __init__(self, num_steps: int, tracker: Tracker) -> None:
        self._tracker, self._every = tracker, max(1, num_steps // _CURVE_POINTS)
        self._num_steps = num_steps
        self._rows: list[dict[str, float]] = []

    def __enter__(self) -> StepReport:
        self._bar = tqdm(total=self._num_steps, desc="training", unit="step", mininterval=0.5)
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def __call__(self, record: StepRecord) -> None:
        """Record one step."""
        if record.step == 1:
            norms = ", ".join(f"{name} {norm:.2e}" for name, norm in record.grad_norm.items())
            log.info("Every branch received gradients in the first step: %s.", norms)
        self._rows.append({name: value for name, value in record.row().items() if name not in ("step", "seconds")})
        if record.step % self._every == 0 or record.step == self._num_steps:
            means = {name: sum(row[name] for row in self._rows) / len(self._rows) for name in self._rows[0]}
            self._tracker.log_metrics({curve_name(name): mean for name, mean in means.items()}, step=record.step)
            self._bar.set_postfix(loss=f"{means['loss']:.4f}", refresh=False)
            self._rows.clear()
        self._bar.update()


def curve_name(column: str) -> str:
    """Return the name of a history column as a metric.

    MLflow groups charts by what is before the last slash, sorts groups and charts by name, and shows only the beginning
    of long names: the losses come first, then previews, and last what the schedules determine.
    """
    kind, _, rest = column.partition("/")
    if kind == "grad_norm":
        return f"training/grad.{rest.replace('/', '.')}"
    if kind == "lr":
        return f"training/lr.{rest}"
    if column == "guidance_scale":
        return "training/guidance_scale"
    return f"loss/{column.removeprefix('loss_')}" if column.startswith("loss_") else "loss/total"


def log_performance(history: Sequence[Mapping[str, float]], device: torch.device, tracker: Tracker) -> None:
    """Log steps per second, without previews, and the peak memory so far, if it is known; nothing without steps."""
    if not history:
        return
    metrics = {"training/steps_per_second": len(history) / sum(row["seconds"] for row in history)}
    if (peak := peak_memory_bytes(device)) is not None:
        metrics["training/peak_memory_gib"] = peak / _GIB
    tracker.log_metrics(metrics, step=len(history))


def preview_drawing(new: NewConcept, params: TrainingParams, tracker: Tracker) -> Callable[[int], None] | None:
    """Return a function that draws the preview prompts with the current concept, always from the same seeds.

    It logs the images of the step, and a sheet of all steps so far.
    """
    prompts = [fill_prompt(prompt, params) for prompt in params.preview.prompts]
    if not prompts:
        return None
    seeds = range(params.preview.seed, params.preview.seed + len(prompts))
    by_step: dict[int, list[Image.Image]] = {}

    def draw(step: int) -> None:
        idle = idle_modules(new, params)
        with on_device(idle, new.backbone.device), new.drawing(params.words.names) as loaded:
            images = generate(new.backbone, loaded, prompts, "", seeds, params.preview.sampler)
        # MLflow centres an image in a square below the run's parameters: a wide one would be out of sight
        grid = image_grid(images, columns=math.isqrt(len(images)), labels=prompts)
        tracker.log_image(grid, key=_PREVIEW_KEY, step=step)
        by_step[step] = [_thumbnail(image) for image in images]
        tracker.log_image_file(filmstrip(prompts, by_step), "training/previews.png")

    return draw


def _thumbnail(image: Image.Image) -> Image.Image:
    small = image.copy()
    small.thumbnail((CELL_PX[1], CELL_PX[1]))
    return small


def filmstrip(prompts: Sequence[str], by_step: Mapping[int, Sequence[Image.Image]]) -> Image.Image:
    """Lay out previews: a row per prompt, a column per step; of many steps at most 12, the first and last included."""
    steps = sorted(by_step)
    if len(steps) > _FILMSTRIP_COLUMNS:
        spacing = (len(steps) - 1) / (_FILMSTRIP_COLUMNS - 1)
        steps = [steps[round(index * spacing)] for index in range(_FILMSTRIP_COLUMNS)]
    rows = [[by_step[step][index] for step in steps] for index in range(len(prompts))]
    return prompt_table(prompts, [f"step {step}" for step in steps], rows)
