"""Sets of captioned images: streamed, resumable, published whole."""

import json
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from kedro.io import DatasetError
from PIL import Image

from dreamartist_pipeline.datasets.image_store import ImageStore, ImageStoreDataset

KEY = "0123abcd"
CAPTIONS = ["a red cat", "a blue dog", "a bee", "a lion", "a cake"]
NAMES = [f"{index:06d}.png" for index in range(5)]


class Artist:
    """Draws image i in grey 10 · i, remembers what it was asked for, and may fail at one image."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at = fails_at
        self.asked: list[list[int]] = []

    def __call__(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        self.asked.append(list(indices))
        for index in indices:
            if index == self.fails_at:
                raise KeyboardInterrupt
            yield Image.new("RGB", (8, 8), (10 * index,) * 3)


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "sets")


def write(store: ImageStore, artist: Artist, captions: Sequence[str] = CAPTIONS) -> None:
    store.write(KEY, captions, artist, batch_size=2, manifest={"seed": 7})


def test_a_set_is_written_in_batches_and_read_back_in_order(store: ImageStore) -> None:
    artist = Artist()

    write(store, artist)

    assert artist.asked == [[0, 1], [2, 3], [4]]
    assert store.has(KEY)
    assert store.captions(KEY) == dict(zip(NAMES, CAPTIONS, strict=True))
    assert [image.getpixel((0, 0)) for image in store.images(KEY)] == [(10 * i,) * 3 for i in range(5)]
    assert store.manifest(KEY) == {"seed": 7}


def test_the_folder_holds_images_captions_and_manifest_and_nothing_else(store: ImageStore) -> None:
    write(store, Artist())

    assert {path.name for path in store.root.iterdir()} == {KEY, f".{KEY}.lock"}
    assert sorted(path.name for path in store.folder(KEY).iterdir()) == [*NAMES, "image_captions.json", "manifest.json"]
    assert json.loads((store.folder(KEY) / "image_captions.json").read_text())["000001.png"] == "a blue dog"


def test_each_image_is_on_disk_before_the_next_is_drawn(store: ImageStore) -> None:
    present = []

    def watching(indices: Sequence[int]) -> Iterator[Image.Image]:
        for _ in indices:
            present.append(store.num_present(KEY))
            yield Image.new("RGB", (8, 8))

    store.write(KEY, CAPTIONS, watching, batch_size=5, manifest={})

    assert present == [0, 1, 2, 3, 4]


def test_an_interrupted_set_is_not_taken_for_a_whole_one(store: ImageStore) -> None:
    with pytest.raises(KeyboardInterrupt):
        write(store, Artist(fails_at=3))

    assert not store.has(KEY)
    assert not store.folder(KEY).exists()
    assert store.num_present(KEY) == 3


def test_an_interrupted_set_goes_on_at_its_unfinished_batch(store: ImageStore) -> None:
    with pytest.raises(KeyboardInterrupt):
        write(store, Artist(fails_at=3))
    artist = Artist()

    write(store, artist)

    assert artist.asked == [[2, 3], [4]]  # a batch is drawn whole, or its images could differ in the last bit
    assert store.has(KEY)
    assert [image.getpixel((0, 0))[0] for image in store.images(KEY)] == [0, 10, 20, 30, 40]


def test_a_set_that_lost_an_image_is_completed(store: ImageStore) -> None:
    write(store, Artist())
    (store.folder(KEY) / NAMES[4]).unlink()
    artist = Artist()

    assert not store.has(KEY)
    write(store, artist)

    assert artist.asked == [[4]]
    assert store.has(KEY)


def test_a_set_of_another_key_is_another_set(store: ImageStore) -> None:
    write(store, Artist())

    assert not store.has("another")
    assert store.num_present("another") == 0


def test_an_empty_set_is_complete(store: ImageStore) -> None:
    write(store, Artist(), captions=[])

    assert store.has(KEY)
    assert list(store.images(KEY)) == []


def test_too_few_images_are_an_error_and_publish_nothing(store: ImageStore) -> None:
    with pytest.raises(RuntimeError, match="expected 2 images from draw_batch, got 1"):
        store.write(KEY, CAPTIONS, lambda indices: [Image.new("RGB", (8, 8))], batch_size=2, manifest={})

    assert not store.has(KEY)


def test_a_key_cannot_leave_the_store(store: ImageStore) -> None:
    with pytest.raises(ValueError, match=r"expected a key of letters, digits, '_' and '-', got '\.\./x'"):
        store.has("../x")


def test_the_dataset_loads_to_a_store_and_cannot_be_saved(tmp_path: Path) -> None:
    dataset = ImageStoreDataset(path=str(tmp_path / "none_yet"))

    assert dataset.load() == ImageStore(tmp_path / "none_yet")
    assert not (tmp_path / "none_yet").exists()
    with pytest.raises(DatasetError, match="filled set by set"):
        dataset.save(ImageStore(tmp_path))


def test_of_two_runs_that_want_the_same_set_one_makes_it_and_the_other_waits(tmp_path: Path) -> None:
    store, started, drawn = ImageStore(tmp_path), threading.Event(), []

    def slow_draw(indices: Sequence[int]) -> list[Image.Image]:
        started.set()
        time.sleep(0.2)
        drawn.append(list(indices))
        return [Image.new("RGB", (8, 8)) for _ in indices]

    first = threading.Thread(target=store.write, args=(KEY, ["a", "b"], slow_draw, 2, {}))
    first.start()
    started.wait()
    store.write(KEY, ["a", "b"], slow_draw, 2, {})
    first.join()
    assert drawn == [[0, 1]]
    assert store.has(KEY)
