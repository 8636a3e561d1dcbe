"""Drawn pictures with what they were drawn from, as a folder of small WebP files and an index."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from dreamartist_pipeline.core.figures import CELL_PX
from dreamartist_pipeline.decoding.json_text import reasons
from dreamartist_pipeline.errors import InputError

INDEX = "index.json"
"""Name of the file that lists the pictures."""
Kind = Literal["subject", "prior", "branch", "guidance", "attention"]

_QUALITY = 88
_NAME_DIGITS = 20


class PictureEntry(BaseModel):
    """How a picture was drawn.

    Attributes:
        kind: what it is drawn for: prompts with the subject or without, the effect of a branch, the guidance scale, or
            maps of attention.
        group: "base" or "concept"; of the kind "branch", "with" or "without" the part.
        condition: the part of the negative branch, the guidance scale, or the map over it; "" for others.
        prompt: filled.
        seed: of the picture.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    group: str
    condition: str
    prompt: str
    seed: int


class _IndexEntry(PictureEntry):
    file: str


@dataclass(frozen=True)
class StoredPicture:
    """A picture in a WebP file."""

    entry: PictureEntry
    webp: bytes


def as_webp(image: Image.Image, side_px: int = CELL_PX[1]) -> bytes:
    """Return an image, reduced to at most `side_px` on its longer side, as a WebP file."""
    small = image.convert("RGB")
    small.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, "WEBP", quality=_QUALITY)
    return file.getvalue()


def write_pictures(pictures: Sequence[tuple[PictureEntry, Image.Image]]) -> dict[str, bytes]:
    """Return name -> bytes of the pictures and their index; equal pictures share a file."""
    files: dict[str, bytes] = {}
    entries = []
    for entry, image in pictures:
        webp = as_webp(image)
        name = f"{hashlib.sha256(webp).hexdigest()[:_NAME_DIGITS]}.webp"
        files[name] = webp
        entries.append(_IndexEntry(**entry.model_dump(), file=name))
    return {INDEX: TypeAdapter(list[_IndexEntry]).dump_json(entries, indent=1), **files}


def read_pictures(files: Mapping[str, bytes], origin: str) -> list[StoredPicture]:
    """Return the pictures of a folder, in the order of its index.

    Args:
        files: name -> bytes.
        origin: name of the folder in an error.

    Raises:
        InputError: a damaged index, or one that names other files than those of the folder.
    """
    try:
        index = TypeAdapter(list[_IndexEntry]).validate_json(files.get(INDEX, b""))
        return [StoredPicture(PictureEntry(**one.model_dump(exclude={"file"})), files[one.file]) for one in index]
    except ValidationError as error:
        got = reasons(error)
    except KeyError as error:
        got = f"no file {error}"
    raise InputError(
        expected=f"pictures with {INDEX} in {origin}", got=got, remedy="evaluate again (kedro run --pipeline evaluate)"
    )
