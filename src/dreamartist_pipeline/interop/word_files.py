"""Embedding files of other tools: one file per trigger word, named after the word."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import Any

import torch

from dreamartist_pipeline.core.concept import TriggerWord
from dreamartist_pipeline.decoding.torch_files import dense_tensor
from dreamartist_pipeline.decoding.unread_files import is_pickled
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.interop.file_facts import FileFacts
from dreamartist_pipeline.interop.pickled_weights import load_weights
from dreamartist_pipeline.interop.safetensors_bytes import read_metadata, read_tensors, write_tensors

_SHOWN = 4  # tensors named in an error
_PICKLED = (".pt", ".bin")
_OUTPUT = "emp_params_out"
_KEYS_OF_ANY_WORD = ("emb_params", "emp_params", "clip_l", "clip_g", "*")
_SDXL_KEYS = {"clip_l", "clip_g"}


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
    content = _content(file, name)
    tensors = {key: value for key, value in content.items() if isinstance(value, torch.Tensor)}
    if tensors.keys() != set(keys.values()) or len({tuple(t.shape[:-1]) for t in tensors.values()}) != 1:
        raise InputError(
            expected=f"{', '.join(sorted(keys.values()))} [n, D] in {name}, one for every text encoder",
            got=str({key: tuple(tensor.shape) for key, tensor in sorted(tensors.items())}),
            remedy="give an embedding for this base model",
        )
    return {encoder: dense_tensor(tensors[key], key, name).float() for encoder, key in keys.items()}


def read_embedding(file: bytes, name: str) -> torch.Tensor:
    """Return the vectors `[n, D]`, float32, of an embedding file.

    A safetensors file holds them as `emb_params` or under the word itself; one that torch pickled in `string_to_param`,
    or likewise. Which it is, its bytes say, not its suffix.

    Args:
        file: its bytes.
        name: its name in an error.

    Raises:
        InputError: not such a file, several embeddings in it, one of the text encoder's output, or something that needs
            code to be run to be read.
    """
    content = _content(file, name)
    if _OUTPUT in content:
        raise InputError(
            expected=f"an embedding of the text encoder's input in {name}",
            got=f"one of its output, which OneTrainer calls {_OUTPUT}",
            remedy="train it without 'output embedding'",
        )
    if content.keys() >= _SDXL_KEYS:
        raise InputError(
            expected=f"an embedding of one text encoder in {name}",
            got=f"one of two ({', '.join(sorted(_SDXL_KEYS))}), as for Stable Diffusion XL",
            remedy="give one for this base model, or import it with --env sdxl and an SDXL base model",
        )
    vectors = _vectors(content)
    tensors = [dense_tensor(value, key, name) for key, value in vectors.items() if isinstance(value, torch.Tensor)]
    if len(tensors) != 1 or tensors[0].dim() not in (1, 2):
        shapes = {key: tuple(getattr(value, "shape", ())) for key, value in list(vectors.items())[:_SHOWN]}
        more = f" and {len(vectors) - _SHOWN} more" if len(vectors) > _SHOWN else ""
        is_lora = any("lora" in str(key) for key in vectors)
        raise InputError(
            expected=f"one embedding [n, D] in {name}",
            got=f"a LoRA of {len(vectors)} tensors" if is_lora else f"{shapes}{more}",
            remedy=(
                "give a LoRA in import.positive or import.negative"
                if is_lora
                else "give an embedding for a Stable Diffusion 1.x or 2.x text encoder"
            ),
        )
    tensor = tensors[0].float()
    return tensor[None] if tensor.dim() == 1 else tensor


def word_inside(file: bytes, name: str) -> str:
    """Return the trigger word that an embedding file itself names, "" if it names none.

    Diffusers' files have it as the key of the vectors, pickled ones of other tools as `name`; metadata may have it.

    Args:
        file: its bytes.
        name: its name in an error.

    Raises:
        InputError: not such a file, or something that needs code to be run to be read.
    """
    content = _content(file, name)
    named = content.get("name")
    if isinstance(named, str):
        return named.strip()
    keys = [key for key, value in content.items() if isinstance(value, torch.Tensor) and isinstance(key, str)]
    if len(keys) == 1 and keys[0] not in _KEYS_OF_ANY_WORD:
        return keys[0].strip()
    return "" if is_pickled(file) else read_metadata(file).get("modelspec.trigger_phrase", "").strip()


def _content(file: bytes, name: str) -> Mapping[str, Any]:
    """Return what a file holds; a damaged one is taken for what its suffix says."""
    is_old = is_pickled(file) or (name.lower().endswith(_PICKLED) and file[8:9] != b"{")
    return load_weights(file, name, "an embedding") if is_old else read_tensors(file, name)


def _vectors(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a file that holds vectors: `string_to_param`, or everything."""
    inner = content.get("string_to_param", content)
    if isinstance(inner, torch.nn.ParameterDict):  # the form of the first textual inversions
        inner = vars(inner).get("_parameters")  # however old the torch that wrote it
    return inner if isinstance(inner, Mapping) else {}
