"""Kedro settings: configuration loader, resolvers and hooks."""

from __future__ import annotations

import functools
import os
import pickle
import warnings
from collections.abc import Collection, Mapping
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
    ManifestHooks,
    MLflowHooks,
    OutputHooks,
    ReportHooks,
    RunRecordHooks,
    StartingHooks,
    StoreHooks,
    nearest,
)
from dreamartist_pipeline.hooks.logs import configure_logs
from dreamartist_pipeline.hooks.run import literal, with_local_copies
from dreamartist_pipeline.params import SECTIONS
from dreamartist_pipeline.redaction import redact_outgoing_text, remember_secret
from dreamartist_pipeline.references import resolved
from dreamartist_pipeline.tracking.servers import REQUEST_LIMITS
from dreamartist_pipeline.yaml_texts import merge_mappings, parse_mapping, too_deep

_SUFFIXES = (".yml", ".yaml", ".json")
_MAX_VALUES = 100_000  # of one key such as `parameters`; conf/ has a few thousand
_APART = frozenset({"compare", "judge", "tune"})  # sections that nothing else refers to
_WITH_PATHS = ("globals", "parameters")
_TRACKING_URI = "MLFLOW_TRACKING_URI"
_MOST_READ = 20
_read_configs: dict[tuple[Any, ...], bytes] = {}  # what configurations' files contain -> Kedro's objects, pickled here

# omegaconf 2.4 deprecates a function that Kedro 1.7 calls.
warnings.filterwarnings("ignore", message=r"register_new_resolver\(\) is deprecated")
configure_logs(None)  # before Kedro imports its plugins, whose warnings it hides
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # with credentials; the summary has the address
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # for files that are copied in an instant
os.environ.setdefault("MLFLOW_ASYNC_LOGGING_BUFFERING_SECONDS", "1")  # one request a second, however short the steps
for _name, _limit in REQUEST_LIMITS.items():
    os.environ.setdefault(_name, _limit)
redact_outgoing_text()


