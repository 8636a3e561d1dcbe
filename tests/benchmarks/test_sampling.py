"""The benchmark of drawing."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch

import sampling
from dreamartist_pipeline.backbones.base_model import BaseModelFiles, load_backbone
from dreamartist_pipeline.backbones.concepts import attach, generate
from dreamartist_pipeline.params import DeviceParams, SamplerParams, StrengthParams
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


def test_two_copies_of_the_base_model_draw_its_pictures(tiny_base_model: Path) -> None:
    backbone = load_backbone(BaseModelFiles(tiny_base_model), DeviceParams(device="cpu"))
    base = attach(backbone, None, StrengthParams())
    two = sampling.TwoDenoisers(backbone)
    twice = dataclasses.replace(base, backbone=two)
    sampler = SamplerParams(num_inference_steps=2, batch_size=3)
    drawn = [generate(backbone, one, ["a cat"] * 3, "blurry", (1, 2, 3), sampler) for one in (base, twice)]
    for one, other in zip(*drawn, strict=True):
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1  # batches of another size
    of_base, of_two = (generate(backbone, one, ["a cat"], "blurry", (1,), sampler)[0] for one in (base, twice))
    with torch.no_grad():
        next(two.negative.networks["unet"].parameters()).mul_(2)
    (changed,) = generate(backbone, twice, ["a cat"], "blurry", (1,), sampler)
    assert changed.tobytes() != of_two.tobytes()
    assert generate(backbone, base, ["a cat"], "blurry", (1,), sampler)[0].tobytes() == of_base.tobytes()


def test_the_benchmark_runs(tiny_base_model: Path, tmp_path: Path) -> None:
    size = ("--rounds", "1", "--steps", "2", "--threads", "1")

    sampling.main((*size, "--base-model", str(tiny_base_model), "--output", str(tmp_path)))

    report = (tmp_path / "sampling_tiny.md").read_text()
    assert sampling.CONCEPT in report and sampling.TWO in report
