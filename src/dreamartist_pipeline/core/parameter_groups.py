"""All trainable parameters of a training, in groups with a common learning rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from dreamartist_pipeline.core.adapters import AdapterStack
from dreamartist_pipeline.core.branches import BRANCH_NAMES
from dreamartist_pipeline.core.concept import words_part
from dreamartist_pipeline.core.embeddings import WordEmbedding

ADAPTERS, WORDS = "adapters", "words"


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with a common learning rate: one LoRA group, or one trigger word.

    Attributes:
        name: as logged, e.g. `unet.0.positive` or `words.positive.pt1`.
        kind: `adapters` or `words`; each kind has its own optimizer.
        branch: `negative`, `positive` or `shared`.
        lr: the peak learning rate, including `scale_lr`.
        parameters: of the group.
        num_layers: number of adapted layers; 0 for words.
    """

    name: str
    kind: str
    branch: str
    lr: float
    parameters: tuple[nn.Parameter, ...] = field(repr=False)
    num_layers: int = 0

    @property
    def num_parameters(self) -> int:
        """The number of trainable scalars."""
        return sum(parameter.numel() for parameter in self.parameters)


def parameter_groups(
    stacks: Mapping[str, AdapterStack], words: Mapping[str, WordEmbedding], words_lr: float
) -> tuple[ParameterGroup, ...]:
    """Return one group per LoRA group of every network, and one per word and text encoder.

    Args:
        stacks: network -> its adapters.
        words: text encoder -> its trigger words.
        words_lr: peak learning rate of the words, including `scale_lr`.
    """
    groups = []
    for adapters in stacks.values():
        parameters, num_layers = adapters.parameters_by_group(), adapters.num_layers_by_group()
        groups += [
            ParameterGroup(g.name, ADAPTERS, g.branch, g.lr, tuple(parameters[g.name]), num_layers[g.name])
            for g in adapters.groups
        ]
    for encoder, embedding in words.items():
        groups += [
            ParameterGroup(f"{words_part(encoder)}.{word.key}", WORDS, BRANCH_NAMES[word.branch], words_lr, (vectors,))
            for word, vectors in zip(embedding.vocabulary.words, embedding.vectors, strict=True)
        ]
    return tuple(groups)


def branch_table(groups: Sequence[ParameterGroup], taken_over: Mapping[str, int] | None = None) -> str:
    """Return a text table of the parameter groups by branch: layers, LoRA parameters, word vectors, learning rates.

    Args:
        groups: all trainable parameters.
        taken_over: group -> number of its layers or vectors that are initialised from a concept; None without one.
    """
    width = max(24, *(len(group.name) + 2 for group in groups))
    head = f"{'branch':<10}{'group':<{width}}{'layers':>8}{'parameters':>12}{'vectors':>9}{'lr':>11}"
    head += f"{'from start':>12}" if taken_over is not None else ""
    lines = [head, "-" * len(head)]
    for group in sorted(groups, key=lambda g: g.branch):
        layers = str(group.num_layers) if group.kind == ADAPTERS else "-"
        vectors = str(sum(len(p) for p in group.parameters)) if group.kind == WORDS else "-"
        line = f"{group.branch:<10}{group.name:<{width}}{layers:>8}"
        line += f"{group.num_parameters:>12,}{vectors:>9}{group.lr:>11.2e}"
        lines.append(line + (f"{taken_over.get(group.name, 0):>12}" if taken_over is not None else ""))
    return "\n".join(lines)
