"""Kedro settings: configuration loader, resolvers and hooks."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from kedro.config import OmegaConfigLoader
from omegaconf import OmegaConf

from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.hooks import ConfigurationHooks, ConsoleHooks, RunRecordHooks, nearest

# omegaconf 2.4 deprecates a function that Kedro 1.7 calls.
warnings.filterwarnings("ignore", message=r"register_new_resolver\(\) is deprecated")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


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
    """Kedro's loader with a resolver for the catalog: `${parameter:training.start_from}`."""

    def __getitem__(self, key: str) -> dict[str, Any]:
        """Return the merged configuration of that key, such as `catalog`."""
        if key == "catalog":
            resolver = functools.partial(parameter, self["parameters"])
            OmegaConf.register_new_resolver("parameter", resolver, replace=True)
        configuration: dict[str, Any] = super().__getitem__(key)
        return configuration


def parameter(parameters: Mapping[str, Any], path: str) -> Any:
    """Return the parameter at a dotted path; sections are plain mappings or pydantic models."""
    section, *names = path.split(".")
    return functools.reduce(lambda values, name: dict(values)[name], names, parameters[section])


CONFIG_LOADER_CLASS = ProjectConfigLoader
HOOKS = (ConfigurationHooks(), RunRecordHooks(), ConsoleHooks())
DISABLE_HOOKS_FOR_PLUGINS = ("kedro-telemetry",)
CONFIG_LOADER_ARGS = {
    "base_env": "base",
    "default_run_env": "local",
    "merge_strategy": {"parameters": "soft"},  # an overlay contains only the differences
    "config_patterns": {"mlflow": ["mlflow*", "mlflow*/**"]},
    "custom_resolvers": {"env": environment, "choose": choose, "now": now},
}
