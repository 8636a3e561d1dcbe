"""Provide what no file has: None for optional inputs that are missing, and for the report the runs of the concept."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from kedro.framework.context import KedroContext
from kedro.framework.hooks import hook_impl
from kedro.io import DataCatalog
from kedro.pipeline import Pipeline

from dreamartist_pipeline.catalog import ProjectCatalog
from dreamartist_pipeline.early_checks import optional_inputs_of
from dreamartist_pipeline.hooks.configuration import build_parameters
from dreamartist_pipeline.hooks.console import Commands, evaluation_command, next_lines, program, quoted
from dreamartist_pipeline.hooks.manifest import (
    BASE_MODEL,
    Manifest,
    ManifestHooks,
    RunManifest,
    StoredFile,
    changes,
    digest_of,
    manifest_of,
)
from dreamartist_pipeline.hooks.parameters import flatten, number_lists, plain_sections
from dreamartist_pipeline.hooks.record import Presets, flush
from dreamartist_pipeline.hooks.run import path_of, settings_of
from dreamartist_pipeline.hooks.story import PREVIEWS, file_sha256, run_that_made
from dreamartist_pipeline.params import RUN_SETTINGS, SECTIONS
from dreamartist_pipeline.redaction import redact
from dreamartist_pipeline.run_facts import RUN_FACTS, RunFacts
from dreamartist_pipeline.tracking.delivery import optional

_CONCEPT = "concept"
_PICTURE, _REPORT = "reference_image", "report"
_NAMES_ITS_CONCEPT = frozenset({"recommended_settings"})
"""Datasets that are read without a manifest, too: their readers leave out those of another concept."""
_USES = ("evaluation", "generate", "export", "registration")  # sections of what is done with a finished concept


class ReportHooks:
    """Provide `RunFacts`, and None for optional inputs that are missing or belong to another concept."""

    def __init__(self, manifests: ManifestHooks) -> None:
        """Store the hooks that know what the present run has read and written.

        Args:
            manifests: of the same session.
        """
        self._manifests = manifests

    @hook_impl
    def after_context_created(self, context: KedroContext) -> None:
        """Store the settings, the project's folder, and what loads the presets."""
        self._settings, self._project = settings_of(context), Path(context.project_path)
        self._loader = cast("Presets", context.config_loader)
        self._conf_source = str(context.config_loader.conf_source)

    @hook_impl(tryfirst=True)  # before ConfigurationHooks refuses what is missing
    def before_pipeline_run(self, run_params: dict[str, Any], pipeline: Pipeline, catalog: DataCatalog) -> None:
        """Provide what the pipeline reads."""
        if not isinstance(catalog, ProjectCatalog):
            return
        if optional_names := _optional_inputs(pipeline):
            concept = path_of(catalog, _CONCEPT)
            manifest = None if concept is None or not concept.is_file() else manifest_of(concept)
            replaces = _CONCEPT in pipeline.all_outputs()
            for name in optional_names:
                is_named = manifest is None and name in _NAMES_ITS_CONCEPT and catalog.exists(name)
                if replaces or not (is_named or is_of_concept(name, manifest, self._project)):
                    catalog.provide(name, lambda: None)
        if RUN_FACTS in pipeline.inputs():
            catalog.provide(RUN_FACTS, lambda: self._facts(run_params, pipeline, catalog))

    def _facts(self, run_params: Mapping[str, Any], pipeline: Pipeline, catalog: DataCatalog) -> RunFacts:
        """Return the facts; the concept exists when the report is written."""
        given = run_params["runtime_params"] or {}
        commands = Commands(self._project, self._conf_source, run_params["env"], self._settings)
        concept = path_of(catalog, _CONCEPT)
        assert concept is not None  # the catalog has it
        now, replaces = self._manifests.run_so_far(pipeline, catalog), _CONCEPT in pipeline.all_outputs()
        manifest = None if replaces else manifest_of(concept)
        made_by = now if replaces else manifest.made_by if manifest else None
        runs = [*(manifest.by_time if manifest else ()), now]
        configuration = _configuration(runs, made_by)
        return RunFacts(
            subject=str(self._settings["subject"]),
            made=made_by.ended if made_by else "",
            command=redact(quoted([program("kedro"), *made_by.arguments])) if made_by else "",
            configuration=flatten(number_lists(configuration)),
            changed=self._changed(configuration) if made_by else {},
            versions=made_by.versions if made_by else {},
            machine=made_by.machine if made_by else {},
            files={name: file.path for name, file in _merged(run.outputs for run in runs).items() if name != _REPORT},
            hashes=_hashes(concept, made_by),
            next=tuple((what.strip(), redact(text)) for what, text in next_lines(commands, pipeline, catalog, given)),
            remedies=_remedies(commands, pipeline, catalog, given),
            previews=_previews(concept, is_made_here=replaces),
        )

    def _changed(self, configuration: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Return dotted name -> (default, value) of all parameters of the runs that differ from conf/base."""
        given = {name: configuration[name] for name in RUN_SETTINGS if configuration.get(name) is not None}
        used = {name: values for name, values in configuration.items() if name in SECTIONS}
        defaults = plain_sections(build_parameters(self._loader.presets(given, used)))
        return changes(number_lists(defaults), number_lists(used))


def _optional_inputs(pipeline: Pipeline) -> set[str]:
    """Return the datasets that a pipeline does not make, and that every node which reads them can do without."""
    inputs = [(name, node) for node in pipeline.nodes for name in node.inputs]
    needed = {name for name, node in inputs if name not in optional_inputs_of(node.func)}
    return (pipeline.inputs() - needed) & {name for name, _ in inputs}


def is_of_concept(name: str, manifest: Manifest | None, project: Path) -> bool:
    """Return whether a dataset exists as a run of a concept has written it, by the concept's manifest."""
    files: dict[str, StoredFile] = {} if manifest is None else _merged(run.outputs for run in manifest.by_time)
    if name not in files or not (path := project / files[name].path).exists():
        return False
    return digest_of(path) == files[name].sha256


def _configuration(runs: Iterable[RunManifest], made_by: RunManifest | None) -> dict[str, Any]:
    """Return the settings and parameters that a concept was made with, and those that it was last used with.

    Args:
        runs: of the concept, in the order in which they ended.
        made_by: the one that made the concept; None if that is not recorded.
    """
    latest = _merged(run.configuration for run in runs)
    making = {} if made_by is None else made_by.configuration
    return latest | {name: value for name, value in making.items() if name not in _USES or name not in latest}


def _merged(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return mappings as one; of a key in several, the value of the last."""
    return {name: value for part in parts for name, value in part.items()}


def _hashes(concept: Path, made_by: RunManifest | None) -> dict[str, str]:
    inputs = {} if made_by is None else made_by.inputs
    known = {name: inputs[name].sha256 for name in (BASE_MODEL, _PICTURE) if name in inputs}
    return {_CONCEPT: file_sha256(concept), **known}


def _remedies(commands: Commands, pipeline: Pipeline, catalog: DataCatalog, given: Mapping[str, Any]) -> dict[str, str]:
    found = {
        "train": commands.run("train", given),
        "evaluate": evaluation_command(commands, pipeline, catalog, given),
        "export": commands.run("export", given),
    }
    return {name: redact(command) for name, command in found.items()}


def _previews(concept: Path, is_made_here: bool) -> bytes | None:
    """Return the sheet of previews that the run which made a concept has logged; None without one."""
    import mlflow

    found = None
    if (active := mlflow.active_run()) is None:
        return found
    with optional("the previews of the training"), tempfile.TemporaryDirectory() as folder:
        if is_made_here:
            flush()
        client = mlflow.MlflowClient()
        run = active if is_made_here else run_that_made(client, active.info.experiment_id, concept)
        files = [] if run is None else client.list_artifacts(run.info.run_id, "training")
        if run is not None and PREVIEWS in {file.path for file in files}:
            found = Path(client.download_artifacts(run.info.run_id, PREVIEWS, folder)).read_bytes()
    return found
