"""Progress bar, live curves and previews of a running training; its history as a table, its speed and memory."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from tqdm import tqdm

from dreamartist_pipeline.backbones.concepts import NewConcept, generate
from dreamartist_pipeline.backbones.placement import on_device
from dreamartist_pipeline.core.checkpoints import Checkpoint
from dreamartist_pipeline.core.course import Checkpointing, StepRecord
from dreamartist_pipeline.core.devices import peak_memory_bytes
from dreamartist_pipeline.core.divergence import Halving
from dreamartist_pipeline.core.figures import CELL_PX, prompt_table
from dreamartist_pipeline.core.images import image_grid
from dreamartist_pipeline.core.tracking import Tracker
from dreamartist_pipeline.params import TrainingParams
from dreamartist_pipeline.pipelines.training.data import fill_prompt
from dreamartist_pipeline.pipelines.training.trainable import idle_modules

_CURVE_POINTS = 200  # about as many points in live curves; each is a mean over steps
_PREVIEW_KEY = "previews/by step"
PREVIEWS = "previews"  # key of the thumbnails in a checkpoint
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
        self._rows: dict[int, dict[str, float]] = {}  # by step, since the last means
        self._logged = 0  # the last step of the means logged so far

    def __enter__(self) -> StepReport:
        self._bar = tqdm(total=self._num_steps, desc="training", unit="step", mininterval=0.5)
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def __call__(self, record: StepRecord) -> None:
        """Record one step; those that are repeated after a divergence are not logged again."""
        if record.step == 1 and not self._bar.n:
            norms = ", ".join(f"{name} {norm:.2e}" for name, norm in record.grad_norm.items())
            log.info("Every branch received gradients in the first step: %s.", norms)
        self._rows = {step: row for step, row in self._rows.items() if step < record.step}
        if record.step > self._logged:
            self._rows[record.step] = {
                name: value for name, value in record.row().items() if name not in ("step", "seconds")
            }
            self._log_means(record.step)
        self._bar.update(record.step - self._bar.n)

    def _log_means(self, step: int) -> None:
        """Log the means of the steps since the last ones, if they are due."""
        if step % self._every and step != self._num_steps:
            return
        rows = list(self._rows.values())
        means = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
        self._tracker.log_metrics({curve_name(name): mean for name, mean in means.items()}, step=step)
        self._bar.set_postfix(loss=f"{means['loss']:.4f}", refresh=False)
        self._rows.clear()
        self._logged = step


class DivergenceReport:
    """Warns of halved learning rates and of a doubtful result, and tags the run.

    Attributes:
        doubts: what makes the result doubtful.
    """

    def __init__(self, rates: Collection[float], tracker: Tracker) -> None:
        """Report nothing yet.

        Args:
            rates: the configured peak learning rates.
            tracker: of the run.
        """
        self._rates, self._tracker = sorted(set(rates)), tracker
        self.doubts: tuple[str, ...] = ()

    def halved(self, halvings: Sequence[Halving]) -> None:
        """Report the last of all halvings of a training."""
        factor = 2 ** len(halvings)
        rates = ", ".join(f"{rate:g} → {rate / factor:g}" for rate in self._rates)
        log.warning(
            "The training diverged at step %d. It goes on from step %d with 1/%d of the learning rates: %s.",
            *(halvings[-1].diverged_at, halvings[-1].back_to, factor, rates),
        )
        self._tracker.set_tag("lr_halved_at_steps", ", ".join(str(halving.diverged_at) for halving in halvings))

    def doubted(self, doubts: Sequence[str]) -> None:
        """Report that the result is doubtful."""
        self.doubts = tuple(doubts)
        log.warning(
            "The training has finished, but its result is doubtful: %s. %s.",
            *("; ".join(doubts), "Lower the learning rates or the guidance scale"),
        )
        self._tracker.set_tag("training_doubts", "; ".join(doubts))


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


def log_scoring_time(seconds: float, history: Sequence[Mapping[str, float]], tracker: Tracker) -> None:
    """Log how long a training was scored, and the share of that in the time of its steps; nothing without steps."""
    if history:
        share = seconds / sum(row["seconds"] for row in history)
        log.info("Scoring took %.0f s, %.0f %% of the time of all steps.", seconds, 100 * share)
        tracker.log_metrics({"training/scoring_share": share}, step=len(history))


class Previews:
    """Draws the preview prompts with the current concept, always from the same seeds.

    It logs the images of a step, and a sheet of some steps so far. The thumbnails of the sheet are part of checkpoints,
    so that the sheet of a continued training has those from before.
    """

    def __init__(self, new: NewConcept, params: TrainingParams, tracker: Tracker) -> None:
        """Draw nothing yet."""
        self._new, self._params, self._tracker = new, params, tracker
        self._prompts = [fill_prompt(prompt, params) for prompt in params.preview.prompts]
        self._by_step: dict[int, list[Image.Image]] = {}
        self._shown = _shown_steps(params)

    def __call__(self, step: int) -> None:
        """Draw, after a step; a training that went back to a good state draws some steps again."""
        if not self._prompts:
            return
        params, new = self._params, self._new
        seeds = range(params.preview.seed, params.preview.seed + len(self._prompts))
        idle = idle_modules(new, params)
        with on_device(idle, new.backbone.device), new.drawing(params.words.names) as loaded:
            images = generate(new.backbone, loaded, self._prompts, "", seeds, params.preview.sampler)
        # MLflow centres an image in a square below the run's parameters: a wide one would be out of sight
        grid = image_grid(images, columns=math.isqrt(len(images)), labels=self._prompts)
        self._tracker.log_image(grid, key=_PREVIEW_KEY, step=step)
        self._by_step = {before: drawn for before, drawn in self._by_step.items() if before < step}
        if step in self._shown:
            self._by_step[step] = [_thumbnail(image) for image in images]
            self._log_filmstrip()

    def _log_filmstrip(self) -> None:
        self._tracker.log_image_file(filmstrip(self._prompts, self._by_step), "training/previews.png")

    def kept_in(self, checkpointing: Checkpointing) -> Checkpointing:
        """Continue the sheet of the resumed checkpoint, and return `checkpointing` with the thumbnails saved, too."""
        if checkpointing.resumed:
            self._continue(checkpointing.resumed[PREVIEWS], checkpointing.resumed["state"]["step"])

        def save(checkpoint: Checkpoint) -> None:
            checkpointing.save(checkpoint | {PREVIEWS: self._kept()})

        return replace(checkpointing, save=save)

    def _continue(self, kept: dict[str, Any], last_step: int) -> None:
        """Continue a sheet with the same prompts; that of a diverged training has steps after the checkpoint's."""
        if kept["prompts"] != self._prompts:
            return
        for step, images in kept["images"].items():
            if step <= last_step:
                self._by_step[step] = [Image.fromarray(image.numpy()) for image in images]
        if self._by_step:
            self._log_filmstrip()

    def _kept(self) -> dict[str, Any]:
        """Return the thumbnails as uint8 `[H, W, 3]`, by step."""
        images = {
            step: [torch.from_numpy(np.array(image.convert("RGB"))) for image in drawn]
            for step, drawn in self._by_step.items()
        }
        return {"prompts": self._prompts, "images": images}


def _shown_steps(params: TrainingParams) -> set[int]:
    """Return the steps on the sheet of a whole training."""
    if not params.preview.every:
        return set()
    return set(_spread([*range(0, params.num_steps, params.preview.every), params.num_steps]))


def _spread(steps: Sequence[int]) -> list[int]:
    """Return at most 12 of the steps, the first and last included."""
    if len(steps) <= _FILMSTRIP_COLUMNS:
        return list(steps)
    spacing = (len(steps) - 1) / (_FILMSTRIP_COLUMNS - 1)
    return [steps[round(index * spacing)] for index in range(_FILMSTRIP_COLUMNS)]


def _thumbnail(image: Image.Image) -> Image.Image:
    small = image.copy()
    small.thumbnail((CELL_PX[1], CELL_PX[1]))
    return small


def filmstrip(prompts: Sequence[str], by_step: Mapping[int, Sequence[Image.Image]]) -> Image.Image:
    """Lay out previews: a row per prompt, a column per step; of many steps at most 12, the first and last included."""
    steps = _spread(sorted(by_step))
    rows = [[by_step[step][index] for step in steps] for index in range(len(prompts))]
    return prompt_table(prompts, [f"step {step}" for step in steps], rows)
