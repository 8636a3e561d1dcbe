"""Embedding files of other tools: one file per trigger word, named after the word."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import Any

import torch

from dreamartist_pipeline.core.concept import TriggerWord
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.interop.file_facts import FileFacts
from dreamartist_pipeline.interop.pickled_weights import dense_tensor, load_weights
from dreamartist_pipeline.interop.safetensors_bytes import read_tensors, write_tensors


def typable(name: str) -> str:
    """Return a name without spaces, braces and slashes, so that it can be a trigger word and a file name."""
    return re.sub(r"[\s{}/\\]+", "-", name).strip("-.") if re.search(r"[\s{}/\\]", name) else name


def write_embedding(word: TriggerWord, facts: FileFacts, dtype: torch.dtype) -> bytes:
    """Return a word's vectors as a safetensors file."""
    flag = {"modelspec.is_negative_embedding": str(word.branch == "negative").lower()}
    tensors = {facts.names.embedding_keys[encoder]: vectors.to(dtype) for encoder, vectors in word.vectors.items()}
    return write_tensors(tensors, facts.modelspec("textual-inversion") | flag)


def write_embedding_pt(word: TriggerWord) -> bytes:
    """Return a word of one text encoder as a .pt file, `{'string_to_param': {'*': [n, D]}, 'name': ...}`, float32."""
    buffer = io.BytesIO()
    (vectors,) = word.vectors.values()
    torch.save({"string_to_param": {"*": vectors.contiguous()}, "name": word.name}, buffer)
    return buffer.getvalue()


def read_vectors(file: bytes, name: str, keys: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Return text encoder -> the vectors `[n, D]`, float32, of an embedding file.

    Args:
        file: its bytes.
        name: its name.
        keys: text encoder -> the key of its vectors; with a single encoder, any key is accepted.

    Raises:
        InputError: see `read_embedding`, or the file does not have the vectors of every encoder.
    """
    if len(keys) == 1:
        return {encoder: read_embedding(file, name) for encoder in keys}
    tensors = read_tensors(file, name)
    if tensors.keys() != set(keys.values()) or len({tuple(t.shape[:-1]) for t in tensors.values()}) != 1:
        raise InputError(
            expected=f"{', '.join(sorted(keys.values()))} [n, D] in {name}, one for every text encoder",
            got=str({key: tuple(tensor.shape) for key, tensor in sorted(tensors.items())}),
            remedy="give an embedding for this base model",
        )
    return {encoder: dense_tensor(tensors[key], key, name).float() for encoder, key in keys.items()}


def read_embedding(file: bytes, name: str) -> torch.Tensor:
    """Return the vectors `[n, D]`, float32, of an embedding file.

    In a `.safetensors` file their key is `emb_params` or the word; in a `.pt` file they are in `string_to_param`.

    Args:
        file: its bytes.
        name: its name, of which the suffix tells the format.

    Raises:
        InputError: not an embedding file, several embeddings, or a file that runs code when it is loaded.
    """
    vectors = _pickled_vectors(file, name) if name.lower().endswith((".pt", ".bin")) else read_tensors(file, name)
    tensors = [dense_tensor(value, key, name) for key, value in vectors.items() if isinstance(value, torch.Tensor)]
    if len(tensors) != 1 or tensors[0].dim() not in (1, 2):
        got = {key: tuple(getattr(value, "shape", ())) for key, value in vectors.items()}
        raise InputError(
            expected=f"one embedding [n, D] in {name}",
            got=f"{got}",
            remedy="give an embedding for a Stable Diffusion 1.x or 2.x text encoder",
        )
    tensor = tensors[0].float()
    return tensor[None] if tensor.dim() == 1 else tensor


def _pickled_vectors(file: bytes, name: str) -> Mapping[str, Any]:
    """Return `string_to_param` of a `.pt` or `.bin` file, or its content without that key."""
    content = load_weights(file, name, "an embedding")
    inner = content.get("string_to_param", content)
    if isinstance(inner, torch.nn.ParameterDict):  # in the first textual inversions
        inner = vars(inner).get("_parameters")  # independent of the version of torch that wrote it
    return inner if isinstance(inner, Mapping) else {}
