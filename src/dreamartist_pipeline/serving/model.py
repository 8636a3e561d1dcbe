"""The MLflow model of a concept: prompts in, PNG files out.

Annotations here are evaluated (no `from __future__ import annotations`): MLflow reads those of `predict`.
"""

import os
import threading
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PythonModel, PythonModelContext

from dreamartist_pipeline.core.model_location import HUB, ModelLocation
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import GenerateParams
from dreamartist_pipeline.redaction import redact, redact_outgoing_text
from dreamartist_pipeline.serving.options import ModelOptions, drawing_of

CONCEPT, BASE_MODEL = "concept", "base_model"
"""Names of the artefacts: the concept's file, and the folder of a base model that is copied."""
VARIABLE = "DREAMARTIST_BASE_MODEL"
"""Environment variable: the place of a base model that is not copied, in place of the one it had."""


class ConceptModel(PythonModel):  # type: ignore[misc]  # its library has no types
    """Draws one row of images per prompt."""

    def load_context(self, context: PythonModelContext) -> None:
        """Open the base model, and read the concept.

        Raises:
            InputError: the base model is not where it was, or has other weights.
        """
        from dreamartist_pipeline.backbones.base_model import open_base_model
        from dreamartist_pipeline.interop.concept_file import read_concept

        redact_outgoing_text()  # a server's log lines and tracebacks too
        self._options = ModelOptions.model_validate(context.model_config)
        file = Path(context.artifacts[CONCEPT])
        self._concept = read_concept(file.read_bytes(), str(file))
        location = location_of(self._options, context.artifacts.get(BASE_MODEL))
        check_base_model(location, self._options)
        self._backbone = open_base_model(location, self._options.device)
        self._drawing = threading.Lock()  # a server calls `predict` in several threads

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Draw every prompt with `images_per_prompt` seeds.

        Args:
            context: not used.
            model_input: with a column `prompt`; '{pt1}' is the positive trigger word.
            params: options of the drawing; MLflow adds the defaults of the signature.

        Returns:
            One row per image: prompt, seed, and `image`, the bytes of a PNG with its settings, Base64 in JSON.

        Raises:
            MlflowException: an option is invalid.
        """
        try:
            request = drawing_of(list(model_input["prompt"]), params or {}, self._options.batch_size)
            return self._draw(request)
        except InputError as error:
            raise MlflowException.invalid_parameter_value(redact(str(error))) from error

    def _draw(self, request: GenerateParams) -> pd.DataFrame:
        from dreamartist_pipeline.backbones.drawing import DrawingRequest, draw
        from dreamartist_pipeline.backbones.schedulers import check_sampler
        from dreamartist_pipeline.datasets.image import png_bytes

        check_sampler(request.sampler, self._concept.metadata.zero_terminal_snr)
        seeds = range(request.seed, request.seed + request.images_per_prompt)
        drawing = DrawingRequest(
            request.prompts, request.negative_prompt, seeds, request.sampler, request.strength, request.size_px
        )
        with self._drawing:
            drawn = draw(self._backbone, self._concept, drawing)
        rows = [(prompt, seed) for prompt in drawn.prompts for seed in seeds]
        return pd.DataFrame(
            {
                "prompt": [prompt for prompt, _ in rows],
                "seed": [seed for _, seed in rows],
                "image": [png_bytes(image) for image in drawn.images],
            }
        )


def location_of(options: ModelOptions, copied: str | None) -> ModelLocation:
    """Return where the base model is: in the model, or where VARIABLE or the options say."""
    if copied is not None:
        return ModelLocation(copied)
    path = os.environ.get(VARIABLE) or options.base_model
    return ModelLocation(path, options.vae, options.base_model_config)


def check_base_model(location: ModelLocation, options: ModelOptions) -> None:
    """Check that a base model is there and has the weights that the model was saved with, before it is loaded.

    Raises:
        InputError: it is not there, or has other weights.
    """
    from dreamartist_pipeline.backbones.base_model import files_for

    expected = f"the base model of this concept ({options.base_model_fingerprint}) at {location.path}"
    remedy = f"copy it there, or set {VARIABLE} to the path of its folder or file"
    if not location.path.startswith(HUB) and not Path(location.path).expanduser().exists():
        raise InputError(expected=expected, got="no such folder or file", remedy=remedy)
    found = files_for(location, options.device).fingerprint()
    if found != options.base_model_fingerprint:
        raise InputError(expected=expected, got=f"other weights ({found})", remedy=remedy)
