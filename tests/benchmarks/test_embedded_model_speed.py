"""The speed benchmark of the embedded model: what a line of its table says, and what a failed training does."""

from __future__ import annotations

import importlib
import subprocess
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def bench():
    return importlib.import_module("embedded_model_speed")


def test_a_line_says_the_median_and_the_quartiles(bench):
    assert bench.row("a step", [0.4, 0.1, 0.2, 0.3, 9.0]) == "| a step | 0.300 | 0.200 to 0.400 |"


def test_single_images_are_timed_without_the_first_ones(bench, tiny_base_model):
    seconds = bench.image_seconds(tiny_base_model, "cpu", num_inference_steps=2)
    assert len(seconds) == bench.NUM_ROUNDS
    assert min(seconds) > 0


def test_a_training_that_fails_ends_the_benchmark(bench, tiny_base_model, monkeypatch):
    monkeypatch.setattr(bench.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 3))
    with pytest.raises(SystemExit, match="3"):
        bench.train(tiny_base_model, "cpu", Path("fox.png"))
