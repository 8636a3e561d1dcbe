"""Safetensors files: the same tensors as by the library, and headers that it or this project refuses."""

from __future__ import annotations

import io
import json
import struct
from typing import Any

import pytest
import torch
from safetensors.torch import _TYPES, load, save

from dreamartist_pipeline.decoding.safetensors_files import _DTYPES, read_header
from dreamartist_pipeline.errors import InputError
from refusals import says

ENTRY: dict[str, Any] = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def file_of(header: dict[str, Any], num_bytes: int) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(num_bytes)


def test_every_dtype_is_read_as_by_the_library() -> None:
    tensors = {
        name: torch.arange(6).to(dtype).reshape(2, 3) for name, dtype in _TYPES.items() if not name.endswith("FNUZ")
    }
    tensors |= {"empty": torch.empty(0, 3), "scalar": torch.tensor(2.5)}
    file = save(tensors, {"key": "text"})
    header = read_header(io.BytesIO(file), "")
    assert header.metadata == {"key": "text"}
    for name, expected in load(file).items():
        read = header.read(io.BytesIO(file), name)
        assert read.dtype == expected.dtype and read.shape == expected.shape
        assert (
            read.view(-1).view(torch.uint8).tolist() == expected.view(-1).view(torch.uint8).tolist() or not read.dim()
        )
    assert _DTYPES.keys() == _TYPES.keys()


@pytest.mark.parametrize(
    ("header", "num_bytes", "got"),
    [
        ({"a": ENTRY}, 4, "of its"),
        ({"a": ENTRY}, 9, "1 bytes after its tensors"),
        ({"a": ENTRY | {"data_offsets": [0, 4]}}, 4, "a of type F32 and shape [2] with 4 bytes"),
        ({"a": ENTRY | {"data_offsets": [8, 0]}}, 8, "with -8 bytes"),
        ({"a": ENTRY | {"data_offsets": [8, 16]}}, 16, "a begins at byte 8"),
        ({"a": ENTRY, "b": ENTRY}, 8, "b begins at byte 0"),
        ({"a": ENTRY | {"shape": [-2]}}, 8, "shape.0"),
        ({"a": ENTRY | {"shape": [2.0]}}, 8, "shape.0"),
        ({"a": ENTRY | {"shape": [1] * 17 + [2]}}, 8, "shape"),
        ({"a": ENTRY | {"dtype": None}}, 8, "dtype"),
        ({"a": ENTRY | {"dtype": "F4"}}, 8, "'F4', which torch does not have"),
        ({"a": [1]}, 0, "a: "),
        ({"__metadata__": {"a": 1}}, 0, "a: "),
        ({"__metadata__": "text"}, 0, "dictionary"),
    ],
)
def test_a_header_that_does_not_fit_its_file_is_refused(header: dict[str, Any], num_bytes: int, got: str) -> None:
    with pytest.raises(InputError, check=says(expected="a file x", got=got)):
        read_header(io.BytesIO(file_of(header, num_bytes)), "a file x")


def test_a_header_longer_than_the_bound_is_refused_before_it_is_read() -> None:
    class Stream(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            assert size is not None and 0 <= size <= 512
            return super().read(size)

    with pytest.raises(InputError, check=says(got="a header of 40,000,000 bytes")):
        read_header(Stream(struct.pack("<Q", 40_000_000) + b"{" + bytes(40_000_000)), "")
