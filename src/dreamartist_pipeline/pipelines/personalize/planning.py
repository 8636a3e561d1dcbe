"""The runs of many subjects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import PROMPT_KEYS, SECTIONS, PersonalizeParams
from dreamartist_pipeline.starting_runs import RunRequest
from dreamartist_pipeline.yaml_texts import merge_mappings, parse_mapping

_SUBJECT = "subject"
_RESULTS = ("concept", "evaluation_metrics", "training_history", "contact_sheet")


def subject_runs(rows: Sequence[Mapping[str, Any]], params: PersonalizeParams) -> list[RunRequest]:
    """Return a run for each row.

    Args:
        rows: run settings, and dotted parameters such as `training.seed`; of the latter, texts are YAML.
        params: of the pipeline.

    Raises:
        InputError: a cell that is no YAML, or a column that is no parameter.
    """
    pipelines = ("train", "evaluate", "export") if params.export else ("train", "evaluate")
    return [
        RunRequest(str(row[_SUBJECT]), pipelines, merge_mappings(params.params, _nested(row)), {}, _RESULTS)
        for row in rows
    ]


def _nested(row: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in row.items():
        section, *keys = name.split(".")
        if not keys:
            nested = merge_mappings(nested, {name: value})
            continue
        if section not in SECTIONS:
            raise InputError(
                expected=f"columns with parameters of the sections {', '.join(SECTIONS)}",
                got=name,
                remedy="correct its name, or leave the column out",
            )
        typed: Any = value if _is_plain(keys[-1], value) else _parsed(value, name, row[_SUBJECT])
        for key in reversed([section, *keys]):
            typed = {key: typed}
        nested = merge_mappings(nested, typed)
    return nested


def _is_plain(key: str, value: Any) -> bool:
    """Return whether a value is not written in YAML."""
    return not isinstance(value, str) or (key in PROMPT_KEYS and not value.startswith(("[", "'", '"')))


def _parsed(text: str, name: str, subject: str) -> Any:
    return parse_mapping(f"value: {text}", f"the cell {name} of {subject}")["value"]
