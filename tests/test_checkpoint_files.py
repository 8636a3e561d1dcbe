"""Checkpoints of trainings on disk."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from dreamartist_pipeline.checkpoint_files import CheckpointStore


def checkpoint(step: int) -> dict[str, Any]:
    return {"step": step, "values": torch.full((3,), float(step)), "groups": [{"lr": 0.5, "betas": [0.9, None]}]}


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    """Return a store with two checkpoints."""
    store = CheckpointStore(tmp_path / "checkpoints")
    for step in (1, 2):
        store.save("a", checkpoint(step))
    return store


def step_of(store: CheckpointStore) -> int | None:
    loaded = store.load("a")
    return None if loaded is None else loaded["step"]


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


def test_the_last_two_are_kept(store: CheckpointStore):
    store.save("a", checkpoint(3))
    assert sorted(file.name for file in store.path.iterdir()) == ["a.before.pt", "a.pt"]
    assert step_of(store) == 3
    assert torch.load(store.path / "a.before.pt", weights_only=True)["step"] == 2


def test_no_damaged_byte_is_read(store: CheckpointStore, caplog: pytest.LogCaptureFixture):
    """Each byte in turn; whatever is changed, the checkpoint is as it was saved or is the one before."""
    whole, before = ((store.path / name).read_bytes() for name in ("a.pt", "a.before.pt"))
    steps = []
    for position in range(0, len(whole), 7):
        (store.path / "a.pt").write_bytes(whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :])
        (store.path / "a.before.pt").write_bytes(before)
        loaded = store.load("a")
        assert loaded is not None
        expected = checkpoint(loaded["step"])
        assert torch.equal(loaded["values"], expected["values"]) and loaded["groups"] == expected["groups"]
        steps.append(loaded["step"])
    assert set(steps) == {1, 2}  # bytes of the padding change nothing
    assert "a.pt is damaged" in caplog.text


@pytest.mark.parametrize("content", [b"", b"half", None], ids=["empty", "text", "cut off"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture, content: bytes | None
):
    file = store.path / "a.pt"
    file.write_bytes(file.read_bytes()[:-40] if content is None else content)
    with caplog.at_level(logging.WARNING):
        assert step_of(store) == 1
    assert str(file) in caplog.text
    assert "before it is used" in caplog.text
    store.save("a", checkpoint(3))
    assert torch.load(store.path / "a.before.pt", weights_only=True)["step"] == 1  # not the damaged one


def test_a_file_of_torch_that_is_no_checkpoint_is_damaged(store: CheckpointStore, caplog: pytest.LogCaptureFixture):
    torch.save([1, 2], store.path / "a.pt")
    assert step_of(store) == 1
    assert "a list in place of a dictionary" in caplog.text


def test_a_save_that_ends_between_its_renames_loses_nothing(store: CheckpointStore, caplog: pytest.LogCaptureFixture):
    (store.path / "a.pt").replace(store.path / "a.before.pt")
    assert step_of(store) == 2
    assert not caplog.text


def test_without_a_whole_checkpoint_there_is_none(store: CheckpointStore):
    for file in store.path.iterdir():
        file.write_bytes(b"damaged")
    assert step_of(store) is None


def test_a_checkpoint_that_does_not_fit_into_memory_is_not_taken_for_a_damaged_one(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="memory"):
        patch.setattr(torch, "load", load)
        store.load("a")
    assert step_of(store) == 2


def test_pickled_code_is_not_run(store: CheckpointStore, tmp_path: Path):
    class Malicious:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "run",)

    for name in ("a.pt", "a.before.pt"):
        torch.save(Malicious(), store.path / name)
    assert step_of(store) is None
    assert not (tmp_path / "run").exists()


def test_a_kill_while_they_are_discarded_leaves_the_latest(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch):
    """The older one alone would be taken for that of an interrupted training."""
    remove = Path.unlink

    def remove_one(file: Path, missing_ok: bool = False) -> None:
        remove(file, missing_ok)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "unlink", remove_one)
    with pytest.raises(KeyboardInterrupt):
        store.discard("a")
    assert step_of(store) == 2


def test_discarded_checkpoints_are_gone_with_their_folder(store: CheckpointStore):
    store.save("b", checkpoint(1))
    store.discard("a")
    assert step_of(store) is None
    assert [file.name for file in store.path.iterdir()] == ["b.pt"]
    store.discard("b")
    store.discard("b")
    assert not store.path.exists()
