"""The project's logging in runs from a sub-folder, of an installed package, or with another configuration."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import yaml
from kedro.framework.project import configure_logging
from kedro.utils import find_kedro_project

_FILE = "logging.yml"


def configure_logs(conf_source: str | None) -> None:
    """Apply logging.yml of the configuration; Kedro looks for conf/logging.yml in the working directory only.

    Args:
        conf_source: folder or tar archive of the configuration; None for the project's.
    """
    project: Path | None = find_kedro_project(Path.cwd())
    if "KEDRO_LOGGING_CONFIG" in os.environ or (conf_source is None and project in (None, Path.cwd())):
        return
    text = _logging_of(Path(conf_source) if conf_source else Path(project or "") / "conf")
    if text is not None:
        configure_logging(yaml.safe_load(text))


def _logging_of(source: Path) -> bytes | None:
    if source.is_dir():
        return (source / _FILE).read_bytes() if (source / _FILE).is_file() else None
    if not source.is_file() or not tarfile.is_tarfile(source):
        return None
    with tarfile.open(source) as archive:
        names = [name for name in archive.getnames() if Path(name).name == _FILE]
        file = archive.extractfile(names[0]) if names else None
        return None if file is None else file.read()
