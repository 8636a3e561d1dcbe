"""Guidance, optimizers, schedules and precision of a toolkit configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.interop.toolkit_config import ImportedConfig
from dreamartist_pipeline.params import TrainingParams
from refusals import says

Import = Callable[..., ImportedConfig]
AsRun = Callable[[ImportedConfig], TrainingParams]
TUTORIAL = Path(__file__).with_name("tutorial.yaml").read_text(encoding="utf-8")
PLAIN_GROUP = "lora_unet: [{lr: 1e-4, rank: 2, layers: [conv_in]}]\n"


def test_schedules_are_read_from_base_files_and_references(imported: ImportedConfig) -> None:
    training = imported.parameters["training"]
    assert training["schedule"] == {"kind": "constant", "warmup_steps": 50}
    assert training["words_schedule"] == {"kind": "constant", "warmup_steps": 50}  # ${.scheduler}
    assert (training["num_steps"], training["seed"], training["weight_decay"]) == (1000, 7, 1e-3)


def test_one_branch_without_a_guidance_scale_gets_1(imported_from: Import, as_run: AsRun) -> None:
    imported = imported_from(PLAIN_GROUP + "data: {batch_size: 4}\n")
    assert as_run(imported).num_branches == 1
    assert imported.left_out["train.cfg_scale"].startswith("not given: 1.0")


@pytest.mark.parametrize(
    ("name", "part"), [("AdamW8bit", "adamw8bit"), ("AdamW", None)], ids=["in 8 bits", "the usual one"]
)
def test_optimizers_are_carried_over_with_their_decay(imported_from: Import, name: str, part: str | None) -> None:
    optimizer = f"{{_target_: some.{name}, _partial_: True}}"
    text = TUTORIAL + f"train: {{optimizer: {optimizer}, optimizer_pt: {optimizer}}}\n"
    imported = imported_from(text)
    training = imported.parameters["training"]
    assert (training.get("optimizer"), training["words"].get("optimizer")) == (part, part)
    assert (training["weight_decay"], training["words"]["weight_decay"]) == (0.01, 0.01)
    assert not [key for key in imported.left_out if "optimizer" in key]


def test_an_unsupported_optimizer_is_named(imported_from: Import) -> None:
    left_out = imported_from(TUTORIAL + "train: {optimizer: {_target_: some.Lion, _partial_: True}}\n").left_out
    assert "training.optimizer" in left_out["train.optimizer._target_"]


@pytest.mark.parametrize("offset", [0.1, 0.0])
def test_the_noise_offset_is_carried_over(imported_from: Import, offset: float) -> None:
    imported = imported_from(TUTORIAL + f"train: {{noise_offset: {offset}}}\n")
    assert imported.parameters["training"]["noise_offset"] == offset
    assert "train.noise_offset" not in imported.left_out


def test_a_null_schedule_is_a_constant_learning_rate(imported_from: Import, as_run: AsRun) -> None:
    params = as_run(imported_from(TUTORIAL + "train: {scheduler: null, scheduler_pt: null}\n"))
    assert (params.schedule.kind, params.schedule.warmup_steps) == ("constant", 0)
    assert (params.words_schedule.kind, params.words_schedule.warmup_steps) == ("constant", 0)


def test_precision_no_is_float32_although_yaml_reads_false(imported_from: Import) -> None:
    assert imported_from(TUTORIAL + "mixed_precision: no\n").parameters["device"] == {"dtype": "float32"}


def test_a_negative_branch_at_a_guidance_scale_of_1_is_refused(imported_from: Import) -> None:
    with pytest.raises(InputError, check=says(got="guidance_scale is 1")):
        imported_from(TUTORIAL + "train: {cfg_scale: '1.0'}\n")
