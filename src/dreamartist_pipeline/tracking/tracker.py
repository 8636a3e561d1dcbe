"""Live curves and previews of a running node in the active MLflow run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image


class MLflowTracker:
    """Logs asynchronously to the MLflow run that is active in this thread; does nothing without one."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log numbers without waiting for the database (2 ms instead of 42 ms)."""
        import mlflow

        if mlflow.active_run() is not None:
            named = {metric_name(name): value for name, value in metrics.items()}
            mlflow.log_metrics(named, step=step, synchronous=False)

    def log_image(self, image: Image, key: str, step: int | None = None) -> None:
        """Log an image; MLflow shows the images of one key with a slider over the steps."""
        import mlflow

        if mlflow.active_run() is not None:
            mlflow.log_image(image, key=key, step=step or 0, synchronous=False)

    def set_tag(self, name: str, text: str) -> None:
        """Tag the run; MLflow cuts what is too long."""
        import mlflow

        if mlflow.active_run() is not None:
            mlflow.set_tag(name, text)

    def run_id(self) -> str | None:
        """Return the id of the active run."""
        import mlflow

        run = mlflow.active_run()
        return None if run is None else str(run.info.run_id)

    def log_image_file(self, image: Image, file: str) -> None:
        """Log an image as an artefact; `file` is its path in the run."""
        import mlflow

        if mlflow.active_run() is not None:
            mlflow.log_image(image, artifact_file=file)


def metric_name(name: str) -> str:
    """Return a name that MLflow accepts: `lr/unet[0]` becomes `lr/unet.0`, other invalid characters become `_`.

    MLflow rejects a whole batch of metrics for one invalid name, and asynchronous logging hides the error.
    """
    return re.sub(r"[^\w\-. :/]", "_", re.sub(r"\[(\w+)\]", r".\1", name))
