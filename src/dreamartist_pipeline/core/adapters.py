"""LoRA with one adapter per branch, in a single pass over the stacked batch (Hu et al. 2021; DreamArtist++).

Every adapted layer computes, for the rows x_b of each branch b,

    y_b = W x_b + bias + Σ_g (alpha_g / rank_g) · (up_g (down_g x_b) + bias_g)

where g runs over the groups that act on branch b, and bias_g is there only in groups that ask for one. The frozen
product is one call for all rows. The updates of all groups are one batched product over [num_branches, rows, ·]:
rows never mix adapters, forward or backward.
"""

from __future__ import annotations

import difflib
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from dreamartist_pipeline.core.branches import BRANCH_NAMES, branches, split
from dreamartist_pipeline.core.lora_factors import SHARED, LoRAFactors, learned_updates
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import ResolvedGroup

StartFactors = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]
"""(weight, rank) -> down and up"""

# ------------------------------------------------------------------------------------------------- layer selectors

_SELECTOR = re.compile(r"(?:cls\((?P<class>\w+)\):)?(?P<regex>re:)?(?P<name>.*)", re.DOTALL)


def select_layers(model: nn.Module, selectors: Sequence[str]) -> list[str]:
    r"""Return the sorted names of every Linear and Conv2d at or under a module that a selector matches.

    A selector is a module's name, or 're:' and a regular expression for `re.match`; 'cls(Name):' in front keeps only
    matched modules of that class. 're:.*\.attn.?$' thus takes to_q, to_k, to_v and to_out.0 of attn1 and attn2.

    Raises:
        InputError: a selector yields no layer; the message lists near names.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    selected: set[str] = set()
    for selector in selectors:
        matched = _matching_modules(modules, selector)
        layers = {
            name
            for parent in matched
            for name, module in modules.items()
            if isinstance(module, nn.Linear | nn.Conv2d) and f"{name}.".startswith(f"{parent}.")
        }
        if not layers:
            raise _nothing_selected(modules, selector, matched)
        selected |= layers
    return sorted(selected)


def _matching_modules(modules: Mapping[str, nn.Module], selector: str) -> list[str]:
    match = _SELECTOR.fullmatch(selector)
    assert match is not None  # every part is optional
    if match["regex"]:
        pattern = re.compile(match["name"])
        names = [name for name in modules if pattern.match(name)]
    else:
        names = [name for name in modules if name == match["name"]]
    return [name for name in names if match["class"] in (None, type(modules[name]).__name__)]


def _nothing_selected(modules: Mapping[str, nn.Module], selector: str, matched: Sequence[str]) -> InputError:
    """Return why a selector yields nothing: it matches no module, or none that has a Linear or Conv2d."""
    if matched:
        return InputError(
            expected="a selector that finds Linear or Conv2d layers",
            got=f"{selector!r}, which matches {', '.join(matched[:3])} without any such layer inside",
            remedy="select another module",
        )
    parts = {part for name in modules for part in name.split(".") if not part.isdigit()}
    known = {*modules, *parts, *(type(module).__name__ for module in modules.values())}
    sought = [selector.rpartition(":")[2], *re.findall(r"[A-Za-z_]\w+", selector)]
    near = [name for word in sought for name in difflib.get_close_matches(word, sorted(known), n=3)]
    names = near or sorted(parts)[:8]
    return InputError(
        expected="a selector that matches a module",
        got=f"{selector!r}, which matches none",
        remedy=f"correct it: near names are {', '.join(dict.fromkeys(names))}",
    )


# ------------------------------------------------------------------------------------------------- one group's update


def min_rank(group: ResolvedGroup, out_features: int, rank: int) -> int:
    """Return the active rank of a group at the noisiest timestep in a layer with `rank` ranks.

    Raises:
        InputError: it is above the rank itself.
    """
    if group.timestep_min_rank is None:
        return rank
    lowest = rank_in(group.timestep_min_rank, out_features)
    if lowest > rank:
        raise InputError(
            expected=(
                f"timestep_min_rank of {group.name} to be at most its rank {rank} in a layer of {out_features} outputs"
            ),
            got=f"{lowest}",
            remedy="lower it",
        )
    return lowest


def rank_in(rank: int | float, out_features: int) -> int:
    """Return a group's rank in a layer of so many outputs: 0.01875 gives 6 for 320."""
    return rank if isinstance(rank, int) else max(1, round(rank * out_features))


