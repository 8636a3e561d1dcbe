"""A concept with all features of files: several groups per layer, different ranks and alphas, convolutions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dreamartist_pipeline.backbones.families.sd import V1_NAMES as NAMES
from dreamartist_pipeline.core.concept import Concept, ConceptMetadata
from dreamartist_pipeline.interop.safetensors_bytes import read_tensors, write_tensors
from dreamartist_pipeline.params import ResolvedGroup

Files = dict[str, bytes]

ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
OUT = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
PROJ_IN = "down_blocks.0.attentions.0.proj_in"  # Conv2d 1 × 1
CONV = "down_blocks.0.resnets.0.conv1"  # Conv2d 3 × 3
TEXT = "encoder.layers.0.self_attn.out_proj"
MLP = "encoder.layers.0.mlp.fc1"
__all__ = ["NAMES"]

MODULES = {"unet": [ATTENTION, OUT, PROJ_IN, CONV, "conv_out"], "text_encoder": [TEXT, MLP]}

# network, layer, group, branch, alpha, shape of down, shape of up
UPDATES = [
    ("unet", ATTENTION, 0, "positive", 1.0, (2, 6), (5, 2)),
    ("unet", OUT, 0, "positive", 1.0, (3, 5), (6, 3)),  # another rank in the same group
    ("unet", PROJ_IN, 0, "positive", 1.0, (2, 4, 1, 1), (6, 2, 1, 1)),
    ("unet", CONV, 1, "positive", 4.0, (2, 4, 3, 3), (7, 2, 1, 1)),  # another alpha
    ("unet", ATTENTION, 1, "positive", 4.0, (3, 6), (5, 3)),  # a second group in one layer
    ("unet", ATTENTION, 2, "negative", 0.5, (1, 6), (5, 1)),
    ("unet", CONV, 3, "shared", 2.0, (1, 4, 3, 3), (7, 1, 1, 1)),  # both branches
    ("text_encoder", TEXT, 0, "positive", 1.0, (1, 4), (4, 1)),
    ("text_encoder", MLP, 1, "negative", 3.0, (2, 4), (8, 2)),
]
NUM_GROUPS = {"unet": 4, "text_encoder": 2}


def make_concept() -> Concept:
    """Return the concept of UPDATES with random values and a pair of words."""
    generator = torch.Generator().manual_seed(0)
    tensors, alphas = {}, {network: [1.0] * count for network, count in NUM_GROUPS.items()}
    branches = {network: ["positive"] * count for network, count in NUM_GROUPS.items()}
    for network, layer, group, branch, alpha, down, up in UPDATES:
        alphas[network][group], branches[network][group] = alpha, branch
        for factor, shape in (("down", down), ("up", up)):
            tensors[f"{network}.{layer}.{group}.{branch}.{factor}"] = torch.randn(shape, generator=generator)
    tensors["words.positive.pt1"] = torch.randn(2, 4, generator=generator)
    tensors["words.negative.pt1"] = torch.randn(3, 4, generator=generator)
    metadata = ConceptMetadata(
        base_model="tiny",
        base_model_fingerprint="0123",
        prediction_type="epsilon",
        class_word="fox",
        num_branches=2,
        num_steps=7,
        words={"pt1": ("my-fox", "my-fox-neg")},
        num_vectors=(2, 3),
        lora={
            network: tuple(
                ResolvedGroup(name=f"{network}.{i}.{b}", alpha=a, branch=b, rank=2, layers=("re:.*",), lr=1.0)
                for i, (a, b) in enumerate(zip(values, branches[network], strict=True))
            )
            for network, values in alphas.items()
        },
    )
    return Concept(tensors, metadata)


def with_groups(concept: Concept, network: str, *changes: dict[str, Any]) -> Concept:
    """Return the concept with one set of changes for each of a network's groups."""
    groups = zip(concept.metadata.lora[network], changes, strict=True)
    lora = {network: tuple(group.model_copy(update=change) for group, change in groups)}
    metadata = concept.metadata.model_copy(update={"lora": concept.metadata.lora | lora})
    return Concept(concept.tensors, metadata)


def expected_updates(concept: Concept, branch: str) -> dict[tuple[str, str], torch.Tensor]:
    """Return Σ_g (alpha_g / rank_g) · up_g · down_g of every layer of a branch, written out."""
    found: dict[tuple[str, str], torch.Tensor] = {}
    for network, layer, group, of_branch, alpha, down, _ in UPDATES:
        if of_branch in (branch, "shared"):
            name = f"{network}.{layer}.{group}.{of_branch}"
            product = concept.tensors[f"{name}.up"].flatten(1) @ concept.tensors[f"{name}.down"].flatten(1)
            update = product * (alpha / down[0])
            found[network, layer] = found[network, layer] + update if (network, layer) in found else update
    return found


BIASED = (("unet", 0), ("unet", 3), ("text_encoder", 1))  # network and group


def make_concept_with_bias() -> Concept:
    """Return the same concept with a bias in BIASED groups: alone in a layer, beside a group without one, shared."""
    concept, generator = make_concept(), torch.Generator().manual_seed(1)
    for network, layer, group, branch, _, _, up in UPDATES:
        if (network, group) in BIASED:
            concept.tensors[f"{network}.{layer}.{group}.{branch}.bias"] = torch.randn(up[0], generator=generator)
    for network, count in NUM_GROUPS.items():
        concept = with_groups(concept, network, *({"bias": (network, i) in BIASED} for i in range(count)))
    return concept


def expected_biases(concept: Concept, branch: str) -> dict[tuple[str, str], torch.Tensor]:
    """Return Σ_g (alpha_g / rank_g) · bias_g of every layer of a branch that has one, written out."""
    found: dict[tuple[str, str], torch.Tensor] = {}
    for network, layer, group, of_branch, alpha, down, _ in UPDATES:
        if of_branch in (branch, "shared") and (network, group) in BIASED:
            bias = concept.tensors[f"{network}.{layer}.{group}.{of_branch}.bias"] * (alpha / down[0])
            found[network, layer] = found[network, layer] + bias if (network, layer) in found else bias
    return found


@pytest.fixture
def concept() -> Concept:
    return make_concept()


@pytest.fixture
def concept_with_bias() -> Concept:
    return make_concept_with_bias()


def renamed_keys(files: Files, *changes: tuple[str, str]) -> Files:
    """Return the files with other names of tensors, as older and newer versions of the toolkit write them."""

    def rename(key: str) -> str:
        for old, new in changes:
            key = key.replace(old, new)
        return key

    return {
        name: file
        if name.endswith(".pt")
        else write_tensors({rename(key): tensor for key, tensor in read_tensors(file, name).items()}, {})
        for name, file in files.items()
    }


def newer(files: Files) -> Files:
    """Return the files of the toolkit's newer layers."""
    changes = ("lora_down.weight", "W_down"), ("lora_up.weight", "W_up"), ("lora_up.bias", "bias")
    return renamed_keys(files, *changes)
