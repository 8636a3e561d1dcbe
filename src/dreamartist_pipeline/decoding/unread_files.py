"""Files that are no safetensors files, told apart by their first bytes, whatever they are called."""

from __future__ import annotations

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"  # torch.save, since and before version 1.6
_OTHER_FORMATS = (  # how they begin in lower case, what they are, remedy
    (b"gguf", "a GGUF file, whose weights are quantized", "download the model as safetensors"),
    (
        b"version https://git-lfs",
        "a Git LFS pointer, which stands for the file",
        "download the file itself, such as by git lfs pull",
    ),
    (
        (b"<!doctype html", b"<html"),
        "a web page",
        "download the file itself; some sites give it to logged-in users only",
    ),
)
_DOWNLOAD_AGAIN = "download or copy it again"


def is_pickled(file: bytes) -> bool:
    """Say whether torch pickled a file; a safetensors file may begin with the same byte, but its header follows."""
    return file.startswith((_ZIP, _PICKLE)) and file[8:9] != b"{"


def name_unread(head: bytes, damage: str) -> tuple[str, str]:
    """Return what a file is that cannot be read as safetensors, and what to do.

    Args:
        head: its first bytes.
        damage: what is wrong with it if it is a safetensors file.
    """
    if is_pickled(head):
        return "a file that torch pickled", "save its tensors as safetensors"
    if (other := other_format(head)) is not None:
        return other
    if not head:
        return "an empty file", _DOWNLOAD_AGAIN
    if head[8:9] != b"{":
        return f"a file of another kind, which begins with {head[:8]!r}", _DOWNLOAD_AGAIN
    return damage, _DOWNLOAD_AGAIN


def other_format(head: bytes) -> tuple[str, str] | None:
    """Return what a file is and what to do, if it is of a kind that is often found in place of another."""
    begin = head[:200].lstrip().lower()
    return next(((kind, remedy) for begins, kind, remedy in _OTHER_FORMATS if begin.startswith(begins)), None)
