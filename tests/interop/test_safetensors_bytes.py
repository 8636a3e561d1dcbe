from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from dreamartist_pipeline.interop.safetensors_bytes import read_metadata, save_tensors, tensor_bytes, write_tensors

CHARACTERS = "".join(map(chr, range(0x180))) + "\u2028 ✓ 🦊"
TENSORS = {"b": torch.arange(6.0).reshape(2, 3).T, "a": torch.ones(2, dtype=torch.int64), "é": torch.zeros(0)}
METADATA = {
    "with characters": {"second": CHARACTERS, "first": '{"a": "\\"}', CHARACTERS: ""},
    "with many entries": {str(number): "value" for number in range(40)},
    "without entries": {},
}


@pytest.mark.parametrize("metadata", METADATA.values(), ids=METADATA.keys())
def test_a_file_is_written_as_in_memory(tmp_path: Path, metadata: dict[str, str]) -> None:
    file = tmp_path / "file.safetensors"
    save_tensors(TENSORS, metadata, file)
    written = file.read_bytes()
    assert written == write_tensors(dict(reversed(TENSORS.items())), dict(reversed(metadata.items())))
    assert read_metadata(written) == metadata
    assert len(tensor_bytes(written)) == sum(tensor.nbytes for tensor in TENSORS.values())
    with safe_open(file, framework="pt") as opened:
        assert (opened.metadata() or {}) == metadata
        assert all(torch.equal(opened.get_tensor(name), tensor) for name, tensor in TENSORS.items())
