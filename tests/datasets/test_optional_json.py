"""JSON files that need not exist."""

from __future__ import annotations

from pathlib import Path

from dreamartist_pipeline.datasets.optional_json import OptionalJSONDataset


def test_without_a_file_there_are_no_values(tmp_path: Path) -> None:
    dataset = OptionalJSONDataset(filepath=str(tmp_path / "values.json"))
    assert dataset.exists()
    assert dataset.load() == {}


def test_values_survive_the_file(tmp_path: Path) -> None:
    dataset = OptionalJSONDataset(filepath=str(tmp_path / "values.json"))
    dataset.save({"guidance_scale": 3.0})
    assert dataset.load() == {"guidance_scale": 3.0}
