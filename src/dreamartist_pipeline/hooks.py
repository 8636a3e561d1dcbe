"""What happens around a run: its configuration is checked, MLflow records it, and progress is printed."""

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
    """Refuse invalid configuration before anything is opened, loaded or written."""

    @hook_impl(tryfirst=True)  # before kedro-mlflow opens its database
    def after_context_created(self, context: KedroContext) -> None:
        """Tell configuration files where the project is, then check the parameters of all pipelines.

        Kedro would take a parameter's type from the annotation of the node that reads it, and silently pass a plain
        dictionary where another annotation of that node cannot be evaluated; here the schema decides.

        Raises:
            InputError: an environment that is not there, an unknown key, method or subject, or values outside their
                bounds, all at once.
        """
        register_project_root(context.project_path)
        check_environment(Path(context.config_loader.conf_source), context.config_loader.env)
        given = context.config_loader.runtime_params or {}
        check_names(given, origin="--params")
        check_picture_is_named(given)
        check_subject(settings_of(context)["subject"])
        context.config_loader["parameters"] = build_parameters(load_parameters(context))

    @hook_impl(tryfirst=True)  # before kedro-mlflow opens a run
    def before_pipeline_run(self, pipeline: Pipeline, catalog: DataCatalog) -> None:
        """Fail before the run on what would end it later: missing files, invalid parameters.

        Raises:
            InputError: it imports a concept over another one, or a node's own check of its parameters fails.
            DatasetError: what is missing or damaged, in its dataset's own words.
        """
        if "params:import" in pipeline.inputs() and not catalog.load("params:import").replace:
            check_replaces_nothing(catalog)
        for name in sorted(pipeline.inputs()):
            if name != "parameters" and not name.startswith("params:") and not catalog.exists(name):
                catalog.load(name)
        planned = planned_concept(pipeline, catalog)
        for node in pipeline.nodes:
            run_early_check(node, catalog, planned)


def planned_concept(pipeline: Pipeline, catalog: DataCatalog) -> PlannedConcept | None:
    """Return what is known of a run's concept; None where it has none, or imports one.

    Raises:
        DatasetError: the concept in place is damaged.
    """
    if any("concept" in node.outputs and "params:training" in node.inputs for node in pipeline.nodes):
        return PlannedConcept.of_training(catalog.load("params:training"))
    if "concept" not in pipeline.inputs():
        return None
    metadata = catalog.load("concept").metadata
    return PlannedConcept(False, metadata.zero_terminal_snr, metadata.lora, bool(metadata.words))


def run_early_check(node: Node, catalog: DataCatalog, planned: PlannedConcept | None) -> None:
    """Check a node's parameters as its function asks for.

    Raises:
        InputError: what is wrong, after the name of the section.
    """
    early = early_check_of(node.func)
    if early is None:
        return
    try:
        early.check(catalog.load(f"params:{early.section}"), planned)
    except InputError as error:
        raise InputError(error.expected, error.got, error.remedy, where=early.section) from error


def register_project_root(project_path: Path) -> None:
    """Let configuration files ask for `${project_root:}`; the package may lie elsewhere than the project."""
    OmegaConf.register_new_resolver("project_root", project_path.as_posix, replace=True)


def check_replaces_nothing(catalog: DataCatalog) -> None:
    """Refuse an import over a concept that is there.

    Raises:
        InputError: with its path.
    """
    if catalog.exists("concept"):
        raise InputError(
            expected="a subject without a concept",
            got=f"{_path_of(catalog, 'concept')}, which is there already",
            remedy="choose another name (subject=NAME), or replace it (import.replace=true)",
        )


def check_names(names: Collection[str], origin: str) -> None:
    """Refuse top-level parameters that mean nothing: neither a section nor a setting of a run.

    Raises:
        InputError: an unknown name, with the nearest known one.
    """
    known = (*RUN_SETTINGS, *SECTIONS)
    for name in map(str, names):
        if name not in known:
            raise InputError(
                expected=f"parameters out of {', '.join(known)}",
                got=f"'{name}' from {origin}",
                remedy=f"{_hint(name, known)}",
            )


def build_parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sections as the models of params.py, without the files' own variables (leading underscore).

    Raises:
        InputError: unknown keys and values outside their bounds, of all sections at once.
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
            expected="parameters as src/dreamartist_pipeline/params.py describes them",
            got="\n".join(["others:", *sorted(problems)]),
            remedy="correct them in conf/ or in --params",
        )
    return built


def _first_errors(error: ValidationError) -> list[ErrorDetails]:
    """Return the errors without those in the value of a key that does not exist."""
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
        return f"{where}: there is no such key; {_hint(key, known)}"
    if isinstance(detail["input"], dict):
        return f"{where}: {detail['msg']}"
    return f"{where}: {detail['msg']}; got {detail['input']!r}"


