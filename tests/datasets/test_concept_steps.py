"""Concepts by step in a folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from kedro_datasets._typing import TablePreview

from core.test_kept_steps import concept
from dreamartist_pipeline.core.concept import Concept
from dreamartist_pipeline.datasets.concept import ConceptDataset
from dreamartist_pipeline.datasets.concept_steps import ConceptStepsDataset
from dreamartist_pipeline.errors import InputError


def steps(*numbers: int) -> dict[int, Concept]:
    group = {"name": "unet.0.positive", "lr": 1e-3, "rank": 1, "layers": ("a",), "branch": "positive"}
    found = {}
    for number in numbers:
        metadata = concept("a", number).metadata.model_copy(update={"lora": {"unet": ()}})
        metadata = type(metadata).model_validate(metadata.model_dump() | {"lora": {"unet": [group]}})
        tensors = {f"unet.a.0.positive.{part}": torch.full((1, 1), float(number)) for part in ("down", "up")}
        found[number] = dataclasses.replace(concept("a"), tensors=tensors, metadata=metadata)
    return found


def test_steps_are_read_one_by_one_and_each_is_a_concept_file(tmp_path: Path) -> None:
    dataset = ConceptStepsDataset(filepath=str(tmp_path / "fox" / "steps"))
    dataset.save(steps(120, 80))
    loaded = dataset.load()
    assert list(loaded) == [80, 120]
    assert loaded[80]().tensors["unet.a.0.positive.up"].item() == 80
    file = tmp_path / "fox" / "steps" / "120.safetensors"
    assert ConceptDataset(filepath=str(file)).load().metadata.step == 120


def test_a_save_removes_the_steps_of_an_earlier_training(tmp_path: Path) -> None:
    dataset = ConceptStepsDataset(filepath=str(tmp_path / "steps"))
    dataset.save(steps(80, 120))
    dataset.save(steps(40))
    assert [file.name for file in (tmp_path / "steps").iterdir()] == ["40.safetensors"]
    dataset.save({})
    assert dataset.load() == {}


def test_without_a_folder_there_are_no_steps(tmp_path: Path) -> None:
    dataset = ConceptStepsDataset(filepath=str(tmp_path / "steps"))
    assert dataset.exists() and dataset.load() == {}


def test_a_damaged_file_is_refused_when_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "80.safetensors").write_bytes(b"0")
    (tmp_path / "readme.txt").touch()
    loaded = ConceptStepsDataset(filepath=str(tmp_path)).load()
    assert list(loaded) == [80]
    with pytest.raises(InputError):
        loaded[80]()


def test_the_preview_lists_steps_and_sizes(tmp_path: Path) -> None:
    dataset = ConceptStepsDataset(filepath=str(tmp_path))
    dataset.save(steps(80))
    shown = dataset.preview()
    size = (tmp_path / "80.safetensors").stat().st_size
    assert (shown["columns"], shown["data"]) == (["step", "bytes"], [[80, f"{size:,}"]])
    assert ConceptStepsDataset.preview.__annotations__["return"] is TablePreview  # kedro-viz compares the type