def environment(name: str, default: str = "") -> str:
    """Return an environment variable, or the default if it is not set or empty: `${env:NAME, default}`.

    Everything that is logged or recorded has the reference in place of its value; a tracking URI only loses its
    credentials.
    """
    if name != _TRACKING_URI:
        remember_secret(os.environ.get(name, ""), f"${{env:{name}}}")
    return os.environ.get(name) or default


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

    def __init__(
        self, conf_source: Any, env: str | None = None, runtime_params: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if "://" not in str(conf_source) and not Path(conf_source).exists():
            raise InputError(
                expected=f"the configuration at {conf_source}",
                got="no such folder or archive",
                remedy="give it as --conf-source PATH, such as conf-dreamartist_pipeline.tar.gz of kedro package",
            )
        self._checked: set[str] = set()  # keys whose files are checked
        self.given_params = runtime_params or {}
        """Those of the command, with addresses in place of the copies on this machine."""
        self._left_out: frozenset[str] = frozenset()  # files of parameters that are not read, to save time
        super().__init__(conf_source, env, with_local_copies(self.given_params), **kwargs)
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
        """Return the merged configuration of that key, such as `catalog`.

        Raises:
            InputError: a file that is no YAML mapping, or whose references multiply its values.
        """
        self._check_files(key)
        if key == "catalog":
            resolver = functools.partial(parameter, self["parameters"])
            OmegaConf.register_new_resolver("parameter", resolver, replace=True)
        is_read = key not in self  # and not one that was set
        configuration: dict[str, Any] = super().__getitem__(key)
        if not is_read or key not in _WITH_PATHS:
            return configuration
        unused = self.given_params.keys() & configuration if key == "globals" else set()
        return configuration | with_local_copies({name: configuration[name] for name in configuration.keys() - unused})

    def _check_files(self, key: str) -> None:
        """Check the files of a key before OmegaConf resolves them, which may take hours for a few lines.

        Raises:
            InputError: the message names the file.
        """
        if key in self._checked or key not in self.config_patterns:
            return
        merged: dict[str, Any] = {}
        for env in dict.fromkeys((self.base_env, self.env or self.default_run_env)):
            for file in self._files(key, env):
                merged = merge_mappings(merged, _parsed(self._fs.cat_file(file), file))
        try:
            resolved(merged, max_values=_MAX_VALUES)
        except RecursionError as error:
            raise too_deep(f"{key} in {self.conf_source}") from error
        except InputError as error:
            raise InputError(error.expected, f"{error.got} in {key}", f"correct {self.conf_source}") from error
        self._checked.add(key)

    def _read_dir_configs(
        self,
        conf_path: str,
        patterns: Any,
        key: str,
        processed_files: set[Path],
        read_environment_variables: bool | None = False,
    ) -> Any:
        """Return what Kedro reads in a folder; files that have not changed are read once in a process.

        A process may have hundreds of loaders: see `of_run`. Objects of OmegaConf are copied faster than built, and by
        pickle seven times as fast as by `copy.deepcopy`.
        """
        if read_environment_variables:
            return super()._read_dir_configs(conf_path, patterns, key, processed_files, read_environment_variables)
        files = {file: self._fs.cat_file(file) for file in self._files_in(conf_path, key)}
        known = (str(self.conf_source), conf_path, key, *files.items())
        if known not in _read_configs:
            if len(_read_configs) >= _MOST_READ:
                _read_configs.clear()
            _read_configs[known] = pickle.dumps(super()._read_dir_configs(conf_path, patterns, key, set()))
        configs = pickle.loads(_read_configs[known])  # a copy of this process's own objects: merging changes them
        read = {file: config for file, config in configs.items() if file.as_posix() not in self._left_out}
        processed_files.update(read)
        return read

    @staticmethod
    def _soft_merge(config: dict[str, Any], env_config: dict[str, Any], env_path: str | None = None) -> dict[str, Any]:
        """Merge an environment over the base, as Kedro does by OmegaConf, which takes longer than all else here."""
        return merge_mappings(config, env_config)

    def _files(self, key: str, env: str | None) -> list[str]:
        """Return the files of a key in an environment, as Kedro finds them."""
        if not env:
            return []
        return [file for file in self._files_in(self._get_conf_env_path(env), key) if file not in self._left_out]

    def _files_in(self, folder: str, key: str) -> list[str]:
        patterns = [f"{Path(folder).as_posix()}/{pattern}" for pattern in self.config_patterns[key]]
        found = {file for pattern in patterns for file in self._fs.glob(pattern)}
        return sorted(file for file in found if Path(file).suffix in _SUFFIXES and not self._is_hidden(file))

    def of_run(self, params: Mapping[str, Any], sections: Collection[str]) -> dict[str, dict[str, Any]]:
        """Return `globals`, `parameters` and `catalog` of another run of this environment.

        Args:
            params: the parameters of its command, nested.
            sections: that it reads.
        """
        other = type(self)(self.conf_source, self.env, dict(params), **CONFIG_LOADER_ARGS)
        other._checked = self._checked | {"globals", "parameters", "catalog"}  # the same files
        other._left_out = self._files_without(sections)
        try:
            configuration = {key: other[key] for key in ("globals", "parameters")}
            for name in _APART - set(sections):  # which an overlay may have in a file with others
                configuration["parameters"].pop(name, None)
            other["parameters"] = configuration["parameters"]  # read by the catalog
            return configuration | {"catalog": other["catalog"]}
        finally:
            self._register_globals_resolver()  # the other loader has replaced it

    def of_environment(self, key: str) -> dict[str, Any]:
        """Return what the files of this environment say, without those of the base, and with unresolved references."""
        env = self.env or self.default_run_env
        files = [] if env == self.base_env else self._files(key, env)
        return functools.reduce(merge_mappings, (_parsed(self._fs.cat_file(file), file) for file in files), {})

    def _files_without(self, sections: Collection[str]) -> frozenset[str]:
        """Return the files of the base environment that have only sections which stand apart and are none of these.

        Files of another environment may define what the rest of it refers to.
        """
        apart = _APART - set(sections)
        return frozenset(file for file, own in self._sections_in_files.items() if own and own <= apart)

    @functools.cached_property
    def _sections_in_files(self) -> dict[str, set[str]]:
        """The files of the base environment's parameters -> the sections that they define; none for other values."""
        files = self._files("parameters", self.base_env)
        return {file: SECTIONS.keys() & _parsed(self._fs.cat_file(file), file).keys() for file in files}

    def presets(self, settings: Mapping[str, Any], sections: Collection[str]) -> dict[str, Any]:
        """Return sections of the base environment's parameters for these run settings, without any other changes."""
        given = {name: literal(value) for name, value in settings.items()}
        base = type(self)(self.conf_source, self.base_env, given, **CONFIG_LOADER_ARGS)
        base._left_out = self._files_without(sections)
        parameters = base["parameters"]
        self._register_globals_resolver()  # the other loader has replaced it
        return {name: parameters[name] for name in sections}


@functools.lru_cache(maxsize=100)  # a run reads each several times
def _parsed(data: bytes, file: str) -> Mapping[str, Any]:
    """Return the values of a file; an empty one has none.

    Raises:
        InputError: the message names the file.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(expected=f"UTF-8 text in {file}", got=str(error), remedy="save it as UTF-8") from error
    return parse_mapping(text, file) if text.strip() else {}


def parameter(parameters: Mapping[str, Any], path: str) -> Any:
    """Return the parameter at a dotted path; sections are plain mappings or pydantic models."""
    section, *names = path.split(".")
    return functools.reduce(lambda values, name: dict(values)[name], names, parameters[section])


CONFIG_LOADER_CLASS = ProjectConfigLoader
DATA_CATALOG_CLASS = ProjectCatalog
# Of hooks that are tried first, the last one here is called first: the configuration, the folders, MLflow.
_RECORD, _MANIFESTS = RunRecordHooks(), ManifestHooks()
HOOKS = (
    MLflowHooks(_RECORD.check_continues),
    OutputHooks(),
    ConfigurationHooks(),
    ReportHooks(_MANIFESTS),
    _RECORD,
    ConsoleHooks(),
    CheckpointHooks(),
    _MANIFESTS,
    StartingHooks(),
    StoreHooks(),
)
DISABLE_HOOKS_FOR_PLUGINS = ("kedro-telemetry", "kedro-mlflow", "kedro_mlflow")  # MLflowHooks; its name has two forms
CONFIG_LOADER_ARGS: dict[str, Any] = {
    "base_env": "base",
    "default_run_env": "local",
    "merge_strategy": {"parameters": "soft"},  # an overlay contains only the differences
    "config_patterns": {"mlflow": ["mlflow*", "mlflow*/**"]},
    "custom_resolvers": {"env": environment, "choose": choose, "now": now},
}
