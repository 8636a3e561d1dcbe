"""Record a run in MLflow: its name, tags, parameters, inputs and description, and the error if it fails."""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from kedro.framework.context import KedroContext
from kedro.framework.hooks import hook_impl
from kedro.io import DataCatalog
from kedro.pipeline import Pipeline
from pydantic import BaseModel

from dreamartist_pipeline.errors import InputError, input_error_in
from dreamartist_pipeline.hooks.configuration import build_parameters
from dreamartist_pipeline.hooks.parameters import (
    concept_parameters,
    flatten,
    plain_sections,
    recorded_parameters,
    repeated_parameters,
)
from dreamartist_pipeline.hooks.run import path_of, pipelines_of, plain, settings_of
from dreamartist_pipeline.hooks.story import (
    CONCEPT_TAG,
    file_sha256,
    pictures_of,
    run_that_made,
    used_concept,
    with_sections,
)
from dreamartist_pipeline.params import RUN_SETTINGS, SECTIONS
from dreamartist_pipeline.redaction import redacted
from dreamartist_pipeline.starting_runs import PARENT_RUN, STARTING
from dreamartist_pipeline.tracking.delivery import optional
from dreamartist_pipeline.tracking.stores import delivery_of

if TYPE_CHECKING:
    from mlflow.entities import Run

PARENT_TAG = "mlflow.parentRunId"
_TAG_LENGTH = 5000  # MLflow's limit for the value of a tag
_TAGGED = ("subject", "method", "base_model", "vae")  # settings of a run
_PARAMS_PER_REQUEST = 100  # MLflow's limit
_VALUE_LENGTH = 60  # of a value in the name of a run, which MLflow cuts at 250 characters
_TITLES = ("name", "subjects")  # of the section of a run that starts others
_NOT_NAMED = {*_TITLES, "workers", "threads", "ray", "space", "params", "methods"}
_CAPTION_LENGTH = 6000  # MLflow's limit for the value of a parameter
_DIGEST_LENGTH = 36  # MLflow's limit for the digest of a dataset
_OBJECT = re.compile(r"<(?:\w+\.)*(\w+) object at 0x[0-9a-fA-F]+>")  # repr of an object, with its address

log = logging.getLogger(__name__)


class Presets(Protocol):
    """The project's configuration loader."""

    def presets(self, settings: Mapping[str, Any], sections: Collection[str]) -> dict[str, Any]:
        """Return sections of the base environment's parameters for these run settings."""


