"""Losses of a training on noise and timesteps that it never draws."""

from __future__ import annotations

import torch

from dreamartist_pipeline.core.batches import Batch, BatchSource, TrainingData, derived_seed
from dreamartist_pipeline.core.branches import guidance_at
from dreamartist_pipeline.core.prompt_tokens import Conditioning
from dreamartist_pipeline.core.training_step import (
    TrainableModel,
    combined_prediction,
    encode_prompts,
    packed_factors,
    row_losses,
)
from dreamartist_pipeline.params import TrainingParams


class Validation:
    """The losses of the current values on one fixed batch; single steps of the training differ by their timesteps."""

    def __init__(
        self, model: TrainableModel, data: TrainingData, params: TrainingParams, rows_at_once: int | None
    ) -> None:
        """Draw the batch, from a seed of its own.

        Args:
            model: base model, adapters and words.
            data: of the training.
            params: of the training; `scoring.validation_rows` of the reference image, and as many of the others.
            rows_at_once: of one forward pass; None for as many as a step has.
        """
        num_rows = params.scoring.validation_rows
        changes = {
            "seed": derived_seed(params.seed, "validation"),
            "batch_size": num_rows,
            "regularization_batch_size": num_rows if data.regularization else 0,
        }
        self._batch = BatchSource(data, params.model_copy(update=changes), model.objective).draw(0)
        self._model, self._params = model, params
        self._rows_at_once = rows_at_once or params.batch_size + params.regularization_batch_size

    @torch.no_grad()
    def losses(self) -> tuple[float, float | None]:
        """Return the mean losses of the reference rows and of the regularization rows; None without those.

        Dropout has to be off.
        """
        batch, num_reference = self._batch, self._params.scoring.validation_rows
        with packed_factors(self._model):
            conditioning = encode_prompts(self._model, batch.tokens)
            starts = range(0, len(batch), self._rows_at_once)
            by_row = [self._losses_of(batch[start : start + self._rows_at_once], conditioning) for start in starts]
        losses = torch.cat(by_row)
        others = losses[num_reference:]
        return float(losses[:num_reference].mean()), float(others.mean()) if len(others) else None

    def _losses_of(self, rows: Batch, conditioning: Conditioning) -> torch.Tensor:
        params, objective = self._params, self._model.objective
        guidance = guidance_at(params.guidance_scale, objective.noise_level(rows.timesteps))
        return row_losses(combined_prediction(self._model, rows, guidance, conditioning), rows, objective, params.loss)
