"""The MLflow models of a subject: in a folder, and in MLflow's model registry.

Annotations here are evaluated (no `from __future__ import annotations`): kedro-viz reads the return type of `preview`.
"""

import hashlib
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedro.io import AbstractDataset
from kedro_datasets._typing import JSONPreview

from dreamartist_pipeline.datasets.inputs import FileError
from dreamartist_pipeline.tracking.delivery import attempt, optional, reason_of
from dreamartist_pipeline.tracking.models import model_record, send_model
from dreamartist_pipeline.tracking.outbox import Record
from dreamartist_pipeline.tracking.stores import delivery_of
from dreamartist_pipeline.whole_files import restored, written_whole_folder

if TYPE_CHECKING:
    from mlflow.pyfunc import PyFuncModel

    from dreamartist_pipeline.backbones.served import ServedConcept

log = logging.getLogger(__name__)


class RegisteredModelDataset(AbstractDataset["tuple[ServedConcept, ...]", "dict[str, PyFuncModel]"]):
    """MLflow models, each in a sub-folder with the name of its first alias; a save registers them as versions.

    A save never fails: a concept is trained by then. What cannot be written or registered is logged, and what MLflow
    does not take is delivered later.

    Args:
        name: of the registered model.
        path: the folder; it contains nothing else.
    """

    def __init__(self, *, name: str, path: str, metadata: dict[str, Any] | None = None) -> None:
        self._name, self._path = name, Path(path)
        self.metadata = metadata

    def load(self) -> "dict[str, PyFuncModel]":
        """Return first alias -> model, which is loaded with its base model.

        Raises:
            FileError: no such folder.
        """
        import mlflow

        if not self._exists():
            raise FileError(
                expected=f"MLflow models at {self._path}", got="none", remedy="run the pipeline register first"
            )
        return {folder.name: mlflow.pyfunc.load_model(str(folder)) for folder in sorted(self._path.iterdir())}

    def save(self, data: "tuple[ServedConcept, ...]") -> None:
        """Write the models, and register them in the active run; without a run they are only written."""
        if not data:
            return
        if (error := attempt(self._write, data)) is not None:
            log.warning("Left out the MLflow model of %s: %s", self._name, reason_of(error))
            return
        for served in data:
            self._register(self._record(served))

    def _write(self, data: "tuple[ServedConcept, ...]") -> None:
        from dreamartist_pipeline.serving.packaging import save_model

        with written_whole_folder(self._path) as temporary:
            for served in data:
                save_model(served, temporary / served.aliases[0])

    def _record(self, served: "ServedConcept") -> Record:
        folder = self._path / served.aliases[0]
        concept = (folder / "artifacts" / "concept.safetensors").read_bytes()
        metadata = served.concept.metadata
        words = [word for pair in metadata.words.values() for word in pair if word]
        facts = {
            "trigger_words": ", ".join(words),
            "base_model": metadata.base_model,
            "base_model_fingerprint": served.fingerprint,
            "num_steps": str(metadata.num_steps),
            "step": "" if metadata.step is None else str(metadata.step),
        }
        return model_record(folder, self._name, served.aliases, hashlib.sha256(concept).hexdigest(), facts)

    def _register(self, record: Record) -> None:
        import mlflow

        if (run := mlflow.active_run()) is None:
            return
        if (delivery := delivery_of(run.info.run_id)) is not None:
            delivery.deliver(record)
        else:
            with optional(f"the registration of {self._name}"):
                send_model(run.info.run_id, record)

    def preview(self) -> JSONPreview:
        """Show signature, example and configuration of each model, without loading it."""
        import yaml

        shown = {}
        for folder in sorted(self._path.iterdir()):
            described = yaml.safe_load((folder / "MLmodel").read_text(encoding="utf-8"))
            shown[folder.name] = {
                "signature": {name: json.loads(text) for name, text in described["signature"].items() if text},
                "example": json.loads((folder / "serving_input_example.json").read_text(encoding="utf-8")),
                "configuration": described["flavors"]["python_function"]["config"],
            }
        return JSONPreview(json.dumps(shown, indent=1, ensure_ascii=False))

    def _exists(self) -> bool:
        return restored(self._path).is_dir()

    def _describe(self) -> dict[str, Any]:
        return {"name": self._name, "path": self._path.as_posix()}
