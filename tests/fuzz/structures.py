"""Mutations that keep the outer structure of a file, so that what is inside is reached: safetensors and torch files."""

from __future__ import annotations

import contextlib
import io
import json
import pickletools
import random
import zipfile

from fuzz.mutations import mutated, mutated_tree

_FRAGMENTS = (  # of pickles: instructions, and what they take
    *(bytes([opcode]) for opcode in b"(t\x85\x86\x87}])N\x88\x8902.QRb\x81suae"),
    *(b"(" * 1000, b"h\x00", b"h\x05", b"q\x00", b"q\x05", b"r\xff\xff\xff\x7f", b"K\x00", b"\x8c\x01a", b"\x80\x04"),
    *(b"J\xff\xff\xff\x7f", b"J\x00\x00\x00\x80", b"\x8a\x09" + b"\xff" * 8 + b"\x00", b"G\x7f\xf8" + b"\x00" * 6),
    *(b"X\x01\x00\x00\x00a", b"X\xff\xff\xff\xff", b"cposix\nsystem\n", b"c__builtin__\nbytearray\n"),
    *(b"ctorch\nTensor\n", b"ctorch\nFloatStorage\n", b"ctorch._utils\n_rebuild_tensor_v2\n"),
    *(b"ctorch._utils\n_rebuild_sparse_tensor\n", b"c__builtin__\nset\n", b"ccollections\nCounter\n"),
    b"ccollections\nOrderedDict\n",
)


def mutate_safetensors(data: bytes, seed: int) -> bytes:
    """Return a copy with another header, with other metadata, or with other bytes."""
    generator = random.Random(seed)
    way = generator.randrange(4)
    if way == 0:
        return mutated(data, seed)
    length = int.from_bytes(data[:8], "little")
    header, tensors = json.loads(data[8 : 8 + length]), data[8 + length :]
    if way == 1:
        header = mutated_tree(header, seed)
    elif header.get("__metadata__"):
        key = generator.choice(sorted(header["__metadata__"]))
        header["__metadata__"][key] = _mutated_text(header["__metadata__"][key], seed)
    else:
        tensors = mutated(tensors, seed)[: len(tensors)].ljust(len(tensors), b"\x7f")
    text = json.dumps(header, skipkeys=True).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + tensors


def _mutated_text(text: str, seed: int) -> str:
    """Return another value of a JSON text, or another text."""
    try:
        return json.dumps(mutated_tree(json.loads(text), seed), skipkeys=True)
    except ValueError:
        return mutated(text.encode(), seed).decode(errors="replace")


def mutate_torch(data: bytes, seed: int) -> bytes:
    """Return a copy with other instructions in its pickle, or with other bytes."""
    generator = random.Random(seed)
    if generator.randrange(4) == 0:
        return mutated(data, seed)
    if not data.startswith(b"PK"):
        return _mutated_pickle(data, generator)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    (pickled,) = (name for name in entries if name.endswith("data.pkl"))
    name = pickled if generator.randrange(4) else generator.choice(sorted(entries))
    entries[name] = _mutated_pickle(entries[name], generator) if name == pickled else mutated(entries[name], seed)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", generator.choice((zipfile.ZIP_STORED,) * 9 + (zipfile.ZIP_DEFLATED,))) as archive:
        for each, content in entries.items():
            archive.writestr(each, content)
    return file.getvalue()


def _mutated_pickle(data: bytes, generator: random.Random) -> bytes:
    """Insert, remove, repeat or replace instructions."""
    for _ in range(generator.choice((1, 1, 2, 4))):
        places = _places(data)
        start, end = sorted((generator.choice(places), generator.choice(places)))
        if generator.randrange(2):
            end = places[min(places.index(start) + 1, len(places) - 1)]
        change = generator.randrange(4)
        if change == 0:
            data = data[:start] + generator.choice(_FRAGMENTS) + data[start:]
        elif change == 1:
            data = data[:start] + generator.choice(_FRAGMENTS) + data[end:]
        elif change == 2:
            data = data[:start] + data[end:]
        else:
            data = data[:end] + data[start:end] * generator.choice((1, 2, 50)) + data[end:]
    return data


def _places(data: bytes) -> list[int]:
    """Return where instructions begin, as far as they can be read."""
    places = [0]
    with contextlib.suppress(ValueError, OverflowError):
        places += [position for _, _, position in pickletools.genops(data) if position]
    return places
