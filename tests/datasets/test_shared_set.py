"""A set of images in a store: machines draw it together, each image once, and all of them have all."""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from PIL import Image

from dreamartist_pipeline.core.image_set import ImagesToDraw, batches_of
from dreamartist_pipeline.datasets import shared_set
from dreamartist_pipeline.datasets.image_set import ImageSetDataset
from dreamartist_pipeline.object_stores import ObjectStore

KEY = "0123abcd"
CAPTIONS = tuple(f"prompt {index}" for index in range(10))
NAMES = {f"{index:06d}.png" for index in range(10)}


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder of a store; two batches of two images are a share, and lost machines are noticed soon."""
    monkeypatch.setattr(shared_set, "_SHARE_IMAGES", 4)
    monkeypatch.setattr(shared_set, "_POLL_S", 0.05)
    monkeypatch.setattr(shared_set.SharedSet.__init__, "__defaults__", (1.0,))
    return f"memory://{secrets.token_hex(4)}"


class Machine:
    """A disk, and who draws on it; image i is grey 10 · i."""

    def __init__(self, folder: Path, url: str | None) -> None:
        self.folder = folder
        self.dataset = ImageSetDataset(
            filepath=str(folder / "set.json"), path=str(folder / "sets"), title="set", command="kedro run", store=url
        )
        self.drawn: list[int] = []

    def draw(self, batches: Sequence[Sequence[int]]) -> Iterator[Image.Image]:
        for index in (index for batch in batches for index in batch):
            self.drawn.append(index)
            yield Image.new("RGB", (8, 8), (10 * index,) * 3)

    def save(self) -> None:
        batches = batches_of(len(CAPTIONS), 2)
        self.dataset.save(ImagesToDraw(CAPTIONS, batches, {"key": KEY}, self.draw, 0, "draw fewer"))

    def greys(self) -> list[int]:
        return [read().getpixel((0, 0))[0] for _, read in self.dataset.load()]


def in_store(url: str) -> ObjectStore:
    return ObjectStore(url).folder("sets", KEY)


def test_the_set_is_in_the_store_as_on_the_disk_and_the_next_machine_draws_nothing(tmp_path: Path, url: str) -> None:
    first, second = Machine(tmp_path / "1", url), Machine(tmp_path / "2", url)
    first.save()
    assert in_store(url).names() == {*NAMES, "image_captions.json", "manifest.json"}
    assert json.loads(in_store(url).read("manifest.json") or b"") == {"key": KEY}
    second.save()
    assert (first.drawn, second.drawn) == ([*range(10)], [])
    for name in NAMES:
        files = [machine.folder / "sets" / KEY / name for machine in (first, second)]
        assert files[0].read_bytes() == files[1].read_bytes() == in_store(url).read(name)
    assert second.greys() == [10 * index for index in range(10)]


def test_machines_draw_shares_of_a_set_each_image_once(tmp_path: Path, url: str) -> None:
    machines = [Machine(tmp_path / str(index), url) for index in range(3)]
    all_begun = threading.Barrier(len(machines))

    def slowly(machine: Machine, batches: Sequence[Sequence[int]]) -> Iterator[Image.Image]:
        if not machine.drawn:
            all_begun.wait(timeout=20)  # each has a share
        yield from Machine.draw(machine, batches)

    for machine in machines:
        machine.draw = slowly.__get__(machine)  # type: ignore[method-assign]
    threads = [threading.Thread(target=machine.save) for machine in machines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(index for machine in machines for index in machine.drawn) == [*range(10)]
    assert all(machine.drawn for machine in machines)
    assert all(machine.greys() == [10 * index for index in range(10)] for machine in machines)
    assert not [name for name in in_store(url).names() if name.endswith(".lock")]


def test_the_share_of_a_lost_machine_is_drawn_by_another(
    tmp_path: Path, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    in_store(url).write("share-0001.lock", b'{"process": 7, "host": "far", "command": "kedro run"}')
    machine = Machine(tmp_path, url)
    with caplog.at_level("INFO"):
        machine.save()
    assert machine.drawn == [0, 1, 2, 3, 8, 9, 4, 5, 6, 7]
    assert "Other machines draw 1 shares of the set; waiting." in caplog.text
    assert "process 7 on far (kedro run) is silent" in caplog.text


def test_what_is_damaged_in_the_store_is_drawn_again(tmp_path: Path, url: str) -> None:
    Machine(tmp_path / "1", url).save()
    whole = in_store(url).read("000003.png")
    in_store(url).write("000003.png", b"damaged")
    machine = Machine(tmp_path / "2", url)
    machine.save()
    assert machine.drawn == [2, 3]
    assert in_store(url).read("000003.png") == whole


def test_what_is_on_the_disk_already_is_copied_to_the_store(tmp_path: Path, url: str) -> None:
    alone = Machine(tmp_path, None)
    alone.save()
    for name in ("000008.png", "000009.png"):
        (tmp_path / "sets" / KEY / name).unlink()
    machine = Machine(tmp_path, url)
    machine.save()
    assert machine.drawn == [8, 9]
    assert in_store(url).names() >= NAMES


def test_a_set_that_was_whole_before_there_was_a_store_is_copied_there(tmp_path: Path, url: str) -> None:
    Machine(tmp_path, None).save()
    machine = Machine(tmp_path, url)
    machine.save()
    assert machine.drawn == []
    assert in_store(url).names() == {*NAMES, "image_captions.json", "manifest.json"}


def test_an_interrupted_share_goes_on_where_it_was(tmp_path: Path, url: str) -> None:
    first, second = Machine(tmp_path / "1", url), Machine(tmp_path / "2", url)

    def interrupted(batches: Sequence[Sequence[int]]) -> Iterator[Image.Image]:
        for image in Machine.draw(first, batches):
            if first.drawn[-1] == 6:
                raise KeyboardInterrupt
            yield image

    first.draw = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        first.save()
    assert not [name for name in in_store(url).names() if name.endswith(".lock")]
    second.save()
    assert second.drawn == [6, 7, 8, 9]
