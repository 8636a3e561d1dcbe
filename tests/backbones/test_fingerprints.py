"""The same weights have the same fingerprint, however they are stored."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dreamartist_pipeline.backbones.fingerprints import fingerprint_of
from dreamartist_pipeline.backbones.holding.folder import FolderParts

HALF = {  # float16 holds these exactly
    "down.weight": torch.arange(12.0).reshape(3, 4).half(),
    "embeddings.bias": torch.tensor([0.5, -2.0]).half(),
    "encoder.key.weight": torch.ones(2, 2).half(),
    "scale": torch.tensor(3.0).half(),
}
Tensors = dict[str, torch.Tensor]


def float32(tensors: Tensors) -> Tensors:
    return {name: tensor.float() for name, tensor in tensors.items()}


def as_safetensors(folder: Path, tensors: Tensors) -> None:
    save_file(tensors, folder / "model.safetensors")


def as_bin(folder: Path, tensors: Tensors) -> None:
    torch.save(tensors, folder / "pytorch_model.bin")


def in_float32(folder: Path, tensors: Tensors) -> None:
    save_file(float32(tensors), folder / "diffusion_pytorch_model.safetensors")


def in_shards(folder: Path, tensors: Tensors) -> None:
    names = list(tensors)
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def beside_a_variant_and_a_pickled_copy(folder: Path, tensors: Tensors) -> None:
    as_safetensors(folder, tensors)
    save_file({"other": torch.ones(1)}, folder / "model.fp16.safetensors")
    as_bin(folder, {"other": torch.ones(1)})


def with_names_of_earlier_versions(folder: Path, tensors: Tensors) -> None:
    old = {f"text_model.{name}": tensor for name, tensor in tensors.items()}
    save_file(old | {"text_model.embeddings.position_ids": torch.arange(3)}, folder / "model.safetensors")


def with_present_names_of_an_attention(folder: Path, tensors: Tensors) -> None:
    save_file(
        {name.replace(".key.", ".to_k."): tensor for name, tensor in tensors.items()}, folder / "model.safetensors"
    )


def fingerprint(folder: Path, write: Callable[[Path, Tensors], None], tensors: Tensors = HALF) -> str:
    part = folder / write.__name__ / "unet"
    part.mkdir(parents=True)
    write(part, tensors)
    return fingerprint_of({"unet": FolderParts(part.parent).tensors("unet")})


@pytest.mark.parametrize(
    "write",
    [
        as_bin,
        in_float32,
        in_shards,
        beside_a_variant_and_a_pickled_copy,
        with_names_of_earlier_versions,
        with_present_names_of_an_attention,
    ],
)
def test_the_same_weights_are_known_in_any_form(tmp_path: Path, write: Callable[[Path, Tensors], None]) -> None:
    assert fingerprint(tmp_path, write) == fingerprint(tmp_path, as_safetensors)


@pytest.mark.parametrize(
    "change",
    [
        {"scale": torch.tensor(3.5).half()},
        {"down.weight": HALF["down.weight"].reshape(4, 3)},
        {"more": torch.zeros(0)},
        {"down.weight": HALF["down.weight"].float() + 1e-6},
    ],
)
def test_another_number_shape_or_name_is_another_fingerprint(tmp_path: Path, change: Tensors) -> None:
    assert fingerprint(tmp_path, as_bin, HALF | change) != fingerprint(tmp_path, as_safetensors)


def test_the_part_that_weights_belong_to_counts(tmp_path: Path) -> None:
    for part in ("unet", "vae"):
        (tmp_path / part).mkdir()
        as_safetensors(tmp_path / part, HALF)
    parts = {part: FolderParts(tmp_path).tensors(part) for part in ("unet", "vae")}
    unet, vae = ({part: tensors} for part, tensors in parts.items())
    assert fingerprint_of(unet) != fingerprint_of(vae)
    assert fingerprint_of(vae | unet) == fingerprint_of(unet | vae)
