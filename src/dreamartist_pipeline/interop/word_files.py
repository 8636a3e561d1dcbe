"""Embeddings of trigger words as other tools keep them: one file a word, and the file's name is the word."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import Any

import torch

from dreamartist_pipeline.core.concept import TriggerWord
from dreamartist_pipeline.core.errors import InputError
from dreamartist_pipeline.interop.file_facts import FileFacts
from dreamartist_pipeline.interop.pickled_weights import dense_tensor, load_weights
from dreamartist_pipeline.interop.safetensors_bytes import read_tensors, write_tensors

_KEY = "emb_params"  # A1111's; ComfyUI takes any key, diffusers too when it is told the token


def typable(name: str) -> str:
    """Return a trigger word as it can be written in a prompt and name a file: without spaces, braces and slashes."""
    return re.sub(r"[\s{}/\\]+", "-", name).strip("-.") if re.search(r"[\s{}/\\]", name) else name


def write_embedding(word: TriggerWord, facts: FileFacts, dtype: torch.dtype) -> bytes:
    """Return a word's vectors `[n, D]` as a safetensors file."""
    flag = {"modelspec.is_negative_embedding": str(word.branch == "negative").lower()}
    return write_tensors({_KEY: word.vectors.to(dtype)}, facts.modelspec("textual-inversion") | flag)


def write_embedding_pt(word: TriggerWord) -> bytes:
    """Return a word's vectors in the old form, `{'string_to_param': {'*': [n, D]}, 'name': ...}`, float32."""
    buffer = io.BytesIO()
    torch.save({"string_to_param": {"*": word.vectors.contiguous()}, "name": word.name}, buffer)
    return buffer.getvalue()


def read_embedding(file: bytes, name: str) -> torch.Tensor:
    """Return the vectors `[n, D]`, float32, of an embedding file.

    A `.safetensors` file holds them as `emb_params` or under the word itself; a `.pt` file in `string_to_param`.

    Args:
        file: its bytes.
        name: the file's name; the suffix says which form it has.

    Raises:
        InputError: not such a file, several embeddings in it, or something that needs code to be run to be read.
    """
    vectors = _old_form(file, name) if name.lower().endswith((".pt", ".bin")) else read_tensors(file, name)
    tensors = [dense_tensor(value, key, name) for key, value in vectors.items() if isinstance(value, torch.Tensor)]
    if len(tensors) != 1 or tensors[0].dim() not in (1, 2):
        came = {key: tuple(getattr(value, "shape", ())) for key, value in vectors.items()}
        raise InputError(
            f"expected one embedding [n, D] in {name}; got {came}; give an embedding for a Stable Diffusion 1.x or 2.x "
            "text encoder"
        )
    tensor = tensors[0].float()
    return tensor[None] if tensor.dim() == 1 else tensor


def _old_form(file: bytes, name: str) -> Mapping[str, Any]:
    """Open a `.pt` or `.bin` file: the vectors are in `string_to_param`, or at the top."""
    content = load_weights(file, name, "an embedding")
    inner = content.get("string_to_param", content)
    if isinstance(inner, torch.nn.ParameterDict):  # the form of the first textual inversions
        inner = vars(inner).get("_parameters")  # however old the torch that wrote it
    return inner if isinstance(inner, Mapping) else {}
