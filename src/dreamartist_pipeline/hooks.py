"""Hooks around a run: check the configuration, record the run in MLflow, print progress."""

from __future__ import annotations

import difflib
import logging
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click
from kedro.framework.context import KedroContext
from kedro.framework.hooks import hook_impl
from kedro.io import DataCatalog
from kedro.pipeline import Pipeline
from kedro.pipeline.node import Node
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from dreamartist_pipeline.early_checks import PlannedConcept, early_check_of
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import SECTIONS

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

LOGGER = logging.getLogger(__name__)

RUN_SETTINGS = (
    "subject",
    "image",
    "mask",
    "init_image",
    "init_mask",
    "base_model",
    "class_word",
    "caption",
    "method",
    "recipe",
    "prompt_database",
    "mlflow_run_id",
)
_SUBJECT = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
_TAG_LENGTH = 5000  # MLflow's limit for the value of a tag


# ------------------------------------------------------------------------------------------------- configuration


class ConfigurationHooks:
    """Refuse invalid configuration before anything is loaded or written."""

    @hook_impl(tryfirst=True)  # before kedro-mlflow opens its database
    def after_context_created(self, context: KedroContext) -> None:
        """Register the project root for configuration files, then validate the parameters of all pipelines.

        Kedro takes a parameter's type from the annotation of the node that reads it, and silently passes a plain
        dictionary if another annotation of that node cannot be evaluated. The schema does not depend on nodes.

        Raises:
            InputError: an unknown environment, key or method, an invalid subject, or values out of bounds, all of
                these in one error.
        """
        register_project_root(context.project_path)
        check_environment(Path(context.config_loader.conf_source), context.config_loader.env)
        given = context.config_loader.runtime_params or {}
        check_names(given, origin="--params")
        check_image_has_subject(given)
        check_subject(settings_of(context)["subject"])
        context.config_loader["parameters"] = build_parameters(load_parameters(context))

    @hook_impl(tryfirst=True)  # before kedro-mlflow opens a run
    def before_pipeline_run(self, pipeline: Pipeline, catalog: DataCatalog) -> None:
        """Fail before the run on missing files and invalid parameters.

        Raises:
            InputError: a missing input, a damaged concept, an import that would replace a concept, or a node's early
                check.
        """
        if "params:import" in pipeline.inputs() and not catalog.load("params:import").replace:
            check_replaces_nothing(catalog)
        for name in sorted(pipeline.inputs()):
            if name != "parameters" and not name.startswith("params:") and not catalog.exists(name):
                catalog.load(name)  # raises the error of its dataset
        planned = planned_concept(pipeline, catalog)
        for node in pipeline.nodes:
            run_early_check(node, catalog, planned)


def planned_concept(pipeline: Pipeline, catalog: DataCatalog) -> PlannedConcept | None:
    """Return what is known of a run's concept before the run; None without one, or in an import.

    Raises:
        InputError: the metadata of the existing concept are damaged.
    """
    if any("concept" in node.outputs and "params:training" in node.inputs for node in pipeline.nodes):
        return PlannedConcept.of_training(catalog.load("params:training"))
    if "concept" not in pipeline.inputs():
        return None
    dataset: Any = catalog["concept"]
    metadata = dataset.load_metadata()
    return PlannedConcept(False, metadata.zero_terminal_snr, metadata.lora, bool(metadata.words))


def run_early_check(node: Node, catalog: DataCatalog, planned: PlannedConcept | None) -> None:
    """Run the early check of a node's function, if it has one.

    Raises:
        InputError: the error of the check, with the section's name as `where`.
    """
    early = early_check_of(node.func)
    if early is None:
        return
    try:
        early.check(catalog.load(f"params:{early.section}"), planned)
    except InputError as error:
        raise InputError(error.expected, error.got, error.remedy, where=early.section) from error


def register_project_root(project_path: Path) -> None:
    """Register the resolver `${project_root:}`; the package may be installed outside the project."""
    OmegaConf.register_new_resolver("project_root", project_path.as_posix, replace=True)


def check_replaces_nothing(catalog: DataCatalog) -> None:
    """Refuse an import over an existing concept.

    Raises:
        InputError: the concept exists.
    """
    if catalog.exists("concept"):
        raise InputError(
            expected="a subject without a concept",
            got=f"{_path_of(catalog, 'concept')}",
            remedy="choose another name (subject=NAME), or replace it (import.replace=true)",
        )


def check_names(names: Collection[str], origin: str) -> None:
    """Refuse top-level parameters that are neither a section nor a run setting.

    Raises:
        InputError: an unknown name; the remedy suggests the nearest known one.
    """
    known = (*RUN_SETTINGS, *SECTIONS)
    for name in map(str, names):
        if name not in known:
            raise InputError(
                expected=f"parameters out of {', '.join(known)}",
                got=f"'{name}' from {origin}",
                remedy=nearest(name, known, otherwise="remove it"),
            )


