"""Record a run in MLflow: its name, tags and parameters, and the error if it fails."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from kedro.framework.context import KedroContext
from kedro.framework.hooks import hook_impl
from pydantic import BaseModel

from dreamartist_pipeline.errors import input_error_in
from dreamartist_pipeline.hooks.run import RUN_SETTINGS, settings_of

_TAG_LENGTH = 5000  # MLflow's limit for the value of a tag


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
