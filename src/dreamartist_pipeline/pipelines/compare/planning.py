"""The runs of a comparison, of the tuning before it, and of a sweep."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import CompareParams, ParameterSearchParams, TuneParams
from dreamartist_pipeline.pipelines.compare.space import nested
from dreamartist_pipeline.starting_runs import RunRequest
from dreamartist_pipeline.yaml_texts import merge_mappings

METHOD, SUBJECT, SEED, SETTING = "method", "subject", "seed", "setting"
SEARCH, TRIAL, VALUES = "search", "trial", "values"
"""Labels of the runs."""
_PIPELINES = ("train", "evaluate")
_RESULTS = ("evaluation_metrics", "training_history")  # which are in the tables


def compared_runs(params: CompareParams) -> list[RunRequest]:
    """Return the runs of a comparison, subject by subject, so that all methods of the first ones finish early."""
    return [
        _request(params, f"{subject}-{row}-{seed}", {METHOD: row, SUBJECT: subject, SEED: seed})
        for subject in params.subjects
        for seed in params.seeds
        for row in params.rows
    ]


def tuning_runs(params: CompareParams, tuning: TuneParams) -> list[RunRequest]:
    """Return the runs of a tuning, method by method.

    Raises:
        InputError: a compared method without settings, or settings of an unknown method.
    """
    check_tuning(params, tuning)
    return list(_tuning_runs(params, tuning))


def check_tuning(params: CompareParams, tuning: TuneParams) -> None:
    """Check that every compared method has settings, and that no subject of the comparison is used.

    Raises:
        InputError: one of these is not so.
    """
    if missing := [name for name in params.rows if name not in tuning.settings]:
        raise InputError(
            expected="tune.settings of every compared method",
            got=f"none for {', '.join(missing)}",
            remedy="add them, or leave these methods out (compare.only)",
        )
    if unknown := [name for name in tuning.settings if name not in params.methods]:
        raise InputError(
            expected=f"tune.settings of methods in compare.methods, {', '.join(params.methods)}",
            got=", ".join(unknown),
            remedy="correct their names",
        )
    if shared := [name for name in tuning.subjects if name in params.subjects]:
        raise InputError(
            expected="tune.subjects that are not compared: settings that were chosen on a subject fit it",
            got=", ".join(shared),
            remedy="tune on other subjects, or leave these out of compare.subjects",
        )


def _tuning_runs(params: CompareParams, tuning: TuneParams) -> Iterator[RunRequest]:
    for row in params.rows:
        for index, setting in enumerate(tuning.settings[row]):
            for subject in tuning.subjects:
                for seed in tuning.seeds:
                    labels = {METHOD: row, SUBJECT: subject, SEED: seed, SETTING: index}
                    yield _request(params, f"tune-{subject}-{row}-{index}-{seed}", labels, setting)


def trial_run(params: ParameterSearchParams, labels: Mapping[str, Any]) -> RunRequest:
    """Return a run of a sweep.

    Args:
        params: of the sweep.
        labels: search, trial, subject, seed, and the values of the trial by their dotted names.
    """
    subject, seed = labels[SUBJECT], labels[SEED]
    name = f"{params.name}-{labels[SEARCH]}-{labels[TRIAL]}-{subject}-{seed}"
    own: dict[str, Any] = {
        "subject": name,
        "class_word": subject,
        "image": f"{params.images}/{subject}.png",
        "training": {"seed": seed},
    }
    if params.halving is not None:
        folder = rungs_of(params, labels[SEARCH]) / f"{subject}-{seed}"
        halving = params.halving.model_dump() | {"folder": str(folder), "run": name}
        own["training"]["scoring"] = {"halving": halving}
    values = merge_mappings(params.params, nested(labels[VALUES]))
    return RunRequest(name, _PIPELINES, merge_mappings(values, own), labels, _RESULTS)


def rungs_of(params: ParameterSearchParams, search: str) -> Path:
    """Return the folder in which the runs of a search note how good they are, for each subject and seed apart."""
    return Path(params.folder) / params.name / "rungs" / search


def _request(
    params: CompareParams, name: str, labels: Mapping[str, Any], setting: dict[str, Any] | None = None
) -> RunRequest:
    """Return a run; a setting that is tuned replaces the method's own values."""
    method, subject = params.methods[labels[METHOD]], labels[SUBJECT]
    own = {
        "subject": name,
        "class_word": subject,
        "method": method.method or labels[METHOD],
        "image": f"{params.images}/{subject}.png",
        "training": {"seed": labels[SEED]},
    }
    values = merge_mappings(params.params, method.params if setting is None else setting)
    return RunRequest(name, _PIPELINES, merge_mappings(values, own), labels, _RESULTS)
