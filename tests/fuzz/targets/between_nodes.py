"""JSON files that one pipeline writes and another reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kedro.io import DatasetError
from kedro_datasets.json import JSONDataset

from dreamartist_pipeline.core.images import Framing
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import TrainingParams
from dreamartist_pipeline.pipelines.training.memory import memory_plan
from dreamartist_pipeline.pipelines.training.plan import check_plan
from fuzz.fuzzing import Target

_PARAMS = TrainingParams.model_validate({"num_steps": 1, "words": {"names": {"pt1": ["my-fox", "my-fox-neg"]}}})
_PLAN = {"caption": "", "num_steps": 1, "groups": [], "memory": {"checkpointing": False, "micro_batch": None}}
_FRAMING = {"original_px": [64, 48], "crop_px": [8, 0], "size_px": [48, 48]}


def _loaded(file: Path) -> Any:
    return JSONDataset(filepath=str(file)).load()


def _plan(file: Path) -> object:
    plan = _loaded(file)
    check_plan(plan, [], {})
    return memory_plan(plan, _PARAMS)


TARGETS = [
    Target("training plan", lambda: {"a.json": json.dumps(_PLAN).encode()}, _plan, (InputError, DatasetError)),
    Target(
        "framing",
        lambda: {"a.json": json.dumps(_FRAMING).encode()},
        lambda file: Framing.of_values(_loaded(file)).numbers(),
        (InputError, DatasetError),
    ),
]
