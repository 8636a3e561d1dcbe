"""Print the progress of a run, and at the end its files and the next commands."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import yaml
from kedro.framework.context import KedroContext
from kedro.framework.hooks import hook_impl
from kedro.io import DataCatalog
from kedro.pipeline import Pipeline
from kedro.pipeline.node import Node
from kedro.utils import find_kedro_project

from dreamartist_pipeline.hooks.parameters import flatten
from dreamartist_pipeline.hooks.run import (
    MODEL_SETTINGS,
    is_absolute,
    literal,
    path_of,
    settings_of,
    shown,
)
from dreamartist_pipeline.params import RUN_SETTINGS
from dreamartist_pipeline.redaction import redact, without_credentials

LOGGER = logging.getLogger(__name__)

_SQLITE = "sqlite:///"
_CHARTS = "workflowType=machine_learning&compareRunsMode=CHART"  # MLflow's view of training runs, as charts


class ConsoleHooks:
    """Print which node runs, its duration, and at the end the files and the next commands."""

    @hook_impl
    def after_context_created(self, context: KedroContext) -> None:
        """Store the settings and the configuration's place for the closing summary."""
        self._settings, self._conf_source = settings_of(context), context.config_loader.conf_source

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
        elapsed_s = time.monotonic() - self._pipeline_started_s
        files = written_files(pipeline, catalog)
        click.echo(f"\nDone in {elapsed_s:.0f} s. Files of this run:")
        click.echo("\n".join(f"  {name:<24} {path}" for name, path in files.items()))
        commands = Commands(Path(run_params["project_path"]), str(self._conf_source), run_params["env"], self._settings)
        lines = next_lines(commands, pipeline, catalog, run_params["runtime_params"] or {})
        click.echo(redact("\n".join(["", "Next:", *(f"  {what:<24} {command}" for what, command in lines)])))


def written_files(pipeline: Pipeline, catalog: DataCatalog) -> dict[str, str]:
    """Return the path of every dataset that the pipeline stores on disk, as shown to users."""
    paths = {name: path_of(catalog, name) for name in sorted(pipeline.all_outputs())}
    return {name: shown(path) for name, path in paths.items() if path is not None}


@dataclass(frozen=True)
class Commands:
    """The commands to type after a run, in the working directory of the user.

    Attributes:
        project_path: root of the project.
        conf_source: folder or archive of the configuration of the run.
        env: environment of the run.
        settings: of the run.
    """

    project_path: Path
    conf_source: str
    env: str | None
    settings: Mapping[str, Any]

    def run(self, pipeline: str, given: Mapping[str, Any], **others: str) -> str:
        """Return the command that runs a pipeline, or several, with the subject, base model and device of this run."""
        option = "--pipelines" if "," in pipeline else "--pipeline"
        words = [*self._program(), option, pipeline, *self._env(), *self._conf()]
        device = flatten({"device": given["device"]}) if "device" in given else {}
        values = {"subject": self.settings["subject"], **self._base_model(given), **device, **others}
        return quoted([*words, "--params", ",".join(f"{name}={value}" for name, value in values.items())])

    def viz(self, given: Mapping[str, Any]) -> str | None:
        """Return the command that shows the pipelines and files of this run; None without a configuration to find.

        Paths stay relative to the project: kedro-viz does not know those of the working directory.
        """
        if self._conf() or not self._is_project():
            return None
        names = ["subject", *(name for name in RUN_SETTINGS if name in given and name != "subject")]
        params = ",".join(f"{name}={_in_viz(self.settings[name])}" for name in names)
        return quoted([program("kedro"), "viz", "run", *self._env(), "--params", params])

    def _program(self) -> list[str]:
        return [program("kedro"), "run"] if self._is_project() else [program("dreamartist-pipeline")]

    def _is_project(self) -> bool:
        return bool(find_kedro_project(self.project_path))

    def _env(self) -> list[str]:
        return ["--env", self.env] if self.env and self.env != "local" else []

    def _conf(self) -> list[str]:
        is_default = Path(self.conf_source) == self.project_path / "conf"
        return [] if is_default else ["--conf-source", shown(Path(self.conf_source))]

    def _base_model(self, given: Mapping[str, Any]) -> dict[str, str]:
        paths = {name: str(given[name]) for name in MODEL_SETTINGS if given.get(name) is not None}
        return {name: path if is_absolute(path) else shown(self.project_path / path) for name, path in paths.items()}


def _in_viz(value: Any) -> str:
    """Return a value for `--params` of kedro-viz, which splits at every comma and reads YAML."""
    text = str(value)
    if re.fullmatch(r"[A-Za-z/~][\w./~-]*", text) and yaml.safe_load(text) == text:
        return text
    return json.dumps(literal(value), ensure_ascii=False).replace(",", r"\x2c")


def next_lines(
    commands: Commands, pipeline: Pipeline, catalog: DataCatalog, given: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """Return (purpose, command) of what shows the results of a run, and of what can be run next."""
    lines = mlflow_lines()
    if (viz := commands.viz(given)) is not None:
        lines.append(("the pipelines", viz))
    if "concept" not in pipeline.datasets() or not catalog.exists("concept"):
        return lines
    if "concept" in pipeline.all_outputs() and "evaluation_metrics" not in pipeline.all_outputs():
        lines.append(("compare with base model", evaluation_command(commands, pipeline, catalog, given)))
    dataset: Any = catalog["concept"]
    slot = next(iter(dataset.load_metadata().words), "pt1")
    prompt = f"a {{{slot}}}, blue background"
    return [*lines, ("new images", commands.run("generate", given, **{"generate.prompts": prompt}))]


def evaluation_command(commands: Commands, pipeline: Pipeline, catalog: DataCatalog, given: Mapping[str, Any]) -> str:
    """Return the command that evaluates a concept; an imported one needs a picture to be compared with."""
    if "prepared_image" in pipeline.datasets() or catalog.exists("prepared_image"):
        return commands.run("evaluate", given)
    picture = {} if catalog.exists("reference_image") else {"image": "PICTURE"}
    return commands.run("ingestion,evaluate", given, **picture)


def mlflow_lines() -> list[tuple[str, str]]:
    """Return the command that starts MLflow's pages, unless a server is running, and their address."""
    import mlflow

    uri = without_credentials(mlflow.get_tracking_uri())
    run = mlflow.active_run()
    experiment = f"#/experiments/{run.info.experiment_id}/runs?{_CHARTS}" if run else ""
    if uri.startswith("http"):
        return [("curves and previews", f"{uri.rstrip('/')}/{experiment}")]
    store = f"{_SQLITE}{shown(Path(uri.removeprefix(_SQLITE)))}" if uri.startswith(_SQLITE) else uri
    command = quoted([program("mlflow"), "ui", "--backend-store-uri", store])
    return [("curves and previews", command), ("  then open", f"http://127.0.0.1:5000/{experiment}")]


def program(name: str) -> str:
    """Return how a program of this environment is called: by its name if the environment is active, else by path."""
    folder = Path(sys.executable).parent
    is_active = (found := shutil.which(name)) is not None and Path(found).parent == folder
    return name if is_active else str(Path(shown(folder / name)))


def quoted(words: Sequence[str]) -> str:
    """Return words as a command line for the shell of this system."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)
