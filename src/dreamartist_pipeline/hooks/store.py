"""The results of subjects in an object store: every run copies its own there, and those that it needs from there."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path

from kedro.framework.context import KedroContext
from kedro.framework.hooks import hook_impl
from kedro.io import DataCatalog
from kedro.pipeline import Pipeline

from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.hooks.manifest import MANIFEST, Manifest, digest_of, parsed_manifest, read_manifest
from dreamartist_pipeline.hooks.run import path_of, settings_of
from dreamartist_pipeline.object_stores import ObjectStore

_CONCEPT = "concept"
_EMPTY_FOLDER = hashlib.sha256().hexdigest()  # see `manifest.digest_of`

log = logging.getLogger(__name__)


class ResultStore:
    """The files that the manifests of concepts name, in a store, at the same paths as in the project.

    A manifest is copied last, so that files which are not those of the manifest in the store are those of a run whose
    copying was interrupted.

    Args:
        project: its folder.
        url: of the store.

    Raises:
        InputError: no such kind of store.
    """

    def __init__(self, project: Path, url: str) -> None:
        self._project, self._store = project, ObjectStore(url)

    def publish(self, manifest_file: Path) -> None:
        """Copy what a manifest of this machine names, and what the store does not have.

        Raises:
            InputError: the store cannot be reached.
        """
        manifest = read_manifest(manifest_file)
        if manifest is None:
            return
        earlier = self._stored(manifest_file)
        known = {} if earlier is None else _files(earlier)
        changed = {
            path: sha256
            for path, sha256 in _files(manifest).items()
            if known.get(path) != sha256 and (self._project / path).exists()
        }
        for path in changed:
            for file in _all_in(self._project / path):
                folder, name = self._place(file)
                folder.copy_to(name, file)
        folder, name = self._place(manifest_file)
        folder.copy_to(name, manifest_file)
        if changed:
            log.info("The results of %s are in %s.", manifest.subject, folder.url)

    def fetch(self, manifest_file: Path, key: str | None = None) -> None:
        """Copy the results of a subject to this machine, if they are in the store, and not here.

        Args:
            manifest_file: of the subject, on this machine.
            key: of a run, see `RunManifest`; the results replace others that are here, if they are those of this run.

        Raises:
            InputError: the store cannot be reached, or has files of another run than its manifest.
        """
        manifest = self._stored(manifest_file)
        if manifest is None or (key is not None and key not in {run.key for run in manifest.runs.values()}):
            return
        for path, sha256 in _files(manifest).items():
            self._fetch(self._project / path, sha256)
        folder, name = self._place(manifest_file)
        folder.copy_from(name, manifest_file)
        log.info("The results of %s come from %s.", manifest.subject, folder.url)

    def _fetch(self, path: Path, sha256: str) -> None:
        if path.exists() and digest_of(path) == sha256:
            return
        folder, name = self._place(path)
        for inner in folder.find(name):
            folder.copy_from(inner, path.parent / inner)
        if sha256 == _EMPTY_FOLDER and not path.exists():  # stores have no empty folders
            path.mkdir(parents=True)
        if not path.exists() or digest_of(path) != sha256:
            raise InputError(
                expected=f"{name} in {folder.url} as its manifest says",
                got="another file" if path.exists() else "no file",
                remedy="let the machine that made it copy it again, by any run of the subject",
            )

    def _stored(self, manifest_file: Path) -> Manifest | None:
        folder, name = self._place(manifest_file)
        text = folder.read(name)
        return None if text is None else parsed_manifest(text, f"{folder.url}/{name}")

    def _place(self, file: Path) -> tuple[ObjectStore, str]:
        """Return the folder of a file in the store, and its name there."""
        relative = file.relative_to(self._project)
        return self._store.folder(*relative.parent.parts), relative.name


class StoreHooks:
    """Fetch what a run needs, and publish what it has made, if the run has a store."""

    @hook_impl
    def after_context_created(self, context: KedroContext) -> None:
        """Store the settings and the project's folder."""
        url = settings_of(context)["store"]
        self._store = None if url is None else ResultStore(Path(context.project_path), str(url))

    @hook_impl(tryfirst=True)  # before the inputs are checked
    def before_pipeline_run(self, pipeline: Pipeline, catalog: DataCatalog) -> None:
        """Copy the concept and its other results to this machine, if they are not here.

        Raises:
            InputError: see `ResultStore.fetch`.
        """
        concept = path_of(catalog, _CONCEPT)
        if self._store is not None and concept is not None and _CONCEPT in pipeline.inputs() and not concept.exists():
            self._store.fetch(concept.with_name(MANIFEST))

    @hook_impl
    def after_pipeline_run(self, pipeline: Pipeline, catalog: DataCatalog) -> None:
        """Copy the results to the store.

        Raises:
            InputError: see `ResultStore.publish`.
        """
        concept = path_of(catalog, _CONCEPT)
        if self._store is not None and concept is not None and _CONCEPT in pipeline.datasets():
            self._store.publish(concept.with_name(MANIFEST))


def _files(manifest: Manifest) -> dict[str, str]:
    """Return path -> hash of what the runs of a subject have written into its folders, the latest of each.

    The concept is the last one: without it, nothing counts as there.
    """
    outputs = [output for run in manifest.by_time for output in run.outputs.items()]
    ordered = sorted(outputs, key=lambda output: output[0] == _CONCEPT)  # stable
    return {file.path: file.sha256 for _, file in ordered if _is_of(manifest.subject, Path(file.path))}


def _is_of(subject: str, path: Path) -> bool:
    return subject in path.parts and ".." not in path.parts and not path.is_absolute()


def _all_in(path: Path) -> Iterator[Path]:
    yield from (file for file in sorted(path.rglob("*")) if file.is_file()) if path.is_dir() else (path,)
