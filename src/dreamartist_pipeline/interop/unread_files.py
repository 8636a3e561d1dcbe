"""Files that are no safetensors files, told apart by their first bytes, whatever they are called."""

from __future__ import annotations

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
    return f"{error}", "give another file, or make it again"
