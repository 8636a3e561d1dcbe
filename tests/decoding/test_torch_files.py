"""Files that torch pickled: what is read, and what is refused before it is built."""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from dreamartist_pipeline.decoding.pickle_outline import PickleOutline, RefusedPickleError
from dreamartist_pipeline.decoding.torch_files import dense_tensor, load_torch
from dreamartist_pipeline.errors import InputError
from refusals import says


def saved(content: object, zipped: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def trainer_checkpoint() -> dict[str, Any]:
    """Return what trainers save: tensors, optimizer states, and plain values of many types."""
    module = torch.nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return {
        "state_dict": module.state_dict(),  # an OrderedDict with _metadata
        "optimizer": optimizer.state_dict(),
        "parameter": module.weight,
        "half": torch.ones(2, dtype=torch.float16),
        "long": torch.ones(2, dtype=torch.long),
        "shape": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "bytes": b"\x00\xff",
        "milestones": Counter({10: 1}),
        "names": {"a", "b"},
        "values": [1, -1, 2**40, 1.5, None, True, False, (1, (2, 3)), "é", OrderedDict(a=1)],
        (1, "tuple"): 1,
    }


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("on_disk", [True, False])
def test_checkpoints_of_trainers_are_read_as_by_torch(tmp_path: Path, zipped: bool, on_disk: bool) -> None:
    newest = {"float8": torch.ones(2).to(torch.float8_e4m3fn)} if zipped else {}  # not in the old format
    file = saved({**trainer_checkpoint(), **newest}, zipped)
    (tmp_path / "x.ckpt").write_bytes(file)
    read = load_torch(tmp_path / "x.ckpt" if on_disk else file, "x.ckpt", "weights")
    expected = torch.load(io.BytesIO(file), weights_only=True)
    assert isinstance(read, dict) and read.keys() == expected.keys()
    assert torch.equal(read["state_dict"]["weight"], expected["state_dict"]["weight"])
    assert torch.equal(read["optimizer"]["state"][0]["exp_avg"], expected["optimizer"]["state"][0]["exp_avg"])
    assert read["values"] == expected["values"] and read["milestones"] == expected["milestones"]


@pytest.mark.parametrize(
    ("pickled", "reason"),
    [
        (b"cposix\nsystem\n.", "a call of posix.system"),
        (b"c__builtin__\neval\n.", "a call of builtins.eval"),
        (b"ctorch\nload\n.", "a call of torch.load"),
        (b"c__builtin__\nset\n)R.", "tuple index"),
        (b"ccollections\nOrderedDict\n](K\x01K\x02e\x85R.", "a call of collections.OrderedDict"),
        (b"}}X\x05\x00\x00\x00itemsK\x00sb.", "attributes"),
        (b"})K\x00\x86K\x00\x86K\x00s.", "a key of type tuple"),
        (b"}}K\x00s.", "a key of type dict"),
        (b"K\x00Q.", "damaged"),
        (b"h\x07.", "damaged"),
        (b"t.", "damaged"),
        (b"\x8c\x01a.", "SHORT_BINUNICODE"),
        (b"K\x00", "damaged"),
    ],
)
def test_instructions_that_torch_does_not_write_are_refused(pickled: bytes, reason: str) -> None:
    with pytest.raises(RefusedPickleError, match=reason):
        PickleOutline(100).check(io.BytesIO(b"\x80\x02" + pickled))


def test_every_instruction_of_the_outline_is_one_that_exists() -> None:
    assert PickleOutline._ACTIONS.keys() <= {opcode.name for opcode in pickletools.opcodes}


def test_several_pickles_of_a_file_share_the_bound_of_its_size() -> None:
    def reference(key: bytes) -> io.BytesIO:
        return io.BytesIO(b"(X\x07\0\0\0storagectorch\nFloatStorage\n" + key + b"X\x03\0\0\0cpuK\x0atQ.")

    outline = PickleOutline(100)
    outline.check(reference(b"K\x00"))
    outline.check(reference(b"K\x01"))
    outline.check(reference(b"K\x00"))  # the same storage
    with pytest.raises(RefusedPickleError, match="40 bytes, more than the file has"):
        outline.check(reference(b"K\x02"))


def compressed(file: bytes) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(file)) as archive, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in archive.namelist():
            target.writestr(name, archive.read(name))
    return packed.getvalue()


@pytest.mark.parametrize(
    ("file", "got"),
    [
        (compressed(saved({"a": torch.ones(2)})), "compressed"),
        (saved({"a": torch.ones(2)})[:-30], "without its end"),
        (saved({"a": torch.ones(2).to_sparse()}), "a sparse"),
        (saved({"a": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])}), "a sparse, quantized, nested"),
        (pickle.dumps({"a": 1}, protocol=4), "FRAME"),
        (b"", "damaged"),
    ],
)
def test_other_files_are_named(file: bytes, got: str) -> None:
    with pytest.raises(InputError, check=says(expected="an embedding in x.pt", got=got, remedy="safetensors")):
        load_torch(file, "x.pt", "an embedding")


def test_a_view_of_fewer_elements_is_no_dense_tensor() -> None:
    assert dense_tensor(torch.ones(4).view(2, 2), "a", "x.pt").shape == (2, 2)
    with pytest.raises(InputError, check=says(expected="'a' in x.pt", got="(3, 2) of 2 elements")):
        dense_tensor(torch.ones(2).expand(3, 2), "a", "x.pt")
    with pytest.raises(InputError, check=says(got="a str")):
        dense_tensor("text", "a", "x.pt")
