"""Two GPUs that do the work of one."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from core.test_processes import fail_on_one_rank
from dreamartist_pipeline.core import processes
from dreamartist_pipeline.core.processes import rank, run_on_processes, sum_over_ranks
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import DeviceParams, TrainingParams
from pipelines.test_regularization import IN_SINGLE_BATCHES, files_in, make
from pipelines.test_training import train
from refusals import says

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
ONE, TWO = (DeviceParams(device="cuda", processes=count) for count in (1, 2))


def _sum_of_ranks() -> tuple[float, str]:
    values = torch.tensor([rank() + 1.0], device="cuda")
    sum_over_ranks([values])
    return values.item(), dist.get_backend()


def test_each_rank_has_a_gpu_and_sums_are_those_of_nccl() -> None:
    assert run_on_processes(_sum_of_ranks, 2, on_gpus=True) == (3.0, "nccl")


@pytest.mark.parametrize("how", ["error", "killed"])
def test_a_rank_that_fails_ends_the_others_although_they_wait_for_it(how: str) -> None:
    expected = "memory" if how == "error" else "rank 1"
    with pytest.raises(InputError, check=says(expected=expected)):
        run_on_processes(fail_on_one_rank, 2, 1, how, "cuda", on_gpus=True)
    assert not dist.is_initialized()
    assert not multiprocessing.active_children()


def test_two_gpus_train_the_concept_of_one(
    tiny_base_model: Path, make_training_params: Callable[..., TrainingParams]
) -> None:
    params = make_training_params(num_steps=3, schedule={"kind": "constant"}, words_schedule={"kind": "constant"})
    (_, alone), (_, shared) = (train(tiny_base_model, params, device=device) for device in (ONE, TWO))
    assert shared["loss"].tolist() == pytest.approx(alone["loss"].tolist(), rel=1e-3)


def test_two_gpus_draw_the_set_of_one(tiny_base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_WORTH_STARTING_S", 0)
    for name, device in (("one", ONE), ("two", TWO)):
        make(tiny_base_model, tmp_path / name, IN_SINGLE_BATCHES, device=device)
    assert files_in(tmp_path / "one") == files_in(tmp_path / "two")