class RunRecordHooks:
    """Record a run in MLflow, runs of one concept as children of the run that made it."""

    @hook_impl
    def after_context_created(self, context: KedroContext) -> None:
        """Store the settings, and what loads the presets."""
        self._settings, self._loader = settings_of(context), cast("Presets", context.config_loader)

    @hook_impl(trylast=True)  # after kedro-mlflow has opened the run
    def before_pipeline_run(self, run_params: dict[str, Any], pipeline: Pipeline, catalog: DataCatalog) -> None:
        """Name and tag the run, log its parameters, configuration and reference image, and find its parent."""
        import mlflow

        self._catalog = catalog
        if (run := mlflow.active_run()) is None:
            return
        _tag_command(run_params)
        if (starter := os.environ.get(PARENT_RUN)) is not None:
            mlflow.set_tag(PARENT_TAG, starter)
        experiment_id = run.info.experiment_id
        mlflow.MlflowClient().set_experiment_tag(experiment_id, "mlflow.experimentKind", "custom_model_development")
        parameters, parent = self._parameters(pipeline, catalog, experiment_id)
        if used_concept(pipeline, catalog) is not None:
            _tell_parent(parent)
        _log_parameters(parameters)
        if "reference_image" in pipeline.inputs():
            _log_reference(catalog, str(self._settings["subject"]))
        if "reference_caption" in pipeline.inputs() and (caption := catalog.load("reference_caption")):
            mlflow.log_param("caption", caption[:_CAPTION_LENGTH])
        sections = plain_sections(sections_of(pipeline, catalog))
        mlflow.log_dict(redacted(self._settings | sections), "configuration.yaml")
        self._name(run_params, parameters.get("method"))

    def check_continues(self, run: Run, pipeline: Pipeline, catalog: DataCatalog) -> None:
        """Check that this command can continue a run, before anything of that run changes.

        Raises:
            InputError: it has other values of the parameters of this command, of which MLflow keeps the first.
        """
        parameters, _ = self._parameters(pipeline, catalog, run.info.experiment_id)
        check_same_parameters(run, parameters)

    def _parameters(
        self, pipeline: Pipeline, catalog: DataCatalog, experiment_id: str
    ) -> tuple[dict[str, str], Run | None]:
        """Return the parameters to record, and the run that made the concept of this one, if it is known."""
        import mlflow

        sections = sections_of(pipeline, catalog)
        given = {name: value for name, value in self._settings.items() if value is not None}
        presets = build_parameters(self._loader.presets(given, sections))
        own = recorded_parameters(self._settings, sections, presets)
        if (concept := used_concept(pipeline, catalog)) is None:
            return own, None
        parent = None
        with optional("the run that made this concept"):
            parent = run_that_made(mlflow.MlflowClient(), experiment_id, concept)
        dataset: Any = catalog["concept"]
        inherited = parent.data.params if parent else concept_parameters(dataset.load_metadata())
        return repeated_parameters(inherited, own, sections), parent

    def _name(self, run_params: Mapping[str, Any], method: str | None) -> None:
        """Name the run, and tag it with its settings."""
        import mlflow

        run_id = mlflow.active_run().info.run_id
        settings = redacted(self._settings) | {"method": method}
        given = {} if PARENT_RUN in os.environ else run_params["runtime_params"] or {}  # a started run has a name
        mlflow.MlflowClient().update_run(run_id, name=run_name(settings, pipelines_of(run_params), redacted(given)))
        mlflow.set_tags({name: settings[name] for name in _TAGGED if settings.get(name) is not None})

    @hook_impl(tryfirst=True)  # before kedro-mlflow logs all of them; the node still gets them
    def before_node_run(self, inputs: dict[str, Any]) -> None:
        """Leave out the parameters, which are recorded before the first node."""
        for name in [name for name in inputs if name == "parameters" or name.startswith("params:")]:
            del inputs[name]

    @hook_impl
    def after_dataset_saved(self, dataset_name: str, data: Any) -> None:
        """Tag the run that makes a concept with the hash of its file and with its base model."""
        import mlflow

        if dataset_name != "concept" or mlflow.active_run() is None:
            return
        if (file := path_of(self._catalog, "concept")) is not None:
            fingerprint = data.metadata.base_model_fingerprint
            mlflow.set_tags({CONCEPT_TAG: file_sha256(file), "base_model_fingerprint": fingerprint})

    @hook_impl(tryfirst=True)  # before kedro-mlflow closes the run
    def after_pipeline_run(self, pipeline: Pipeline, catalog: DataCatalog) -> None:
        """Wait for asynchronous logging, and describe the run, and its parent, with their pictures."""
        import mlflow

        flush()
        if (run := mlflow.active_run()) is None:
            return
        client = mlflow.MlflowClient()
        run_id, tags = run.info.run_id, client.get_run(run.info.run_id).data.tags
        pictures = pictures_of(run_id, pipeline, catalog)
        maker = None if PARENT_RUN in os.environ else tags.get(PARENT_TAG)
        for described in filter(None, (run_id, maker)):
            with optional("the pictures in the description of the run that made the concept"):
                note = client.get_run(described).data.tags.get("mlflow.note.content", "")
                client.set_tag(described, "mlflow.note.content", with_sections(note, pictures).strip())

    @hook_impl(tryfirst=True)  # before kedro-mlflow closes the run as FAILED
    def on_pipeline_error(self, error: Exception) -> None:
        """Tag the run with the error."""
        import mlflow

        if mlflow.active_run() is not None:
            flush()
            mlflow.set_tag("error", reason_of(error)[:_TAG_LENGTH])


def _tag_command(run_params: Mapping[str, Any]) -> None:
    """Tag the active run with its pipelines, command and commit, and correct the tags that kedro-mlflow has set."""
    import mlflow

    with_address = {name: str(value) for name, value in run_params.items() if _OBJECT.search(str(value))}
    given = plain(run_params["runtime_params"] or {})
    mlflow.set_tags(
        {
            **{name: _OBJECT.sub(r"\1", value) for name, value in with_address.items()},
            **({"runtime_params": str(given)[:_TAG_LENGTH]} if given else {}),
            "pipeline": "+".join(pipelines_of(run_params)),
            "command_line": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])[:_TAG_LENGTH],
            **git_tags(Path(run_params["project_path"])),
        }
    )


def sections_of(pipeline: Pipeline, catalog: DataCatalog) -> dict[str, BaseModel]:
    """Return section -> its parameters, for all sections that a pipeline reads."""
    return {name: catalog.load(f"params:{name}") for name in SECTIONS if f"params:{name}" in pipeline.inputs()}


def _tell_parent(parent: Run | None) -> None:
    """Make the active run a child of `parent`; without one, log that it stands alone."""
    import mlflow

    if parent is None:
        log.info("MLflow has no run that made this concept: this run is recorded by itself.")
        return
    mlflow.set_tag(PARENT_TAG, parent.info.run_id)
    log.info("Recorded in MLflow under the run that made this concept: %s.", parent.info.run_name)


