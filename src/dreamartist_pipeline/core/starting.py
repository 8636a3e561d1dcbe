"""A training that begins with a concept in place of fresh values.

Every update of the concept goes into the ranks of a configured group, such that the group's own
(alpha / rank) · up · down is the same update. Ranks that are left over start fresh: down random, up zero. So the first
step sees the concept's own predictions, and nothing of the concept is left out.
"""

from __future__ import annotations

import re
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
    """What a training begins with. sha256: of the concept's file."""

    concept: Concept
    sha256: str


@dataclass(frozen=True)
class Assignment:
    """A group's update in one layer, and what it takes over; several updates add up."""

    network: str
    layer: str
    target: LowRankUpdate
    updates: tuple[LearnedUpdate, ...]

    @property
    def rank(self) -> int:
        """The ranks it needs."""
        return sum(update.factors.rank for update in self.updates)

    @property
    def option(self) -> str:
        """The group as the configuration names it."""
        return f"training.lora_{self.network}.{self.target.index}"


def take_over(
    stacks: Mapping[str, AdapterStack], words: Mapping[str, WordEmbedding], concept: Concept
) -> dict[str, int]:
    """Give adapters and words the values of a concept, in place; also works on the meta device.

    A layer's first group of a branch takes what acts on that branch. What acts on both goes to a group of both, or else
    to one of each.

    Args:
        stacks: network -> its fresh adapters.
        words: text encoder -> the fresh words.
        concept: of the same base model.

    Returns:
        Name of each group (`unet.0.positive`, `words.positive.pt1`) -> how many layers, or vectors, it took over.

    Raises:
        InputError: something of the concept has no place: a layer or bias without a group for it, too small a rank,
            other words.
    """
    assignments = plan_assignments(stacks, concept)
    for assignment in assignments:
        _check_shapes(assignment)
        _check_timestep_rank(assignment)
        _check_bias(assignment)
    _check_ranks(assignments)
    _check_words(words, concept)
    taken: dict[str, int] = {}
    for assignment in assignments:
        _fill(assignment)
        taken[assignment.target.group.name] = taken.get(assignment.target.group.name, 0) + 1
    return taken | _fill_words(words, concept)


# ------------------------------------------------------------------------------------------------- adapters


def plan_assignments(stacks: Mapping[str, AdapterStack], concept: Concept) -> list[Assignment]:
    """Return which layer of the training takes which updates of the concept, one group's learned updates each.

    Raises:
        InputError: some update has no layer or group to take it.
    """
    assignments: list[Assignment] = []
    without_place: list[tuple[str, str]] = []  # (<network>.<layer>, branch)
    for network in concept.networks:
        layers = stacks[network].layers if network in stacks else {}
        for layer, by_branch in _updates(network, concept).items():
            targets = _first_targets(layers[layer].updates if layer in layers else ())
            for name, updates in _for_targets(by_branch, targets):
                if name in targets:
                    assignments.append(Assignment(network, layer, targets[name], tuple(updates)))
                else:
                    without_place.append((f"{network}.{layer}", name))
    if without_place:
        raise InputError(
            expected=f"a LoRA group for every layer of the concept in {_OPTION}",
            got=f"none for {len(without_place)}: {_alike(without_place)}",
            remedy=f"{_advice(without_place, stacks)}",
        )
    return assignments


def _advice(without_place: Sequence[tuple[str, str]], stacks: Mapping[str, AdapterStack]) -> str:
    layers = [layer for adapters in stacks.values() for layer in adapters.layers.values()]
    if any(layer.num_branches == 1 for layer in layers) and any(branch != SHARED for _, branch in without_place):
        return (
            "raise training.guidance_scale above 1: at 1 there are no branches, and every group acts on both sides of "
            "the guidance"
        )
    return "add groups of that branch (p, n, or none for shared) whose layers match them"


def _alike(without_place: Sequence[tuple[str, str]]) -> str:
    """Name layers with their branches, those that differ in their numbers alone as one: `down_blocks.*.conv_in`."""
    branches: dict[str, set[str]] = {}
    for layer, branch in without_place:
        branches.setdefault(re.sub(r"\.\d+(?=\.|$)", ".*", layer), set()).add(branch)
    return ", ".join(f"{layer} ({', '.join(sorted(names))})" for layer, names in branches.items())


def _updates(network: str, concept: Concept) -> dict[str, dict[str, list[LearnedUpdate]]]:
    """Return layer -> branch name -> the updates of the concept's groups."""
    found: dict[str, dict[str, list[LearnedUpdate]]] = {}
    for update in concept.updates(network):
        found.setdefault(update.layer, {}).setdefault(update.group.branch, []).append(update)
    return found


