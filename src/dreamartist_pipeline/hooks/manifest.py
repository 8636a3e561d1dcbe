"""Write the manifest of a concept: what a run read and wrote, with which versions, settings and machine."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from kedro.framework.context import KedroContext
from kedro.framework.hooks import hook_impl
from kedro.io import DataCatalog
from kedro.pipeline import Pipeline
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from dreamartist_pipeline.core.devices import machine_class
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.hooks.parameters import plain_sections
from dreamartist_pipeline.hooks.record import git_tags, sections_of
from dreamartist_pipeline.hooks.run import path_of, pipelines_of, settings_of
from dreamartist_pipeline.hooks.story import file_sha256
from dreamartist_pipeline.redaction import redacted
from dreamartist_pipeline.starting_runs import RUN_KEY
from dreamartist_pipeline.whole_files import written_whole

if TYPE_CHECKING:
    from dreamartist_pipeline.params import DeviceParams

MANIFEST = "manifest.json"
"""Name of the file, in the folder of the concept."""
BASE_MODEL = "base_model"
_FORMAT = 1
_PACKAGES = ("dreamartist-pipeline", "kedro", "torch", "diffusers", "transformers", "safetensors", "numpy", "pillow")


class StoredFile(BaseModel):
    """A file or folder as a run read or wrote it.

    Attributes:
        path: relative to the project if it is inside, else absolute.
        sha256: of the file; of a folder, over the names and hashes of its files.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    sha256: str


class RunManifest(BaseModel):
    """One run of a concept.

    Attributes:
        arguments: of the command, without its program and without secrets.
        ended: time, ISO 8601.
        mlflow_run: id; None if it was not recorded.
        configuration: settings and parameters of the run, with all seeds.
        inputs: dataset -> file, when the run began; the base model with the fingerprint of its weights.
        outputs: dataset -> file, when the run had ended.
        versions: package -> version; the commit of the project among them.
        machine: what can change the last bits: processor or GPU, threads, operating system.
        key: of a run that another one has started; see `hooks.starting`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    arguments: tuple[str, ...]
    ended: str
    mlflow_run: str | None
    configuration: dict[str, Any]
    inputs: dict[str, StoredFile]
    outputs: dict[str, StoredFile]
    versions: dict[str, str]
    machine: dict[str, str]
    key: str | None = None


class Manifest(BaseModel):
    """The runs of one concept, by pipeline: the one that made it first.

    Attributes:
        format: of this file.
        subject: of the runs.
        concept_sha256: of the concept file.
        runs: pipelines joined by '+' -> the latest such run.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: NonNegativeInt = _FORMAT
    subject: str
    concept_sha256: str
    runs: dict[str, RunManifest]

    @property
    def made_by(self) -> RunManifest:
        """The run that made the concept."""
        return next(iter(self.runs.values()))

    @property
    def by_time(self) -> list[RunManifest]:
        """The runs in the order in which they ended."""
        return sorted(self.runs.values(), key=lambda run: run.ended)


def read_manifest(file: Path) -> Manifest | None:
    """Return the manifest in a file; None if there is none.

    Raises:
        InputError: it is damaged, or of a later format.
    """
    try:
        return parsed_manifest(file.read_bytes(), str(file))
    except FileNotFoundError:
        return None


def parsed_manifest(text: bytes, file: str) -> Manifest:
    """Return the manifest in the contents of a file.

    Raises:
        InputError: it is damaged, or of a later format.
    """
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(
            expected=f"a manifest of format {_FORMAT} in {file}",
            got=f"{'.'.join(map(str, first['loc'])) or 'the text'}: {first['msg']}",
            remedy="delete the file; the next training writes it again",
        ) from None
    if not manifest.runs or manifest.format > _FORMAT:
        raise InputError(
            expected=f"a manifest of format {_FORMAT} in {file}, with a run",
            got=f"format {manifest.format}, {len(manifest.runs)} runs",
            remedy="use the version of the project that wrote it, or delete the file",
        )
    return manifest