def _keys_beside(model: Any, path: Sequence[int | str]) -> list[str]:
    """Return the keys allowed where the last part of `path` stands."""
    for part in path[:-1]:
        if isinstance(part, str):
            annotation = model.model_fields[part].annotation
            model = next((kind for kind in (annotation, *get_args(annotation)) if hasattr(kind, "model_fields")), None)
        if model is None:
            return []
    return list(model.model_fields)


def _hint(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean '{near[0]}'?" if near else "remove it"


def check_environment(source: Path, env: str | None) -> None:
    """Refuse an environment (`--env`) that has no folder.

    Raises:
        InputError: with those there are.
    """
    if env and not (source / env).is_dir():
        known = ", ".join(sorted(folder.name for folder in source.iterdir() if folder.is_dir()))
        raise InputError(
            expected=f"an environment out of {known}",
            got=f"'{env}'",
            remedy=f"choose one (--env NAME), or make {source / env}",
        )


def check_subject(subject: object) -> None:
    """Refuse a subject's name that cannot be both a folder's name and part of a trigger word.

    Raises:
        InputError: other characters than letters, digits, dot, hyphen and underscore.
    """
    if subject is None or not _SUBJECT.match(str(subject)):
        raise InputError(
            expected="a subject's name of letters, digits, '.', '-' and '_' (it names folders and the trigger word)",
            got=f"'{subject}'",
            remedy=f"use for example '{re.sub(r'[^A-Za-z0-9]+', '-', str(subject)).strip('-') or 'my-cat'}'",
        )


def check_picture_is_named(given: Mapping[str, Any]) -> None:
    """Refuse a picture for one run without a subject for it: its results would replace those of another subject.

    Raises:
        InputError: `image` without `subject`.
    """
    if "image" in given and "subject" not in given:
        raise InputError(
            expected="a subject's name beside the picture",
            got=f"only image={given['image']}",
            remedy="add subject=NAME, which names its folders and trigger word",
        )


def load_parameters(context: KedroContext) -> dict[str, Any]:
    """Return the merged configuration, with an InputError that a resolver raised as it is.

    Raises:
        InputError: for example an unknown method, or one entry of a list without the others.
    """
    try:
        return dict(context.config_loader["parameters"])
    except OmegaConfBaseException as error:
        if (cause := input_error_in(error)) is not None:
            raise cause from None
        raise
    except TypeError as error:  # OmegaConf's for a mapping that meets a list
        raise InputError(
            expected="parameters of the same shape as in conf/",
            got=f"{context.config_loader.runtime_params} ({error})",
            remedy=(
                "give a list as a whole, such as training.lora_unet=[{lr: 1e-4, rank: 4, branch: p, layers: "
                "['re:.*attn']}]"
            ),
        ) from error


def input_error_in(error: BaseException) -> InputError | None:
    """Return the InputError that an error was made from, if any; Kedro and OmegaConf wrap what they pass on."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, InputError):
        cause = cause.__cause__ or cause.__context__
    return cause


def settings_of(context: KedroContext) -> dict[str, Any]:
    """Return the settings of a run, each from `--params` or else from globals.yml."""
    given = context.config_loader["globals"] | (context.config_loader.runtime_params or {})
    return {name: given.get(name) for name in RUN_SETTINGS}


# ------------------------------------------------------------------------------------------------- MLflow


class RunRecordHooks:
    """Make an MLflow run say what was run, from which commit, and how it ended."""

    @hook_impl
    def after_context_created(self, context: KedroContext) -> None:
        """Remember the settings, for the run's name and tags."""
        self._settings = settings_of(context)
        self._project_path = context.project_path

    @hook_impl(trylast=True)  # after kedro-mlflow opened the run
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
                "subject": self._settings["subject"],
                "method": self._settings["method"],
                "base_model": self._settings["base_model"],
                "pipeline": "+".join(names),
                "command_line": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])[:_TAG_LENGTH],
                **git_tags(self._project_path),
            }
        )

    @hook_impl(tryfirst=True)  # before kedro-mlflow logs them; the node still gets the models
    def before_node_run(self, inputs: dict[str, Any]) -> None:
        """Turn typed parameters into plain ones, which MLflow then shows one value a row."""
        for name, value in inputs.items():
            if isinstance(value, BaseModel):
                inputs[name] = number_lists(value.model_dump(mode="json"))

    @hook_impl(tryfirst=True)  # before kedro-mlflow closes the run
    def after_pipeline_run(self) -> None:
        """Wait until everything that was logged in the background has arrived."""
        import mlflow

        mlflow.flush_async_logging()

    @hook_impl(tryfirst=True)  # before kedro-mlflow closes the run as FAILED
    def on_pipeline_error(self, error: Exception) -> None:
        """Tag the run with the reason of its failure."""
        import mlflow

        if mlflow.active_run() is not None:
            mlflow.flush_async_logging()
            reason = input_error_in(error) or error  # datasets wrap what they raise
            mlflow.set_tag("error", f"{type(reason).__name__}: {reason}"[:_TAG_LENGTH])


