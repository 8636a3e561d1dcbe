"""The form between a concept and the files of other tools: one plain LoRA per branch, one embedding per word.

Other tools know neither groups nor branches. So every layer of a branch gets a single update, ΔW = scale · up · down,
and perhaps a bias; several groups in one layer are concatenated along the rank, which adds them up, and a shared group
goes to both branches.
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

_ALPHA = 1.0  # of the groups of a concept that is built here; everything else is in `up`


@dataclass(frozen=True)
class BranchAdapter:
    """What acts on one branch: network (such as `unet`) -> layer -> its update; networks may be missing."""

    networks: dict[str, dict[str, LoRAFactors]]

    @property
    def num_layers(self) -> int:
        """How many layers have an update, of all networks."""
        return sum(len(layers) for layers in self.networks.values())

    def by_layer(self) -> dict[tuple[str, str], LoRAFactors]:
        """Return (network, layer) -> its update."""
        return {(network, layer): f for network, layers in self.networks.items() for layer, f in layers.items()}


def has_bias(layers: Mapping[str, LoRAFactors]) -> bool:
    """Say whether any of these layers has a bias."""
    return any(factors.bias is not None for factors in layers.values())


# ------------------------------------------------------------------------------------------------- out of a concept


def branch_adapter(concept: Concept, branch: str) -> BranchAdapter:
    """Return everything that acts on the rows of one branch, "negative" or "positive".

    Raises:
        InputError: a tensor belongs to no group, or an update is incomplete.
    """
    return BranchAdapter(
        {network: layers for network in concept.networks if (layers := _branch_layers(concept, network, branch))}
    )


def _branch_layers(concept: Concept, network: str, branch: str) -> dict[str, LoRAFactors]:
    groups: dict[str, list[LoRAFactors]] = {}
    for update in concept.updates(network):
        if update.group.branch in (branch, SHARED):
            groups.setdefault(update.layer, []).append(update.factors)
    return {layer: _joined(members) for layer, members in groups.items()}


def _joined(groups: Sequence[LoRAFactors]) -> LoRAFactors:
    """Concatenate the groups of one layer along the rank; groups of unequal scale keep theirs inside `up`."""
    scale = groups[0].scale if len({group.scale for group in groups}) == 1 else 1.0
    down = torch.cat([group.down for group in groups])  # [R, in, ...]
    up = torch.cat([group.up_for_scale(scale) for group in groups], dim=1)  # [out, R, ...]
    bias = None
    if any(group.bias is not None for group in groups):
        bias = torch.stack([group.bias_for_scale(scale) for group in groups]).sum(0)  # [out]
    return LoRAFactors(down, up, scale, bias)


def added_up(adapters: Sequence[BranchAdapter]) -> BranchAdapter:
    """Return one adapter that does what several do together."""
    layers: dict[tuple[str, str], list[LoRAFactors]] = {}
    for adapter in adapters:
        for at, factors in adapter.by_layer().items():
            layers.setdefault(at, []).append(factors)
    networks: dict[str, dict[str, LoRAFactors]] = {}
    for (network, layer), members in sorted(layers.items()):
        networks.setdefault(network, {})[layer] = _joined(members)
    return BranchAdapter(networks)


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
    """Return a concept that `backbones.concepts.attach` takes: one LoRA group per branch and network.

    Args:
        adapters: branch name -> its adapter, "shared" for one that acts on both; a branch without one follows the base
            model.
        words: a positive word, or a pair, for every slot; each with its own number of vectors.
        base_model: what the files were made for; nobody but the caller can know.
        class_word: stands in for a slot without a word.
        num_steps: how long it was trained, as far as is known.
        clip_skip: how many of the text encoder's last layers it was trained without; no file says it.
        imported_from: (name, SHA-256) of the files it is made of.

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
        names = (*BRANCH_NAMES, SHARED)
        present = {b: adapters[b].networks[network] for b in names if network in _networks(adapters, b)}
        groups[network] = tuple(_group(network, i, b, present[b]) for i, b in enumerate(present))
        for index, (branch, layers) in enumerate(present.items()):
            for layer, factors in layers.items():
                prefix = f"{network}.{layer}.{index}.{branch}"
                tensors[f"{prefix}.down"] = _stored(factors.down)
                tensors[f"{prefix}.up"] = _stored(factors.up_for_scale(_ALPHA / factors.rank))
                if has_bias(layers):
                    tensors[f"{prefix}.bias"] = _stored(factors.bias_for_scale(_ALPHA / factors.rank))
    by_branch = {branch: {word.slot: word for word in words if word.branch == branch} for branch in BRANCH_NAMES}
    positive, negative = by_branch["positive"], by_branch["negative"]
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


def _networks(adapters: Mapping[str, BranchAdapter], branch: str) -> dict[str, dict[str, LoRAFactors]]:
    return adapters[branch].networks if branch in adapters else {}


def _stored(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", torch.float32).contiguous()


def _group(network: str, index: int, branch: str, layers: Mapping[str, LoRAFactors]) -> ResolvedGroup:
    """Return the group that layers were put into; ranks are those of the tensors."""
    return ResolvedGroup(
        name=f"{network}.{index}.{branch}",
        rank=max(factors.rank for factors in layers.values()),
        layers=tuple(sorted(layers)),
        lr=0.0,  # nothing trains it
        branch=branch,
        alpha=_ALPHA,
        bias=has_bias(layers),
    )


def _word_names(positive: Mapping[str, TriggerWord], negative: Mapping[str, TriggerWord]) -> dict[str, tuple[str, str]]:
    """Return slot -> (positive, negative) word. A word by itself beside pairs has "" for a partner.

    Where no word has a partner, there is one branch, and names of partners are what a training would call them.
    """
    if alone := negative.keys() - positive.keys():
        raise InputError(
            expected="a positive word in every slot that has a negative one",
            got=f"none for {sorted(alone)}",
            remedy="give its file, or give the negative word alone as the positive one of a slot",
        )
    return {
        slot: (word.name, (negative[slot].name if slot in negative else "") if negative else f"{word.name}-neg")
        for slot, word in positive.items()
    }


def _num_vectors(words: Iterable[TriggerWord]) -> int | None:
    """Return how many vectors each of these words has; None where they differ, so that only the tensors say it."""
    counts = {word.num_vectors for word in words} or {1}
    return counts.pop() if len(counts) == 1 else None
