"""Initialise a training from a concept.

Every update of the concept is copied into the first ranks of a configured group, rescaled such that the group's
(alpha / rank) · up · down is the same update. The remaining ranks are initialised fresh: down random, up zero. The
predictions of the first step are therefore those of the concept.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from dreamartist_pipeline.core.adapters import AdapterStack, LowRankUpdate
from dreamartist_pipeline.core.branches import BRANCH_NAMES
from dreamartist_pipeline.core.concept import Concept, ConceptMetadata, to_json, words_part
from dreamartist_pipeline.core.embeddings import WordEmbedding
from dreamartist_pipeline.core.lora_factors import SHARED, LearnedUpdate
from dreamartist_pipeline.errors import InputError

_OPTION = "training.start_from"


@dataclass(frozen=True)
class Start:
    """The concept that a training starts from.

    Attributes:
        concept: the initial values.
        sha256: of the concept file.
    """

    concept: Concept
    sha256: str


@dataclass(frozen=True)
class Assignment:
    """The updates of the concept that initialise one group in one layer; they are summed.

    Attributes:
        network: of the base model.
        layer: in that network.
        target: the update to initialise.
        updates: those of the concept.
    """

    network: str
    layer: str
    target: LowRankUpdate
    updates: tuple[LearnedUpdate, ...]

    @property
    def rank(self) -> int:
        """The rank that the target needs."""
        return sum(update.factors.rank for update in self.updates)

    @property
    def option(self) -> str:
        """The configuration key of the target's group."""
        return f"training.lora_{self.network}.{self.target.index}"


def load_initial_values(
    stacks: Mapping[str, AdapterStack], words: Mapping[str, WordEmbedding], concept: Concept
) -> dict[str, int]:
    """Copy the adapters and words of a concept, in place; also works on the meta device.

    In each layer, the first group of a branch takes the updates of that branch. Shared updates go to a shared group,
    or otherwise to one group of each branch.

    Args:
        stacks: network -> its fresh adapters.
        words: text encoder -> the fresh words.
        concept: of the same base model.

    Returns:
        Group (`unet.0.positive`, `words.positive.pt1`) -> number of its layers, or vectors, that were copied.

    Raises:
        InputError: the concept does not fit the configured groups: no group for a layer or bias, a rank that is too
            small, or other words.
    """
    assignments = plan_assignments(stacks, concept)
    for assignment in assignments:
        _check_shapes(assignment)
        _check_timestep_rank(assignment)
        _check_bias(assignment)
    _check_ranks(assignments)
    _check_words(words, concept)
    for assignment in assignments:
        _copy_updates(assignment)
    copied = Counter(assignment.target.group.name for assignment in assignments)
    return {**copied, **_copy_words(words, concept)}


# ------------------------------------------------------------------------------------------------- adapters


def plan_assignments(stacks: Mapping[str, AdapterStack], concept: Concept) -> list[Assignment]:
    """Assign the updates of the concept to groups of the training, layer by layer.

    Raises:
        InputError: there is no layer or group for an update.
    """
    assignments: list[Assignment] = []
    unassigned: list[tuple[str, str]] = []  # (<network>.<layer>, branch)
    for network in concept.networks:
        layers = stacks[network].layers if network in stacks else {}
        for layer, by_branch in _updates(network, concept).items():
            updates = layers[layer].updates if layer in layers else ()
            targets: dict[str, LowRankUpdate] = {u.group.branch: u for u in reversed(updates)}  # first of each branch
            for branch, learned in _by_target(by_branch, targets):
                if branch in targets:
                    assignments.append(Assignment(network, layer, targets[branch], tuple(learned)))
                else:
                    unassigned.append((f"{network}.{layer}", branch))
    if unassigned:
        raise InputError(
            expected=f"a LoRA group for every layer of the concept in {_OPTION}",
            got=f"none for {len(unassigned)}: {_summary(unassigned)}",
            remedy=_missing_group_remedy(unassigned, stacks),
        )
    return assignments


