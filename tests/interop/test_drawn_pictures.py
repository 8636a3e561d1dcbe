"""Drawn pictures as files: what is written is read, and what is damaged is refused."""

from __future__ import annotations

import io
import json

import pytest
from PIL import Image

from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.interop.drawn_pictures import INDEX, PictureEntry, as_webp, read_pictures, write_pictures
from refusals import says

ENTRY = PictureEntry(kind="subject", group="concept", condition="", prompt="a my-fox", seed=7)
RED, BLUE = Image.new("RGB", (40, 20), "red"), Image.new("RGB", (40, 20), "blue")


def test_pictures_are_read_as_they_were_drawn() -> None:
    other = ENTRY.model_copy(update={"seed": 8})
    stored = read_pictures(write_pictures([(ENTRY, RED), (other, BLUE)]), "pictures")
    assert [one.entry for one in stored] == [ENTRY, other]
    red, green, blue = Image.open(io.BytesIO(stored[1].webp)).convert("RGB").getpixel((20, 10))
    assert blue > 240 and red < 10 and green < 10


def test_equal_pictures_share_a_file() -> None:
    other = ENTRY.model_copy(update={"kind": "branch", "group": "with"})
    assert len(write_pictures([(ENTRY, RED), (other, RED), (ENTRY, BLUE)])) == 3  # two pictures and the index


def test_equal_pictures_give_equal_files() -> None:
    assert write_pictures([(ENTRY, RED)]) == write_pictures([(ENTRY, RED.copy())])


def test_a_large_picture_is_reduced() -> None:
    assert Image.open(io.BytesIO(as_webp(Image.new("RGB", (1024, 512))))).size == (256, 128)


@pytest.mark.parametrize(
    ("damage", "got"),
    [
        ({INDEX: b"{"}, "Invalid JSON"),
        ({INDEX: json.dumps([{"file": "x.webp"}]).encode()}, "0.kind"),
        ({INDEX: json.dumps([{**ENTRY.model_dump(), "file": "gone.webp"}]).encode()}, "gone.webp"),
    ],
)
def test_a_damaged_folder_is_refused_with_its_name(damage: dict[str, bytes], got: str) -> None:
    with pytest.raises(InputError, check=says(expected="evaluation_pictures", got=got)):
        read_pictures(write_pictures([(ENTRY, RED)]) | damage, "evaluation_pictures")


def test_a_folder_without_an_index_is_refused() -> None:
    with pytest.raises(InputError, check=says(expected=INDEX)):
        read_pictures({}, "evaluation_pictures")
