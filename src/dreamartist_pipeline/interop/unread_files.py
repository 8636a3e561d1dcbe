"""Files that are no safetensors files, told apart by their first bytes, whatever they are called."""

from __future__ import annotations

import json

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"  # torch.save, before and since version 1.6
_LFS_POINTER = b"version https://git-lfs"
_WEB_PAGE = (b"<!doctype html", b"<html")


def is_pickled(file: bytes) -> bool:
    """Say whether torch pickled a file; a safetensors file may begin with the same byte, but its header follows."""
    return file.startswith((_ZIP, _PICKLE)) and file[8:9] != b"{"


def name_unread(file: bytes, error: Exception) -> tuple[str, str]:
    """Return what a file is that safetensors does not open, and what to do.

    Args:
        file: its bytes.
        error: what safetensors says.
    """
    if not file:
        return "an empty file", "download or copy it again"
    if is_pickled(file):
        return "a file that torch pickled", "save its tensors as safetensors"
    if file.startswith(_LFS_POINTER):
        return "a Git LFS pointer, which stands for the file", "download the file itself, such as by git lfs pull"
    if file[:200].lstrip().lower().startswith(_WEB_PAGE):
        return "a web page", "download the file itself; some sites give it to logged-in users only"
    if isinstance(error, KeyError):
        return f"tensors of the type {error}, which torch does not have", "save it in float32, float16 or bfloat16"
    return _damage(file, error), "download or copy it again"


def _damage(file: bytes, error: Exception) -> str:
    """Return what is wrong with a file: whether it begins as safetensors, and how much of it is missing."""
    start = 8 + int.from_bytes(file[:8], "little")  # of the tensors
    if file[8:9] != b"{":
        return f"a file of another kind, which begins with {file[:8]!r}"
    if start > len(file):
        return f"an incomplete file, which ends within its header of {start:,} bytes"
    try:
        header = json.loads(file[8:start])
        num_bytes = start + max(entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__")
    except (ValueError, KeyError, TypeError, AttributeError):
        num_bytes = 0
    return f"{len(file):,} of its {num_bytes:,} bytes" if num_bytes > len(file) else f"a damaged file ({error})"
