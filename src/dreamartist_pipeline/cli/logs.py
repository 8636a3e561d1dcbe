"""The project's logging in a run that is started from a sub-folder."""

from __future__ import annotations

import os
from pathlib import Path

import yaml
from kedro.framework.project import configure_logging
from kedro.utils import find_kedro_project


def configure_logs() -> None:
    """Apply conf/logging.yml of the project; Kedro reads it from the working directory only."""
    project: Path | None = find_kedro_project(Path.cwd())
    if project is None or project == Path.cwd() or "KEDRO_LOGGING_CONFIG" in os.environ:
        return
    configure_logging(yaml.safe_load((project / "conf" / "logging.yml").read_text(encoding="utf-8")))
