"""The space of a sweep: which parameters have several values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import ParameterSearchParams, SweptRange

_OF_THE_SWEEP = {
    "subject": "sweep.subjects",
    "class_word": "sweep.subjects",
    "image": "sweep.subjects",
    "training.seed": "sweep.seeds",
    "training.scoring.halving": "sweep.halving",
}
ParameterPath = tuple[str, ...]
Choices = tuple[Any, ...]


def dimensions(space: Mapping[str, Any], _path: ParameterPath = ()) -> dict[ParameterPath, Choices | SweptRange]:
    """Return path of a parameter -> its values.

    Args:
        space: `sweep.space`.

    Raises:
        InputError: a single value, an empty list, or invalid bounds.
    """
    found: dict[ParameterPath, Choices | SweptRange] = {}
    for name, value in space.items():
        path = (*_path, name)
        if isinstance(value, Mapping) and not {"low", "high"} & value.keys():
            found |= dimensions(value, path)
        elif isinstance(value, Mapping):
            found[path] = _range_of(value, path)
        elif isinstance(value, list | tuple) and value:
            found[path] = tuple(value)
        else:
            raise InputError(
                expected=f"several values of {dotted(path)} in sweep.space: a list, or {{low: …, high: …}}",
                got=repr(value),
                remedy="give more values, or move it to sweep.params, which all runs have",
            )
    return found


def _range_of(value: Mapping[str, Any], path: ParameterPath) -> SweptRange:
    try:
        return SweptRange.model_validate(dict(value))
    except ValueError as error:
        raise InputError(
            expected=f"low, high, and perhaps log and integer for {dotted(path)} in sweep.space",
            got=str(error),
            remedy="correct sweep.space",
        ) from error


def check_space(params: ParameterSearchParams, _concept: object = None) -> None:
    """Check a sweep before anything is started.

    Raises:
        InputError: there is nothing to search, a parameter that the sweep itself sets, a grid of ranges, or a subject
            without a picture.
    """
    space = dimensions(params.space)
    for path in space:
        for name, option in _OF_THE_SWEEP.items():
            if f"{dotted(path)}.".startswith(f"{name}."):
                raise InputError(
                    expected=f"{name} by {option}", got=f"{dotted(path)} in sweep.space", remedy=f"set {option}"
                )
    if not space:
        raise InputError(
            expected="parameters with several values in sweep.space",
            got="none",
            remedy="give them in a file: kedro sweep SWEEP.yml",
        )
    ranges = [dotted(path) for path, values in space.items() if isinstance(values, SweptRange)]
    if params.search == "grid" and ranges:
        raise InputError(
            expected="a list of values of each parameter for sweep.search=grid",
            got=f"a range for {', '.join(ranges)}",
            remedy="list its values, or choose sweep.search=random or tpe",
        )
    pictures = [Path(params.images) / f"{subject}.png" for subject in params.subjects]
    if missing := [str(picture) for picture in pictures if not picture.is_file()]:
        raise InputError(
            expected="a picture <subject>.png of each of sweep.subjects in sweep.images",
            got=f"none at {', '.join(missing)}",
            remedy="correct sweep.subjects or sweep.images",
        )


def dotted(path: ParameterPath) -> str:
    """Return the name of a parameter, as in `--params`."""
    return ".".join(path)


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values by their dotted names as nested parameters."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        *sections, last = name.split(".")
        section = result
        for each in sections:
            section = section.setdefault(each, {})
        section[last] = value
    return result