def _missing_group_remedy(unassigned: Sequence[tuple[str, str]], stacks: Mapping[str, AdapterStack]) -> str:
    layers = [layer for adapters in stacks.values() for layer in adapters.layers.values()]
    if any(layer.num_branches == 1 for layer in layers) and any(branch != SHARED for _, branch in unassigned):
        return "raise training.guidance_scale above 1: at 1 there is no negative branch and every group is shared"
    return "add groups of that branch (p, n, or none for shared) whose layers match them"


def _summary(unassigned: Sequence[tuple[str, str]]) -> str:
    """List layers with their branches, merging those that differ only in numbers: `down_blocks.*.conv_in`."""
    branches: dict[str, set[str]] = {}
    for layer, branch in unassigned:
        branches.setdefault(re.sub(r"\.\d+(?=\.|$)", ".*", layer), set()).add(branch)
    return ", ".join(f"{layer} ({', '.join(sorted(names))})" for layer, names in branches.items())


def _updates(network: str, concept: Concept) -> dict[str, dict[str, list[LearnedUpdate]]]:
    """Return layer -> branch name -> updates of the concept."""
    found: dict[str, dict[str, list[LearnedUpdate]]] = {}
    for update in concept.updates(network):
        found.setdefault(update.layer, {}).setdefault(update.group.branch, []).append(update)
    return found


def _by_target(
    by_branch: Mapping[str, list[LearnedUpdate]], targets: Mapping[str, LowRankUpdate]
) -> Iterator[tuple[str, list[LearnedUpdate]]]:
    """Yield (branch of the target, updates) for one layer."""
    shared = by_branch.get(SHARED, [])
    split = bool(shared) and SHARED not in targets and targets.keys() >= set(BRANCH_NAMES)
    for branch in BRANCH_NAMES:
        if updates := by_branch.get(branch, []) + (shared if split else []):
            yield branch, updates
    if shared and not split:
        yield SHARED, shared


def _check_shapes(assignment: Assignment) -> None:
    """Check that the updates have the shape of this layer, apart from the rank."""
    down, up = assignment.target.down.shape[1:], assignment.target.up[:, 0].shape
    for factors in (update.factors for update in assignment.updates):
        if factors.down.shape[1:] != down or factors.up[:, 0].shape != up:
            raise InputError(
                expected=(
                    f"down [rank, {', '.join(map(str, down))}] and up of {up[0]} outputs for {assignment.network}."
                    f"{assignment.layer} in the concept of {_OPTION}"
                ),
                got=f"{tuple(factors.down.shape)} and {tuple(factors.up.shape)}",
                remedy="the file is damaged: start from another concept",
            )


def _check_timestep_rank(assignment: Assignment) -> None:
    """Check that the active ranks at every timestep are those of the concept."""
    configured = assignment.target.group.timestep_min_rank
    if configured is None and all(update.group.timestep_min_rank is None for update in assignment.updates):
        return
    (first, *others), rank = assignment.updates, assignment.target.rank
    if any(update.group.orthogonal_init is not None for update in assignment.updates):
        raise InputError(
            expected=f"a concept in {_OPTION} whose ranks by timestep are those of a plain LoRA",
            got=f"orthogonal_init with timestep_min_rank={first.group.timestep_min_rank} for "
            f"{assignment.network}.{assignment.layer}",
            remedy="start from a concept without either of them",
        )
    if others or (first.group.timestep_min_rank, first.factors.rank) != (configured, rank):
        stored = ", ".join(f"rank {u.factors.rank} with {u.group.timestep_min_rank}" for u in assignment.updates)
        raise InputError(
            expected=f"the rank and timestep_min_rank that the concept in {_OPTION} has for "
            f"{assignment.network}.{assignment.layer}, {stored}",
            got=f"rank {rank} with {configured}",
            remedy=f"set {assignment.option}.rank and .timestep_min_rank to the former",
        )


def _check_bias(assignment: Assignment) -> None:
    if assignment.target.bias is None and any(update.factors.bias is not None for update in assignment.updates):
        raise InputError(
            expected=f"a bias for {assignment.network}.{assignment.layer}, as in the concept in {_OPTION}",
            got="a group without",
            remedy=f"set {assignment.option}.bias to true",
        )


