"""Deterministic algorithms are set for the process before CUDA starts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dreamartist_pipeline.backbones.base_model import open_base_model
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import DeviceParams
from refusals import says

VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
DETERMINISTIC = DeviceParams(device="cpu", deterministic=True)


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(VARIABLE, "restored afterwards")
    monkeypatch.delenv(VARIABLE)
    yield
    torch.use_deterministic_algorithms(False)


def test_a_base_model_is_opened_with_deterministic_algorithms(tiny_base_model: Path) -> None:
    import os

    open_base_model(tiny_base_model, DeviceParams(device="cpu"))
    assert not torch.are_deterministic_algorithms_enabled()
    open_base_model(tiny_base_model, DETERMINISTIC)
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ[VARIABLE] == ":4096:8"


def test_a_started_cuda_without_the_setting_of_cublas_is_refused(
    tiny_base_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(InputError, check=says(expected=VARIABLE, remedy=f"{VARIABLE}=:4096:8")):
        open_base_model(tiny_base_model, DETERMINISTIC)
    monkeypatch.setenv(VARIABLE, ":16:8")
    open_base_model(tiny_base_model, DETERMINISTIC)