def check_same_parameters(run: Run, parameters: Mapping[str, str]) -> None:
    """Check that a continued run (MLFLOW_RUN_ID) has no other values of these parameters: MLflow keeps the first.

    Raises:
        InputError: it has.
    """
    earlier = run.data.params
    other = {name: value for name, value in parameters.items() if earlier.get(name, value) != value}
    if other:
        raise InputError(
            expected=f"the parameters of the run {run.info.run_id} (MLFLOW_RUN_ID)",
            got=", ".join(f"{name}={value} for {earlier[name]}" for name, value in other.items()),
            remedy="unset MLFLOW_RUN_ID to record a new run",
        )


def _log_parameters(parameters: Mapping[str, str]) -> None:
    import mlflow

    remaining = iter(parameters.items())
    while batch := dict(itertools.islice(remaining, _PARAMS_PER_REQUEST)):
        mlflow.log_params(batch)


def _log_reference(catalog: DataCatalog, subject: str) -> None:
    """Log the reference image as an input of the run, with the SHA-256 of its file."""
    import mlflow
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.data.sources import LocalArtifactDatasetSource

    sha256 = hashlib.sha256(catalog.load("reference_image")).hexdigest()
    source = LocalArtifactDatasetSource(str(path_of(catalog, "reference_image")))
    dataset = MetaDataset(source, name=f"reference image of {subject}", digest=sha256[:_DIGEST_LENGTH])
    mlflow.log_input(dataset, context="training", tags={"sha256": sha256})


def flush() -> None:
    """Wait for asynchronous logging of metrics and of images, for a limited time."""
    import mlflow

    run = mlflow.active_run()
    if run is not None and (delivery := delivery_of(run.info.run_id)) is not None:
        delivery.hurry()
    mlflow.flush_async_logging()
    mlflow.flush_artifact_async_logging()


def reason_of(error: BaseException) -> str:
    """Return kind and message of an error, of the InputError that caused it if any: datasets wrap what they raise.

    References stand in place of values of the environment.
    """
    reason = input_error_in(error) or error
    text: str = redacted(f"{type(reason).__name__}: {reason}")
    return text


def close_run(status: str, reason: str) -> None:
    """End the active MLflow run, if any, with a status and its reason; MLflow itself would record FINISHED.

    Kedro calls no hook on Ctrl-C, nor for an error of another hook before the first node.
    """
    if "mlflow" not in sys.modules:
        return
    import mlflow

    if mlflow.active_run() is not None:
        flush()
        mlflow.set_tag("error", reason[:_TAG_LENGTH])
        mlflow.end_run(status)


def run_name(settings: Mapping[str, Any], pipeline_names: Collection[str], given: Mapping[str, Any]) -> str:
    """Return 'subject · pipeline · parameters of the command line · method'; MLflow cuts long names at their end.

    Runs that start others have no subject, but the name of a sweep or of a table of subjects.
    """
    pipeline = "+".join("default" if name == "__default__" else name for name in pipeline_names)
    starting = STARTING.intersection(pipeline_names)
    given = plain(given)
    sections = {name: given[name] for name in STARTING if isinstance(given.get(name), Mapping)}
    own = [sections[name] for name in starting if name in sections]
    titles = [
        _short(Path(section[key]).name) for section in own for key in _TITLES if isinstance(section.get(key), str)
    ]
    named = {name: {k: v for k, v in each.items() if k not in _NOT_NAMED} for name, each in sections.items()}
    values = flatten({name: value for name, value in {**given, **named}.items() if name not in RUN_SETTINGS})
    differing = [f"{name.removeprefix('training.')}={_short(value)}" for name, value in values.items()]
    method = [] if settings["method"] is None else [str(settings["method"])]
    subject = [] if starting else [str(settings["subject"])]
    return " · ".join([*subject, pipeline, *titles, *differing, *method])[:250]


def _short(value: Any) -> str:
    """Return a value in a run's name: of LoRA groups their number, of a long text its beginning."""
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return f"[{len(value)} groups]" if len(value) > 1 else "[1 group]"
    return textwrap.shorten(str(value), _VALUE_LENGTH, placeholder="…")


def git_tags(project_path: Path) -> dict[str, str]:
    """Return the commit of the project and whether the working tree is dirty; nothing outside a git repository."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(project_path), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"git_commit": git("rev-parse", "HEAD"), "git_dirty": str(bool(git("status", "--porcelain"))).lower()}
    except (subprocess.CalledProcessError, FileNotFoundError):
        return {}
