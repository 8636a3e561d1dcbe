"""Datasets of the pretrain pipeline."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest
import torch
from kedro.io import DatasetError

from dreamartist_pipeline.embedded.datasets import (
    PretrainedFolderDataset,
    SpritePackagesDataset,
    SpriteSetDataset,
    StartDataset,
)
from dreamartist_pipeline.embedded.sprites import SpriteSet


def write_package(folder: Path, **members: object) -> dict[str, object]:
    tarball = folder / "icons-1.0.0.tgz"
    with tarfile.open(tarball, "w:gz") as archive:
        for stem, content in members.items():
            data = json.dumps(content).encode()
            info = tarfile.TarInfo(f"package/{stem}.json")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    digest = hashlib.sha256(tarball.read_bytes()).hexdigest()
    return {"file": tarball.name, "sha256": digest, "members": [f"{stem}.json" for stem in members]}


def test_packages_load_to_the_json_inside_them(tmp_path):
    spec = write_package(tmp_path, icons={"prefix": "x"}, chars={"1f436": "dog"})
    loaded = SpritePackagesDataset(path=str(tmp_path), packages={"x": spec}).load()
    assert loaded == {"x": {"icons": {"prefix": "x"}, "chars": {"1f436": "dog"}}}


def test_a_missing_package_says_how_to_get_it(tmp_path):
    spec = {"file": "absent.tgz", "sha256": "0", "members": []}
    with pytest.raises(DatasetError, match="absent.tgz.*make sprites"):
        SpritePackagesDataset(path=str(tmp_path), packages={"x": spec}).load()


def test_a_package_with_another_hash_is_not_read(tmp_path):
    spec = write_package(tmp_path, icons={}) | {"sha256": "0" * 64}
    with pytest.raises(DatasetError, match="0" * 64):
        SpritePackagesDataset(path=str(tmp_path), packages={"x": spec}).load()


def test_a_sprite_set_survives_saving_and_loading(tmp_path):
    sprites = SpriteSet(torch.arange(64, dtype=torch.uint8).view(1, 4, 4, 4), ("dog",), ("flat",))
    dataset = SpriteSetDataset(filepath=str(tmp_path / "deep" / "sprites.safetensors"))
    dataset.save(sprites)
    loaded = dataset.load()
    assert torch.equal(loaded.images, sprites.images)
    assert (loaded.objects, loaded.styles) == (sprites.objects, sprites.styles)


class FakePipeline:
    def __init__(self, text: str) -> None:
        self.text = text

    def save_pretrained(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        (path / "model_index.json").write_text(self.text)


class BrokenPipeline:
    def save_pretrained(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        raise OSError("disk full")


def test_a_saved_folder_replaces_the_earlier_one_whole(tmp_path):
    dataset = PretrainedFolderDataset(path=str(tmp_path / "model"))
    dataset.save(FakePipeline("first"))
    dataset.save(FakePipeline("second"))
    assert (Path(dataset.load()) / "model_index.json").read_text() == "second"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_failed_save_leaves_the_earlier_folder_as_it_was(tmp_path):
    dataset = PretrainedFolderDataset(path=str(tmp_path / "model"))
    dataset.save(FakePipeline("first"))
    with pytest.raises(DatasetError):
        dataset.save(BrokenPipeline())
    assert (Path(dataset.load()) / "model_index.json").read_text() == "first"


def test_a_start_is_a_base_models_folder_or_none(tmp_path):
    assert StartDataset(path=None).load() is None
    absent = StartDataset(path=str(tmp_path))
    assert not absent.exists()
    with pytest.raises(DatasetError, match="pretrain.start"):
        absent.load()
    (tmp_path / "model_index.json").touch()
    assert absent.load() == str(tmp_path)
