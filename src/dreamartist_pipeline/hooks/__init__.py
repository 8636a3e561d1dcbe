"""Hooks around a run: check the configuration, record the run in MLflow, print progress."""

from dreamartist_pipeline.errors import input_error_in
from dreamartist_pipeline.hooks.checkpoints import CheckpointHooks
from dreamartist_pipeline.hooks.configuration import (
    ConfigurationHooks,
    build_parameters,
    check_image_has_subject,
    check_names,
    check_subject,
    load_parameters,
    nearest,
    register_project_root,
)
from dreamartist_pipeline.hooks.console import Commands, ConsoleHooks, mlflow_lines, next_lines, written_files
from dreamartist_pipeline.hooks.manifest import ManifestHooks
from dreamartist_pipeline.hooks.opening import MLflowHooks
from dreamartist_pipeline.hooks.outputs import OutputHooks
from dreamartist_pipeline.hooks.parameters import flatten, number_lists
from dreamartist_pipeline.hooks.record import RunRecordHooks, close_run, git_tags, run_name
from dreamartist_pipeline.hooks.report import ReportHooks
from dreamartist_pipeline.hooks.run import settings_of
from dreamartist_pipeline.hooks.starting import ProjectRuns, StartingHooks
from dreamartist_pipeline.hooks.store import StoreHooks
from dreamartist_pipeline.params import RUN_SETTINGS

__all__ = [
    "RUN_SETTINGS",
    "CheckpointHooks",
    "Commands",
    "ConfigurationHooks",
    "ConsoleHooks",
    "MLflowHooks",
    "ManifestHooks",
    "OutputHooks",
    "ProjectRuns",
    "ReportHooks",
    "RunRecordHooks",
    "StartingHooks",
    "StoreHooks",
    "build_parameters",
    "check_image_has_subject",
    "check_names",
    "check_subject",
    "close_run",
    "flatten",
    "git_tags",
    "input_error_in",
    "load_parameters",
    "mlflow_lines",
    "nearest",
    "next_lines",
    "number_lists",
    "register_project_root",
    "run_name",
    "settings_of",
    "written_files",
]
