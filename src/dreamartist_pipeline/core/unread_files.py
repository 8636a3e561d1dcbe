"""Files that are no safetensors files, told apart by their first bytes, whatever they are called."""

from __future__ import annotations

import re

from dreamartist_pipeline.errors import InputError

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"  # torch.save, before and since version 1.6
_GGUF = b"GGUF"
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
    if file.startswith(_GGUF):
        return "a GGUF file, whose weights are quantized", "download the model as safetensors"
    if file.startswith(_LFS_POINTER):
        return "a Git LFS pointer, which stands for the file", "download the file itself, such as by git lfs pull"
    if file[:200].lstrip().lower().startswith(_WEB_PAGE):
        return "a web page", "download the file itself; some sites give it to logged-in users only"
    return f"{error}", "give another file, or make it again"


def unpickled(error: Exception, name: str, holds: str) -> InputError:
    """Return the error for a pickled file that torch does not load without running code.

    Args:
        error: of `torch.load` with `weights_only`.
        name: of the file.
        holds: the expected content, such as "an embedding".
    """
    call = re.search(r"GLOBAL ([\w.]+)", str(error))  # torch's own message recommends weights_only=False
    return InputError(
        expected=f"{holds} in {name} that loads without running code",
        got=f"a call of {call[1]}" if call else f"a damaged or unknown file ({type(error).__name__})",
        remedy="save plain tensors, as safetensors, with the tool that made it"
        if call
        else "make or download it again",
    )
