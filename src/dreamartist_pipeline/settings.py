"""Kedro settings: configuration loader, resolvers and hooks."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from kedro.config import OmegaConfigLoader
from omegaconf import OmegaConf

from dreamartist_pipeline.catalog import ProjectCatalog
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.hooks import (
    CheckpointHooks,
    ConfigurationHooks,
    ConsoleHooks,
    MLflowHooks,
    OutputHooks,
    RunRecordHooks,
    nearest,
)
from dreamartist_pipeline.hooks.logs import configure_logs
from dreamartist_pipeline.hooks.run import literal
from dreamartist_pipeline.params import SECTIONS

# omegaconf 2.4 deprecates a function that Kedro 1.7 calls.
warnings.filterwarnings("ignore", message=r"register_new_resolver\(\) is deprecated")
configure_logs(None)  # before Kedro imports its plugins, whose warnings it hides
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true")


def environment(name: str, default: str = "") -> str:
    """Return an environment variable: `${env:NAME, default}`."""
    return os.environ.get(name, default)


def now() -> str:
    """Return the time as a folder name: `${now:}`."""
    return datetime.now().strftime("%Y-%m-%dT%H-%M-%S")


def choose(options: str, name: str, *, _root_: Any) -> Any:
    """Return an entry of a table in the same configuration: `${choose:TABLE, NAME}`.

    Raises:
        InputError: the table has no such entry.
    """
    table = _root_[options]
    if name not in table:
        known = sorted(map(str, table))
        raise InputError(
            expected=f"a {options.strip('_').rstrip('s')} out of {', '.join(known)}",
            got=f"'{name}'",
            remedy=nearest(str(name), known, otherwise="choose one of them"),
        )
    return table[name]


class ProjectConfigLoader(OmegaConfigLoader):
    """Kedro's loader with a resolver for the catalog, `${parameter:training.start_from}`, and a check of `--env`."""

    def __init__(self, conf_source: Any, *args: Any, **kwargs: Any) -> None:
        if "://" not in str(conf_source) and not Path(conf_source).exists():
            raise InputError(
                expected=f"the configuration at {conf_source}",
                got="no such folder or archive",
                remedy="give it as --conf-source PATH, such as conf-dreamartist_pipeline.tar.gz of kedro package",
            )
        super().__init__(conf_source, *args, **kwargs)
        self._check_environment()

    def _check_environment(self) -> None:
        """Refuse an environment without a folder, in a folder or an archive (`--conf-source conf.tar.gz`).

        Raises:
            InputError: no such folder; the message lists those that exist.
        """
        env = self.env or self.default_run_env
        folder = Path(self._get_conf_env_path(env))
        if not env or self._fs.isdir(folder.as_posix()):
            return
        entries = self._fs.ls(folder.parent.as_posix(), detail=True)
        known = ", ".join(sorted(Path(entry["name"]).name for entry in entries if entry["type"] == "directory"))
        raise InputError(
            expected=f"one of the environments {known}",
            got=f"'{env}'",
            remedy=f"choose one (--env NAME), or create {env} in {self.conf_source}",
        )

    def __getitem__(self, key: str) -> dict[str, Any]:
        """Return the merged configuration of that key, such as `catalog`."""
        if key == "catalog":
            resolver = functools.partial(parameter, self["parameters"])
            OmegaConf.register_new_resolver("parameter", resolver, replace=True)
        configuration: dict[str, Any] = super().__getitem__(key)
        return configuration

    def presets(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the parameters of the base environment for these run settings, without any other changes."""
        given = {name: literal(value) for name, value in settings.items()}
        parameters = type(self)(self.conf_source, self.base_env, given, **CONFIG_LOADER_ARGS)["parameters"]
        self._register_globals_resolver()  # the other loader has replaced it
        return {name: parameters[name] for name in SECTIONS if name in parameters}


def parameter(parameters: Mapping[str, Any], path: str) -> Any:
    """Return the parameter at a dotted path; sections are plain mappings or pydantic models."""
    section, *names = path.split(".")
    return functools.reduce(lambda values, name: dict(values)[name], names, parameters[section])


CONFIG_LOADER_CLASS = ProjectConfigLoader
DATA_CATALOG_CLASS = ProjectCatalog
HOOKS = (ConfigurationHooks(), MLflowHooks(), OutputHooks(), RunRecordHooks(), ConsoleHooks(), CheckpointHooks())
DISABLE_HOOKS_FOR_PLUGINS = ("kedro-telemetry", "kedro-mlflow", "kedro_mlflow")  # MLflowHooks; its name has two forms
CONFIG_LOADER_ARGS: dict[str, Any] = {
    "base_env": "base",
    "default_run_env": "local",
    "merge_strategy": {"parameters": "soft"},  # an overlay contains only the differences
    "config_patterns": {"mlflow": ["mlflow*", "mlflow*/**"]},
    "custom_resolvers": {"env": environment, "choose": choose, "now": now},
}