class LowRankUpdate(nn.Module):
    """What one group adds to one layer: (alpha / rank) · (up (down x) + bias).

    Attributes:
        index: the group's, among those of its network.
        group: the group.
        down: `[rank, in]`, or `[rank, in, kh, kw]` of a convolution.
        up: `[out, rank]`, or `[out, rank, 1, 1]`.
        bias: `[out]`, or None.
    """

    def __init__(
        self, index: int, group: ResolvedGroup, down: torch.Tensor, up: torch.Tensor, bias: torch.Tensor | None = None
    ) -> None:
        super().__init__()
        self.index, self.group = index, group
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)
        self.bias = None if bias is None else nn.Parameter(bias)

    @property
    def rank(self) -> int:
        """The number of rows of down."""
        return self.down.shape[0]

    @property
    def num_ranks(self) -> int:
        """The number of rows of `effective_down`."""
        return self.rank

    @property
    def scale(self) -> float:
        """The factor alpha / rank."""
        return self.group.alpha / self.rank

    @property
    def key(self) -> str:
        """The update's name inside its layer, "<group index>.<branch>"."""
        return f"{self.index}.{self.group.branch}"

    def effective_down(self) -> torch.Tensor:
        """Return the factor that is multiplied with the rows, `[num_ranks, in, ...]`."""
        return self.down

    def effective_up(self) -> torch.Tensor:
        """Return the factor that is multiplied with the ranks, `[out, num_ranks, ...]`."""
        return self.up

    def learned(self) -> dict[str, nn.Parameter]:
        """Return what trains, by name."""
        factors = {"down": self.down, "up": self.up}
        return factors if self.bias is None else factors | {"bias": self.bias}

    def stored(self) -> dict[str, torch.Tensor]:
        """Return the tensors of a plain `LowRankUpdate` that adds the same."""
        return dict(self.learned())


