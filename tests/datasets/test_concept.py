"""The concept's file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kedro.io import DatasetError

from dreamartist_pipeline.core.concept import Concept, ConceptMetadata
from dreamartist_pipeline.datasets.concept import ConceptDataset
from dreamartist_pipeline.datasets.inputs import FileError
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.whole_files import STAGED, publish
from refusals import says


@pytest.fixture
def concept() -> Concept:
    metadata = ConceptMetadata(
        base_model="tiny",
        base_model_fingerprint="0123",
        num_branches=1,
        num_steps=3,
        words={"pt1": ("my-fox", "my-fox-neg")},
        num_vectors=(6, 1),
        lora={"unet": (), "text_encoder": ()},
    )
    return Concept({"words.positive.pt1": torch.arange(24.0).reshape(6, 4)}, metadata)


def dataset(folder: Path) -> ConceptDataset:
    return ConceptDataset(filepath=str(folder / "new" / "concept.safetensors"))


def test_a_saved_concept_is_loaded(tmp_path: Path, concept: Concept) -> None:
    dataset(tmp_path).save(concept)
    loaded = dataset(tmp_path).load()
    assert loaded.metadata == concept.metadata
    assert loaded.tensors.keys() == concept.tensors.keys()
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in concept.tensors.items())


def test_equal_concepts_give_equal_bytes_whatever_the_order_of_their_names(tmp_path: Path, concept: Concept) -> None:
    concept.tensors["unet.a.0.positive.up"] = torch.arange(6.0).reshape(2, 3)
    reversed_concept = Concept(dict(reversed(concept.tensors.items())), concept.metadata)
    dataset(tmp_path / "1").save(concept)
    dataset(tmp_path / "2").save(reversed_concept)
    files = [tmp_path / name / "new" / "concept.safetensors" for name in "12"]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_doubtful_concept_leaves_the_last_sound_one_beside_it(
    tmp_path: Path, concept: Concept, caplog: pytest.LogCaptureFixture
) -> None:
    file, before = (tmp_path / "new" / name for name in ("concept.safetensors", "concept.before.safetensors"))
    doubtful = [
        dataclasses.replace(concept, tensors={"words.positive.pt1": torch.full((6, 4), value)}, doubts=("loss",))
        for value in (1.0, 2.0)
    ]
    dataset(tmp_path).save(doubtful[0])
    assert not before.exists()  # there was none
    dataset(tmp_path).save(concept)
    sound = file.read_bytes()
    for each in doubtful:
        caplog.clear()
        dataset(tmp_path).save(each)
        assert before.read_bytes() == sound != file.read_bytes()
        assert str(before) in caplog.text
    dataset(tmp_path).save(concept)
    assert file.read_bytes() == sound and not before.exists()


def test_what_is_kept_beside_a_doubtful_concept_stays_until_a_sound_one_is_in_its_place(
    tmp_path: Path, concept: Concept
) -> None:
    file, before = (tmp_path / "new" / name for name in ("concept.safetensors", "concept.before.safetensors"))
    dataset(tmp_path).save(concept)
    dataset(tmp_path).save(dataclasses.replace(concept, doubts=("loss",)))
    staged = ConceptDataset(filepath=str(file.parent / STAGED / file.name))
    staged.save(concept)
    assert before.exists()  # a kill now leaves the doubtful concept
    publish([file], tmp_path / "journal.json")
    staged.published()
    assert not before.exists()


def test_a_failed_save_leaves_the_earlier_concept_as_it_was(tmp_path: Path, concept: Concept) -> None:
    dataset(tmp_path).save(concept)
    unsavable = Concept({"x": "no tensor"}, concept.metadata)  # type: ignore[dict-item]
    with pytest.raises(DatasetError):
        dataset(tmp_path).save(unsavable)
    assert dataset(tmp_path).load().metadata == concept.metadata
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["concept.safetensors"]


def test_the_metadata_is_loaded_without_the_tensors(
    tmp_path: Path, concept: Concept, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset(tmp_path).save(concept)
    monkeypatch.setattr(Path, "read_bytes", lambda _: pytest.fail("read the tensors"))
    assert dataset(tmp_path).load_metadata() == concept.metadata


@pytest.mark.parametrize("read", [ConceptDataset.load, ConceptDataset.load_metadata, ConceptDataset.preview])
def test_a_missing_file_is_refused_with_how_to_train_it(
    tmp_path: Path, read: Callable[[ConceptDataset], object]
) -> None:
    assert not dataset(tmp_path).exists()
    with pytest.raises(
        FileError, check=says(expected="concept.safetensors", got="no such file", remedy="--pipeline train")
    ):
        read(dataset(tmp_path))


@pytest.mark.parametrize("content", [b"", b"not a safetensors file", b"\xff" * 64])
def test_a_corrupt_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "concept.safetensors").write_bytes(content)
    with pytest.raises(DatasetError) as raised:
        dataset(tmp_path).load()
    assert isinstance(raised.value.__cause__, InputError)  # the command line shows only this one
    assert "safetensors" in raised.value.__cause__.expected
    with pytest.raises(FileError, check=says(expected="concept.safetensors")):
        dataset(tmp_path).load_metadata()


def test_the_preview_shows_metadata_and_sizes(tmp_path: Path, concept: Concept) -> None:
    dataset(tmp_path).save(concept)
    shown = json.loads(dataset(tmp_path).preview())
    assert shown["words positive"] == {"tensors": 1, "numbers": 24}
    assert shown["metadata"]["words"] == {slot: list(names) for slot, names in concept.metadata.words.items()}
    assert None not in shown["metadata"].values()
