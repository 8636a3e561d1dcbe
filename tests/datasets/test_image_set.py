"""A set of images: drawn while it is saved, resumable, published atomically, shared, and read on demand."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from kedro.io import DatasetError
from PIL import Image

from dreamartist_pipeline.core.image_set import ImagesToDraw, batches_of
from dreamartist_pipeline.datasets.image_set import ImageSetDataset
from dreamartist_pipeline.datasets.inputs import FileError
from dreamartist_pipeline.errors import input_error_in
from image_sets import set_dataset
from refusals import says
from small_disks import mount_small

KEY = "0123abcd"
CAPTIONS = ("a red cat", "a blue dog", "a bee", "a lion", "a cake")
NAMES = [f"{index:06d}.png" for index in range(5)]


class Artist:
    """Draws image i in grey 10 · i, remembers what it was asked for, and may fail at one image."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at = fails_at
        self.asked: list[list[int]] = []

    def __call__(self, batches: Sequence[Sequence[int]]) -> Iterator[Image.Image]:
        for batch in batches:
            self.asked.append(list(batch))
            for index in batch:
                if index == self.fails_at:
                    raise KeyboardInterrupt
                yield Image.new("RGB", (8, 8), (10 * index,) * 3)


def dataset_in(folder: Path, subject: str = "fox") -> ImageSetDataset:
    return set_dataset(folder / subject / "regularization_set.json", folder / "sets")


def requested(artist: Artist, captions: Sequence[str] = CAPTIONS) -> ImagesToDraw:
    return ImagesToDraw(captions, batches_of(len(captions), 2), {"key": KEY, "seed": 7}, artist, 0, "draw fewer")


@pytest.fixture
def dataset(tmp_path: Path) -> ImageSetDataset:
    return dataset_in(tmp_path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "sets" / KEY


def greys(dataset: ImageSetDataset) -> list[int]:
    return [read().getpixel((0, 0))[0] for _, read in dataset.load()]


def test_a_set_is_drawn_in_batches_and_read_back_in_order(dataset: ImageSetDataset) -> None:
    artist = Artist()
    assert not dataset.exists()
    dataset.save(requested(artist))
    assert artist.asked == [[0, 1], [2, 3], [4]]
    assert dataset.exists()
    assert tuple(caption for caption, _ in dataset.load()) == CAPTIONS
    assert greys(dataset) == [0, 10, 20, 30, 40]


def test_the_folder_holds_images_captions_and_manifest_and_nothing_else(dataset: ImageSetDataset, folder: Path) -> None:
    dataset.save(requested(Artist()))
    assert {path.name for path in folder.parent.iterdir()} == {KEY, f".{KEY}.lock"}
    assert sorted(path.name for path in folder.iterdir()) == [*NAMES, "image_captions.json", "manifest.json"]
    assert json.loads((folder / "image_captions.json").read_text())["000001.png"] == "a blue dog"
    assert json.loads((folder / "manifest.json").read_text()) == {"key": KEY, "seed": 7}


def test_each_image_is_on_disk_before_the_next_is_drawn(dataset: ImageSetDataset, folder: Path) -> None:
    present = []

    def watching(batches: Sequence[Sequence[int]]) -> Iterator[Image.Image]:
        for _ in (index for batch in batches for index in batch):
            present.append(len(list(folder.with_name(f"{KEY}.partial").glob("*.png"))))
            yield Image.new("RGB", (8, 8))

    dataset.save(ImagesToDraw(CAPTIONS, [range(5)], {"key": KEY}, watching, 0, ""))
    assert present == [0, 1, 2, 3, 4]


def test_an_interrupted_set_is_not_taken_for_a_whole_one_and_goes_on_at_its_unfinished_batch(
    dataset: ImageSetDataset, folder: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        dataset.save(requested(Artist(fails_at=3)))
    assert not dataset.exists()
    assert not folder.exists()
    artist = Artist()
    dataset.save(requested(artist))
    assert artist.asked == [[2, 3], [4]]  # a batch is drawn whole, or its images could differ in the last bit
    assert greys(dataset) == [0, 10, 20, 30, 40]


def test_a_whole_set_is_shared_by_subjects_and_not_drawn_again(
    dataset: ImageSetDataset, tmp_path: Path, folder: Path
) -> None:
    dataset.save(requested(Artist()))
    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.glob("*.png")}
    artist, another = Artist(), dataset_in(tmp_path, "owl")
    another.save(requested(artist))
    assert artist.asked == []
    assert greys(another) == greys(dataset)
    assert {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.glob("*.png")} == before


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [Path.unlink, cut, flip, lambda file: file.write_bytes(b"")])
def test_a_missing_or_damaged_image_is_drawn_again(
    dataset: ImageSetDataset, folder: Path, damage: object, caplog: pytest.LogCaptureFixture
) -> None:
    dataset.save(requested(Artist()))
    damage(folder / NAMES[4])  # type: ignore[operator]
    artist = Artist()
    dataset.save(requested(artist))
    assert (f"{folder} are drawn again: {NAMES[4]}" in caplog.text) == (damage is not Path.unlink)
    assert artist.asked == [[4]]
    assert greys(dataset) == [0, 10, 20, 30, 40]