def close_interrupted_run() -> None:
    """Mark the active MLflow run, if any, as KILLED: Kedro tells no hook of Ctrl-C, MLflow would say FINISHED."""
    if "mlflow" not in sys.modules:
        return
    import mlflow

    if mlflow.active_run() is not None:
        mlflow.flush_async_logging()
        mlflow.set_tag("error", "interrupted")
        mlflow.end_run("KILLED")


def run_name(settings: Mapping[str, Any], pipeline_names: Collection[str], run_params: Mapping[str, Any]) -> str:
    """Return 'subject · pipeline · method · parameters that differ from the configuration files'."""
    pipeline = "+".join("default" if name == "__default__" else name for name in pipeline_names)
    given = {name: value for name, value in (run_params["runtime_params"] or {}).items() if name not in RUN_SETTINGS}
    differing = [f"{name}={value}" for name, value in flatten(given).items()]
    return " · ".join([str(settings["subject"]), pipeline, str(settings["method"]), *differing])[:250]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def number_lists(value: Any) -> Any:
    """Return the value with lists of mappings as mappings by position, so that each entry becomes a row of its own."""
    if isinstance(value, dict):
        return {key: number_lists(item) for key, item in value.items()}
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return {str(index): number_lists(item) for index, item in enumerate(value)}
    return value


def git_tags(project_path: Path) -> dict[str, str]:
    """Return the commit of the project and whether files differ from it; nothing outside a git repository."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(project_path), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"git_commit": git("rev-parse", "HEAD"), "git_dirty": str(bool(git("status", "--porcelain"))).lower()}
    except (subprocess.CalledProcessError, FileNotFoundError):
        return {}


# ------------------------------------------------------------------------------------------------- console


class ConsoleHooks:
    """Say which node runs, how long it took, and at the end where everything is."""

    @hook_impl
    def after_context_created(self, context: KedroContext) -> None:
        """Remember where the project is."""
        self._settings = settings_of(context)
        self._project_path = context.project_path

    @hook_impl
    def before_pipeline_run(self, pipeline: Pipeline) -> None:
        """Count the nodes."""
        self._num_nodes, self._num_started = len(pipeline.nodes), 0
        self._pipeline_started_s = time.monotonic()

    @hook_impl
    def before_node_run(self, node: Node) -> None:
        """Announce a node."""
        self._num_started += 1
        self._node_started_s = time.monotonic()
        LOGGER.info("[%d/%d] %s", self._num_started, self._num_nodes, node.short_name)

    @hook_impl
    def after_node_run(self, node: Node) -> None:
        """Say how long a node took, where that is worth saying."""
        elapsed_s = time.monotonic() - self._node_started_s
        if elapsed_s > 2:
            LOGGER.info("      %s took %.1f s", node.short_name, elapsed_s)

    @hook_impl(tryfirst=True)  # while the MLflow run is still open, so that its number is known
    def after_pipeline_run(self, run_params: dict[str, Any], pipeline: Pipeline, catalog: DataCatalog) -> None:
        """Print where the results are and how to look at them."""
        elapsed_s = time.monotonic() - self._pipeline_started_s
        files = written_files(pipeline, catalog, self._project_path)
        lines = [f"Done in {elapsed_s:.0f} s. What this run wrote:", *(f"  {n:<24} {path}" for n, path in files)]
        lines += ["", "Look at it:", *look_at_it(self._settings, run_params, self._project_path)]
        click.echo("\n" + "\n".join(lines))


def written_files(pipeline: Pipeline, catalog: DataCatalog, project_path: Path) -> list[tuple[str, str]]:
    """Return name and path, relative to the project, of everything the pipeline stores on disk."""
    files = []
    for name in sorted(pipeline.all_outputs()):
        path = _path_of(catalog, name)
        if path is not None:
            files.append((name, _relative(Path(path), project_path)))
    return files


def _path_of(catalog: DataCatalog, name: str) -> str | None:
    """Return where a dataset keeps its data, if that is a file or a folder."""
    dataset = catalog.get(name)
    path = getattr(dataset, "_filepath", None) or getattr(dataset, "_path", None)
    return None if path is None else str(path)


def look_at_it(settings: Mapping[str, Any], run_params: Mapping[str, Any], project_path: Path) -> list[str]:
    """Return the commands with which a user looks at the results, as lines of text."""
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
