"""LoRA files of other tools: detection of the format, rejection of other adapter types, and shape checks."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch

from dreamartist_pipeline.core.concept import FORMAT
from dreamartist_pipeline.core.layout import FileNames, Shapes
from dreamartist_pipeline.core.lora_factors import LoRAFactors
from dreamartist_pipeline.decoding.unread_files import is_pickled
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.interop.branch_adapters import BranchAdapter
from dreamartist_pipeline.interop.foreign_kinds import (
    advice_by_width,
    check_not_for_another_model,
    check_plain,
    refuse_pickled,
)
from dreamartist_pipeline.interop.kohya import read_kohya
from dreamartist_pipeline.interop.peft_files import read_peft
from dreamartist_pipeline.interop.safetensors_bytes import header_of

_SHOWN = 3  # layers named in an error
_READERS = {"kohya": read_kohya, "peft": read_peft, "diffusers": read_peft}
_ENDINGS = {
    "peft": (".lora_A.weight", ".lora_B.weight"),
    "diffusers": (
        "lora.down.weight",
        "lora.up.weight",
        ".lora_linear_layer.down.weight",
        ".lora_linear_layer.up.weight",
    ),
    "kohya": (".lora_down.weight", ".lora_up.weight"),
}
_ALPHA_TOLERANCE = 5e-3  # of an alpha in bfloat16


@dataclass(frozen=True)
class ForeignLoRA:
    """The content of a LoRA file.

    Attributes:
        form: "kohya", "peft" or "diffusers".
        adapter: its updates.
        notes: what users should know about it.
    """

    form: str
    adapter: BranchAdapter
    notes: tuple[str, ...] = ()


def read_lora(file: bytes, name: str, shapes: Shapes, names: FileNames, path: str | None = None) -> ForeignLoRA:
    """Read a LoRA file of another tool, in float32.

    Args:
        file: its bytes, safetensors.
        name: its name in an error.
        shapes: of the base model's layers.
        names: their names in files.
        path: where the file is, in an error; None for `name`.

    Raises:
        InputError: not a safetensors file, not a plain LoRA, unknown keys, or shapes of another base model.
    """
    if is_pickled(file):
        refuse_pickled(file, name, path or name)
    header = header_of(file, name)
    keys = header.tensors.keys()
    _check_foreign(header.metadata, name)
    check_plain(keys, name)
    try:
        form = _form(keys, name)
        adapter = fitted(_READERS[form](file, name, shapes, names), name, shapes)
    except InputError:
        check_not_for_another_model(keys, name, names.title)
        raise
    return ForeignLoRA(form, adapter, _notes(adapter, name))


def _check_foreign(metadata: Mapping[str, str], name: str) -> None:
    if metadata.get("format") == FORMAT:
        raise InputError(
            expected=f"a LoRA of another tool in {name}",
            got="a concept of this project",
            remedy="copy it to data/06_models/SUBJECT/concept.safetensors, or start from it with training.start_from",
        )


def _form(keys: Collection[str], name: str) -> str:
    """Return the format by its keys.

    Raises:
        InputError: no LoRA.
    """
    for form, endings in _ENDINGS.items():
        if stems := [key for key in keys if key.endswith(endings)]:
            has_module_names = "." in stems[0].removesuffix(".weight").rpartition(".")[0]
            return "diffusers" if form == "kohya" and has_module_names else form
    is_word = len(keys) == 1
    raise InputError(
        expected=f"a LoRA in kohya, peft or diffusers' format in {name}",
        got=", ".join(sorted(keys)[:_SHOWN]) or "no tensors",
        remedy="give another file" + (", or, if it is an embedding, give it in import.words" if is_word else ""),
    )


def _notes(adapter: BranchAdapter, name: str) -> tuple[str, ...]:
    ranks = sorted({factors.rank for factors in adapter.by_layer().values()})
    if (alpha := _alpha_divided_twice(adapter)) is None:
        return ()
    by = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    return (
        f"alpha is {alpha:.3g} / rank throughout {name}, as HCP-Diffusion's converter writes it; unless that was "
        f"called with --auto_scale_alpha, the LoRA is weaker than it was trained, by its rank ({by}): import the "
        "folder of the training (import.toolkit), or convert it again with --auto_scale_alpha",
    )


def _alpha_divided_twice(adapter: BranchAdapter) -> float | None:
    """Return the alpha that was divided by the rank before it was written as alpha, None where there is no sign of it.

    The scale is then alpha / rank² in every layer. A sign is an alpha of 1, the toolkit's default, or one alpha for
    several ranks: where ranks differ, other tools keep alpha or alpha / rank the same.
    """
    layers = adapter.by_layer().values()
    alphas = [factors.scale * factors.rank**2 for factors in layers]
    ranks = {factors.rank for factors in layers}
    if not all(math.isclose(alpha, alphas[0], rel_tol=2 * _ALPHA_TOLERANCE) for alpha in alphas):
        return None
    is_default = math.isclose(alphas[0], 1.0, rel_tol=_ALPHA_TOLERANCE)
    return alphas[0] if len(ranks) > 1 or (is_default and ranks != {1}) else None


def fitted(adapter: BranchAdapter, name: str, shapes: Shapes) -> BranchAdapter:
    """Return the adapter with the factors reshaped for its layers: files have 1 × 1 kernels with or without axes.

    Raises:
        InputError: shapes of another base model, or non-finite values; the message names the layers.
    """
    reshaped, wrong = {}, []
    for (network, layer), factors in adapter.by_layer().items():
        weight = shapes[network][layer]
        down, up = (factors.rank, *weight[1:]), (weight[0], factors.rank, *[1] * (len(weight) - 2))
        if _is_reshape(factors.down, down) and _is_reshape(factors.up, up):
            reshaped[network, layer] = replace(factors, down=factors.down.reshape(down), up=factors.up.reshape(up))
        else:
            got = f"{tuple(factors.down.shape)} and {tuple(factors.up.shape)}"
            wrong.append(f"{network}.{layer} is {got} where {down} and {up} are expected")
    if wrong:
        raise InputError(
            expected=f"{name} to fit the layers of this base model",
            got=f"{len(wrong)} of {adapter.num_layers} layers with other shapes: {'; '.join(wrong[:_SHOWN])}",
            remedy=advice_by_width(adapter.by_layer()),
        )
    if infinite := [".".join(at) for at, factors in adapter.by_layer().items() if not _is_finite(factors)]:
        raise InputError(
            expected=f"finite values in {name}",
            got=f"{len(infinite)} of {adapter.num_layers} layers with others: {', '.join(infinite[:_SHOWN])}",
            remedy="make or download it again",
        )
    return BranchAdapter.of_layers(reshaped)


def _is_finite(factors: LoRAFactors) -> bool:
    tensors = [tensor for tensor in (factors.down, factors.up, factors.bias) if tensor is not None]
    return math.isfinite(factors.scale) and all(bool(tensor.isfinite().all()) for tensor in tensors)


def _is_reshape(tensor: torch.Tensor, shape: tuple[int, ...]) -> bool:
    """Return whether shapes differ at most in trailing axes of length 1."""
    got, length = tuple(tensor.shape), max(tensor.dim(), len(shape))
    return got + (1,) * (length - len(got)) == shape + (1,) * (length - len(shape))