class PrincipalUpdate(LowRankUpdate):
    """An update whose factors start at the weight's principal part, which is taken away again where it started.

    With the largest singular values S and vectors U, V of the frozen weight, up₀ = U √S and down₀ = √S Vᵀ, the change
    is that of PiSSA (Meng et al. 2024), times alpha / rank,

        ΔW ∝ up · down − up₀ · down₀ = (up − up₀) · down + up₀ · (down − down₀).

    The right side, a LoRA of twice the rank, is what is multiplied and stored: it is exactly zero at the start, and
    keeps small changes of large factors in half precision. Dropout drops parts of the change, never of the frozen
    weight. Stored, it needs no decomposition to be used again, and other tools take it as it is.

    The reference toolkit (`low_rank_approximate` in `hcpdiff.utils`) puts U S into up and Vᵀ into down, cuts both off
    at their common 0.99 quantile, and takes nothing away, so that there the outputs change before the first step.

    Attributes:
        start_down, start_up: down₀ and up₀, frozen.
    """

    def __init__(
        self,
        index: int,
        group: ResolvedGroup,
        start_down: torch.Tensor,
        start_up: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> None:
        super().__init__(index, group, start_down.clone(), start_up.clone(), bias)
        self.start_down = nn.Buffer(start_down, persistent=False)
        self.start_up = nn.Buffer(start_up, persistent=False)

    @property
    def num_ranks(self) -> int:
        """Twice the rank."""
        return 2 * self.rank

    def effective_down(self) -> torch.Tensor:
        """Return down and, below, its distance from the start."""
        return torch.cat([self.down, self.down - self.start_down])

    def effective_up(self) -> torch.Tensor:
        """Return up's distance from the start and, beside it, the start."""
        return torch.cat([self.up - self.start_up, self.start_up], dim=1)

    def stored(self) -> dict[str, torch.Tensor]:
        """Return the plain update; it divides alpha by the doubled rank, so that up and bias are doubled as well."""
        factor = self.num_ranks / self.rank
        tensors = {"down": self.effective_down(), "up": self.effective_up() * factor}
        return tensors if self.bias is None else tensors | {"bias": self.bias * factor}


def _new_update(
    layer: nn.Linear | nn.Conv2d, index: int, group: ResolvedGroup, generator: torch.Generator, start: StartFactors
) -> LowRankUpdate:
    """Start an update at zero: down as a fresh nn.Linear, up zeros. Drawn on the CPU, so that devices agree.

    With svd_init, `start` gives both factors instead.
    """
    out_features = layer.weight.shape[0]
    rank = rank_in(group.rank, out_features)
    bias = torch.zeros(out_features) if group.bias else None
    if group.svd_init:
        _check_principal(layer, group, rank)
        return PrincipalUpdate(index, group, *start(layer.weight, rank), bias)
    down = torch.empty(rank, *layer.weight.shape[1:])
    nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
    up = torch.zeros(out_features, rank, *[1] * (layer.weight.dim() - 2))
    return LowRankUpdate(index, group, down, up, bias)


def _check_principal(layer: nn.Linear | nn.Conv2d, group: ResolvedGroup, rank: int) -> None:
    most = min(layer.weight.shape[0], layer.weight[0].numel())
    if rank > most:
        raise InputError(
            expected=(
                f"a rank of at most {most} for svd_init of {group.name} in a layer whose weight is "
                f"{tuple(layer.weight.shape)}"
            ),
            got=f"{rank}",
            remedy="lower it, or leave this layer out",
        )


def principal_factors(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return down = √S Vᵀ and up = U √S of the `rank` largest singular values; a kernel counts as a row.

    Decomposed in full, on the CPU: devices agree, no random numbers are drawn (torch.svd_lowrank takes the global
    generator's), and what comes out is the best approximation of this rank. A weight of 1280 × 1280 takes about one
    second of one core, 1280 × 5120 four.

    Args:
        weight: `[out, in]` or `[out, in, kh, kw]`; on the meta device only the shapes are found.
        rank: at most the number of singular values.
    """
    matrix = weight.detach().flatten(1).to(torch.promote_types(weight.dtype, torch.float32))
    left, values, right = torch.linalg.svd(matrix if matrix.is_meta else matrix.cpu(), full_matrices=False)
    root = values[:rank].sqrt()
    down, up = root[:, None] * right[:rank], left[:, :rank] * root  # [rank, in · kh · kw], [out, rank]
    return down.reshape(rank, *weight.shape[1:]), up.reshape(*up.shape, *[1] * (weight.dim() - 2)).contiguous()


# ------------------------------------------------------------------------------------------------- adapted layers


class BranchLoRALayer(nn.Module):
    """A frozen layer and the updates that act on it.

    Attributes:
        base: the frozen layer, untouched.
        updates: those of all groups, float32 (float64 under a float64 layer), cast to the rows' dtype where used.
        rows: for each branch of the stacked batch, the indices of the updates that act on its rows.
        missing_ranks: how many ranks a branch has less than the one with most, R.
        scale: alpha / rank times the branch's strength for each rank, `[num_branches, R, 1]`.
        keep: 1 − dropout for each rank, `[num_branches, 1, R]`.
        bias_scale: alpha / rank times the branch's strength for each bias that acts on a branch, and 0 for each that
            does not, `[num_branches, number of biases]`.
        noise_level: t / (T − 1) of each row, `[num_branches·B]`, as `set_noise_levels` left it.
        rank_ranges: index of each rank in its update, lowest active rank, and full rank, `[3, num_branches, 1, R]`.
        positions: of a row's rank activations, `(N / B,)` or `(h, w)`, as `AdapterStack.measuring` found them.
        mask: which rank activations are kept while training, as `draw_mask` left it.
    """

    base: nn.Linear | nn.Conv2d

    def __init__(
        self,
        base: nn.Linear | nn.Conv2d,
        updates: Sequence[LowRankUpdate],
        num_branches: int,
        strengths: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        """Freeze `base` and put the updates on its device.

        Args:
            base: the layer to adapt.
            updates: at least one.
            num_branches: of the batches to come.
            strengths: (negative, positive), a factor on the updates of a branch's rows.
        """
        super().__init__()
        self.base = base.requires_grad_(False)
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        self.updates: Sequence[LowRankUpdate] = nn.ModuleList(updates).to(base.weight.device, dtype)  # type: ignore[assignment]
        self.num_branches = num_branches
        self.rows = [
            [i for i, update in enumerate(updates) if update.group.branch in (BRANCH_NAMES[branch], SHARED)]
            for branch in branches(num_branches)
        ]
        totals = [sum(updates[i].num_ranks for i in row) for row in self.rows]
        self.missing_ranks = [max(totals) - total for total in totals]
        scales = [
            [updates[i].scale * strengths[branch] for i in row]
            for branch, row in zip(branches(num_branches), self.rows, strict=True)
        ]
        keeps = [[1 - updates[i].group.dropout for i in row] for row in self.rows]
        self.scale = nn.Buffer(self._per_rank(scales)[:, :, None], persistent=False)
        self.keep = nn.Buffer(self._per_rank(keeps)[:, None, :], persistent=False)
        self.has_bias = any(update.bias is not None for update in updates)
        self.bias_scale = nn.Buffer(self._bias_scale(scales), persistent=False)
        self.noise_level: torch.Tensor | None = None
        self.has_timestep_rank = any(update.group.timestep_min_rank is not None for update in updates)
        self.rank_ranges = nn.Buffer(self._rank_ranges(), persistent=False)
        self.has_dropout = any(update.group.dropout for update in updates)
        self.positions: tuple[int, ...] | None = None
        self.mask: torch.Tensor | None = None
        self.train(base.training)

    @property
    def weight(self) -> torch.Tensor:
        """The frozen weight, for code that asks a layer for its dtype or device."""
        return self.base.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The frozen bias."""
        return self.base.bias

    def _per_rank(self, values: Sequence[Sequence[float]]) -> torch.Tensor:
        """Repeat one value an update for each of its ranks: `[num_branches, R]`, 1 where zeros fill up."""
        repeated = [
            [value for i, value in zip(row, row_values, strict=True) for _ in range(self.updates[i].num_ranks)]
            + [1.0] * missing
            for row, row_values, missing in zip(self.rows, values, self.missing_ranks, strict=True)
        ]
        return torch.tensor(repeated, device=self.weight.device, dtype=self.updates[0].up.dtype)

    def _bias_scale(self, scales: Sequence[Sequence[float]]) -> torch.Tensor:
        with_bias = [i for i, update in enumerate(self.updates) if update.bias is not None]
        by_branch = [dict(zip(row, values, strict=True)) for row, values in zip(self.rows, scales, strict=True)]
        values = [[scale_of.get(i, 0.0) for i in with_bias] for scale_of in by_branch]
        return torch.tensor(values, device=self.weight.device, dtype=self.updates[0].up.dtype)

    def _learned_bias(self) -> torch.Tensor:
        """Return Σ scale · bias of the updates that act on each branch: `[num_branches, out]`."""
        return self.bias_scale @ torch.stack([update.bias for update in self.updates if update.bias is not None])

    def _rank_ranges(self) -> torch.Tensor:
        out_features = self.weight.shape[0]
        updates = [self.updates[i] for row in self.rows for i in row]
        lowest = {id(update): min_rank(update.group, out_features, update.num_ranks) for update in updates}
        index = [
            [float(k) for i in row for k in range(self.updates[i].num_ranks)] + [0.0] * missing
            for row, missing in zip(self.rows, self.missing_ranks, strict=True)
        ]
        ends = [
            self._per_rank([[float(end(self.updates[i])) for i in row] for row in self.rows])
            for end in (lambda update: lowest[id(update)], lambda update: update.num_ranks)
        ]
        return torch.stack([torch.tensor(index, device=ends[0].device, dtype=ends[0].dtype), *ends])[:, :, None]

    def _active(self, num_rows: int) -> torch.Tensor:
        """Return which ranks act on each row, 1 or 0: `[num_branches, B, R]`.

        Raises:
            RuntimeError: the timesteps of the rows are not known, or those of another batch.
        """
        if self.noise_level is None or len(self.noise_level) != num_rows:
            known = "none" if self.noise_level is None else len(self.noise_level)
            raise RuntimeError(
                f"expected the noise levels of {num_rows} rows, got {known}; call set_noise_levels first"
            )
        index, lowest, full = self.rank_ranges
        level = self.noise_level.to(full).view(self.num_branches, -1, 1)
        active: torch.Tensor = index < torch.round(full - (full - lowest) * level)
        return active.to(full.dtype)

    def draw_mask(self, num_rows: int, generator: torch.Generator) -> None:
        """Draw which rank activations are kept, each with its group's probability, for passes of `num_rows` a branch.

        The mask stays until the next call: gradient checkpointing computes a layer again during the backward pass.

        Raises:
            RuntimeError: the positions of a row are not known.
        """
        if self.positions is None:
            raise RuntimeError(
                "expected the positions of a row, got none; call the model within AdapterStack.measuring"
            )
        shape, keep = self._mask_layout(num_rows, self.positions)
        self.mask = torch.rand(shape, generator=generator, device=keep.device, dtype=keep.dtype) < keep

    def _mask_layout(self, num_rows: int, positions: tuple[int, ...]) -> tuple[tuple[int, ...], torch.Tensor]:
        """Return the shape of the mask and the probabilities, which broadcast to it."""
        raise NotImplementedError

    def _drop(self, hidden: torch.Tensor, keep: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Drop rank activations by the mask and scale up the others; only while training.

        Dropping between down and up follows kohya's `network_dropout`.

        Raises:
            RuntimeError: there is no mask, or that of another batch.
        """
        if not (self.training and self.has_dropout):
            return hidden
        if mask is None or mask.shape != hidden.shape:
            drawn = "none" if mask is None else tuple(mask.shape)
            raise RuntimeError(f"expected a dropout mask of {tuple(hidden.shape)}, got {drawn}; call draw_masks first")
        return hidden * (mask / keep).to(hidden.dtype)


class BranchLoRALinear(BranchLoRALayer):
    """y_b = W x_b + bias + up_b (down_b x_b) + bias_b: the stacked form, one batched product for all branches.

    The updates of one branch are concatenated along the rank, which adds them up. Branches of unequal total rank are
    filled up with zeros, which are no parameters.
    """

    base: nn.Linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `[num_branches·B, ..., in]` to `[num_branches·B, ..., out]`.

        Raises:
            ValueError: the rows cannot be shared out among the branches.
        """
        if x.shape[0] % self.num_branches:
            raise ValueError(f"expected the rows of {self.num_branches} branches, got {x.shape[0]} rows")
        y = self.base(x)
        rows = x.reshape(self.num_branches, -1, x.shape[-1])  # [nb, N, in]
        down = self._stacked([update.effective_down() for update in self.updates])  # [nb, R, in]
        up = self._stacked([update.effective_up().mT for update in self.updates]) * self.scale  # [nb, R, out]
        hidden = self._drop(torch.bmm(rows, down.mT.to(x.dtype)), self.keep, self.mask)  # [nb, N, R]
        if self.has_timestep_rank:
            active = self._active(x.shape[0])
            hidden = hidden * active.repeat_interleave(hidden.shape[1] // active.shape[1], dim=1).to(x.dtype)
        updated = torch.baddbmm(y.reshape(self.num_branches, -1, y.shape[-1]), hidden, up.to(x.dtype))
        if self.has_bias:
            updated = updated + self._learned_bias()[:, None].to(updated.dtype)  # [nb, 1, out]
        return updated.reshape(y.shape)

    def _mask_layout(self, num_rows: int, positions: tuple[int, ...]) -> tuple[tuple[int, ...], torch.Tensor]:
        return (self.num_branches, num_rows * math.prod(positions), self.keep.shape[-1]), self.keep  # [nb, N, R]

    def _stacked(self, factors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Stack factors `[rank, width]` by branch: `[num_branches, R, width]`, zeros where a branch has fewer ranks."""
        parts: list[torch.Tensor] = []
        for row, missing in zip(self.rows, self.missing_ranks, strict=True):
            parts += [factors[i] for i in row]
            if missing:
                parts.append(factors[0].new_zeros(missing, factors[0].shape[-1]))
        return torch.cat(parts).view(self.num_branches, -1, factors[0].shape[-1])


class BranchLoRAConv2d(BranchLoRALayer):
    """The same for a convolution: down has its kernel, stride and padding, up is 1 × 1; one branch after the other."""

    base: nn.Conv2d

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `[num_branches·B, in, H, W]` to `[num_branches·B, out, h, w]`.

        Raises:
            ValueError: the rows cannot be shared out among the branches.
        """
        branch_rows = zip(split(x, self.num_branches), split(self.base(x), self.num_branches), strict=True)
        biases = self._learned_bias().to(x.dtype) if self.has_bias else [None] * self.num_branches
        outputs = [
            y + self._update(branch, rows, biases[branch]) if self.rows[branch] else y
            for branch, (rows, y) in enumerate(branch_rows)
        ]
        return torch.cat(outputs)

    def _mask_layout(self, num_rows: int, positions: tuple[int, ...]) -> tuple[tuple[int, ...], torch.Tensor]:
        keep = self.keep[..., None, None]  # [nb, 1, R, 1, 1]
        return (self.num_branches, num_rows, keep.shape[2], *positions), keep

    def _update(self, row: int, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return the update of one branch's rows, `[B, in, H, W]` to `[B, out, h, w]`."""
        updates = [self.updates[i] for i in self.rows[row]]
        down = torch.cat([update.effective_down() for update in updates])  # [R, in, kh, kw]
        scale, keep = self.scale[row, : len(down), :, None], self.keep[row, 0, : len(down), None, None]  # [R, 1, 1]
        up = torch.cat([update.effective_up() for update in updates], dim=1) * scale  # [out, R, 1, 1]
        base = self.base
        hidden = F.conv2d(x, down.to(x.dtype), None, base.stride, base.padding, base.dilation)  # [B, R, h, w]
        hidden = self._drop(hidden, keep, None if self.mask is None else self.mask[row, :, : len(down)])
        if self.has_timestep_rank:
            active = self._active(len(x) * self.num_branches)[row, :, : len(down)]
            hidden = hidden * active[..., None, None].to(x.dtype)
        return F.conv2d(hidden, up.to(x.dtype), bias)


def set_noise_levels(model: nn.Module, levels: torch.Tensor) -> None:
    """Tell the layers whose active rank depends on it each row's t / (T − 1), `[num_branches·B]`.

    The levels stay until the next call: gradient checkpointing computes a layer again during the backward pass, when a
    context around the forward pass would have ended.
    """
    for module in model.modules():
        if isinstance(module, BranchLoRALayer) and module.has_timestep_rank:
            module.noise_level = levels


# ------------------------------------------------------------------------------------------------- the stack


@dataclass(frozen=True)
class AdapterStack:
    """The adapters of one model: its adapted layers by name, and the groups they belong to.

    `parameters_by_group` and `parameters_by_branch` list parameters by layer name, then group.
    """

    layers: dict[str, BranchLoRALayer]
    groups: tuple[ResolvedGroup, ...]

    def parameters_by_group(self) -> dict[str, list[nn.Parameter]]:
        """Return the parameters of each group, by its name."""
        found: dict[str, list[nn.Parameter]] = {group.name: [] for group in self.groups}
        for _, update in self._updates():
            found[update.group.name] += update.learned().values()
        return found

    def parameters_by_branch(self) -> dict[str, list[nn.Parameter]]:
        """Return the parameters of "negative", "positive" and "shared" groups."""
        found: dict[str, list[nn.Parameter]] = {name: [] for name in (*BRANCH_NAMES, SHARED)}
        for _, update in self._updates():
            found[update.group.branch] += update.learned().values()
        return found

    def num_layers_by_group(self) -> dict[str, int]:
        """Return how many layers each group sits on, by its name."""
        found = {group.name: 0 for group in self.groups}
        for _, update in self._updates():
            found[update.group.name] += 1
        return found

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Copy all adapters: "<layer>.<group index>.<branch>.<down|up|bias>" -> float32, contiguous, on the CPU.

        alpha is not folded in; it belongs into the metadata. Groups with svd_init have twice their rank here, see
        `PrincipalUpdate`.
        """
        return {
            f"{layer}.{update.key}.{name}": tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
            for layer, update in self._updates()
            for name, tensor in update.stored().items()
        }

    def train(self, mode: bool = True) -> None:
        """Switch dropout on or off; the frozen layers keep their mode."""
        for layer in self.layers.values():
            layer.training = mode

    @property
    def has_dropout(self) -> bool:
        """Whether any layer has dropout."""
        return any(layer.has_dropout for layer in self.layers.values())

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Let a pass of the model within, without dropout, find out the shapes of the dropout masks."""
        hooks = [layer.register_forward_hook(_note_positions) for layer in self.layers.values() if layer.has_dropout]
        modes = [layer.training for layer in self.layers.values()]
        self.train(False)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for layer, mode in zip(self.layers.values(), modes, strict=True):
                layer.training = mode

    def draw_masks(self, num_rows: int, generator: torch.Generator) -> None:
        """Draw the dropout masks of the next passes; without them, a layer with dropout refuses to train.

        Args:
            num_rows: of each branch in those passes.
            generator: on the layers' device; draws layer after layer.

        Raises:
            RuntimeError: no pass has been measured.
        """
        for layer in self.layers.values():
            if layer.has_dropout:
                layer.draw_mask(num_rows, generator)

    def remove_from(self, model: nn.Module) -> None:
        """Put the frozen layers back into the model."""
        for name, layer in self.layers.items():
            model.set_submodule(name, layer.base)

    def _updates(self) -> list[tuple[str, LowRankUpdate]]:
        return [(name, update) for name, layer in self.layers.items() for update in layer.updates]


def _note_positions(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    assert isinstance(layer, BranchLoRALayer)
    layer.positions = tuple(output.shape[2:] if isinstance(layer, BranchLoRAConv2d) else output.shape[1:-1])


def inject(
    model: nn.Module, groups: Sequence[ResolvedGroup], num_branches: int, generator: torch.Generator
) -> AdapterStack:
    """Replace the layers that the groups select by adapted ones, in place; the model's outputs stay the same.

    New layers are in the mode (training or not) of the ones they replace; see `AdapterStack.train` for dropout.

    Args:
        model: frozen base model without adapters.
        groups: LoRA groups; several may select one layer, their updates add up.
        num_branches: of the batches to come; with 1, all rows are the positive branch's.
        generator: CPU generator of the initial values.

    Raises:
        InputError: a selector yields no layer, a convolution is grouped, or svd_init asks for more ranks than a weight
            has.
    """
    planned: dict[str, list[LowRankUpdate]] = {}
    start = functools.cache(principal_factors)  # the groups of both branches start alike
    for index, group in enumerate(groups):
        for name in select_layers(model, group.layers):
            layer = _plain_layer(model, name)
            planned.setdefault(name, []).append(_new_update(layer, index, group, generator, start))
    return _install(model, planned, groups, num_branches, (1.0, 1.0))


def load_adapters(
    model: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    groups: Sequence[ResolvedGroup],
    num_branches: int,
    strengths: tuple[float, float] = (1.0, 1.0),
) -> AdapterStack:
    """Inject adapters that `AdapterStack.state_dict` saved. Layers and ranks are those of the tensors.

    Args:
        model: frozen base model without adapters.
        tensors: as saved; they are copied.
        groups: those they were trained as, for alpha and branch.
        num_branches: of the batches to come.
        strengths: (negative, positive), a factor on the updates of a branch's rows; both act on a shared group.

    Raises:
        InputError: a key, shape or group that does not belong to this model and these groups.
    """
    planned: dict[str, list[LowRankUpdate]] = {}
    for learned in learned_updates(tensors, groups):
        factors = learned.factors
        _check_shapes(learned.layer, _plain_layer(model, learned.layer), factors)
        down, up = factors.down.detach().clone(), factors.up.detach().clone()
        bias = None if factors.bias is None else factors.bias.detach().clone()
        planned.setdefault(learned.layer, []).append(LowRankUpdate(learned.index, learned.group, down, up, bias))
    return _install(model, planned, groups, num_branches, strengths)


def _install(
    model: nn.Module,
    planned: Mapping[str, Sequence[LowRankUpdate]],
    groups: Sequence[ResolvedGroup],
    num_branches: int,
    strengths: tuple[float, float],
) -> AdapterStack:
    layers: dict[str, BranchLoRALayer] = {}
    for name in sorted(planned):
        base = _plain_layer(model, name)
        kind = BranchLoRALinear if isinstance(base, nn.Linear) else BranchLoRAConv2d
        layers[name] = kind(base, planned[name], num_branches, strengths)
        model.set_submodule(name, layers[name])
    return AdapterStack(layers, tuple(groups))


def _plain_layer(model: nn.Module, name: str) -> nn.Linear | nn.Conv2d:
    """Return a layer that can be adapted.

    Raises:
        InputError: there is none of that name, it is adapted already, or its convolution is grouped.
    """
    try:
        layer, parent = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
    except AttributeError:
        layer, parent = None, None
    adapted = isinstance(layer, BranchLoRALayer) or isinstance(parent, BranchLoRALayer)
    if adapted or not isinstance(layer, nn.Linear | nn.Conv2d):
        got = "one that has adapters already" if adapted else "no such layer"
        raise InputError(
            expected=f"a plain Linear or Conv2d {name!r}", got=f"{got}", remedy="start from the base model"
        )
    if isinstance(layer, nn.Conv2d) and (layer.groups != 1 or layer.padding_mode != "zeros"):
        raise InputError(
            expected=f"an ordinary convolution {name!r}",
            got=f"groups={layer.groups} and padding_mode={layer.padding_mode!r}",
            remedy="leave it out of the LoRA layers",
        )
    return layer


def _check_shapes(name: str, layer: nn.Linear | nn.Conv2d, factors: LoRAFactors) -> None:
    rank, out_features = factors.rank, layer.weight.shape[0]
    down, up = (rank, *layer.weight.shape[1:]), (out_features, rank, *[1] * (layer.weight.dim() - 2))
    if factors.down.shape != down or factors.up.shape != up:
        raise InputError(
            expected=f"adapters of shapes {down} and {up} for {name}",
            got=f"{tuple(factors.down.shape)} and {tuple(factors.up.shape)}",
            remedy="load a concept that was trained on this base model",
        )
