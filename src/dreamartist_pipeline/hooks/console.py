"""Print the progress of a run, and at the end its files and the next commands."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from kedro.framework.context import KedroContext
from kedro.framework.hooks import hook_impl
from kedro.io import DataCatalog
from kedro.pipeline import Pipeline
from kedro.pipeline.node import Node

from dreamartist_pipeline.hooks.run import path_of, settings_of

LOGGER = logging.getLogger(__name__)


class ConsoleHooks:
    """Print which node runs, its duration, and at the end the files and the next commands."""

    @hook_impl
    def after_context_created(self, context: KedroContext) -> None:
        """Store the settings for the closing summary."""
        self._settings = settings_of(context)

    @hook_impl
    def before_pipeline_run(self, pipeline: Pipeline) -> None:
        """Count the nodes."""
        self._num_nodes, self._num_started = len(pipeline.nodes), 0
        self._pipeline_started_s = time.monotonic()

    @hook_impl
    def before_node_run(self, node: Node) -> None:
        """Print the node's name."""
        self._num_started += 1
        self._node_started_s = time.monotonic()
        LOGGER.info("[%d/%d] %s", self._num_started, self._num_nodes, node.short_name)

    @hook_impl
    def after_node_run(self, node: Node) -> None:
        """Print the node's duration if it is above 2 s."""
        elapsed_s = time.monotonic() - self._node_started_s
        if elapsed_s > 2:
            LOGGER.info("      %s took %.1f s", node.short_name, elapsed_s)

    @hook_impl(tryfirst=True)  # before kedro-mlflow closes the run, whose experiment is printed
    def after_pipeline_run(self, run_params: dict[str, Any], pipeline: Pipeline, catalog: DataCatalog) -> None:
        """Print the files of this run and the next commands."""
        elapsed_s, project_path = time.monotonic() - self._pipeline_started_s, Path(run_params["project_path"])
        files = written_files(pipeline, catalog, project_path)
        click.echo(f"\nDone in {elapsed_s:.0f} s. Files of this run:")
        click.echo("\n".join(f"  {name:<24} {path}" for name, path in files.items()))
        click.echo("\n".join(["", "Next:", *next_commands(self._settings, run_params, project_path)]))


def written_files(pipeline: Pipeline, catalog: DataCatalog, project_path: Path) -> dict[str, str]:
    """Return the path, relative to the project, of every dataset that the pipeline stores on disk."""
    paths = {name: path_of(catalog, name) for name in sorted(pipeline.all_outputs())}
    return {name: _relative(path, project_path) for name, path in paths.items() if path is not None}


def next_commands(settings: Mapping[str, Any], run_params: Mapping[str, Any], project_path: Path) -> list[str]:
    """Return the commands that show the results and draw new images, as lines of text."""
    import mlflow

    uri = mlflow.get_tracking_uri()
    scheme = "sqlite:///"
    store = scheme + _relative(Path(uri.removeprefix(scheme)), project_path) if uri.startswith(scheme) else uri
    run = mlflow.active_run()
    experiment = f"#/experiments/{run.info.experiment_id}/runs?compareRunsMode=CHART" if run else ""
    is_server = uri.startswith("http")
    command = "open in a browser:" if is_server else f"mlflow ui --backend-store-uri {store}"
    server = uri.rstrip("/") if is_server else "http://127.0.0.1:5000"
    env, given = run_params["env"], run_params["runtime_params"] or {}
    option = f" --env {env}" if env and env != "local" else ""
    same_base_model = f",base_model={given['base_model']}" if "base_model" in given else ""
    prompt = f"subject={settings['subject']}{same_base_model},generate.prompts=a {{pt1}}, blue background"
    return [
        f"  curves and previews      {command}",
        f"                           {server}/{experiment}",
        f"  the pipelines            kedro viz run{option}",
        f'  new images               kedro run --pipeline generate{option} --params "{prompt}"',
    ]


def _relative(path: Path, project_path: Path) -> str:
    return path.relative_to(project_path).as_posix() if path.is_relative_to(project_path) else path.as_posix()
