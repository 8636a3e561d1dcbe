"""The space on the disk that a training needs is checked before it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import DeviceParams, TrainingParams
from dreamartist_pipeline.pipelines.training.disk import check_disk, needed_bytes
from dreamartist_pipeline.pipelines.training.nodes import check_training
from refusals import says
from small_disks import mount_small

PLAN = {"groups": [{"num_parameters": 1000}, {"num_parameters": 500}]}


def test_the_estimate_grows_with_what_is_written(make_training_params: Callable[..., TrainingParams]) -> None:
    def needed(**changes: object) -> int:
        return needed_bytes(PLAN, make_training_params(preview={"every": 0}, **changes), 32)

    assert needed(num_steps=0) == 3 * 2 * (1500 * 4 * 3) + 6 * 1500 * 4  # the state, and a good one
    assert needed(num_steps=0, ema_decay=0.9) == needed(num_steps=0) + 3 * 2 * 1500 * 4
    assert needed(num_steps=0, on_divergence="halve_lr") == needed(num_steps=0) + 3 * (1500 * 4 * 3)
    assert needed(num_steps=10) == needed(num_steps=0) + 3 * 10 * 1000
    scoring = {"every": 3, "prompts": ["a {pt1}"], "prior_prompts": ["a cat"]}
    assert needed(num_steps=10, scoring=scoring) == needed(num_steps=10) + (3 + 2) * 4 * 1500 * 4  # steps 3, 6, 9, 10
    preview = {"every": 5, "prompts": ["a {pt1}", "two {pt1}"]}
    with_previews = needed_bytes(PLAN, make_training_params(num_steps=10, preview=preview), 32)
    assert with_previews == needed(num_steps=10) + 3 * 2 * 3 * 32 * 32  # steps 0, 5 and 10


def test_a_training_that_keeps_nothing_needs_nothing(make_training_params: Callable[..., TrainingParams]) -> None:
    check_disk({"groups": [{"num_parameters": 10**15}]}, make_training_params(), 32)


def test_a_training_that_will_not_fit_is_refused_by_its_check(
    tiny_base_model: Path, make_training_params: Callable[..., TrainingParams], tmp_path: Path
) -> None:
    cpu = DeviceParams(device="cpu")
    with mount_small(tmp_path / "disk", "100k") as disk:
        params = make_training_params(checkpoints=str(disk / "checkpoints"))
        with pytest.raises(InputError, check=says(expected=str(disk / "checkpoints"), got="KiB")):
            check_training(str(tiny_base_model), params, "", cpu)
        assert not list(disk.iterdir())
