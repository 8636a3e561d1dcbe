"""Start kedro-mlflow, whose database takes seconds to open, after the checks of a run."""

from __future__ import annotations

from typing import Any

import click
from kedro.framework.context import KedroContext
from kedro.framework.hooks import hook_impl
from kedro.io import DataCatalog
from kedro.pipeline import Pipeline

RUN_COMMAND = "run"
"""Name of the command that runs pipelines."""


class MLflowHooks:
    """Register kedro-mlflow's hooks: in `kedro run` after the checks, in sessions and other commands at once.

    Kedro would register them itself; settings.py disables that.
    """

    def __init__(self) -> None:
        self._waiting: KedroContext | None = None

    @hook_impl
    def after_context_created(self, context: KedroContext) -> None:
        """Open the tracking store, except in `kedro run`."""
        command = click.get_current_context(silent=True)
        if command is not None and command.command.name == RUN_COMMAND:
            self._waiting = context
        else:
            _register(context)

    @hook_impl  # after ConfigurationHooks, which are tried first, and before RunRecordHooks, which are tried last
    def before_pipeline_run(self, run_params: dict[str, Any], pipeline: Pipeline, catalog: DataCatalog) -> None:
        """Open the tracking store and the run."""
        if (context := self._waiting) is None:
            return
        self._waiting = None
        plugin = _register(context)
        plugin.after_catalog_created(catalog, {}, {}, {}, "", {})
        plugin.before_pipeline_run(run_params, pipeline, catalog)


def _register(context: KedroContext) -> Any:
    """Register kedro-mlflow's hooks for all calls from now on, and return them."""
    from kedro_mlflow.framework.hooks.mlflow_hook import mlflow_hook

    if not context._hook_manager.is_registered(mlflow_hook):
        context._hook_manager.register(mlflow_hook)
    mlflow_hook.after_context_created(context)
    return mlflow_hook
