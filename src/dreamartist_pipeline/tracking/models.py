"""MLflow models on their way into the model registry of the current tracking store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreamartist_pipeline.redaction import redact, redacted
from dreamartist_pipeline.tracking.delivery import attempt
from dreamartist_pipeline.tracking.outbox import Record

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

CONCEPT_TAG = "concept_sha256"
"""Tag of a version: SHA-256 of the concept's file."""
STARTED_TAG = "run_start_time"
"""Tag of a version: when its run has started, in milliseconds as MLflow counts them."""


def model_record(
    folder: Path, name: str, aliases: Sequence[str], concept_sha256: str, facts: Mapping[str, str]
) -> Record:
    """Return the record that registers a model.

    Args:
        folder: of the MLflow model.
        name: of the registered model.
        aliases: of the new version.
        concept_sha256: of the concept's file.
        facts: parameters of the logged model.
    """
    return Record(
        "model",
        {
            "folder": str(folder),
            "name": redact(name),
            "aliases": list(aliases),
            CONCEPT_TAG: concept_sha256,
            "facts": redacted(dict(facts)),
        },
    )


def send_model(run_id: str, record: Record) -> None:
    """Register a model as a new version of a run, and move the aliases to it.

    A version that an interrupted try has made is used. An alias stays with the version of a later run, whose model was
    delivered before this one.
    """
    from mlflow import MlflowClient

    client, content = MlflowClient(), record.content
    name, run = content["name"], client.get_run(run_id)
    version = _version_of(client, run_id, content)
    if version is None:
        version = _new_version(client, run, content)
    aliases = client.get_registered_model(name).aliases
    for alias in content["aliases"]:
        if alias not in aliases or _started(client.get_model_version(name, aliases[alias])) <= run.info.start_time:
            client.set_registered_model_alias(name, alias, version)


def _started(version: ModelVersion) -> int:
    """Return when the run of a version has started, in ms; 0 for a version that was registered elsewhere."""
    return int(version.tags.get(STARTED_TAG, 0))


def _version_of(client: MlflowClient, run_id: str, content: Mapping[str, Any]) -> str | None:
    versions = client.search_model_versions(f"name = '{content['name']}' and run_id = '{run_id}'")
    return next((str(each.version) for each in versions if each.tags.get(CONCEPT_TAG) == content[CONCEPT_TAG]), None)


def _new_version(client: MlflowClient, run: Run, content: Mapping[str, Any]) -> str:
    model_id = _logged_model(client, run, content)
    _make_registered_model(client, content["name"])
    version = client.create_model_version(
        content["name"],
        f"models:/{model_id}",
        run_id=run.info.run_id,
        tags={CONCEPT_TAG: content[CONCEPT_TAG], STARTED_TAG: str(run.info.start_time)},
        description=_description(content["facts"]),
        await_creation_for=0,
        model_id=model_id,
    )
    return str(version.version)


def _logged_model(client: MlflowClient, run: Run, content: Mapping[str, Any]) -> str:
    """Log a model in a run, with its files, and return its id."""
    from mlflow.entities import LoggedModelOutput

    model = client.create_logged_model(
        run.info.experiment_id,
        content["name"],
        source_run_id=run.info.run_id,
        tags={CONCEPT_TAG: content[CONCEPT_TAG]},
        params=dict(content["facts"]),
    )
    try:
        client.log_model_artifacts(model.model_id, content["folder"])
    except Exception:
        attempt(client.finalize_logged_model, model.model_id, "FAILED")
        raise
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(run.info.run_id, [LoggedModelOutput(model.model_id, step=0)])
    return str(model.model_id)


def _make_registered_model(client: MlflowClient, name: str) -> None:
    """Create a registered model unless it exists."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _description(facts: Mapping[str, str]) -> str:
    return "\n".join(f"* {name.replace('_', ' ')}: `{value}`" for name, value in facts.items() if value)