def build_parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sections as the models of params.py, without variables (names with a leading underscore).

    Raises:
        InputError: unknown keys and values out of bounds, of all sections in one error.
    """
    parameters = {name: value for name, value in parameters.items() if not name.startswith("_")}
    check_names(parameters, origin="conf/")
    built, problems = dict(parameters), []
    for section in SECTIONS.keys() & parameters.keys():
        try:
            built[section] = SECTIONS[section].model_validate(parameters[section])
        except ValidationError as error:
            problems += [f"  {_problem(section, detail)}" for detail in _first_errors(error)]
    if problems:
        raise InputError(
            expected="parameters as defined in src/dreamartist_pipeline/params.py",
            got="\n".join(["others:", *sorted(problems)]),
            remedy="correct them in conf/ or in --params",
        )
    return built


def _first_errors(error: ValidationError) -> list[ErrorDetails]:
    """Return the errors without those inside the value of an unknown key."""
    unknown = {detail["loc"] for detail in error.errors() if detail["type"] == "extra_forbidden"}
    return [
        detail
        for detail in error.errors()
        if detail["type"] == "extra_forbidden" or not any(detail["loc"][: len(key)] == key for key in unknown)
    ]


def _problem(section: str, detail: ErrorDetails) -> str:
    where = ".".join([section, *map(str, detail["loc"])])
    if detail["type"] == "extra_forbidden":
        key, known = str(detail["loc"][-1]), _keys_beside(SECTIONS[section], detail["loc"])
        return f"{where}: unknown key; {nearest(key, known, otherwise='remove it')}"
    if isinstance(detail["input"], dict):
        return f"{where}: {detail['msg']}"
    return f"{where}: {detail['msg']}; got {detail['input']!r}"


def _keys_beside(model: Any, path: Sequence[int | str]) -> list[str]:
    """Return the keys allowed at the last part of `path`."""
    for part in path[:-1]:
        if isinstance(part, str):
            annotation = model.model_fields[part].annotation
            model = next((kind for kind in (annotation, *get_args(annotation)) if hasattr(kind, "model_fields")), None)
        if model is None:
            return []
    return list(model.model_fields)


def nearest(name: str, known: Sequence[str], otherwise: str) -> str:
    """Return a remedy for an unknown name: the nearest known one, else `otherwise`."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean '{near[0]}'?" if near else otherwise


def check_environment(source: Path, env: str | None) -> None:
    """Refuse an environment (`--env`) without a folder.

    Raises:
        InputError: no such folder; the message lists those that exist.
    """
    if env and not (source / env).is_dir():
        known = ", ".join(sorted(folder.name for folder in source.iterdir() if folder.is_dir()))
        raise InputError(
            expected=f"one of the environments {known}",
            got=f"'{env}'",
            remedy=f"choose one (--env NAME), or create {source / env}",
        )


def check_subject(subject: object) -> None:
    """Refuse a subject that cannot be a folder name and part of a trigger word.

    Raises:
        InputError: characters other than letters, digits, '.', '-' and '_'.
    """
    if subject is None or not _SUBJECT.match(str(subject)):
        raise InputError(
            expected="a subject of letters, digits, '.', '-' and '_' (it names folders and the trigger word)",
            got=f"'{subject}'",
            remedy=f"use for example '{re.sub(r'[^A-Za-z0-9]+', '-', str(subject)).strip('-') or 'my-cat'}'",
        )


def check_image_has_subject(given: Mapping[str, Any]) -> None:
    """Refuse `image` without `subject`, because the results would replace those of another subject.

    Raises:
        InputError: `image` without `subject`.
    """
    if "image" in given and "subject" not in given:
        raise InputError(
            expected="a subject for the image",
            got=f"image={given['image']} alone",
            remedy="add subject=NAME, which names folders and the trigger word",
        )


def load_parameters(context: KedroContext) -> dict[str, Any]:
    """Return the merged parameters.

    Raises:
        InputError: raised by a resolver, such as an unknown method; or an override of a single list entry.
    """
    try:
        return dict(context.config_loader["parameters"])
    except OmegaConfBaseException as error:
        if (cause := input_error_in(error)) is not None:
            raise cause from None
        raise
    except TypeError as error:  # OmegaConf merges a mapping into a list
        raise InputError(
            expected="parameters of the same structure as in conf/",
            got=f"{context.config_loader.runtime_params} ({error})",
            remedy=(
                "replace the whole list, such as training.lora_unet=[{lr: 1e-4, rank: 4, branch: p, layers: "
                "['re:.*attn']}]"
            ),
        ) from error