class ManifestHooks:
    """Write the manifest once a run has ended that makes or uses a concept."""

    @hook_impl
    def after_context_created(self, context: KedroContext) -> None:
        """Store the settings and the project's folder."""
        self._settings, self._project = settings_of(context), Path(context.project_path)

    @hook_impl(trylast=True)
    def before_pipeline_run(self, pipeline: Pipeline, catalog: DataCatalog) -> None:
        """Hash what the run reads, which may be changed or replaced while it runs."""
        self._inputs: dict[str, StoredFile] = {}
        if "concept" in pipeline.datasets():
            provided = getattr(catalog, "provided", ())
            self._inputs = stored_files(pipeline.inputs() - set(provided), catalog, self._project)

    @hook_impl(tryfirst=True)  # while the MLflow run is open
    def after_pipeline_run(self, run_params: dict[str, Any], pipeline: Pipeline, catalog: DataCatalog) -> None:
        """Write or extend the manifest beside the concept, and log it."""
        concept = path_of(catalog, "concept") if "concept" in pipeline.datasets() else None
        if concept is None or not concept.is_file():
            return
        name, file = "+".join(pipelines_of(run_params)), concept.with_name(MANIFEST)
        run = self.run_so_far(pipeline, catalog)
        if "concept" in pipeline.all_outputs():
            manifest = Manifest(
                subject=str(self._settings["subject"]), concept_sha256=file_sha256(concept), runs={name: run}
            )
        elif (earlier := manifest_of(concept)) is None:
            return  # the concept was made elsewhere, or before there were manifests
        else:
            if name == next(iter(earlier.runs)):  # some nodes of the pipelines that made it, which does not change
                name = f"{name} ({', '.join(sorted(node.name for node in pipeline.nodes))})"
            manifest = earlier.model_copy(update={"runs": earlier.runs | {name: run}})
        with written_whole(file) as temporary:
            temporary.write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
        _log(file)

    def run_so_far(self, pipeline: Pipeline, catalog: DataCatalog) -> RunManifest:
        """Return what the present run has read and written so far."""
        inputs = self._inputs
        if "concept" in pipeline.all_outputs() and BASE_MODEL in pipeline.inputs():
            dataset: Any = catalog["concept"]
            fingerprint = dataset.load_metadata().base_model_fingerprint
            inputs = inputs | {BASE_MODEL: StoredFile(path=str(self._settings[BASE_MODEL]), sha256=fingerprint)}
        sections = sections_of(pipeline, catalog)
        device = cast("DeviceParams | None", sections.get("device"))
        return RunManifest(
            arguments=redacted(tuple(sys.argv[1:])),
            ended=datetime.now(UTC).isoformat(timespec="seconds"),
            mlflow_run=active_run_id(),
            configuration=redacted(self._settings) | plain_sections(sections),
            inputs=inputs,
            outputs=stored_files(pipeline.all_outputs(), catalog, self._project),
            versions=versions(self._project),
            machine=machine_class(device) if device is not None else {},
            key=os.environ.get(RUN_KEY),
        )


def versions(project: Path) -> dict[str, str]:
    """Return the versions of the packages that compute results, and the commit of the project."""
    return {name: version(name) for name in _PACKAGES} | git_tags(project)


def stored_files(names: Iterable[str], catalog: DataCatalog, project: Path) -> dict[str, StoredFile]:
    """Return dataset -> file, for all datasets that are stored."""
    stored = {}
    for name in sorted(set(names) - {BASE_MODEL}):  # which can have gigabytes: the concept has its fingerprint
        where = getattr(catalog.get(name), "stored_at", lambda name=name: path_of(catalog, name))()
        if where is not None and where.exists():
            path = where.relative_to(project) if where.is_relative_to(project) else where
            stored[name] = StoredFile(path=path.as_posix(), sha256=digest_of(where))
    return stored


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file, or of a folder over the relative names and hashes of its files, as hex digits."""
    if not path.is_dir():
        return file_sha256(path)
    digest = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()}\0{file_sha256(file)}\n".encode())
    return digest.hexdigest()


def manifest_of(concept: Path) -> Manifest | None:
    """Return the manifest beside a concept; None if there is none, or it is damaged, or that of another concept."""
    try:
        manifest = read_manifest(concept.with_name(MANIFEST))
    except InputError:
        return None
    return manifest if manifest is not None and manifest.concept_sha256 == file_sha256(concept) else None


def active_run_id() -> str | None:
    """Return the id of the active MLflow run; None without one."""
    import mlflow

    run = mlflow.active_run()
    return None if run is None else str(run.info.run_id)


def _log(file: Path) -> None:
    import mlflow

    if mlflow.active_run() is not None:
        mlflow.log_artifact(str(file))


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return dotted name -> (before, now) of all values that differ; None for a missing one."""
    found: dict[str, tuple[Any, Any]] = {}
    for name in [*before, *(key for key in now if key not in before)]:
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found |= {f"{name}.{key}": values for key, values in changes(old, new).items()}
        elif old != new:
            found[name] = (old, new)
    return found