@pytest.mark.parametrize("name", ["image_captions.json", "manifest.json"])
def test_damaged_texts_are_written_again_without_drawing(dataset: ImageSetDataset, folder: Path, name: str) -> None:
    dataset.save(requested(Artist()))
    before = (folder / name).read_bytes()
    (folder / name).write_text("{")
    artist = Artist()
    dataset.save(requested(artist))
    assert (folder / name).read_bytes() == before
    assert artist.asked == []


def test_a_set_that_is_no_longer_whole_is_not_read(dataset: ImageSetDataset, folder: Path) -> None:
    with pytest.raises(FileError, check=says(expected="/sets/none")):
        dataset.load()
    dataset.save(requested(Artist()))
    flip(folder / NAMES[1])
    (_, first), (_, second), *_ = dataset.load()
    assert first().size == (8, 8)
    with pytest.raises(FileError, check=says(expected=NAMES[1])):
        second()
    (folder / NAMES[1]).unlink()
    assert not dataset.exists()
    with pytest.raises(FileError, check=says(expected=f"{folder},")):
        dataset.load()


def test_an_empty_set_is_whole(dataset: ImageSetDataset) -> None:
    artist = Artist()
    dataset.save(requested(artist, captions=()))
    assert dataset.exists()
    assert len(dataset.load()) == 0
    assert dataset.preview() == ""
    assert artist.asked == []


def test_too_few_images_are_an_error_and_publish_nothing(dataset: ImageSetDataset, folder: Path) -> None:
    few = ImagesToDraw(CAPTIONS, [range(5)], {"key": KEY}, lambda batches: iter([Image.new("RGB", (8, 8))]), 0, "")
    with pytest.raises(DatasetError) as raised:
        dataset.save(few)
    assert isinstance(raised.value.__cause__, ValueError)
    assert not folder.exists()
    assert not dataset.exists()


def test_a_key_cannot_leave_the_folder(dataset: ImageSetDataset) -> None:
    with pytest.raises(FileError, check=says(expected="a key", got="'../x'")):
        dataset.save(ImagesToDraw(CAPTIONS, [range(5)], {"key": "../x"}, Artist(), 0, ""))


def test_the_first_pictures_are_previewed_with_their_captions(dataset: ImageSetDataset) -> None:
    dataset.save(requested(Artist(), captions=CAPTIONS * 2))
    preview = Image.open(io.BytesIO(base64.b64decode(dataset.preview())))
    assert preview.width == 4 * 124 + 4
    assert preview.height > 2 * 124  # two rows of four, and the captions below them
    assert preview.getpixel((2 * 124 + 60, 60))[0] == pytest.approx(20, abs=1)


def test_of_two_runs_that_want_the_same_set_one_draws_it_and_the_other_waits(tmp_path: Path) -> None:
    started, drawn = threading.Event(), []

    def slow(batches: Sequence[Sequence[int]]) -> Iterator[Image.Image]:
        started.set()
        time.sleep(0.2)
        for index in (index for batch in batches for index in batch):
            drawn.append(index)
            yield Image.new("RGB", (8, 8))

    both = ImagesToDraw(("a", "b"), [range(2)], {"key": KEY}, slow, 0, "")
    first = threading.Thread(target=dataset_in(tmp_path).save, args=(both,))
    first.start()
    started.wait()
    dataset_in(tmp_path, "owl").save(both)
    first.join()
    assert drawn == [0, 1]
    assert dataset_in(tmp_path, "owl").exists()


def test_a_disk_without_room_is_found_before_anything_is_drawn(tmp_path: Path) -> None:
    artist = Artist()
    with mount_small(tmp_path / "sets", "64k"), pytest.raises(DatasetError) as refused:
        dataset_in(tmp_path).save(dataclasses.replace(requested(artist), image_bytes=20_000))
    error = input_error_in(refused.value)
    assert error is not None and "5 images" in error.expected
    assert artist.asked == []


# --------------------------------------------------------------------------------------------- under another name


def rename_set(folder: Path, key: str) -> None:
    """Give a set another name, as another version would have."""
    manifest = json.loads((folder / "manifest.json").read_text()) | {"key": key}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    folder.rename(folder.with_name(key))


def test_the_same_set_under_another_name_is_used_in_place_of_a_new_one(dataset: ImageSetDataset, folder: Path) -> None:
    dataset.save(requested(Artist()))
    rename_set(folder, "older")
    (folder.with_name("older") / NAMES[3]).unlink()
    artist = Artist()
    dataset.save(dataclasses.replace(requested(artist), is_in=lambda manifest: manifest["seed"] == 7))
    assert artist.asked == [[2, 3]]
    assert not folder.exists()
    assert greys(dataset) == [0, 10, 20, 30, 40]


def test_a_set_under_another_name_that_is_no_such_set_is_left_alone(dataset: ImageSetDataset, folder: Path) -> None:
    dataset.save(requested(Artist()))
    rename_set(folder, "older")
    artist = Artist()
    dataset.save(dataclasses.replace(requested(artist), is_in=lambda manifest: manifest["seed"] == 8))
    assert len(artist.asked) == 3
    assert {file.name for file in folder.parent.iterdir() if not file.name.startswith(".")} == {KEY, "older"}
