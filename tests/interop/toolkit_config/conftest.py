"""Importing texts, and what a run makes of the result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from dreamartist_pipeline.interop.toolkit_config import ImportedConfig, read_toolkit_config
from dreamartist_pipeline.params import TrainingParams
from dreamartist_pipeline.pipelines.training.plan import check_templates

FULL, BASE = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("full.yaml", "full_base.yaml"))
FILES = {"cfgs/train/train_base.yaml": BASE, "templates/object.txt": "a photo of a {dog}\n\na {dog}, {caption}\n"}


@pytest.fixture
def read_full() -> Callable[[str], ImportedConfig]:
    """Import a variation of full.yaml, with its base file and its templates."""
    return lambda text: read_toolkit_config(text, FILES.get)


@pytest.fixture
def imported(read_full: Callable[[str], ImportedConfig]) -> ImportedConfig:
    """Return the import of full.yaml."""
    return read_full(FULL)


@pytest.fixture
def imported_from() -> Callable[..., ImportedConfig]:
    """Import a text; the keyword `t_txt` gives the file t.txt."""

    def read(text: str, **files: str) -> ImportedConfig:
        return read_toolkit_config(text, {name.replace("_", "."): file for name, file in files.items()}.get)

    return read


@pytest.fixture
def as_run() -> Callable[[ImportedConfig], TrainingParams]:
    """Return the parameters of a run: the imported values over the method's, checked as before a training."""
    methods = yaml.safe_load(Path("conf/base/parameters_training.yml").read_text(encoding="utf-8"))["_methods"]

    def run(imported: ImportedConfig) -> TrainingParams:
        method: Any = OmegaConf.create(
            {"_subject": "fox", "_class_word": "fox", "training": methods[imported.settings["method"]]}
        )
        merged: Any = OmegaConf.merge(method, {"training": imported.parameters["training"]})
        params = TrainingParams.model_validate(OmegaConf.to_container(merged, resolve=True)["training"])  # type: ignore[index,call-overload]
        check_templates(params)
        return params

    return run
