"""Start kedro-mlflow, whose database takes seconds to open, after the checks of a run."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
from kedro.framework.context import KedroContext
from kedro.framework.hooks import hook_impl
from kedro.io import DataCatalog
from kedro.pipeline import Pipeline

from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.locks import LocalLock
from dreamartist_pipeline.tracking.databases import database_file, follow_location, open_database
from dreamartist_pipeline.tracking.delivery import reason_of
from dreamartist_pipeline.tracking.left_runs import LeftRuns
from dreamartist_pipeline.tracking.servers import check_store
from dreamartist_pipeline.tracking.stores import keep_undelivered

RUN_COMMAND = "run"
"""Name of the command that runs pipelines."""
_FOLDER = "data/09_tracking"
_SETUP_S = 60.0  # creating the tables takes some seconds


class MLflowHooks:
    """Register kedro-mlflow's hooks: in `kedro run` after the checks, in sessions and other commands at once.

    Kedro would register them itself; settings.py disables that.

    Args:
        check_continues: whether a run, of MLFLOW_RUN_ID, can be continued by a pipeline with its catalog; it raises
            an InputError.
    """

    def __init__(self, check_continues: Callable[[Any, Pipeline, DataCatalog], None] | None = None) -> None:
        self._check_continues = check_continues
        self._waiting: KedroContext | None = None
        self._runs: LeftRuns
        self._configuration: Any

    @hook_impl
    def after_context_created(self, context: KedroContext) -> None:
        """Open the tracking store, except in `kedro run`."""
        command = click.get_current_context(silent=True)
        if command is not None and command.command.name == RUN_COMMAND:
            self._waiting = context
        else:
            self._register(context)

    # after ConfigurationHooks, before kedro-mlflow, which sessions register later, and before RunRecordHooks
    @hook_impl(tryfirst=True)
    def before_pipeline_run(self, run_params: dict[str, Any], pipeline: Pipeline, catalog: DataCatalog) -> None:
        """Open the tracking store, finish what earlier runs have left there, and open the run."""
        plugin = None if self._waiting is None else self._register(self._waiting)
        self._waiting = None
        self._prepare_run(pipeline, catalog)
        if plugin is not None:
            plugin.after_catalog_created(catalog, {}, {}, {}, "", {})
            _open_run(plugin, run_params, pipeline, catalog)

    @hook_impl(trylast=True)  # after kedro-mlflow has closed the run
    def after_pipeline_run(self) -> None:
        """Let go of the lock of the run."""
        self._runs.end()

    @hook_impl(trylast=True)
    def on_pipeline_error(self) -> None:
        """Let go of the lock of the run."""
        self._runs.end()

    def _register(self, context: KedroContext) -> Any:
        """Check and open the tracking store, register kedro-mlflow's hooks for all calls from now on, and return them.

        Raises:
            InputError: the store cannot be used.
        """
        from kedro_mlflow.framework.hooks.mlflow_hook import mlflow_hook

        configuration = context.config_loader["mlflow"]
        _export_credentials(context, configuration)
        uri = str(configuration["server"]["mlflow_tracking_uri"])
        check_store(uri)
        folder = context.project_path / _FOLDER
        location = _set_location(configuration, uri, context.project_path)
        context.config_loader["mlflow"] = configuration
        keep_undelivered()
        file = database_file(uri)
        with ExitStack() as stack:
            if file is not None:
                import mlflow.store.tracking.sqlalchemy_store  # noqa: F401 # takes seconds: not while others wait

                lock = LocalLock(file.with_name(f"{file.name}.lock"), f"the set-up of MLflow's database {file}")
                stack.enter_context(lock.hold(_SETUP_S))
                open_database(file, uri)
            _set_up(mlflow_hook, context)
            if file is not None and file.is_relative_to(folder) and location is not None:
                name = mlflow_hook.mlflow_config.tracking.experiment.name
                follow_location(uri, name, location, context.project_path)
        if not context._hook_manager.is_registered(mlflow_hook):
            context._hook_manager.register(mlflow_hook)
        self._runs, self._configuration = LeftRuns(folder, uri), mlflow_hook.mlflow_config
        return mlflow_hook

    def _prepare_run(self, pipeline: Pipeline, catalog: DataCatalog) -> None:
        """Finish earlier runs, and check the run that is to be continued, if any; it is not changed by that.

        Raises:
            InputError: there is no such run in the experiment, or it has other parameters.
        """
        import mlflow

        client, tracking = mlflow.MlflowClient(), self._configuration.tracking
        experiment_id = tracking.experiment._experiment.experiment_id
        self._runs.finish(client, experiment_id)
        if (run_id := tracking.run.id or os.environ.get("MLFLOW_RUN_ID")) and mlflow.active_run() is None:
            run = continued_run(client, run_id, experiment_id)
            if self._check_continues is not None:
                self._check_continues(run, pipeline, catalog)
        self._runs.announce(experiment_id)


def _export_credentials(context: KedroContext, configuration: dict[str, Any]) -> None:
    """Export the credentials that mlflow.yml names, as kedro-mlflow does later: the check needs them."""
    if (name := configuration["server"].get("credentials")) is not None:
        os.environ.update(context._get_config_credentials().get(name, {}))


def _set_location(configuration: dict[str, Any], uri: str, project: Path) -> str | None:
    """Set where the experiment has its files, if it is new, and return that; a server decides it by itself.

    Returns:
        A URI; None for a server, and without the setting.
    """
    arguments = configuration["tracking"]["experiment"].get("create_experiment_kwargs", {})
    location = arguments.get("artifact_location")
    if location is None or uri.startswith(("http", "databricks")):
        arguments.pop("artifact_location", None)
        return None
    file = database_file(uri)
    if file is not None and not file.is_relative_to(project / _FOLDER):
        location = arguments["artifact_location"] = str(file.with_name("artifacts"))
    return str(location) if "://" in str(location) else (project / location).as_uri()


def _set_up(plugin: Any, context: KedroContext) -> None:
    """Let kedro-mlflow set up the experiment.

    Raises:
        InputError: MLflow refuses it.
    """
    from mlflow.exceptions import MlflowException

    try:
        try:
            plugin.after_context_created(context)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            plugin.after_context_created(context)  # another process has just made the experiment
    except MlflowException as error:
        raise refused(error) from error


def _open_run(plugin: Any, run_params: dict[str, Any], pipeline: Pipeline, catalog: DataCatalog) -> None:
    """Let kedro-mlflow open the run.

    Raises:
        InputError: MLflow refuses it.
    """
    from mlflow.exceptions import MlflowException

    try:
        plugin.before_pipeline_run(run_params, pipeline, catalog)
    except MlflowException as error:
        raise refused(error) from error


def refused(error: Exception) -> InputError:
    """Return the error of a store that answers but does not open a run."""
    return InputError(
        expected="MLflow to open a run",
        got=reason_of(error),
        remedy="set MLFLOW_TRACKING_URI to another store, or mend this one",
    )


def continued_run(client: Any, run_id: str, experiment_id: str) -> Any:
    """Return the run of this experiment that is to be continued.

    Raises:
        InputError: there is none.
    """
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        got = reason_of(error)
    else:
        info = run.info
        if info.experiment_id == experiment_id and info.lifecycle_stage == "active":
            return run
        got = f"a run of the experiment {info.experiment_id} ({info.lifecycle_stage})"
    raise InputError(
        expected=f"MLFLOW_RUN_ID={run_id} to be a run of the experiment {experiment_id}",
        got=got,
        remedy="unset MLFLOW_RUN_ID to record a new run",
    )
