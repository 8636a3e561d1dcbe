"""The form between a concept and the files of other tools: one plain LoRA per branch, one embedding per word.

Other tools know neither groups nor branches. So every layer of a branch gets a single update, ΔW = scale · up · down,
and perhaps a bias; several groups in one layer are concatenated along the rank, which adds them up, and a shared group
goes to both branches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dreamartist_pipeline.core.adapters import SHARED, factors_by_update, tensor_names
from dreamartist_pipeline.core.branches import BRANCH_NAMES
from dreamartist_pipeline.core.concept import FORMAT, Concept, to_json, words_part
from dreamartist_pipeline.core.errors import InputError
from dreamartist_pipeline.core.layout import BaseModelIdentity

_ALPHA = 1.0  # of the groups of a concept that is built here; everything else is in `up`


@dataclass(frozen=True)
class LoRAFactors:
    """One layer's update ΔW = scale · up · down and Δbias = scale · bias, float32.

    down: `[rank, in]`, or `[rank, in, kh, kw]` of a convolution. up: `[out, rank]`, or `[out, rank, 1, 1]`.
    bias: `[out]`, or None.
    """

    down: torch.Tensor = field(repr=False)
    up: torch.Tensor = field(repr=False)
    scale: float
    bias: torch.Tensor | None = field(default=None, repr=False)

    @property
    def rank(self) -> int:
        """The number of rows of down."""
        return self.down.shape[0]

    def up_for_scale(self, scale: float) -> torch.Tensor:
        """Return the `up` with which a reader that multiplies by `scale` gets the same update."""
        return self.up if self.scale == scale else self.up * (self.scale / scale)

    def bias_for_scale(self, scale: float) -> torch.Tensor:
        """Return the bias `[out]` for a reader that multiplies by `scale`, as `up_for_scale`; zeros without one."""
        if self.bias is None:
            return self.up.new_zeros(len(self.up))
        return self.bias if self.scale == scale else self.bias * (self.scale / scale)

    def update(self) -> torch.Tensor:
        """Return ΔW as a matrix `[out, in · kh · kw]`."""
        return self.up.flatten(1) @ self.down.flatten(1) * self.scale


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


@dataclass(frozen=True)
class TriggerWord:
    """A learned word. branch: "negative" or "positive". vectors: text encoder -> float32 `[n, D]`."""

    name: str
    slot: str
    branch: str
    vectors: Mapping[str, torch.Tensor] = field(repr=False)

    @property
    def num_vectors(self) -> int:
        """n, the same for every text encoder."""
        return len(next(iter(self.vectors.values())))


# ------------------------------------------------------------------------------------------------- out of a concept


def branch_adapter(concept: Concept, branch: str) -> BranchAdapter:
    """Return everything that acts on the rows of one branch, "negative" or "positive".

    Raises:
        InputError: not a concept of this project, or a tensor's name is not one of an adapter.
    """
    return BranchAdapter(
        {network: layers for network in concept.networks if (layers := _branch_layers(concept, network, branch))}
    )


def _branch_layers(concept: Concept, network: str, branch: str) -> dict[str, LoRAFactors]:
    specs = concept.value(f"lora_{network}")
    _check_static(network, specs)
    groups: dict[str, list[LoRAFactors]] = {}
    for (layer, group, of_branch), factors in sorted(factors_by_update(concept.part(network)).items()):
        if group >= len(specs) or set(factors) != tensor_names(specs[group].get("bias", False)):
            raise InputError(
                f"expected all tensors of one of {len(specs)} LoRA groups; got {sorted(factors)} of group {group} in "
                f"{network}.{layer}; the file is incomplete: train the concept again"
            )
        if of_branch in (branch, SHARED):
            groups.setdefault(layer, []).append(_scaled(factors, float(specs[group]["alpha"])))
    return {layer: _joined(members) for layer, members in groups.items()}


def _check_static(network: str, specs: Sequence[Mapping[str, Any]]) -> None:
    """Confirm that no group changes its rank with the timestep, which no other tool's files can say."""
    for index, fields in enumerate(specs):
        if fields.get("timestep_min_rank") is not None:
            raise InputError(
                f"expected LoRA groups of one rank; got lora_{network}[{index}] with timestep_min_rank "
                f"{fields['timestep_min_rank']}, which LoRA files of other tools cannot express; draw with "
                "kedro run --pipeline generate, or train without timestep_min_rank"
            )


