"""MLflow's stores and artefact repositories, with `Delivery` in between.

MLflow builds the store of a tracking URI by its scheme. Here the builders of servers and databases are replaced by ones
whose stores write through the `Delivery` of a run, so that whatever records something in it (this project, kedro-mlflow
and its datasets, MLflow's system metrics) is covered at the one place through which all of it passes.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreamartist_pipeline.redaction import redact
from dreamartist_pipeline.tracking.delivery import Delivery, Send, attempt, is_loud
from dreamartist_pipeline.tracking.models import send_model
from dreamartist_pipeline.tracking.outbox import Outbox, Record

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput, Metric, Param, Run, RunTag
    from mlflow.store.tracking.abstract_store import AbstractStore
else:
    AbstractStore = object  # the real one is imported with MLflow, which takes seconds

PROCESS_TAG = "process"
"""Tag of a run: the lock that its process holds, see `left_runs`."""

_deliveries: dict[str, Delivery] = {}  # run id -> its delivery


@dataclass(frozen=True)
class _Expected:
    """The next run that is opened: tags that it gets when it is created, and what is to be called then."""

    tags: Mapping[str, str]
    began: Callable[[Run], None]


_expected: list[_Expected] = []  # one, or none


def keep_undelivered() -> None:
    """Let the stores that MLflow builds from now on write through the deliveries of `begin_delivery`."""
    from mlflow.store.db.db_types import DATABASE_ENGINES
    from mlflow.tracking._tracking_service import utils

    for handler in (*logging.getLogger().handlers, *logging.getLogger("mlflow").handlers):
        handler.addFilter(is_loud)  # adds it once
    registry = utils._tracking_store_registry
    if registry._registry.get("http") is _rest_store:
        return
    for scheme in ("http", "https"):
        registry.register(scheme, _rest_store)
    for scheme in DATABASE_ENGINES:
        registry.register(scheme, _sql_store)
    registry._get_store_with_resolved_uri.cache_clear()


def _rest_store(store_uri: str, **_: Any) -> Any:
    from mlflow.store.tracking.rest_store import RestStore
    from mlflow.utils.credentials import get_default_host_creds

    return _delivering(RestStore)(functools.partial(get_default_host_creds, store_uri))


def _sql_store(store_uri: str, artifact_uri: str | None) -> Any:
    from mlflow.store.tracking import DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    return _delivering(SqlAlchemyStore)(store_uri, artifact_uri or DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH)


@functools.cache
def _delivering(store: type) -> Callable[..., Any]:
    return type(f"Delivering{store.__name__}", (DeliveringStore, store), {})


def expect_run(tags: Mapping[str, str], began: Callable[[Run], None]) -> None:
    """Tag the next run that is created, in the same transaction; call `began` with the next run that is opened."""
    _expected[:] = [_Expected(tags, began)]


def expect_no_run() -> None:
    """Leave runs that are opened from now on to MLflow."""
    _expected.clear()


def begin_delivery(run: Run, about: Mapping[str, Any], folder: Path) -> None:
    """Let the records of this run go through a `Delivery` from now on.

    Args:
        run: in the current tracking store.
        about: of its outbox.
        folder: of all outboxes.
    """
    from mlflow.tracking._tracking_service import utils

    files, run_id = _artifacts_of(run), run.info.run_id
    delivery = Delivery(run, about, Outbox(folder / run_id), _sender(run_id, files))
    files.delivery = delivery
    _deliveries[run_id] = delivery
    utils._artifact_repos_cache[run_id] = files


def end_delivery(run_id: str) -> None:
    """Leave a run to MLflow again: it is closed."""
    from mlflow.tracking._tracking_service import utils

    if _deliveries.pop(run_id, None) is not None:
        utils._artifact_repos_cache.pop(run_id, None)


def delivery_of(run_id: str) -> Delivery | None:
    """Return the delivery of a run; None for runs that this process has not begun."""
    return _deliveries.get(run_id)


def logged_files(run_id: str) -> set[str]:
    """Return the paths of the files that this process has logged in a run, whether they are delivered or not."""
    from mlflow.tracking._tracking_service import utils

    return set(utils._artifact_repos_cache[run_id].logged) if run_id in _deliveries else set()


def sender_to(run: Run) -> Send:
    """Return what writes records of an earlier run to the current tracking store."""
    return _sender(run.info.run_id, _artifacts_of(run))


def _artifacts_of(run: Run) -> Any:
    import mlflow

    from dreamartist_pipeline.tracking.artifacts import DeliveringArtifacts

    return DeliveringArtifacts(run, mlflow.get_tracking_uri())


def _sender(run_id: str, files: Any) -> Send:
    from mlflow import MlflowClient

    store = MlflowClient()._tracking_client.store

    def send(record: Record) -> None:
        if record.kind == "file":
            files.send(record.content["file"], record.content["path"])
        elif record.kind == "model":
            send_model(run_id, record)
        else:
            store.send(run_id, record)

    return send


class DeliveringStore(AbstractStore):  # type: ignore[misc]
    """What a tracking store writes for a run with a `Delivery` goes through it; the rest is left to the store."""

    def create_run(
        self, experiment_id: str, user_id: str, start_time: int, tags: Iterable[RunTag], run_name: str | None
    ) -> Run:
        """Create a run, with the tags of `expect_run`."""
        from mlflow.entities import RunTag

        expected = _expected[0] if _expected else None
        own = [] if expected is None else [RunTag(key, value) for key, value in expected.tags.items()]
        clean = [RunTag(tag.key, redact(str(tag.value))) for tag in (*tags, *own)]
        name = None if run_name is None else redact(run_name)
        run = super().create_run(experiment_id, user_id, start_time, clean, name)
        _begin_expected(run)
        return run

    def get_run(self, run_id: str) -> Run:
        """Return a run; one of this process as it began, if the store does not answer."""
        if (delivery := delivery_of(run_id)) is None:
            return super().get_run(run_id)
        found: list[Run] = []
        read = super().get_run
        if not delivery.is_away and attempt(lambda: found.append(read(run_id))) is None:
            return found[0]
        return delivery.run

    def log_batch(self, run_id: str, metrics: list[Metric], params: list[Param], tags: list[RunTag]) -> None:
        """Deliver metrics, parameters and tags."""
        if (delivery := delivery_of(run_id)) is None:
            super().log_batch(run_id, metrics, params, tags)
            return
        content = {
            "metrics": [_without_none(metric.to_dictionary()) for metric in metrics],
            "parameters": {param.key: redact(str(param.value)) for param in params},
            "tags": {tag.key: redact(str(tag.value)) for tag in tags},
        }
        delivery.deliver(Record("batch", content))

    def log_metric(self, run_id: str, metric: Metric) -> None:
        """Deliver a metric."""
        self.log_batch(run_id, [metric], [], [])

    def log_param(self, run_id: str, param: Param) -> None:
        """Deliver a parameter."""
        self.log_batch(run_id, [], [param], [])

    def set_tag(self, run_id: str, tag: RunTag) -> None:
        """Deliver a tag."""
        record = Record("tag", {"key": tag.key, "value": redact(str(tag.value))})
        if (delivery := delivery_of(run_id)) is None:
            self.send(run_id, record)
        else:
            delivery.deliver(record)

    def set_experiment_tag(self, experiment_id: str, tag: Any) -> None:
        """Deliver a tag of the experiment with the run in it."""
        from mlflow import active_run

        run = active_run()
        if run is None or (delivery := delivery_of(run.info.run_id)) is None:
            super().set_experiment_tag(experiment_id, tag)
        else:
            content = {"experiment_id": experiment_id, "key": tag.key, "value": redact(str(tag.value))}
            delivery.deliver(Record("experiment_tag", content))

    def log_inputs(self, run_id: str, datasets: list[DatasetInput] | None = None, models: Any = None) -> None:
        """Deliver the inputs of a run."""
        if models or (delivery := delivery_of(run_id)) is None:
            super().log_inputs(run_id, datasets, models)
        else:
            delivery.deliver(Record("inputs", {"datasets": [each.to_dictionary() for each in datasets or []]}))

    def update_run_info(self, run_id: str, run_status: Any, end_time: int | None, run_name: str | None) -> Any:
        """Deliver status and name; with the last status, what was kept is tried for the last time."""
        from mlflow.entities import RunStatus

        if (delivery := delivery_of(run_id)) is None:
            info = super().update_run_info(run_id, run_status, end_time, run_name)
            if run_status == RunStatus.RUNNING:  # a run that is continued
                _begin_expected(super().get_run(run_id))
            return info
        is_end = run_status is not None and RunStatus.is_terminated(run_status)
        if is_end:
            delivery.close()
        status = None if run_status is None else RunStatus.to_string(run_status)
        name = None if run_name is None else redact(run_name)
        delivery.deliver(Record("status", {"status": status, "end_time": end_time, "name": name}))
        if is_end:
            delivery.report()
        return self.get_run(run_id).info

    def send(self, run_id: str, record: Record) -> None:
        """Write a record to the store itself."""
        from mlflow.entities import ExperimentTag, Metric, Param, RunStatus, RunTag

        content = record.content
        match record.kind:
            case "batch":
                metrics = [Metric.from_dictionary(metric) for metric in content["metrics"]]
                params = [Param(key, value) for key, value in content["parameters"].items()]
                tags = [RunTag(key, value) for key, value in content["tags"].items()]
                super().log_batch(run_id, metrics, params, tags)
            case "tag":
                super().set_tag(run_id, RunTag(content["key"], content["value"]))
            case "experiment_tag":
                super().set_experiment_tag(content["experiment_id"], ExperimentTag(content["key"], content["value"]))
            case "inputs":
                super().log_inputs(run_id, [_dataset_input(each) for each in content["datasets"]])
            case _:
                status = None if content["status"] is None else RunStatus.from_string(content["status"])
                super().update_run_info(run_id, status, content["end_time"], content["name"])


def _begin_expected(run: Run) -> None:
    if _expected:
        _expected.pop().began(run)


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _dataset_input(content: Mapping[str, Any]) -> DatasetInput:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    tags = [InputTag(key, value) for key, value in content["tags"].items()]
    return DatasetInput(Dataset(**content["dataset"]), tags)
