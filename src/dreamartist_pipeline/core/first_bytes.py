"""What a file is by its first bytes, for messages about files of another kind than expected."""

from __future__ import annotations

from dreamartist_pipeline.decoding.unread_files import other_format

_KINDS = (
    ((b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\x00", b"MM\x00*", b"8BPS"), "a picture"),
    (b"PAR1", "a parquet table"),
    (b"PK\x03\x04", "a zip archive"),
    ((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"(\xb5/\xfd"), "a compressed file"),
    (b"%PDF", "a PDF document"),
    (b"SQLite format 3", "an SQLite database"),
)
_BOXES = {b"ftyp": "a picture or a film", b"WEBP": "a picture"}  # at byte 4 and 8: AVIF, HEIC, MP4; WebP


def kind_of(data: bytes) -> str:
    """Return what a file is, such as "a zip archive" or "a text"; it may be only its first bytes."""
    if (known := other_format(data)) is not None:
        return known[0]
    for begins, kind in _KINDS:
        if data.startswith(begins):
            return kind
    for place in (4, 8):
        if (kind := _BOXES.get(data[place : place + 4], "")) != "":
            return kind
    beginning = data[:200].decode(errors="replace")[:150]  # without a character that is cut
    return "a file of an unknown kind" if {"\x00", "\ufffd"} & set(beginning) else "a text"
