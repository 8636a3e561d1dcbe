"""Progress bar, live curves and previews of a running training; its history as a table."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import pandas as pd
from tqdm import tqdm

from dreamartist_pipeline.backbones.concepts import NewConcept, generate
from dreamartist_pipeline.core.images import image_grid
from dreamartist_pipeline.core.tracking import Tracker
from dreamartist_pipeline.core.training import StepRecord
from dreamartist_pipeline.params import TrainingParams
from dreamartist_pipeline.pipelines.training.data import fill_prompt

_CURVE_POINTS = 200  # about as many points in live curves; each is a mean over steps
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
            self._tracker.log_metrics(means, step=record.step)
            self._bar.set_postfix(loss=f"{means['loss']:.4f}", refresh=False)
            self._rows.clear()
        self._bar.update()


def preview_drawing(new: NewConcept, params: TrainingParams, tracker: Tracker) -> Callable[[int], None] | None:
    """Return a function that draws the preview prompts with the current concept, always from the same seeds."""
    prompts = [fill_prompt(prompt, params) for prompt in params.preview.prompts]
    if not prompts:
        return None
    seeds = range(params.preview.seed, params.preview.seed + len(prompts))

    def draw(step: int) -> None:
        with new.drawing(params.words.names) as loaded:
            images = generate(new.backbone, loaded, prompts, "", seeds, params.preview.sampler)
        tracker.log_image(image_grid(images, columns=min(4, len(images)), labels=prompts), key="preview", step=step)

    return draw
