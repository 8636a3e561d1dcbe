"""The files of a run on their way to where its server, or its database, has them. Importing this imports MLflow."""

from __future__ import annotations

import posixpath
from pathlib import Path
from typing import Any

from mlflow.entities import FileInfo, Run
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from dreamartist_pipeline.tracking.delivery import Delivery
from dreamartist_pipeline.tracking.outbox import Record


class DeliveringArtifacts(ArtifactRepository):  # type: ignore[misc]
    """An artefact repository whose files go through the `Delivery` of a run.

    Attributes:
        logged: the paths, in the run, of the files that this process has logged.
    """

    def __init__(self, run: Run, tracking_uri: str) -> None:
        super().__init__(run.info.artifact_uri, tracking_uri)
        self._repository: Any = get_artifact_repository(run.info.artifact_uri, tracking_uri)
        self.logged: set[str] = set()
        self.delivery: Delivery | None = None

    def send(self, file: str, path: str) -> None:
        """Copy a file into this folder of the run."""
        self._repository.log_artifact(file, path or None)

    def log_artifact(self, local_file: str, artifact_path: str | None = None) -> None:
        """Deliver a file."""
        assert self.delivery is not None
        self.logged.add(posixpath.join(artifact_path or "", Path(local_file).name))
        self.delivery.deliver(Record("file", {"file": str(local_file), "path": artifact_path or ""}))

    def log_artifacts(self, local_dir: str, artifact_path: str | None = None) -> None:
        """Deliver the files of a folder."""
        for file in sorted(file for file in Path(local_dir).rglob("*") if file.is_file()):
            folder = file.parent.relative_to(local_dir).as_posix()
            self.log_artifact(
                str(file), posixpath.normpath(posixpath.join(artifact_path or "", folder)).removeprefix(".")
            )

    def list_artifacts(self, path: str | None = None) -> list[FileInfo]:
        """Return the files of a folder."""
        files: list[FileInfo] = self._repository.list_artifacts(path)
        return files

    def _download_file(self, remote_file_path: str, local_path: str) -> None:
        self._repository._download_file(remote_file_path, local_path)
