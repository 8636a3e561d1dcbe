"""Files pickled by torch (`.pt`, `.bin`, `.ckpt`), loaded within bounds and without running code of the file."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from dreamartist_pipeline.decoding.pickle_outline import CALLBACK, PickleOutline, RefusedPickleError
from dreamartist_pipeline.errors import InputError, is_out_of_memory

_ZIP = b"PK\x03\x04"
_MAX_PICKLE_BYTES = 64 * 2**20  # of names and shapes, without the numbers: published checkpoints have less than 1 MB
_MAX_DIRECTORY_BYTES = 8 * 2**20  # of a zip file: a checkpoint of SDXL has 3,000 entries of about 100 bytes
_END, _END_BYTES, _MAX_COMMENT_BYTES = b"PK\x05\x06", 22, 2**16  # of a zip file
_LARGE_END, _LARGE_END_BYTES, _LOCATOR_BYTES = b"PK\x06\x06", 56, 20  # of one of 4 GB, before the above
_NUM_LEGACY_PICKLES = 5  # of the format before torch 1.6: a magic number, version, system, content, storages


class _Ignored:
    """Stands for classes of trainers, which checkpoints have as keys beside their weights; never called."""


_SAFE: list[Any] = [torch.nn.ParameterDict, (_Ignored, CALLBACK)]


def load_torch(source: bytes | Path, name: str, holds: str) -> object:
    """Return the content of a file that torch pickled, on the CPU.

    The tensors of a file on disk in the present format are mapped, not read.

    Args:
        source: the file, or its bytes.
        name: its name in an error.
        holds: the expected content in an error, such as "an embedding".

    Raises:
        InputError: a damaged file, one that runs code when it is loaded, or one that takes more memory or time than
            its size allows.
    """
    try:
        with source.open("rb") if isinstance(source, Path) else io.BytesIO(source) as stream:
            is_zip = _check(stream)
        with torch.serialization.safe_globals(_SAFE):
            is_mapped = is_zip and isinstance(source, Path)  # older files cannot be mapped
            file: Any = source if isinstance(source, Path) else io.BytesIO(source)
            return torch.load(file, map_location="cpu", weights_only=True, mmap=is_mapped)
    except RefusedPickleError as error:
        raise _refusal(name, holds, str(error), error.runs_code) from error
    except Exception as error:  # on arbitrary bytes the unpickler raises anything: KeyError, IndexError, …
        if is_out_of_memory(error):
            raise
        raise _refusal(name, holds, f"a damaged or unknown file ({type(error).__name__})") from error


def dense_tensor(value: object, key: object, name: str) -> torch.Tensor:
    """Return a value of a pickled file that is a tensor with all its elements in the file.

    A pickled tensor may be an expanded view: small in the file, of any size when it is copied.

    Args:
        value: the value of `key` in the file.
        key: its key, for an error.
        name: the file's name in an error.

    Raises:
        InputError: not a tensor, or an expanded view.
    """
    if not isinstance(value, torch.Tensor):
        got = f"a {type(value).__name__}"
    elif value.numel() * value.element_size() > value.untyped_storage().nbytes():
        stored = value.untyped_storage().nbytes() // value.element_size()
        got = f"a view of shape {tuple(value.shape)} of {stored} elements"
    else:
        return value.detach()
    raise InputError(expected=f"a dense tensor {key!r} in {name}", got=got, remedy="save the file again")


def _refusal(name: str, holds: str, got: str, runs_code: bool = False) -> InputError:
    return InputError(
        expected=f"{holds} in {name} that loads without running code",
        got=got,
        remedy="save plain tensors, as safetensors, with the tool that made it"
        if runs_code
        else "make or download it again, as safetensors",
    )


def _check(stream: BinaryIO) -> bool:
    """Check the structure of a file, and return whether it is in the present format, a zip file.

    Raises:
        RefusedPickleError: see `PickleOutline.check`, or a zip file that torch does not write.
    """
    size = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    outline, is_zip = PickleOutline(size), stream.read(len(_ZIP)) == _ZIP
    if is_zip:
        outline.check(io.BytesIO(_pickle_in_zip(stream, size)))
    else:
        stream.seek(0)
        pickles = io.BytesIO(stream.read(_MAX_PICKLE_BYTES))
        for _ in range(_NUM_LEGACY_PICKLES):
            outline.check(pickles)
    return is_zip


def _pickle_in_zip(stream: BinaryIO, size: int) -> bytes:
    """Return the pickle in a zip file of torch, whose entries are not compressed and do not overlap."""
    if _directory_bytes(stream, size) > _MAX_DIRECTORY_BYTES:
        raise RefusedPickleError(f"a zip file whose list of entries has more than {_MAX_DIRECTORY_BYTES:,} bytes")
    with zipfile.ZipFile(stream) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise RefusedPickleError("a compressed zip file, which torch does not write")
        if sum(entry.file_size for entry in entries) > size:
            raise RefusedPickleError("a zip file with overlapping entries")
        pickles = [entry for entry in entries if entry.filename.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1 or pickles[0].file_size > _MAX_PICKLE_BYTES:
            raise RefusedPickleError("a zip file without data.pkl of at most 64 MiB")
        return archive.read(pickles[0])


def _directory_bytes(stream: BinaryIO, size: int) -> int:
    """Return the length of a zip file's list of entries, as `zipfile` finds it, which reads the whole list."""
    tail_bytes = min(size, _LARGE_END_BYTES + _LOCATOR_BYTES + _END_BYTES + _MAX_COMMENT_BYTES)
    stream.seek(size - tail_bytes)
    tail = stream.read(tail_bytes)
    has_comment = not tail[-_END_BYTES:].startswith(_END)
    end = tail.rfind(_END) if has_comment else tail_bytes - _END_BYTES
    if end < 0:
        raise RefusedPickleError("a damaged zip file, without its end")
    large_end = tail[max(0, end - _LOCATOR_BYTES - _LARGE_END_BYTES) : end]
    if large_end.startswith(_LARGE_END):
        return int.from_bytes(large_end[40:48], "little")
    return int.from_bytes(tail[end + 12 : end + 16], "little")