def input_error_in(error: BaseException) -> InputError | None:
    """Return the InputError in the chain of causes, if any; Kedro and OmegaConf wrap errors."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, InputError):
        cause = cause.__cause__ or cause.__context__
    return cause


def settings_of(context: KedroContext) -> dict[str, Any]:
    """Return the run settings, each from `--params` or else from globals.yml."""
    given = context.config_loader["globals"] | (context.config_loader.runtime_params or {})
    return {name: given.get(name) for name in RUN_SETTINGS}


# ------------------------------------------------------------------------------------------------- MLflow


class RunRecordHooks:
    """Name and tag the MLflow run: settings, commit, and the error if it fails."""

    @hook_impl
    def after_context_created(self, context: KedroContext) -> None:
        """Store the settings for the run's name and tags."""
        self._settings = settings_of(context)

    @hook_impl(trylast=True)  # after kedro-mlflow has opened the run
    def before_pipeline_run(self, run_params: dict[str, Any]) -> None:
        """Name the run and tag it."""
        import mlflow

        run = mlflow.active_run()
        if run is None:
            return
        names = run_params["pipeline_names"] or ["__default__"]
        mlflow.MlflowClient().update_run(run.info.run_id, name=run_name(self._settings, names, run_params))
        mlflow.set_tags(
            {
                **{name: self._settings[name] for name in ("subject", "method", "base_model")},
                "pipeline": "+".join(names),
                "command_line": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])[:_TAG_LENGTH],
                **git_tags(Path(run_params["project_path"])),
            }
        )

    @hook_impl(tryfirst=True)  # before kedro-mlflow logs them; the node still gets the models
    def before_node_run(self, inputs: dict[str, Any]) -> None:
        """Convert pydantic models to plain values, which MLflow shows one per row."""
        for name, value in inputs.items():
            if isinstance(value, BaseModel):
                inputs[name] = number_lists(value.model_dump(mode="json"))

    @hook_impl(tryfirst=True)  # before kedro-mlflow closes the run
    def after_pipeline_run(self) -> None:
        """Wait for asynchronous logging."""
        import mlflow

        mlflow.flush_async_logging()

    @hook_impl(tryfirst=True)  # before kedro-mlflow closes the run as FAILED
    def on_pipeline_error(self, error: Exception) -> None:
        """Tag the run with the error."""
        import mlflow

        if mlflow.active_run() is not None:
            mlflow.flush_async_logging()
            reason = input_error_in(error) or error  # datasets wrap what they raise
            mlflow.set_tag("error", f"{type(reason).__name__}: {reason}"[:_TAG_LENGTH])


def close_interrupted_run() -> None:
    """Mark the active MLflow run, if any, as KILLED: Kedro calls no hook on Ctrl-C, MLflow would record FINISHED."""
    if "mlflow" not in sys.modules:
        return
    import mlflow

    if mlflow.active_run() is not None:
        mlflow.flush_async_logging()
        mlflow.set_tag("error", "interrupted")
        mlflow.end_run("KILLED")


def run_name(settings: Mapping[str, Any], pipeline_names: Collection[str], run_params: Mapping[str, Any]) -> str:
    """Return 'subject · pipeline · method · parameters of the command line'."""
    pipeline = "+".join("default" if name == "__default__" else name for name in pipeline_names)
    given = {name: value for name, value in (run_params["runtime_params"] or {}).items() if name not in RUN_SETTINGS}
    differing = [f"{name}={value}" for name, value in flatten(given).items()]
    return " · ".join([str(settings["subject"]), pipeline, str(settings["method"]), *differing])[:250]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def number_lists(value: Any) -> Any:
    """Return the value with lists of mappings as mappings by index, so that MLflow shows each entry in a row."""
    if isinstance(value, dict):
        return {key: number_lists(item) for key, item in value.items()}
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return {str(index): number_lists(item) for index, item in enumerate(value)}
    return value


def git_tags(project_path: Path) -> dict[str, str]:
    """Return the commit of the project and whether the working tree is dirty; nothing outside a git repository."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(project_path), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"git_commit": git("rev-parse", "HEAD"), "git_dirty": str(bool(git("status", "--porcelain"))).lower()}
    except (subprocess.CalledProcessError, FileNotFoundError):
        return {}


# ------------------------------------------------------------------------------------------------- console


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
    paths = {name: _path_of(catalog, name) for name in sorted(pipeline.all_outputs())}
    return {name: _relative(path, project_path) for name, path in paths.items() if path is not None}


def _path_of(catalog: DataCatalog, name: str) -> Path | None:
    """Return the file or folder of a dataset, if it has one."""
    dataset = catalog.get(name)
    path = getattr(dataset, "_filepath", None) or getattr(dataset, "_path", None)
    return None if path is None else Path(path)


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
