"""Tests that need a GPU, and skip themselves without one.

`GPU_TESTS_DEVICE=cpu` runs those on the CPU that make sense there, to try the tests themselves.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

_DEVICE = os.environ.get("GPU_TESTS_DEVICE", "cuda")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    without_gpu = _DEVICE == "cuda" and not torch.cuda.is_available()
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.gpu)
            if without_gpu:
                item.add_marker(pytest.mark.skip(reason="there is no CUDA GPU"))


@pytest.fixture(scope="session")
def device() -> str:
    """Return the device of the tests, as `DeviceParams.device`."""
    return _DEVICE
