"""Kedro settings: how configuration is found and merged, and which hooks take part in a run."""

from __future__ import annotations

import difflib
import functools
import os
import warnings
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from kedro.config import OmegaConfigLoader
from omegaconf import OmegaConf

from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.hooks import ConfigurationHooks, ConsoleHooks, RunRecordHooks

# omegaconf 2.4 deprecates a function that Kedro 1.7 calls; users can do nothing about it.
warnings.filterwarnings("ignore", message=r"register_new_resolver\(\) is deprecated")
# Runs work offline and report to nobody.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


def environment(name: str, default: str = "") -> str:
    """Return an environment variable; `${env:NAME, default}` in configuration files."""
    return os.environ.get(name, default)


def now() -> str:
    """Return the time as a folder's name; `${now:}` in configuration files."""
    return datetime.now().strftime("%Y-%m-%dT%H-%M-%S")


def choose(options: str, name: str, *, _root_: Any) -> Any:
    """Return one entry of a table in the same configuration; `${choose:TABLE, NAME}` in configuration files.

    Raises:
        InputError: the table has no such entry.
    """
    table = _root_[options]
    if name not in table:
        known = ", ".join(sorted(map(str, table)))
        near = difflib.get_close_matches(str(name), list(map(str, table)), n=1)
        hint = f"did you mean '{near[0]}'?" if near else "choose one of them"
        raise InputError(expected=f"a {options.strip('_').rstrip('s')} out of {known}", got=f"'{name}'", remedy=hint)
    return table[name]


class ProjectConfigLoader(OmegaConfigLoader):
    """Kedro's, whose catalog may name files as parameters do: `${parameter:training.start_from}`."""

    def __getitem__(self, key: str) -> dict[str, Any]:
        """Return the merged configuration of a kind, such as `catalog`."""
        if key == "catalog":
            resolver = functools.partial(parameter, self["parameters"])
            OmegaConf.register_new_resolver("parameter", resolver, replace=True)
        configuration: dict[str, Any] = super().__getitem__(key)
        return configuration


def parameter(parameters: Mapping[str, Any], path: str) -> Any:
    """Return the parameter of that dotted path, out of plain mappings or of the models that they have become."""
    section, *names = path.split(".")
    return functools.reduce(lambda values, name: dict(values)[name], names, parameters[section])


CONFIG_LOADER_CLASS = ProjectConfigLoader
HOOKS = (ConfigurationHooks(), RunRecordHooks(), ConsoleHooks())
DISABLE_HOOKS_FOR_PLUGINS = ("kedro-telemetry",)
CONFIG_LOADER_ARGS = {
    "base_env": "base",
    "default_run_env": "local",
    "merge_strategy": {"parameters": "soft"},  # an overlay names only what differs
    "config_patterns": {"mlflow": ["mlflow*", "mlflow*/**"]},
    "custom_resolvers": {"env": environment, "choose": choose, "now": now},
}
