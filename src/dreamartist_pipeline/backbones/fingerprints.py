"""Fingerprints of weights, independent of file format, sharding and dtype."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

_FILE = re.compile(r"(diffusion_pytorch_model|pytorch_model|model)(-\d+-of-\d+)?\.(safetensors|bin)")
_NOT_LEARNED = re.compile(r"(^|\.)position_ids$")  # a buffer that newer versions do not save
_OUTER = re.compile(r"^text_model\.")  # newer versions leave it out
_RENAMED = {  # layers of the autoencoder's attention in older versions of diffusers
    re.compile(rf"(?<=\.){old}(?=\.(weight|bias)$)"): new
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))
}


def fingerprint_of(parts: Iterable[Path]) -> str:
    """Return `sha256:` and 64 hex digits over part, name, shape and float32 contents of every tensor.

    Args:
        parts: the folders of all parts with weights. Variants such as `*.fp16.safetensors` are ignored, as when the
            model is loaded.
    """
    digest = hashlib.sha256()
    for folder in sorted(parts):
        for name, load in sorted(_tensors(folder).items()):
            tensor = load().to(torch.float32).contiguous()
            digest.update(f"{folder.name}.{name} {list(tensor.shape)}\n".encode())
            digest.update(tensor.numpy().data)
    return f"sha256:{digest.hexdigest()}"


def _tensors(folder: Path) -> dict[str, Callable[[], torch.Tensor]]:
    """Return name -> a function that loads the tensor; safetensors take precedence over pickled files."""
    files = sorted(file for file in folder.iterdir() if _FILE.fullmatch(file.name))
    tensors: dict[str, Callable[[], torch.Tensor]] = {}
    for file in [file for file in files if file.suffix == ".safetensors"] or files:
        opened: Any
        if file.suffix == ".safetensors":
            opened = safe_open(file, "pt")
            loaders = {name: partial(opened.get_tensor, name) for name in opened.keys()}  # noqa: SIM118
        else:
            opened = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            loaders = {name: partial(opened.__getitem__, name) for name in opened}
        tensors |= {_current_name(name): load for name, load in loaders.items() if not _NOT_LEARNED.search(name)}
    return tensors


def _current_name(name: str) -> str:
    """Return the tensor's name in current versions of diffusers and transformers."""
    for old, new in _RENAMED.items():
        name = old.sub(new, name)
    return _OUTER.sub("", name)
