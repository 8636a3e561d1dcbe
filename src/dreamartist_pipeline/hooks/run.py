"""What the hooks know of a run: its settings, and where a dataset is stored."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Mapping, Set
from pathlib import Path, PureWindowsPath
from typing import Any

from kedro.framework.context import KedroContext
from kedro.framework.project import pipelines
from kedro.io import DataCatalog
from pydantic import BaseModel

from dreamartist_pipeline.core.model_location import HUB
from dreamartist_pipeline.object_stores import is_remote, local_copy
from dreamartist_pipeline.params import ADDRESS, KIND_AND_PATH, NODE_PATH, PATH, RUN_SETTINGS, SECTIONS

MODEL_SETTINGS = ("base_model", "vae", "base_model_config")
PATH_SETTINGS = ("image", "mask", "init_image", "init_mask", *MODEL_SETTINGS, "prompt_database")
_INTERPOLATION = re.compile(r"(?<!\\)\$\{")


def settings_of(context: KedroContext) -> dict[str, Any]:
    """Return the run settings, each from `--params` or else from globals.yml."""
    return settings_in(context.config_loader["globals"], context.config_loader.runtime_params or {})


def settings_in(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the run settings: those that are given, and otherwise the values of globals.yml."""
    values = {**defaults, **given}
    return {name: plain(values.get(name)) for name in RUN_SETTINGS}


def pipelines_of(run_params: Mapping[str, Any]) -> list[str]:
    """Return the names of a run's pipelines in the order of the registry: Kedro shuffles them."""
    names, order = run_params["pipeline_names"] or ["__default__"], list(pipelines)
    return sorted(names, key=lambda name: (order.index(name) if name in order else len(order), name))


def literal(value: Any) -> Any:
    """Escape `${` in texts and lists of texts, which OmegaConf would replace by another value of the configuration."""
    if isinstance(value, str):
        return _INTERPOLATION.sub(r"\\${", value)
    return [literal(item) for item in value] if isinstance(value, list) else value


def plain(value: Any) -> Any:
    """Undo `literal`, also in mappings: return values as users wrote them."""
    if isinstance(value, str):
        return value.replace(r"\${", "${")
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


def path_of(catalog: DataCatalog, name: str) -> Path | None:
    """Return the file or folder of a dataset, if it has one."""
    dataset = catalog.get(name)
    path = getattr(dataset, "_filepath", None) or getattr(dataset, "_path", None)
    return None if path is None else Path(path)


def with_paths_in(
    values: Mapping[str, Any],
    folder: Path,
    project: Path | None,
) -> dict[str, Any]:
    """Return parameters of a run with relative paths taken from `folder`.

    They become relative to the project if they are inside it, else absolute. Ids of the Hugging Face hub stay: of
    `clip:PATH`, only existing folders are changed.

    Args:
        values: run settings and sections.
        folder: absolute.
        project: absolute; None for absolute paths only.
    """
    return _changed(values, functools.partial(_moved, folder=folder, project=project))


def with_local_copies(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters of a run with the paths of copies in place of URLs, such as s3://BUCKET/cat.jpg.

    Args:
        values: run settings and sections.

    Raises:
        InputError: nothing is there, or the store cannot be reached.
    """
    return _changed(values, lambda path, kinds: _local_copy(path) if PATH in kinds and is_remote(path) else path)


_local_copy = functools.cache(local_copy)  # one version in a process, which reads its configuration many times


def _changed(values: Mapping[str, Any], change: Callable[[str, Set[Any]], str]) -> dict[str, Any]:
    """Return parameters of a run with texts changed, which is told which kinds of paths each is."""
    changed = {name: _each(value, {PATH}, change) if name in PATH_SETTINGS else value for name, value in values.items()}
    for section in SECTIONS.keys() & values.keys():
        if isinstance(values[section], Mapping):
            changed[section] = _changed_in(values[section], SECTIONS[section], change)
    return changed


def _changed_in(
    values: Mapping[str, Any], model: type[BaseModel], change: Callable[[str, Set[Any]], str]
) -> dict[str, Any]:
    """Return the values of a model, and of models in it, with texts changed."""
    changed = dict(values)
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel) and isinstance(values.get(name), Mapping):
            changed[name] = _changed_in(values[name], inner, change)
        elif name in values:
            changed[name] = _each(values[name], {*field.metadata}, change)
    return changed


def _each(value: Any, kinds: Set[Any], change: Callable[[str, Set[Any]], str]) -> Any:
    """Return a value, possibly nested, with its texts changed."""
    if isinstance(value, Mapping):
        return {name: _each(item, kinds, change) for name, item in value.items()}
    if isinstance(value, list):
        return [_each(item, kinds, change) for item in value]
    return change(value, kinds) if isinstance(value, str) else value


def _moved(value: str, kinds: Set[Any], *, folder: Path, project: Path | None) -> str:
    """Return a text with its relative path taken from a folder, if it is of a kind with paths."""
    if {PATH, NODE_PATH, ADDRESS} & kinds and not is_absolute(value):
        return _in_project(folder / value, project)
    if KIND_AND_PATH in kinds:
        kind, _, path = value.partition(":")
        return f"{kind}:{_in_project(folder / path, project)}" if path and (folder / path).is_dir() else value
    return value


def is_absolute(path: str) -> bool:
    """Return whether a path, URL or `hub:` id depends on no folder; absolute paths of Windows count everywhere."""
    if path.startswith((HUB, "~")) or is_remote(path):
        return True
    return Path(path).is_absolute() or bool(PureWindowsPath(path).drive)


def _in_project(path: Path, project: Path | None) -> str:
    plain = Path(os.path.normpath(path))  # without `..`; links stay
    return str(plain) if project is None or not plain.is_relative_to(project) else plain.relative_to(project).as_posix()


def shown(path: Path) -> str:
    """Return a path as a user types it: relative to the working directory if it is inside, else absolute."""
    return path.relative_to(Path.cwd()).as_posix() if path.is_relative_to(Path.cwd()) else path.as_posix()
