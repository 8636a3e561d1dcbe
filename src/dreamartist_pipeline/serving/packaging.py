"""Write a concept as an MLflow model."""

from __future__ import annotations

import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreamartist_pipeline.interop.concept_file import write_concept
from dreamartist_pipeline.redaction import redacted
from dreamartist_pipeline.serving.options import ModelOptions, call_options
from dreamartist_pipeline.tracking.delivery import quiet

if TYPE_CHECKING:
    from mlflow.models import ModelSignature

    from dreamartist_pipeline.backbones.served import ServedConcept
    from dreamartist_pipeline.params import GenerateParams

_PACKAGES = ("dreamartist-pipeline", "mlflow", "torch", "diffusers", "transformers", "safetensors", "pillow")
_CODE = Path(__file__).with_name("model_code.py")


def save_model(served: ServedConcept, folder: Path) -> None:
    """Write an MLflow model: code, the concept, and the base model or its place, with signature and example.

    Args:
        served: the concept and what it needs.
        folder: of the model; it must not exist, or be empty.
    """
    import mlflow

    from dreamartist_pipeline.serving.model import BASE_MODEL, CONCEPT

    with tempfile.TemporaryDirectory() as temporary, quiet():
        concept = Path(temporary) / "concept.safetensors"
        write_concept(served.concept, concept)
        artifacts = {CONCEPT: str(concept)}
        if served.copied:
            artifacts[BASE_MODEL] = str(_copy(served, Path(temporary) / "copied"))
        mlflow.pyfunc.save_model(
            str(folder),
            python_model=str(_CODE),
            artifacts=artifacts,
            model_config=redacted(options_of(served).model_dump(mode="json")),
            signature=signature_of(served.defaults),
            input_example=example_of(served),
            pip_requirements=requirements(),
            streamable=False,
        )


def _copy(served: ServedConcept, folder: Path) -> Path:
    """Copy the files of the base model into a folder of its name."""
    copy = folder / Path(served.base_model.path).name
    for name, file in served.copied.items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy / name)
    return copy


def options_of(served: ServedConcept) -> ModelOptions:
    """Return the options that the model is saved with."""
    return ModelOptions(
        base_model=served.base_model.path,
        vae=served.base_model.vae,
        base_model_config=served.base_model.config,
        base_model_fingerprint=served.fingerprint,
        device=served.device,
        batch_size=served.defaults.sampler.batch_size,
    )


def signature_of(defaults: GenerateParams) -> ModelSignature:
    """Return the signature: prompts, the options of a call with their defaults, and the columns of the result."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    options = [ParamSpec(name, kind, default) for name, (kind, default) in call_options(defaults).items()]
    return ModelSignature(
        inputs=Schema([ColSpec("string", "prompt")]),
        outputs=Schema([ColSpec("string", "prompt"), ColSpec("long", "seed"), ColSpec("binary", "image")]),
        params=ParamSchema(options),
    )


def example_of(served: ServedConcept) -> tuple[Any, dict[str, Any]]:
    """Return prompts as a data frame, and the options of a call."""
    import pandas as pd

    metadata = served.concept.metadata
    words = " ".join(positive for positive, _ in metadata.words.values()) or metadata.class_word or "picture"
    options = {name: default for name, (_, default) in call_options(served.defaults).items() if default is not None}
    return pd.DataFrame({"prompt": [f"a {words}, blue background"]}), options


def requirements() -> list[str]:
    """Return the packages that the model needs, in the installed versions without their build (torch's `+cpu`)."""
    return [f"{name}=={version(name).partition('+')[0]}" for name in _PACKAGES]
