"""What the hooks know of a run: its settings, and where a dataset is stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kedro.framework.context import KedroContext
from kedro.io import DataCatalog

RUN_SETTINGS = (
    "subject",
    "image",
    "mask",
    "init_image",
    "init_mask",
    "base_model",
    "class_word",
    "caption",
    "method",
    "recipe",
    "prompt_database",
    "mlflow_run_id",
)


def settings_of(context: KedroContext) -> dict[str, Any]:
    """Return the run settings, each from `--params` or else from globals.yml."""
    given = context.config_loader["globals"] | (context.config_loader.runtime_params or {})
    return {name: given.get(name) for name in RUN_SETTINGS}


def path_of(catalog: DataCatalog, name: str) -> Path | None:
    """Return the file or folder of a dataset, if it has one."""
    dataset = catalog.get(name)
    path = getattr(dataset, "_filepath", None) or getattr(dataset, "_path", None)
    return None if path is None else Path(path)
