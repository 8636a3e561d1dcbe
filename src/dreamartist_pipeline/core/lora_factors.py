"""The factors of a LoRA update, and the check that they are complete."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from dreamartist_pipeline.core.branches import BRANCH_NAMES
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import ResolvedGroup

SHARED = "shared"
"""`branch` of a group that acts on both branches."""


@dataclass(frozen=True)
class LoRAFactors:
    """The update of one layer, ΔW = scale · up · down and Δbias = scale · bias.

    Attributes:
        down: `[rank, in]`, or `[rank, in, kh, kw]` for a convolution.
        up: `[out, rank]`, or `[out, rank, 1, 1]`.
        scale: alpha / rank.
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
        """Return `up` for a reader that multiplies by `scale`, such that the update is the same."""
        return self.up * (self.scale / scale)

    def bias_for_scale(self, scale: float) -> torch.Tensor:
        """Return the bias `[out]` for a reader that multiplies by `scale`; zeros if there is no bias."""
        bias = self.up.new_zeros(len(self.up)) if self.bias is None else self.bias
        return bias * (self.scale / scale)

    def balanced_for_scale(self, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (down, up) for a reader that multiplies by `scale`, with balanced norms.

        After a short training or with a small alpha, `up` is so small that it loses precision in float16. Each rank has
        its own factor, a power of two, so that the update is bit-equal.
        """
        down, up = self.down, self.up_for_scale(scale)
        norms = down.flatten(1).norm(dim=1), up.flatten(1).norm(dim=0)  # [rank] each
        exponents = (norms[1] / norms[0]).log2().div(2).round()
        factors = torch.exp2(exponents.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0))  # 1 for a rank that is zero
        return down * factors.view(-1, *[1] * (down.dim() - 1)), up / factors.view(-1, *[1] * (up.dim() - 2))

    def update(self) -> torch.Tensor:
        """Return ΔW as a matrix `[out, in · kh · kw]`."""
        return self.up.flatten(1) @ self.down.flatten(1) * self.scale


def check_complete(tensors: Mapping[str, torch.Tensor], layer: str, origin: str) -> None:
    """Check that tensors are the factors of one update: down and up of one rank, and optionally a bias and an alpha.

    Args:
        tensors: "down", "up", and optionally "bias" and "alpha".
        layer: name of the layer, for the message.
        origin: name of the file or concept, for the message.

    Raises:
        InputError: a tensor is missing, or the shapes do not match.
    """
    complete = {"down", "up"} <= tensors.keys() and min(tensors["down"].dim(), tensors["up"].dim()) >= 2
    complete = complete and tensors["down"].shape[0] == tensors["up"].shape[1] > 0
    complete = complete and ("bias" not in tensors or tensors["bias"].shape == tensors["up"].shape[:1])
    if not complete or ("alpha" in tensors and tensors["alpha"].numel() != 1):
        shapes = {name: tuple(tensor.shape) for name, tensor in sorted(tensors.items())}
        raise InputError(
            expected=(
                f"{origin} to hold down [rank, in], up [out, rank] and at most one alpha (a bias: [out]) for {layer}"
            ),
            got=str(shapes),
            remedy="the file is incomplete: make or download it again",
        )


# ------------------------------------------------------------------------------------------------- in a concept


@dataclass(frozen=True)
class LearnedUpdate:
    """The update of one group of a concept in one layer.

    Attributes:
        layer: its name.
        index: position of the group among those of its network.
        group: the LoRA group.
        factors: the update.
    """

    layer: str
    index: int
    group: ResolvedGroup
    factors: LoRAFactors


_KEY = re.compile(
    rf"(?P<layer>.+)\.(?P<index>\d+)\.(?P<branch>{'|'.join((*BRANCH_NAMES, SHARED))})\.(?P<name>down|up|bias)"
)


def learned_updates(tensors: Mapping[str, torch.Tensor], groups: Sequence[ResolvedGroup]) -> tuple[LearnedUpdate, ...]:
    """Return the updates of a network, sorted by layer, group and branch.

    Args:
        tensors: "<layer>.<group index>.<branch>.<down|up|bias>" -> tensor, as in `AdapterStack.state_dict`.
        groups: of the network, for alpha, branch and bias.

    Raises:
        InputError: a tensor has another name or no group, or an update is incomplete.
    """
    found: dict[tuple[str, int, str], dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise InputError(
                expected="adapter tensors named '<layer>.<group>.<branch>.<down|up|bias>'",
                got=f"{key!r}",
                remedy="load a concept that this project saved",
            )
        found.setdefault((match["layer"], int(match["index"]), match["branch"]), {})[match["name"]] = tensor
    return tuple(_learned(*key, parts, groups) for key, parts in sorted(found.items()))


def _learned(
    layer: str, index: int, branch: str, parts: Mapping[str, torch.Tensor], groups: Sequence[ResolvedGroup]
) -> LearnedUpdate:
    group = groups[index] if index < len(groups) else None
    if group is None or group.branch != branch or ("bias" in parts) != group.bias:
        raise InputError(
            expected=(
                f"the tensors of one of {len(groups)} LoRA groups, {[group.name for group in groups]}, with a "
                "bias where the group has one"
            ),
            got=f"{sorted(parts)} of {branch} group {index} in {layer}",
            remedy="the file is incomplete: train the concept again",
        )
    check_complete(parts, layer, "the concept")
    down = parts["down"]
    return LearnedUpdate(
        layer, index, group, LoRAFactors(down, parts["up"], group.alpha / len(down), parts.get("bias"))
    )