def _check_ranks(assignments: Sequence[Assignment]) -> None:
    """Check that the rank of every group suffices; each group is reported once, with the largest rank it needs."""
    too_small: dict[str, Assignment] = {}
    for assignment in assignments:
        largest = too_small.get(assignment.option)
        if assignment.rank > assignment.target.rank and (largest is None or assignment.rank > largest.rank):
            too_small[assignment.option] = assignment
    if too_small:
        raise InputError(
            expected=f"LoRA groups of the ranks that the concept in {_OPTION} has, "
            + ", ".join(f"{a.rank} in {a.network}.{a.layer}" for a in too_small.values()),
            got=", ".join(str(a.target.rank) for a in too_small.values()),
            remedy="set " + ", ".join(f"{option}.rank to {a.rank}" for option, a in too_small.items()),
        )


@torch.no_grad()
def _copy_updates(assignment: Assignment) -> None:
    """Copy the updates into the first ranks; the other ranks keep their random down and get a zero up."""
    target, end = assignment.target, 0
    target.up.zero_()
    for factors in (update.factors for update in assignment.updates):
        ranks = slice(end, end := end + factors.rank)
        target.down[ranks] = factors.down.to(target.down)
        target.up[:, ranks] = factors.up_for_scale(target.scale).to(target.up)
        if factors.bias is not None and target.bias is not None:
            target.bias.add_(factors.bias_for_scale(target.scale).to(target.bias))


# ------------------------------------------------------------------------------------------------- words


def _check_words(words: Mapping[str, WordEmbedding], concept: Concept) -> None:
    """Check that the training has every word of the concept, with the same slot, branch, name and shape of vectors."""
    expected = {word.key: (word.name, word.num_vectors) for word in concept.trigger_words()}
    trained = next((embedding.vocabulary.words for embedding in words.values()), ())
    configured = {word.key: (word.name, word.num_vectors) for word in trained}
    if wrong := [key for key, word in expected.items() if configured.get(key) != word]:
        differences = [f"{key} {expected[key]}, configured {configured.get(key, 'none')}" for key in sorted(wrong)]
        raise InputError(
            expected=f"the trigger words of the concept in {_OPTION}",
            got=f"other (word, vectors): {'; '.join(differences)}",
            remedy=_words_remedy(concept.metadata),
        )
    widths = {encoder: embedding.base.embedding_dim for encoder, embedding in words.items()}
    for word in concept.trigger_words():
        got = {encoder: vectors.shape[1] for encoder, vectors in word.vectors.items()}
        if got != widths:
            raise InputError(
                expected=f"vectors of width {widths} in the concept of {_OPTION}",
                got=f"{got} for {word.key}",
                remedy="the file is damaged: start from another concept",
            )


def _words_remedy(metadata: ConceptMetadata) -> str:
    """Return the settings of a training that can start from a concept with these words."""
    if None in metadata.num_vectors:
        return (
            "training.words.num_vectors applies to all words of a branch: start from a concept with one slot, imported "
            "without the other words"
        )
    names = {slot: (word, partner or f"{word}-neg") for slot, (word, partner) in metadata.words.items()}
    return (
        f"set training.words.names={to_json(names)} and training.words.num_vectors={to_json(metadata.num_vectors)}, "
        "and keep a guidance_scale above 1 for negative words"
    )


@torch.no_grad()
def _copy_words(words: Mapping[str, WordEmbedding], concept: Concept) -> dict[str, int]:
    """Copy the vectors of the concept's words and return group -> number of vectors."""
    copied: dict[str, int] = {}
    for encoder, embedding in words.items():
        part = words_part(encoder)
        stored = concept.part(part)
        for word, vectors in zip(embedding.vocabulary.words, embedding.vectors, strict=True):
            if word.key in stored:
                vectors.copy_(stored[word.key])
                copied[f"{part}.{word.key}"] = word.num_vectors
    return copied
