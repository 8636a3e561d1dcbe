"""The identity of weights: the same numbers have the same fingerprint, whatever files and dtype they are in."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

_FILE = re.compile(r"(diffusion_pytorch_model|pytorch_model|model)(-\d+-of-\d+)?\.(?P<suffix>safetensors|bin)")
_NOT_LEARNED = re.compile(r"(^|\.)position_ids$")  # a buffer, which newer versions do not save
_OUTER = re.compile(r"^text_model\.")  # which newer versions leave out
_RENAMED = {  # of an autoencoder's attention, by diffusers
    re.compile(rf"(?<=\.){old}(?=\.(weight|bias)$)"): new
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))
}


def fingerprint_of(parts: Iterable[Path]) -> str:
    """Return `sha256:` and 64 hex digits over part, name, shape and float32 contents of every tensor.

    Args:
        parts: the folders of all parts with weights. Variants such as `*.fp16.safetensors` are passed over, as they are
            when the model is loaded.
    """
    digest = hashlib.sha256()
    for folder in sorted(parts):
        for name, read in sorted(_tensors(folder).items()):
            tensor = read().to(torch.float32).contiguous()
            digest.update(f"{folder.name}.{name} {list(tensor.shape)}\n".encode())
            digest.update(tensor.numpy().data)
    return f"sha256:{digest.hexdigest()}"


def _tensors(folder: Path) -> dict[str, Callable[[], torch.Tensor]]:
    """Return name -> what reads the tensor; safetensors go before pickled files, as in loading."""
    found: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()):
        if match := _FILE.fullmatch(file.name):
            found.setdefault(match["suffix"], []).append(file)
    tensors: dict[str, Callable[[], torch.Tensor]] = {}
    for file in found.get("safetensors") or found.get("bin", []):
        opened: Any
        if file.suffix == ".safetensors":
            opened = safe_open(file, "pt")
            readers = {name: partial(opened.get_tensor, name) for name in opened.keys()}  # noqa: SIM118
        else:
            opened = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            readers = {name: partial(opened.__getitem__, name) for name in opened}
        tensors |= {_present_name(name): read for name, read in readers.items() if not _NOT_LEARNED.search(name)}
    return tensors


def _present_name(name: str) -> str:
    """Return the name that present versions of diffusers and transformers give a tensor."""
    for old, new in _RENAMED.items():
        name = old.sub(new, name)
    return _OUTER.sub("", name)
