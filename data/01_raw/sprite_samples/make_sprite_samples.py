"""Write a few hand-drawn shapes in the layout of published icon packages: enough to try the pretrain pipeline.

    python data/01_raw/sprite_samples/make_sprite_samples.py

`kedro run --pipeline pretrain --env test` reads them. The drawings are this project's own.
"""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
CODE_POINTS = {"circle": "1f534", "square": "1f7e5", "triangle": "1f53a", "diamond": "1f536"}
BOLD = 'fill="#d02c2c" stroke="#301010" stroke-width="1.5" stroke-linejoin="miter"'
SOFT = 'fill="#e8907a" stroke="#f7d2c4" stroke-width="1.5" stroke-linejoin="round"'
SHAPES = {
    "circle": '<circle cx="8" cy="8" r="6" {paint}/>',
    "square": '<rect x="2.5" y="2.5" width="11" height="11" {paint}/>',
    "triangle": '<path d="M8 2 14 13.5H2Z" {paint}/>',
    "diamond": '<path d="M8 1.5 14 8 8 14.5 2 8Z" {paint}/>',
}
DRAWN_GROUP = 7  # emojibase's number for objects


def write_package(file_name: str, contents: dict[str, Any]) -> None:
    """Write JSON files as an npm tarball, the same bytes every time."""
    with tarfile.open(FOLDER / file_name, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in contents.items():
            data = json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def main() -> None:
    emoji = [{"hexcode": code.upper(), "group": DRAWN_GROUP, "label": name} for name, code in CODE_POINTS.items()]
    write_package("emojibase-data.tar", {"en/data.json": emoji})
    chars = {code: name for name, code in CODE_POINTS.items()}
    for style, paint in (("bold", BOLD), ("soft", SOFT)):
        icons = {name: {"body": body.format(paint=paint)} for name, body in SHAPES.items()}
        write_package(
            f"{style}-shapes.tar", {"icons.json": {"icons": icons, "width": 16, "height": 16}, "chars.json": chars}
        )


if __name__ == "__main__":
    main()
