"""Checkpoints of training stages on disk."""

from __future__ import annotations

from pathlib import Path

import torch

from dreamartist_pipeline.embedded.checkpoints import CheckpointStore


def test_a_checkpoint_is_a_torch_file_in_the_folder_of_its_recipe(tmp_path: Path):
    """The format of checkpoints that are on users' disks already."""
    CheckpointStore(tmp_path).of_recipe("a").save("stage", {"step": 3, "weights": [torch.ones(2)]})
    assert [file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*.*")] == ["a/stage.pt"]
    assert torch.load(tmp_path / "a/stage.pt", weights_only=True)["step"] == 3


def test_checkpoints_of_two_recipes_do_not_mix(tmp_path: Path):
    store = CheckpointStore(tmp_path)
    store.of_recipe("a").save("stage", {"step": 3})
    assert store.of_recipe("a").load("stage") == {"step": 3}
    assert store.of_recipe("b").load("stage") is None
