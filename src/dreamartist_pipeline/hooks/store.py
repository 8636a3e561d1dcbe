"""The results of subjects in an object store: runs copy their own there, and those that they need from there."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from kedro.framework.context import KedroContext
from kedro.framework.hooks import hook_impl
from kedro.io import DataCatalog
from kedro.pipeline import Pipeline

from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.hooks.manifest import (
    MANIFEST,
    Manifest,
    RunManifest,
    StoredFile,
    digest_of,
    parsed_manifest,
    read_manifest,
)
from dreamartist_pipeline.hooks.outputs import JOURNAL, lock_of
from dreamartist_pipeline.hooks.run import path_of, settings_of
from dreamartist_pipeline.object_stores import ObjectStore
from dreamartist_pipeline.whole_files import STAGED, finish_publishing, publish

_CONCEPT = "concept"
_DATA = "data"
_EMPTY_FOLDER = hashlib.sha256().hexdigest()  # see `manifest.digest_of`; stores have no empty folders

log = logging.getLogger(__name__)


class ResultStore:
    """The files that the manifests of concepts name, in a store, at the same paths as in the project.

    A manifest is copied last. Files that are not those of the manifest are those of a run whose copying was
    interrupted, and are not taken.

    Args:
        project: its folder.
        url: of the store.

    Raises:
        InputError: no such kind of store.
    """

    def __init__(self, project: Path, url: str) -> None:
        self._project, self._store = project, ObjectStore(url)

    def publish(self, manifest_file: Path, makes_concept: bool = False) -> None:
        """Copy what a manifest of this machine names, and what the store does not have.

        The runs of other machines that used the same concept stay in the store, and so does another concept, unless the
        present run has made that of this machine.

        Args:
            manifest_file: of the subject.
            makes_concept: whether the present run has made the concept.

        Raises:
            InputError: the store cannot be reached.
        """
        if (own := read_manifest(manifest_file)) is None:
            return
        stored = self._readable(manifest_file)
        before = {} if stored is None else _files(stored)
        if stored is not None and stored.concept_sha256 != own.concept_sha256:
            if not makes_concept:
                log.warning("Another machine has made another concept of %s: these results stay here.", own.subject)
                return
            stored = None
        united = own if stored is None else own.model_copy(update={"runs": _united(stored, own)})
        files = _files(united)
        changed = {path for path, sha256 in _files(own).items() if files[path] == sha256 != before.get(path)}
        if differing := [path for path in changed if self._digest(path) != files[path]]:
            log.warning("%s is not as its manifest says: these results stay here (kedro verify).", differing[0])
            return
        for path in changed:
            self._upload(self._project / path)
        folder, name = self._place(manifest_file)
        if united != stored:
            folder.write(name, united.model_dump_json(indent=1).encode())
            log.info("The results of %s are in %s.", own.subject, folder.url)

    def fetch(self, manifest_file: Path, key: str | None = None) -> None:
        """Copy the results of a subject from the store, all of them or none, in place of those that are here.

        Args:
            manifest_file: of the subject, on this machine.
            key: of a run, see `RunManifest`; without a run of that key in the store, nothing is copied.

        Raises:
            InputError: the store cannot be reached, or has files of another run than its manifest; another run of the
                subject.
        """
        manifest = self._stored(manifest_file)
        if manifest is None or (key is not None and key not in {run.key for run in manifest.runs.values()}):
            return
        with lock_of(manifest_file.parent, manifest.subject).hold():
            journal = manifest_file.with_name(JOURNAL)
            finish_publishing(journal)
            files = {self._project / path: sha256 for path, sha256 in _files(manifest).items()}
            try:
                differing = [path for path, sha256 in files.items() if not path.exists() or digest_of(path) != sha256]
                for path in differing:
                    self._download(path, files[path])
                folder, name = self._place(manifest_file)
                folder.copy_from(name, manifest_file.parent / STAGED / name)
                publish([*differing, manifest_file], journal)
            finally:
                for parent in {path.parent for path in (*files, manifest_file)}:
                    shutil.rmtree(parent / STAGED, ignore_errors=True)
        log.info("The results of %s come from %s.", manifest.subject, folder.url)

    def _upload(self, path: Path) -> None:
        folder, name = self._place(path)
        kept = set()
        for file in _all_in(path):
            inner = file.relative_to(path.parent)
            kept.add(inner.as_posix())
            folder.folder(*inner.parent.parts).copy_to(inner.name, file)
        for other in folder.find(name).keys() - kept:  # of an earlier run
            folder.remove(other)

    def _download(self, path: Path, sha256: str) -> None:
        """Copy a file or folder aside, and check it."""
        (folder, name), staged = self._place(path), path.parent / STAGED
        for inner in folder.find(name):
            folder.copy_from(inner, staged / inner)
        copy = staged / name
        if sha256 == _EMPTY_FOLDER and not copy.exists():
            copy.mkdir(parents=True)
        if not copy.exists() or digest_of(copy) != sha256:
            raise InputError(
                expected=f"{name} in {folder.url} as its manifest says",
                got="another file" if copy.exists() else "no file",
                remedy="wait until the machine that made it has copied it, or let any run of the subject there do so",
            )

    def _digest(self, path: str) -> str | None:
        file = self._project / path
        return digest_of(file) if file.exists() else None

    def _readable(self, manifest_file: Path) -> Manifest | None:
        """Return the manifest in the store; a damaged one is replaced."""
        folder, name = self._place(manifest_file)
        text = folder.read(name)
        try:
            return None if text is None else self._checked(text, manifest_file)
        except InputError as error:
            log.warning("%s", error)
            return None

    def _stored(self, manifest_file: Path) -> Manifest | None:
        folder, name = self._place(manifest_file)
        text = folder.read(name)
        return None if text is None else self._checked(text, manifest_file)

    def _checked(self, text: bytes, manifest_file: Path) -> Manifest:
        folder, name = self._place(manifest_file)
        manifest = parsed_manifest(text, f"{folder.url}/{name}")
        if manifest.subject != manifest_file.parent.name:
            raise InputError(
                expected=f"a manifest of {manifest_file.parent.name} in {folder.url}",
                got=f"one of {manifest.subject}",
                remedy="delete it; the next training writes it again",
            )
        return manifest

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
        """Copy the concept and its other results to this machine, if it is not here.

        Raises:
            InputError: see `ResultStore.fetch`.
        """
        concept = path_of(catalog, _CONCEPT)
        if self._store is not None and concept is not None and _CONCEPT in pipeline.inputs() and not concept.exists():
            self._store.fetch(concept.with_name(MANIFEST))

    @hook_impl(trylast=True)  # when the run has ended in every other respect
    def after_pipeline_run(self, pipeline: Pipeline, catalog: DataCatalog) -> None:
        """Copy the results to the store.

        Raises:
            InputError: the store cannot be reached; the results are whole here.
        """
        concept = path_of(catalog, _CONCEPT)
        if self._store is None or concept is None or _CONCEPT not in pipeline.datasets():
            return
        try:
            self._store.publish(concept.with_name(MANIFEST), _CONCEPT in pipeline.all_outputs())
        except InputError as error:
            remedy = (
                f"{error.remedy}; the results are whole on this machine, and the next run of the subject copies them"
            )
            raise InputError(error.expected, error.got, remedy) from error


def _united(stored: Manifest, own: Manifest) -> dict[str, RunManifest]:
    """Return the runs of both, of equal ones the latest."""
    runs = dict(stored.runs)
    for name, run in own.runs.items():
        if name not in runs or runs[name].ended <= run.ended:
            runs[name] = run
    return runs


def _files(manifest: Manifest) -> dict[str, str]:
    """Return path -> hash of what the runs of a subject have written into its folders, the latest of each."""
    outputs = (output for run in manifest.by_time for output in run.outputs.values())
    return {output.path: output.sha256 for output in outputs if _is_of(manifest.subject, output)}


def _is_of(subject: str, output: StoredFile) -> bool:
    """Return whether a file is data/<layer>/<subject>/… in the project."""
    parts = Path(output.path).parts
    return len(parts) > 3 and (parts[0], parts[2]) == (_DATA, subject) and ".." not in parts


def _all_in(path: Path) -> Iterator[Path]:
    yield from (file for file in sorted(path.rglob("*")) if file.is_file()) if path.is_dir() else (path,)
