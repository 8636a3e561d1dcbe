"""The benchmark of drawing."""

from __future__ import annotations

from pathlib import Path

import torch

import sampling
from dreamartist_pipeline.backbones.base_model import BaseModelFiles, load_backbone
from dreamartist_pipeline.params import DeviceParams
from speed.settings import Settings, read_training


def test_the_table_has_the_ratio_to_the_base_model() -> None:
    rows = sampling.make_rows({sampling.BASE: [2.0, 2.0], sampling.CONCEPT: [3.0, 3.0]})

    assert [row.values["× base model"] for row in rows] == [1.0, 1.5]


def test_the_concept_has_no_zeros(tiny_base_model: Path) -> None:
    backbone = load_backbone(BaseModelFiles(tiny_base_model), DeviceParams(device="cpu"))

    concept = sampling.random_concept(Settings(BaseModelFiles(tiny_base_model), backbone, read_training(), 32))

    ups = [tensor for name, tensor in concept.tensors.items() if name.endswith(".up")]
    assert len(ups) > 20
    assert all(torch.count_nonzero(up) == up.numel() for up in ups)


def test_the_benchmark_runs(tiny_base_model: Path, tmp_path: Path) -> None:
    size = ("--rounds", "1", "--steps", "2", "--threads", "1")

    sampling.main((*size, "--base-model", str(tiny_base_model), "--output", str(tmp_path)))

    assert sampling.CONCEPT in (tmp_path / "sampling_tiny.md").read_text()