def _scaled(factors: Mapping[str, torch.Tensor], alpha: float) -> LoRAFactors:
    return LoRAFactors(factors["down"], factors["up"], alpha / factors["down"].shape[0], factors.get("bias"))


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


def trigger_words(concept: Concept) -> tuple[TriggerWord, ...]:
    """Return the learned words of both branches, positive first in every slot.

    Raises:
        InputError: not a concept of this project.
    """
    return tuple(
        TriggerWord(name, slot, branch, vectors)
        for slot, names in concept.value("words").items()
        for branch, name in zip(("positive", "negative"), names, strict=True)
        if (vectors := concept.word_vectors(f"{branch}.{slot}"))
    )


# ------------------------------------------------------------------------------------------------- into a concept


def build_concept(
    adapters: Mapping[str, BranchAdapter],
    words: Sequence[TriggerWord],
    base_model: BaseModelIdentity,
    class_word: str = "",
    num_steps: int = 0,
    clip_skip: int = 0,
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

    Raises:
        InputError: a negative word without a positive one.
    """
    metadata = {
        "format": FORMAT,
        "base_model": base_model.name,
        "base_model_fingerprint": base_model.fingerprint,
        "base_model_family": base_model.family,
        "class_word": class_word,
        "num_steps": to_json(num_steps),
        "clip_skip": to_json(clip_skip),
        **_words_metadata(words, only_shared=set(adapters) == {SHARED}),
    }
    tensors = {
        f"{words_part(encoder)}.{word.branch}.{word.slot}": _stored(vectors)
        for word in words
        for encoder, vectors in word.vectors.items()
    }
    for network in base_model.networks:
        names = (*BRANCH_NAMES, SHARED)
        present = {b: adapters[b].networks[network] for b in names if network in _networks(adapters, b)}
        metadata[f"lora_{network}"] = to_json([_group(network, i, b, present[b]) for i, b in enumerate(present)])
        for index, (branch, layers) in enumerate(present.items()):
            for layer, factors in layers.items():
                prefix = f"{network}.{layer}.{index}.{branch}"
                tensors[f"{prefix}.down"] = _stored(factors.down)
                tensors[f"{prefix}.up"] = _stored(factors.up_for_scale(_ALPHA / factors.rank))
                if has_bias(layers):
                    tensors[f"{prefix}.bias"] = _stored(factors.bias_for_scale(_ALPHA / factors.rank))
    return Concept(dict(sorted(tensors.items())), dict(sorted(metadata.items())))


def _networks(adapters: Mapping[str, BranchAdapter], branch: str) -> dict[str, dict[str, LoRAFactors]]:
    return adapters[branch].networks if branch in adapters else {}


def _stored(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", torch.float32).contiguous()


def _group(network: str, index: int, branch: str, layers: Mapping[str, LoRAFactors]) -> dict[str, Any]:
    """Return one group as a concept's metadata describe it; ranks are those of the tensors."""
    return {
        "name": f"{network}.{index}.{branch}",
        "rank": max(factors.rank for factors in layers.values()),
        "layers": sorted(layers),
        "lr": 0.0,  # nothing trains it
        "branch": branch,
        "alpha": _ALPHA,
        "dropout": 0.0,
        "bias": has_bias(layers),
    }


def _words_metadata(words: Sequence[TriggerWord], only_shared: bool) -> dict[str, str]:
    """Return the entries about words. A word by itself beside pairs has "" for a partner.

    Where no word has a partner, there is one branch, and names of partners are what a training would call them.
    """
    by_branch = {branch: {word.slot: word for word in words if word.branch == branch} for branch in BRANCH_NAMES}
    positive, negative = by_branch["positive"], by_branch["negative"]
    if alone := negative.keys() - positive.keys():
        raise InputError(
            f"expected a positive word in every slot that has a negative one; got none for {sorted(alone)}; give its "
            "file, or give the negative word alone as the positive one of a slot"
        )
    names = {
        slot: (word.name, (negative[slot].name if slot in negative else "") if negative else f"{word.name}-neg")
        for slot, word in positive.items()
    }
    return {
        "words": to_json(names),
        "num_vectors": to_json((_num_vectors(positive.values()), _num_vectors(negative.values()))),
        "num_branches": to_json(2 if negative or not (positive or only_shared) else 1),
    }


def _num_vectors(words: Iterable[TriggerWord]) -> int | None:
    """Return how many vectors each of these words has; None where they differ, so that only the tensors say it."""
    counts = {word.num_vectors for word in words} or {1}
    return counts.pop() if len(counts) == 1 else None
