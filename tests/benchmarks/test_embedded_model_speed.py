"""The speed benchmark of the embedded model."""

from __future__ import annotations

import importlib
import subprocess
from pathlib import Path

import pytest

from markdown_tables import cells, numbers


@pytest.fixture(scope="module")
def bench():
    return importlib.import_module("embedded_model_speed")


def test_a_row_has_median_and_quartiles(bench):
    median, quartiles = cells(bench.row("a step", [0.4, 0.1, 0.2, 0.3, 9.0]), "a step")
    assert (numbers(median), numbers(quartiles)) == ([0.3], [0.2, 0.4])


def test_single_images_are_timed_without_the_first_ones(bench, tiny_base_model):
    seconds = bench.image_seconds(tiny_base_model, "cpu", num_inference_steps=2)
    assert len(seconds) == bench.NUM_ROUNDS
    assert min(seconds) > 0


def test_a_training_that_fails_ends_the_benchmark(bench, tiny_base_model, monkeypatch):
    monkeypatch.setattr(bench.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 3))
    with pytest.raises(SystemExit, match="status 3"):
        bench.train(tiny_base_model, "cpu", Path("fox.png"))
