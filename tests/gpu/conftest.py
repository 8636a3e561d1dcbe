"""Tests that need a GPU, and skip themselves without one.

With `GPU_TESTS_DEVICE=cpu`, those that take the fixture `device` run on the CPU, to try the tests themselves.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

_DEVICE = os.environ.get("GPU_TESTS_DEVICE", "cuda")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder, and skip those that cannot run here."""
    for item in items:
        if not item.path.is_relative_to(Path(__file__).parent):
            continue
        item.add_marker(pytest.mark.gpu)
        takes_device = "device" in getattr(item, "fixturenames", ())
        if not torch.cuda.is_available() and (_DEVICE == "cuda" or not takes_device):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session")
def device() -> str:
    """Return the device of the tests, as `DeviceParams.device`."""
    return _DEVICE
