"""Fingerprints of weights, independent of file format, sharding, dtype and of how a model is held."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

from dreamartist_pipeline.backbones.holding.parts import StoredTensors


def fingerprint_of(parts: Mapping[str, StoredTensors]) -> str:
    """Return `sha256:` and 64 hex digits over part, name, shape and float32 contents of every tensor.

    Args:
        parts: part with weights -> its tensors.
    """
    digest = hashlib.sha256()
    for part, tensors in sorted(parts.items()):
        for name, stored in sorted(tensors.items()):
            tensor = stored.read().to(torch.float32).contiguous()
            digest.update(f"{part}.{name} {list(tensor.shape)}\n".encode())
            digest.update(tensor.numpy().data)
    return f"sha256:{digest.hexdigest()}"