def _first_targets(updates: Sequence[LowRankUpdate]) -> dict[str, LowRankUpdate]:
    """Return branch name -> the first group of that branch in a layer."""
    targets: dict[str, LowRankUpdate] = {}
    for update in updates:
        targets.setdefault(update.group.branch, update)
    return targets


def _for_targets(
    by_branch: Mapping[str, list[LearnedUpdate]], targets: Mapping[str, LowRankUpdate]
) -> Iterator[tuple[str, list[LearnedUpdate]]]:
    """Yield (branch of the group that should take them, updates) of one layer."""
    shared = by_branch.get(SHARED, [])
    split = bool(shared) and SHARED not in targets and targets.keys() >= set(BRANCH_NAMES)
    for branch in BRANCH_NAMES:
        if updates := by_branch.get(branch, []) + (shared if split else []):
            yield branch, updates
    if shared and not split:
        yield SHARED, shared


def _check_shapes(assignment: Assignment) -> None:
    """Confirm that an update of the concept is one of this layer, whatever its rank."""
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
    """Confirm that the same ranks act at every timestep as in the concept."""
    configured = assignment.target.group.timestep_min_rank
    if configured is None and all(update.group.timestep_min_rank is None for update in assignment.updates):
        return
    (first, *others), rank = assignment.updates, assignment.target.rank
    if others or (first.group.timestep_min_rank, first.factors.rank) != (configured, rank):
        got = ", ".join(f"rank {u.factors.rank} with {u.group.timestep_min_rank}" for u in assignment.updates)
        raise InputError(
            expected=f"the rank and timestep_min_rank that the concept in {_OPTION} has for "
            f"{assignment.network}.{assignment.layer}, {got}",
            got=f"rank {rank} with {configured}",
            remedy=f"set {assignment.option}.rank and .timestep_min_rank to the former",
        )


def _check_bias(assignment: Assignment) -> None:
    if assignment.target.bias is None and any(update.factors.bias is not None for update in assignment.updates):
        raise InputError(
            expected=f"a bias for {assignment.network}.{assignment.layer}, since the concept in {_OPTION} has one",
            got="a group without",
            remedy=f"set {assignment.option}.bias to true",
        )


def _check_ranks(assignments: Sequence[Assignment]) -> None:
    """Confirm that every group has the ranks it needs; each group is named once, with the most that it needs."""
    short: dict[str, Assignment] = {}
    for assignment in assignments:
        worst = short.get(assignment.option)
        if assignment.rank > assignment.target.rank and (worst is None or assignment.rank > worst.rank):
            short[assignment.option] = assignment
    if short:
        raise InputError(
            expected=f"LoRA groups of the ranks that the concept in {_OPTION} has, "
            + ", ".join(f"{t.rank} in {t.network}.{t.layer}" for t in short.values()),
            got=", ".join(str(t.target.rank) for t in short.values()),
            remedy="set " + ", ".join(f"{option}.rank to {t.rank}" for option, t in short.items()),
        )


@torch.no_grad()
def _fill(assignment: Assignment) -> None:
    """Copy the updates into the first ranks; up is zero in the others, whose down stays as drawn."""
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
    """Confirm that every word of the concept is trained here: the same slot, branch, name and number of vectors."""
    expected = {word.key: (word.name, word.num_vectors) for word in concept.trigger_words()}
    trained = next((embedding.vocabulary.words for embedding in words.values()), ())
    here = {word.key: (word.name, word.num_vectors) for word in trained}
    if wrong := [key for key, word in expected.items() if here.get(key) != word]:
        differing = [f"{key} {expected[key]} where the training has {here.get(key, 'none')}" for key in sorted(wrong)]
        raise InputError(
            expected=f"the trigger words of the concept in {_OPTION}",
            got=f"(word, vectors) {'; '.join(differing)}",
            remedy=f"{_words_to_set(concept.metadata)}",
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


def _words_to_set(metadata: ConceptMetadata) -> str:
    """Say with which words a training can begin with a concept."""
    if None in metadata.num_vectors:
        return (
            "a training has one number of vectors for all words of a branch: start from a concept with one slot, "
            "imported without the other words"
        )
    names = {slot: (word, partner or f"{word}-neg") for slot, (word, partner) in metadata.words.items()}
    return (
        f"set training.words.names={to_json(names)} and training.words.num_vectors={to_json(metadata.num_vectors)}, "
        "and keep a guidance_scale above 1 for negative words"
    )


@torch.no_grad()
def _fill_words(words: Mapping[str, WordEmbedding], concept: Concept) -> dict[str, int]:
    taken: dict[str, int] = {}
    for encoder, embedding in words.items():
        part = words_part(encoder)
        stored = concept.part(part)
        for word, vectors in zip(embedding.vocabulary.words, embedding.vectors, strict=True):
            if word.key in stored:
                vectors.copy_(stored[word.key])
                taken[f"{part}.{word.key}"] = word.num_vectors
    return taken
