"""Files that are no safetensors files, told apart by their first bytes, whatever they are called."""

from __future__ import annotations

import json
import re

from dreamartist_pipeline.errors import InputError

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"  # torch.save, before and since version 1.6
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


def is_pickled(file: bytes) -> bool:
    """Say whether torch pickled a file; a safetensors file may begin with the same byte, but its header follows."""
    return file.startswith((_ZIP, _PICKLE)) and file[8:9] != b"{"


def name_unread(file: bytes, error: Exception) -> tuple[str, str]:
    """Return what a file is that safetensors does not open, and what to do.

    Args:
        file: its bytes.
        error: what safetensors says.
    """
    if is_pickled(file):
        return "a file that torch pickled", "save its tensors as safetensors"
    if (other := other_format(file)) is not None:
        return other
    if isinstance(error, KeyError):
        return f"tensors of the type {error}, which torch does not have", "save it in float32, float16 or bfloat16"
    return _damage(file, error) if file else "an empty file", "download or copy it again"


def other_format(file: bytes) -> tuple[str, str] | None:
    """Return what a file is and what to do, if it is of a kind that is often found in place of another."""
    begin = file[:200].lstrip().lower()
    return next(((kind, remedy) for begins, kind, remedy in _OTHER_FORMATS if begin.startswith(begins)), None)


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
