"""The intermediate representation between concepts and files of other tools: one plain LoRA per branch.

Other tools know neither groups nor branches. Here each layer of a branch has a single update, ΔW = scale · up · down,
with an optional bias. Groups on the same layer are concatenated along the rank, which adds them; a shared group acts on
both branches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from dreamartist_pipeline.core.branches import BRANCH_NAMES
from dreamartist_pipeline.core.concept import Concept, ConceptMetadata, TriggerWord, words_part
from dreamartist_pipeline.core.layout import BaseModelIdentity
from dreamartist_pipeline.core.lora_factors import SHARED, LoRAFactors
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import ResolvedGroup

_ALPHA = 1.0  # of the groups of a built concept; the scale is folded into `up`


@dataclass(frozen=True)
class BranchAdapter:
    """The updates of one branch.

    Attributes:
        networks: network (such as `unet`) -> layer -> its update; networks without updates are omitted.
    """

    networks: dict[str, dict[str, LoRAFactors]]

    @classmethod
    def of_layers(cls, updates: Mapping[tuple[str, str], LoRAFactors]) -> BranchAdapter:
        """Return the adapter of (network, layer) -> update, in alphabetical order."""
        networks: dict[str, dict[str, LoRAFactors]] = {}
        for (network, layer), factors in sorted(updates.items()):
            networks.setdefault(network, {})[layer] = factors
        return cls(networks)

    @property
    def num_layers(self) -> int:
        """The number of layers with an update, in all networks."""
        return sum(len(layers) for layers in self.networks.values())

    def by_layer(self) -> dict[tuple[str, str], LoRAFactors]:
        """Return (network, layer) -> its update."""
        return {(network, layer): f for network, layers in self.networks.items() for layer, f in layers.items()}


def has_bias(layers: Mapping[str, LoRAFactors]) -> bool:
    """Return whether any of these layers has a bias."""
    return any(factors.bias is not None for factors in layers.values())


# ------------------------------------------------------------------------------------------------- out of a concept


def branch_adapter(concept: Concept, branch: str) -> BranchAdapter:
    """Return the updates that act on the rows of one branch, "negative" or "positive".

    Raises:
        InputError: a tensor belongs to no group, or an update is incomplete.
    """
    return _sum_by_layer(
        ((network, update.layer), update.factors)
        for network in concept.networks
        for update in concept.updates(network)
        if update.group.branch in (branch, SHARED)
    )


def added_up(adapters: Sequence[BranchAdapter]) -> BranchAdapter:
    """Return one adapter with the sum of the updates of several."""
    return _sum_by_layer(item for adapter in adapters for item in adapter.by_layer().items())


def _sum_by_layer(updates: Iterable[tuple[tuple[str, str], LoRAFactors]]) -> BranchAdapter:
    by_layer: dict[tuple[str, str], list[LoRAFactors]] = {}
    for at, factors in updates:
        by_layer.setdefault(at, []).append(factors)
    return BranchAdapter.of_layers({at: _joined(members) for at, members in by_layer.items()})


def _joined(groups: Sequence[LoRAFactors]) -> LoRAFactors:
    """Concatenate the groups of one layer along the rank; unequal scales are folded into `up`."""
    scale = groups[0].scale if len({group.scale for group in groups}) == 1 else 1.0
    down = torch.cat([group.down for group in groups])  # [R, in, ...]
    up = torch.cat([group.up_for_scale(scale) for group in groups], dim=1)  # [out, R, ...]
    bias = None
    if any(group.bias is not None for group in groups):
        bias = torch.stack([group.bias_for_scale(scale) for group in groups]).sum(0)  # [out]
    return LoRAFactors(down, up, scale, bias)


# ------------------------------------------------------------------------------------------------- into a concept


def build_concept(
    adapters: Mapping[str, BranchAdapter],
    words: Sequence[TriggerWord],
    base_model: BaseModelIdentity,
    class_word: str = "",
    num_steps: int = 0,
    clip_skip: int = 0,
    imported_from: tuple[tuple[str, str], ...] | None = None,
) -> Concept:
    """Return a concept with one LoRA group per branch and network.

    Args:
        adapters: branch name, or "shared" for both -> its adapter; a branch without one predicts as the base model.
        words: a positive word, or a pair, for every slot; numbers of vectors may differ.
        base_model: the base model of the files, which do not name it.
        class_word: fills slots without a word.
        num_steps: of the training; 0 if unknown.
        clip_skip: of the training, which the files do not contain.
        imported_from: (name, SHA-256) of the files.

    Raises:
        InputError: a negative word without a positive one.
    """
    tensors = {
        f"{words_part(encoder)}.{word.key}": _stored(vectors)
        for word in words
        for encoder, vectors in word.vectors.items()
    }
    groups: dict[str, tuple[ResolvedGroup, ...]] = {}
    for network in base_model.networks:
        present = {
            branch: adapters[branch].networks[network]
            for branch in (*BRANCH_NAMES, SHARED)
            if branch in adapters and network in adapters[branch].networks
        }
        groups[network] = tuple(_group(network, i, b, present[b]) for i, b in enumerate(present))
        for index, (branch, layers) in enumerate(present.items()):
            for layer, factors in layers.items():
                prefix = f"{network}.{layer}.{index}.{branch}"
                tensors[f"{prefix}.down"] = _stored(factors.down)
                tensors[f"{prefix}.up"] = _stored(factors.up_for_scale(_ALPHA / factors.rank))
                if has_bias(layers):
                    tensors[f"{prefix}.bias"] = _stored(factors.bias_for_scale(_ALPHA / factors.rank))
    negative, positive = ({word.slot: word for word in words if word.branch == branch} for branch in BRANCH_NAMES)
    only_shared = set(adapters) == {SHARED}
    metadata = ConceptMetadata(
        base_model=base_model.name,
        base_model_fingerprint=base_model.fingerprint,
        base_model_family=base_model.family,
        num_branches=2 if negative or not (positive or only_shared) else 1,
        num_steps=num_steps,
        words=_word_names(positive, negative),
        num_vectors=(_num_vectors(positive.values()), _num_vectors(negative.values())),
        lora=groups,
        class_word=class_word,
        clip_skip=clip_skip,
        imported_from=imported_from,
    )
    return Concept(dict(sorted(tensors.items())), metadata)


def _stored(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", torch.float32).contiguous()


def _group(network: str, index: int, branch: str, layers: Mapping[str, LoRAFactors]) -> ResolvedGroup:
    """Return the group of these layers; its rank is their highest."""
    return ResolvedGroup(
        name=f"{network}.{index}.{branch}",
        rank=max(factors.rank for factors in layers.values()),
        layers=tuple(sorted(layers)),
        lr=0.0,  # not trained here
        branch=branch,
        alpha=_ALPHA,
        bias=has_bias(layers),
    )


def _word_names(positive: Mapping[str, TriggerWord], negative: Mapping[str, TriggerWord]) -> dict[str, tuple[str, str]]:
    """Return slot -> (positive, negative) word; a word without a partner has "" where others have one.

    Without any negative word there is one branch; its partners are named as in a training.
    """
    if alone := negative.keys() - positive.keys():
        raise InputError(
            expected="a positive word in every slot that has a negative one",
            got=f"none for {sorted(alone)}",
            remedy="add its file, or make the negative word the positive one of a slot",
        )
    return {
        slot: (word.name, (negative[slot].name if slot in negative else "") if negative else f"{word.name}-neg")
        for slot, word in positive.items()
    }


def _num_vectors(words: Iterable[TriggerWord]) -> int | None:
    """Return the common number of vectors of these words, or None if they differ."""
    counts = {word.num_vectors for word in words} or {1}
    return counts.pop() if len(counts) == 1 else None
