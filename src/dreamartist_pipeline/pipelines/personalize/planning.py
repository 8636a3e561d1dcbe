"""The runs of many subjects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dreamartist_pipeline.early_checks import PlannedConcept
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import RUN_SETTINGS, PersonalizeParams, is_prompt_text
from dreamartist_pipeline.starting_runs import RunRequest
from dreamartist_pipeline.yaml_texts import merge_mappings, parse_mapping

_SUBJECT = "subject"
_SECTIONS = ("device", "ingestion", "prompts", "regularization", "training", "evaluation", "export")
_RESULTS = ("concept", "training_history", "evaluation_metrics", "contact_sheet", "report")
_EXPORTED = ("exported_files", "export_report")


def check_rows(
    params: PersonalizeParams, planned: PlannedConcept | None, subject_list: Sequence[Mapping[str, Any]]
) -> None:
    """Check the columns and cells of a table of subjects.

    Raises:
        InputError: see `subject_runs`.
    """
    subject_runs(subject_list, params)


def subject_runs(rows: Sequence[Mapping[str, Any]], params: PersonalizeParams) -> list[RunRequest]:
    """Return a run for each row.

    Args:
        rows: run settings, and dotted parameters such as `training.seed`; of the latter, texts are YAML, and a single
            prompt is written as it is.
        params: of the pipeline.

    Raises:
        InputError: a column that is neither a run setting nor a parameter of these runs, or a cell that is no YAML.
    """
    pipelines = ("train", "evaluate", "export") if params.export else ("train", "evaluate")
    results = (*_RESULTS, *_EXPORTED) if params.export else _RESULTS
    return [
        RunRequest(str(row[_SUBJECT]), pipelines, merge_mappings(params.params, _nested(row)), {}, results)
        for row in rows
    ]


def _nested(row: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in row.items():
        section, *keys = name.split(".")
        if not keys and name in RUN_SETTINGS:
            typed: Any = str(value)
        elif keys and section in _SECTIONS:
            is_plain = not isinstance(value, str) or is_prompt_text(name, value)
            typed = value if is_plain else _parsed(value, f"the cell {name} of {row[_SUBJECT]}")
        else:
            raise InputError(
                expected=f"columns with run settings ({', '.join(RUN_SETTINGS)}) or parameters of "
                f"{', '.join(_SECTIONS)}, such as training.seed",
                got=name,
                remedy="correct its name, or leave the column out",
            )
        for key in reversed([section, *keys]):
            typed = {key: typed}
        nested = merge_mappings(nested, typed)
    return nested


def _parsed(text: str, what: str) -> Any:
    return parse_mapping(f"value: {text}", what)["value"]
