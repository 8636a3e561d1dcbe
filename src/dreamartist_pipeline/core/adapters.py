"""LoRA with one adapter per branch, in a single pass over the stacked batch (Hu et al. 2021; DreamArtist++).

Every adapted layer computes, for the rows x_b of each branch b,

    y_b = W x_b + bias + Σ_g (alpha_g / rank_g) · (up_g (down_g x_b) + bias_g)

where g runs over the groups of branch b, and bias_g exists only in groups with `bias: true`. The frozen layer is
applied once to all rows, and the updates of all groups are one batched product over the branches (`branch_products`):
rows never mix adapters, forward or backward.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn

from dreamartist_pipeline.core.branch_products import ConvGeometry, ConvProduct, LinearProduct, MergedLayer
from dreamartist_pipeline.core.branches import BRANCH_NAMES, branches
from dreamartist_pipeline.core.factor_packs import FactorLayout, PackedFactors, pack_factors, pack_flat
from dreamartist_pipeline.core.lora_factors import SHARED, LearnedUpdate, LoRAFactors, learned_updates
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.layer_selectors import parse_selector
from dreamartist_pipeline.params import ResolvedGroup

InitialFactors = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]
"""(weight, rank) -> down, up"""

# ------------------------------------------------------------------------------------------------- layer selectors


def select_layers(model: nn.Module, selectors: Sequence[str]) -> list[str]:
    r"""Return the sorted names of every Linear and Conv2d at or under a module that a selector matches.

    See layer_selectors.py. Example: 're:.*\.attn.?$' selects to_q, to_k, to_v, to_out.0 of attn1, attn2.

    Raises:
        InputError: a selector matches no layer; the message lists near names.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    selected: set[str] = set()
    for selector in selectors:
        parsed = parse_selector(selector)
        matched = {name for name, module in modules.items() if parsed.matches(name, type(module).__name__)}
        layers = {
            name
            for name, module in modules.items()
            if isinstance(module, nn.Linear | nn.Conv2d) and not matched.isdisjoint(_with_parents(name))
        }
        if not layers:
            raise _nothing_selected(modules, selector, matched)
        selected |= layers
    return sorted(selected)


def _with_parents(name: str) -> Iterator[str]:
    """Return the names of the modules that hold a module, the outermost first, and then its own."""
    return itertools.accumulate(name.split("."), "{}.{}".format)


def _nothing_selected(modules: Mapping[str, nn.Module], selector: str, matched: Set[str]) -> InputError:
    """Return the error for a selector that matches no module, or only modules without a Linear or Conv2d."""
    if matched:
        return InputError(
            expected="a selector that matches Linear or Conv2d layers",
            got=f"{selector!r}, which matches only {', '.join(sorted(matched)[:3])}",
            remedy="select another module",
        )
    parts = {part for name in modules for part in name.split(".") if not part.isdigit()}
    known = {*modules, *parts, *(type(module).__name__ for module in modules.values())}
    words = [selector.rpartition(":")[2], *re.findall(r"[A-Za-z_]\w+", selector)]
    similar = [name for word in words for name in difflib.get_close_matches(word, sorted(known), n=3)]
    return InputError(
        expected="a selector that matches a module",
        got=f"{selector!r}, which matches none",
        remedy=f"correct it; near names are {', '.join(dict.fromkeys(similar or sorted(parts)[:8]))}",
    )


# ------------------------------------------------------------------------------------------------- one group's update


def min_rank(group: ResolvedGroup, out_features: int, rank: int) -> int:
    """Return the active rank of a group at the last timestep, in a layer where its full rank is `rank`.

    Raises:
        InputError: timestep_min_rank exceeds the rank.
    """
    if group.timestep_min_rank is None:
        return rank
    lowest = rank_in(group.timestep_min_rank, out_features)
    if lowest > rank:
        raise InputError(
            expected=f"timestep_min_rank of {group.name} at most its rank {rank} in a layer of {out_features} outputs",
            got=f"{lowest}",
            remedy="lower it",
        )
    return lowest


def rank_in(rank: int | float, out_features: int) -> int:
    """Return the rank in a layer with `out_features` outputs; a rank of 0.01875 is 6 for 320 outputs."""
    return rank if isinstance(rank, int) else max(1, round(rank * out_features))


class LowRankUpdate(nn.Module):
    """The update of one group in one layer: (alpha / rank) · (up (down x) + bias).

    Attributes:
        index: position of the group among those of its network.
        group: the LoRA group.
        down: `[rank, in]`, or `[rank, in, kh, kw]` for a convolution.
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
    def num_gated(self) -> int:
        """The number of ranks that timestep_min_rank counts: with orthogonal_init, two rows of down are one of them."""
        return self.num_ranks // (2 if self.group.orthogonal_init else 1)

    @property
    def scale(self) -> float:
        """The factor alpha / rank."""
        return self.group.alpha / self.rank

    @property
    def key(self) -> str:
        """The name of the update within its layer, "<group index>.<branch>"."""
        return f"{self.index}.{self.group.branch}"

    def effective_down(self) -> torch.Tensor:
        """Return the down projection that is applied, `[num_ranks, in, ...]`."""
        return self.down

    def effective_up(self) -> torch.Tensor:
        """Return the up projection that is applied, `[out, num_ranks, ...]`."""
        return self.up

    def learned(self) -> dict[str, nn.Parameter]:
        """Return the trainable parameters by name."""
        factors = {"down": self.down, "up": self.up}
        return factors if self.bias is None else factors | {"bias": self.bias}

    def stored(self) -> dict[str, torch.Tensor]:
        """Return the tensors of the equivalent plain `LowRankUpdate`."""
        return dict(self.learned())


class PrincipalUpdate(LowRankUpdate):
    """An update whose factors start at the principal singular vectors of the weight, minus this initial product.

    With the largest singular values S and vectors U, V of the frozen weight, up₀ = U √S and down₀ = √S Vᵀ, the change
    of the weight is that of PiSSA (Meng et al. 2024), times alpha / rank:

        ΔW ∝ up · down − up₀ · down₀ = (up − up₀) · down + up₀ · (down − down₀).

    The right-hand side, a LoRA of twice the rank, is applied and stored. It is exactly zero at initialisation, keeps
    small changes of large factors in half precision, and is a plain LoRA for other tools. Dropout acts on the change
    only, not on the frozen weight.

    Deviation from the reference toolkit (`low_rank_approximate` in `hcpdiff.utils`), which uses up₀ = U S, down₀ = Vᵀ,
    clamps both to their common 0.99 quantile, and subtracts nothing, so that the outputs change before the first step.

    Attributes:
        start_down: down₀, frozen.
        start_up: up₀, frozen.
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

    def trained_down(self) -> torch.Tensor:
        """Return down as the learned parameters are now, `[rank, in, ...]`."""
        return self.down

    def effective_down(self) -> torch.Tensor:
        """Return [down; down − down₀]."""
        down = self.trained_down()
        return torch.cat([down, down - self.start_down])

    def effective_up(self) -> torch.Tensor:
        """Return [up − up₀, up₀]."""
        return torch.cat([self.up - self.start_up, self.start_up], dim=1)

    def stored(self) -> dict[str, torch.Tensor]:
        """Return the plain update of twice the rank; up and bias are doubled, because alpha / rank is halved."""
        factor = self.num_ranks / self.rank
        tensors = {"down": self.effective_down(), "up": self.effective_up() * factor}
        return tensors if self.bias is None else tensors | {"bias": self.bias * factor}


class OrthogonalUpdate(PrincipalUpdate):
    """An update of three factors that start at singular vectors and values (Ortho-LoRA; Soboleva et al. 2025, eq. 5-7).

    With orthonormal rows A₀ and columns B₀, all of A, S and B are learned, and M_t selects the ranks of a timestep:

        ΔW_t ∝ B · S · M_t · A − B₀ · S₀ · M_t · A₀.

    It is a `PrincipalUpdate` with up = B and down = S · A, so that it is exactly zero at initialisation for every t,
    and is stored as a plain LoRA of twice the rank. Orthogonal ranks make M_t leave out what the others do not contain.

    Deviations: the paper has no alpha, which is that of alpha = rank here; convolutions are flattened to matrices.

    Attributes:
        values: S, `[rank]`.
    """

    def __init__(
        self, index: int, group: ResolvedGroup, start: OrthogonalFactors, bias: torch.Tensor | None = None
    ) -> None:
        super().__init__(index, group, start.down, start.up, bias)
        self.values = nn.Parameter(start.values.clone())
        self.start_down = nn.Buffer(self.trained_down().detach(), persistent=False)

    def trained_down(self) -> torch.Tensor:
        """Return S · A."""
        return self.values.view(-1, *[1] * (self.down.dim() - 1)) * self.down

    def learned(self) -> dict[str, nn.Parameter]:
        """Return A, B, S and the bias."""
        return super().learned() | {"values": self.values}


def _new_update(
    layer: nn.Linear | nn.Conv2d,
    index: int,
    group: ResolvedGroup,
    generator: torch.Generator,
    principal: InitialFactors,
) -> LowRankUpdate:
    """Return a zero update: down initialised as in nn.Linear, on the CPU for all devices alike, and up = 0.

    With svd_init, `principal` returns both factors instead; with orthogonal_init, they are `orthogonal_factors`.
    """
    out_features = layer.weight.shape[0]
    rank = rank_in(group.rank, out_features)
    bias = torch.zeros(out_features) if group.bias else None
    if group.svd_init:
        _check_svd_rank(layer, group, rank, "svd_init")
        return PrincipalUpdate(index, group, *principal(layer.weight, rank), bias)
    if group.orthogonal_init is not None:
        _check_svd_rank(layer, group, rank, "orthogonal_init")
        is_random = group.orthogonal_init == "random"
        return OrthogonalUpdate(
            index, group, orthogonal_factors(layer.weight, rank, generator if is_random else None), bias
        )
    down = torch.empty(rank, *layer.weight.shape[1:])
    nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
    up = torch.zeros(out_features, rank, *[1] * (layer.weight.dim() - 2))
    return LowRankUpdate(index, group, down, up, bias)


def _check_svd_rank(layer: nn.Linear | nn.Conv2d, group: ResolvedGroup, rank: int, option: str) -> None:
    max_rank = min(layer.weight.shape[0], layer.weight[0].numel())
    if rank > max_rank:
        raise InputError(
            expected=(
                f"a rank of at most {max_rank} for {option} of {group.name} in a layer with weight "
                f"{tuple(layer.weight.shape)}"
            ),
            got=f"{rank}",
            remedy="lower it, or exclude this layer",
        )


def principal_factors(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return down = √S Vᵀ and up = U √S of the `rank` largest singular values; kernels are flattened to rows.

    A full SVD on the CPU is independent of the device, is the best approximation of this rank, and draws no random
    numbers, unlike torch.svd_lowrank. It takes about 1 s on one core for a weight of 1280 × 1280, 4 s for 1280 × 5120.

    Args:
        weight: `[out, in]` or `[out, in, kh, kw]`; on the meta device, only shapes are computed.
        rank: at most the number of singular values.
    """
    left, values, right = _singular_vectors(_exact_matrix(weight))
    root = values[:rank].sqrt()
    return _as_factors(weight, root[:, None] * right[:rank], left[:, :rank] * root)


@dataclass(frozen=True)
class OrthogonalFactors:
    """The initial factors of Ortho-LoRA.

    Attributes:
        down: A₀, with orthonormal rows: `[rank, in]`, or `[rank, in, kh, kw]`.
        values: S₀, singular values in descending order, `[rank]`.
        up: B₀, with orthonormal columns: `[out, rank]`, or `[out, rank, 1, 1]`.
    """

    down: torch.Tensor
    values: torch.Tensor
    up: torch.Tensor


def orthogonal_factors(weight: torch.Tensor, rank: int, generator: torch.Generator | None) -> OrthogonalFactors:
    """Return singular vectors and values: of a random matrix the smallest, of the weight itself the largest.

    The matrix has normal values of standard deviation 1 / rank, as in the code of the paper, which compares these and
    recommends the smallest ones of a random matrix: large singular values overfit, and those at the end of a weight's
    spectrum are almost zero.

    Args:
        weight: `[out, in]` or `[out, in, kh, kw]`; on the meta device, only shapes are computed.
        rank: at most the number of singular values.
        generator: CPU generator of the random matrix; None for the weight.
    """
    matrix = _exact_matrix(weight)
    if generator is not None and not matrix.is_meta:
        matrix = torch.randn(matrix.shape, generator=generator, dtype=matrix.dtype) / rank
    left, values, right = _singular_vectors(matrix)
    chosen = slice(rank) if generator is None else slice(len(values) - rank, None)
    down, up = _as_factors(weight, right[chosen], left[:, chosen])
    return OrthogonalFactors(down, values[chosen], up)


def _exact_matrix(weight: torch.Tensor) -> torch.Tensor:
    """Return a weight as a matrix `[out, in · kh · kw]`, in float32 at least."""
    return weight.detach().flatten(1).to(torch.promote_types(weight.dtype, torch.float32))


def _singular_vectors(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return U `[out, m]`, S `[m]` and Vᵀ `[m, in]`, on the CPU unless the matrix is on the meta device."""
    left, values, right = torch.linalg.svd(matrix if matrix.is_meta else matrix.cpu(), full_matrices=False)
    return left, values, right


def _as_factors(weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return matrices `[rank, in · kh · kw]` and `[out, rank]` in the shapes of down and up for this weight."""
    shape = (*up.shape, *[1] * (weight.dim() - 2))
    return down.reshape(len(down), *weight.shape[1:]).contiguous(), up.reshape(shape).contiguous()


# ------------------------------------------------------------------------------------------------- adapted layers


class BranchLoRALayer(nn.Module):
    """A frozen layer with the updates of all groups.

    R is the largest total rank of a branch; the others are padded to R.

    Attributes:
        base: the frozen layer.
        updates: float32 (float64 for a float64 layer).
        branch_updates: for each branch of the stacked batch, the indices of its updates.
        layout: of the packed factors.
        packed: the factors of all forward passes within `AdapterStack.packed`; None outside.
        merged: the merged weights of all forward passes within `AdapterStack.merged`; None outside.
        keep: 1 − dropout of each rank, `[num_branches, 1, R]`.
        noise_level: t / (T − 1) of each row, `[num_branches·B]`; see `AdapterStack.set_noise_levels`.
        rank_ranges: index of each rank in its update, lowest active rank, and full rank, `[3, num_branches, 1, R]`, as
            timestep_min_rank counts them.
        positions: shape of the rank activations of a row, `(N / B,)` or `(h, w)`; see `AdapterStack.measuring`.
        mask: dropout mask of the rank activations; see `set_mask`.
    """

    base: nn.Linear | nn.Conv2d

    def __init__(
        self,
        base: nn.Linear | nn.Conv2d,
        updates: Sequence[LowRankUpdate],
        num_branches: int,
        strengths: tuple[float, float] = (1.0, 1.0),
        geometry: ConvGeometry | None = None,
    ) -> None:
        """Freeze `base` and move the updates to its device.

        Args:
            base: the layer to adapt.
            updates: at least one.
            num_branches: of the stacked batch.
            strengths: (negative, positive), a factor on all updates of a branch.
            geometry: of a convolution.
        """
        super().__init__()
        self.base = base.requires_grad_(False)
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        self.updates: Sequence[LowRankUpdate] = nn.ModuleList(updates).to(base.weight.device, dtype)  # type: ignore[assignment]
        self.num_branches = num_branches
        names = [BRANCH_NAMES[branch] for branch in branches(num_branches)]
        self.branch_updates = [[i for i, u in enumerate(updates) if u.group.branch in (name, SHARED)] for name in names]
        totals = [sum(updates[i].num_ranks for i in row) for row in self.branch_updates]
        self.missing_ranks = [max(totals) - total for total in totals]
        self.has_timestep_rank = any(update.group.timestep_min_rank is not None for update in updates)
        self.has_dropout = any(update.group.dropout for update in updates)
        self._strengths = tuple(strengths[branch] for branch in branches(num_branches))
        self.layout = self._make_layout(geometry)
        self._register_ranks()
        self.packed: PackedFactors | None = None
        self.merged: MergedLayer | None = None
        self.noise_level: torch.Tensor | None = None
        self.positions: tuple[int, ...] | None = None
        self.mask: torch.Tensor | None = None
        self.train(base.training)

    @property
    def weight(self) -> torch.Tensor:
        """The frozen weight, for code that reads the dtype or device of a layer."""
        return self.base.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The frozen bias."""
        return self.base.bias

    def _make_layout(self, geometry: ConvGeometry | None) -> FactorLayout:
        """Return the layout of the packed factors."""
        strengths = self._strengths
        biased = tuple(i for i, u in enumerate(self.updates) if u.bias is not None)
        bias_scale = [
            [self.updates[i].scale * strength if i in row else 0.0 for i in biased]
            for row, strength in zip(self.branch_updates, strengths, strict=True)
        ]
        new_tensor = self.updates[0].up.new_tensor
        scale = new_tensor(self._per_rank(lambda branch, u: [u.scale * strengths[branch]] * u.num_ranks))
        scales = [
            self.updates[i].scale * strength
            for row, strength in zip(self.branch_updates, strengths, strict=True)
            for i in row
        ]
        return FactorLayout(
            branches=tuple(map(tuple, self.branch_updates)),
            ranks=tuple(u.num_ranks for u in self.updates),
            num_ranks=scale.shape[1],
            width=self.base.weight[0].numel(),
            out=self.base.weight.shape[0],
            geometry=geometry,
            biases=biased,
            scale=None if set(scales) == {1.0} else scale[:, None],
            bias_scale=new_tensor(bias_scale),
        )

    def _register_ranks(self) -> None:
        """Register the buffers with one value per rank."""
        out_features = self.weight.shape[0]
        keep = self._per_rank(lambda branch, u: [1 - u.group.dropout] * u.num_ranks)
        index = self._per_rank(lambda branch, u: [rank % u.num_gated for rank in range(u.num_ranks)])
        lowest = self._per_rank(lambda branch, u: [min_rank(u.group, out_features, u.num_gated)] * u.num_ranks)
        full = self._per_rank(lambda branch, u: [u.num_gated] * u.num_ranks)
        new_tensor = self.updates[0].up.new_tensor
        self.keep = nn.Buffer(new_tensor(keep).unsqueeze(1), persistent=False)
        self.rank_ranges = nn.Buffer(new_tensor([index, lowest, full]).unsqueeze(2), persistent=False)

    def _per_rank(self, values_of: Callable[[int, LowRankUpdate], Sequence[float]]) -> list[list[float]]:
        """Lay out the values that `values_of(branch, update)` returns per rank: `[num_branches][R]`, padded with 1."""
        updates = list(self.updates)  # torch's list looks up each item by its name
        return [
            [value for i in row for value in values_of(branch, updates[i])] + [1.0] * missing
            for branch, (row, missing) in enumerate(zip(self.branch_updates, self.missing_ranks, strict=True))
        ]

    @property
    def group_of_each_branch(self) -> tuple[int, ...]:
        """The index of the only group of each branch, where `pack_flat` can pack the factors; otherwise nothing."""
        is_plain = self.layout.is_plain and all(type(update) is LowRankUpdate for update in self.updates)
        return tuple(self.updates[row[0]].index for row in self.branch_updates) if is_plain else ()

    def factors(self) -> list[torch.Tensor]:
        """Return the tensors that `pack_factors` takes: (down, up) of each update, and then the biases."""
        pairs = [tensor for update in self.updates for tensor in (update.effective_down(), update.effective_up())]
        return pairs + [update.bias for update in self.updates if update.bias is not None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map the rows of a stacked batch, as the frozen layer does, each with the updates of its branch.

        Raises:
            ValueError: the number of rows is not a multiple of num_branches.
            RuntimeError: there are no noise levels or no dropout mask for this batch.
        """
        if x.shape[0] % self.num_branches:
            raise ValueError(f"expected a multiple of {self.num_branches} rows, got {x.shape[0]}")
        dtype = self.weight.dtype
        if x.dtype != dtype:  # float32 out of a normalization under autocast
            x = x.to(dtype)
        if self.merged is not None:
            return self.merged(x)
        return self._product(x, self.packed or pack_factors([self.layout], self.factors(), dtype)[0])

    def _product(self, x: torch.Tensor, packed: PackedFactors) -> torch.Tensor:
        """Return the outputs for rows whose number is a multiple of num_branches."""
        raise NotImplementedError

    @property
    def num_merged(self) -> int:
        """The number of weights with merged updates: 1 where they are the same for all branches."""
        of_shared = self.branch_updates[0] == self.branch_updates[-1] and self._strengths[0] == self._strengths[-1]
        return 1 if of_shared else self.num_branches

    @property
    def num_merged_values(self) -> int:
        """The number of values of all merged weights."""
        return self.num_merged * self.weight.numel()

    @torch.no_grad()
    def merge(self, memory: torch.Tensor) -> MergedLayer:
        """Return W + Σ scale · up · down and bias + Σ scale · bias of each branch, computed in float32.

        Args:
            memory: for the merged weights, `[num_merged_values]` in the dtype of the frozen weight.
        """
        weight, bias = self.weight, None
        if weight.is_contiguous():
            weights = memory.view(-1, *weight.shape)
        else:  # channels_last
            weights = memory.view(-1, weight.shape[0], *weight.shape[2:], weight.shape[1]).permute(0, 1, 4, 2, 3)
        for branch, merged in enumerate(weights):
            merged.copy_(self._merged_matrix(branch).view(weight.shape))
        if self.bias is not None or self.layout.biases:
            exact = torch.promote_types(weight.dtype, torch.float32)
            frozen = torch.zeros(weight.shape[:1]).to(weight) if self.bias is None else self.bias
            learned = self.layout.bias([u.bias for u in self.updates if u.bias is not None])
            bias = (frozen.to(exact) + learned)[: self.num_merged].to(weight.dtype)
        return MergedLayer(weights, bias, self.layout.geometry)

    def _merged_matrix(self, branch: int) -> torch.Tensor:
        """Return W + Σ scale · up · down of a branch, float32 `[out, in · kh · kw]`."""
        matrix = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32)).flatten(1)
        for update in (self.updates[index] for index in self.branch_updates[branch]):
            up, down = update.effective_up().flatten(1), update.effective_down().flatten(1)
            matrix = torch.addmm(matrix, up, down, alpha=update.scale * self._strengths[branch])
        return matrix

    def _active(self, num_rows: int) -> torch.Tensor:
        """Return which ranks are active in each row, 1 or 0: `[num_branches, B, R]`.

        Raises:
            RuntimeError: `set_noise_levels` was not called for this batch.
        """
        if self.noise_level is None or len(self.noise_level) != num_rows:
            got = "none" if self.noise_level is None else len(self.noise_level)
            raise RuntimeError(f"expected the noise levels of {num_rows} rows, got {got}; call set_noise_levels first")
        index, lowest, full = self.rank_ranges
        level = self.noise_level.to(full).view(self.num_branches, -1, 1)
        active: torch.Tensor = index < torch.round(full - (full - lowest) * level)
        return active.to(full.dtype)

    def mask_shape(self, num_rows: int) -> tuple[int, ...]:
        """Return the shape of the dropout mask for forward passes with `num_rows` rows per branch.

        Raises:
            RuntimeError: `positions` is unknown.
        """
        if self.positions is None:
            raise RuntimeError("expected positions, got None; call the model within AdapterStack.measuring first")
        return self._rank_activations(num_rows, self.positions)

    def set_mask(self, uniform: torch.Tensor) -> None:
        """Set the dropout mask from random numbers in [0, 1) of `mask_shape`.

        The mask is kept until the next call, because gradient checkpointing repeats the forward pass during the
        backward pass. One of the same shape is changed in place, for recorded CUDA graphs.
        """
        mask = uniform < self._keep
        if self.mask is not None and self.mask.shape == mask.shape:
            self.mask.copy_(mask)
        else:
            self.mask = mask

    def _rank_activations(self, num_rows: int, positions: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the rank activations as the dropout mask has them."""
        raise NotImplementedError

    @property
    def _keep(self) -> torch.Tensor:
        """1 − dropout of each rank, which broadcasts to the dropout mask."""
        raise NotImplementedError

    @property
    def _is_gated(self) -> bool:
        """Whether there are factors between down and up."""
        return self.has_timestep_rank or (self.training and self.has_dropout)

    def _dropout(self, num_rows: int, positions: tuple[int, ...]) -> torch.Tensor | None:
        """Return the factors of dropout between down and up, as kohya's `network_dropout`; None outside training.

        Raises:
            RuntimeError: there is no mask of this shape.
        """
        if not (self.training and self.has_dropout):
            return None
        shape = self._rank_activations(num_rows, positions)
        if self.mask is None or self.mask.shape != shape:
            got = "none" if self.mask is None else tuple(self.mask.shape)
            raise RuntimeError(f"expected a dropout mask of {shape}, got {got}; call draw_masks first")
        return self.mask / self._keep


class BranchLoRALinear(BranchLoRALayer):
    """y_b = W x_b + bias + up_b (down_b x_b) + bias_b for every branch b, in one batched product.

    `[num_branches·B, ..., in]` becomes `[num_branches·B, ..., out]`. Concatenating the factors of a branch along the
    rank sums its updates. Branches with fewer ranks are padded with zeros, which are not parameters.
    """

    base: nn.Linear

    def _product(self, x: torch.Tensor, packed: PackedFactors) -> torch.Tensor:
        base, gate = self.base, self._gate(x) if self._is_gated else None
        y: torch.Tensor = LinearProduct.apply(x, base.weight, base.bias, packed.down, packed.up, gate)  # type: ignore[no-untyped-call]
        if packed.bias is not None:
            y = (y.view(self.num_branches, -1, y.shape[-1]) + packed.bias[:, None]).view(y.shape)
        return y

    def _gate(self, x: torch.Tensor) -> torch.Tensor | None:
        """Return the factor of every rank activation, `[nb, R, N]`."""
        positions = x.shape[1:-1]
        gate = self._dropout(x.shape[0] // self.num_branches, positions)
        if self.has_timestep_rank:
            active = self._active(x.shape[0]).repeat_interleave(math.prod(positions), dim=1)
            gate = active if gate is None else gate * active
        return None if gate is None else gate.mT.to(self.weight.dtype)

    def _rank_activations(self, num_rows: int, positions: tuple[int, ...]) -> tuple[int, ...]:
        return self.num_branches, num_rows * math.prod(positions), self.layout.num_ranks  # [nb, N, R]

    @property
    def _keep(self) -> torch.Tensor:
        return self.keep


class BranchLoRAConv2d(BranchLoRALayer):
    """The same for a convolution: down has its kernel, stride and padding, up is 1 × 1.

    `[num_branches·B, in, H, W]` becomes `[num_branches·B, out, h, w]`.
    """

    base: nn.Conv2d

    def _product(self, x: torch.Tensor, packed: PackedFactors) -> torch.Tensor:
        base, geometry = self.base, self.layout.geometry
        assert geometry is not None
        gate = self._gate(x, geometry) if self._is_gated else None
        y: torch.Tensor = ConvProduct.apply(x, base.weight, base.bias, packed.down, packed.up, gate, geometry)  # type: ignore[no-untyped-call]
        if packed.bias is not None:
            y = (y.view(self.num_branches, -1, *y.shape[1:]) + packed.bias[:, None, :, None, None]).view(y.shape)
        return y

    def _gate(self, x: torch.Tensor, geometry: ConvGeometry) -> torch.Tensor | None:
        """Return the factor of every rank activation, which broadcasts to `[nb·B, R, h · w]`."""
        gate = self._dropout(x.shape[0] // self.num_branches, geometry.output_size(x))
        gate = None if gate is None else gate.flatten(3)
        if self.has_timestep_rank:
            active = self._active(len(x))[..., None]  # [nb, B, R, 1]
            gate = active if gate is None else gate * active
        return None if gate is None else gate.flatten(0, 1).to(self.weight.dtype)

    def _rank_activations(self, num_rows: int, positions: tuple[int, ...]) -> tuple[int, ...]:
        return self.num_branches, num_rows, self.layout.num_ranks, *positions  # [nb, B, R, h, w]

    @property
    def _keep(self) -> torch.Tensor:
        return self.keep[..., None, None]


# ------------------------------------------------------------------------------------------------- the stack


@dataclass(frozen=True)
class AdapterStack:
    """The adapters of one model.

    Attributes:
        layers: name -> adapted layer.
        groups: the LoRA groups.
        flats: group name -> one parameter with all values of the group, of which the layers' parameters are views; see
            `use_flat`.
    """

    layers: dict[str, BranchLoRALayer]
    groups: tuple[ResolvedGroup, ...]
    flats: dict[str, nn.Parameter] = field(default_factory=dict)

    def use_flat(self, flats: Mapping[str, nn.Parameter]) -> None:
        """Let the gradients of `packed` go to one parameter per group instead of the parameters of every layer.

        Args:
            flats: group name -> a parameter as `optimizers.flatten` makes it of `parameters_by_group`; without one, the
                gradients of a group go to the layers' parameters.
        """
        self.flats.update({group.name: flats[group.name] for group in self.groups if group.name in flats})

    @contextmanager
    def packed(self, layers: Sequence[BranchLoRALayer] | None = None) -> Iterator[None]:
        """Pack the factors of layers, by default all, once for all forward passes within this context.

        The parameters must not change within. The context may include backward passes: with gradient checkpointing,
        these repeat forward passes. Outside, every forward pass of a layer packs its own factors.
        """
        layers = list(self.layers.values()) if layers is None else layers
        for layer, factors in zip(layers, self._pack(layers), strict=True):
            layer.packed = factors
        try:
            yield
        finally:
            for layer in layers:
                layer.packed = None

    def _pack(self, layers: Sequence[BranchLoRALayer]) -> list[PackedFactors]:
        if not layers:
            return []
        layouts, dtype = [layer.layout for layer in layers], layers[0].weight.dtype
        flats = [self.flats[group.name] for group in self._group_of_each_branch if group.name in self.flats]
        if len(flats) == layers[0].num_branches and len(layers) == len(self.layers):
            return pack_flat(layouts, flats, dtype)
        return pack_factors(layouts, [tensor for layer in layers for tensor in layer.factors()], dtype)

    @cached_property
    def _group_of_each_branch(self) -> tuple[ResolvedGroup, ...]:
        """The groups in the order of branches, where each is that of one branch in all layers; otherwise none."""
        found = {layer.group_of_each_branch for layer in self.layers.values()}
        return tuple(self.groups[index] for index in found.pop()) if len(found) == 1 else ()

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Merge the updates into copies of the weights for all forward passes within this context, without gradients.

        In layers with a timestep-dependent rank, which cannot be merged, the factors are packed. The parameters must
        not change within.

        Raises:
            RuntimeError: a layer is training with dropout.
        """
        if any(layer.training and layer.has_dropout for layer in self.layers.values()):
            raise RuntimeError("expected dropout to be off in merged layers; call AdapterStack.train(False) first")
        with torch.no_grad(), self.packed(self.timestep_layers):
            plain = [layer for layer in self.layers.values() if not layer.has_timestep_rank]
            try:
                # one block: when it is freed, its memory is the system's again, and the heap is as before
                sizes = [layer.num_merged_values for layer in plain]
                memory = plain[0].weight.new_empty(sum(sizes)) if plain else torch.empty(0)
                for layer, values in zip(plain, memory.split(sizes), strict=True):
                    layer.merged = layer.merge(values)
                yield
            finally:
                for layer in plain:
                    layer.merged = None

    @property
    def merged_bytes(self) -> int:
        """The size of the weights that `merged` makes."""
        return sum(
            layer.num_merged_values * layer.weight.element_size()
            for layer in self.layers.values()
            if not layer.has_timestep_rank
        )

    def set_noise_levels(self, levels: torch.Tensor) -> None:
        """Set t / (T − 1) of each row, `[num_branches·B]`, in the layers with a timestep-dependent rank.

        The levels are kept until the next call, because gradient checkpointing repeats the forward pass during the
        backward pass.
        """
        for layer in self.timestep_layers:
            layer.noise_level = levels

    @cached_property
    def timestep_layers(self) -> tuple[BranchLoRALayer, ...]:
        """The layers with a timestep-dependent rank."""
        return tuple(layer for layer in self.layers.values() if layer.has_timestep_rank)

    def parameters_by_group(self) -> dict[str, list[nn.Parameter]]:
        """Return group name -> its parameters, in the order of layers."""
        found: dict[str, list[nn.Parameter]] = {group.name: [] for group in self.groups}
        for _, update in self._updates():
            found[update.group.name] += update.learned().values()
        return found

    def num_layers_by_group(self) -> dict[str, int]:
        """Return group name -> its number of adapted layers."""
        found = {group.name: 0 for group in self.groups}
        for _, update in self._updates():
            found[update.group.name] += 1
        return found

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return copies of all tensors: "<layer>.<group index>.<branch>.<down|up|bias>" -> float32, on the CPU.

        alpha is not multiplied in; it is part of the metadata. Groups with svd_init or orthogonal_init have twice
        their rank, see `PrincipalUpdate`.
        """
        return {
            f"{layer}.{update.key}.{name}": tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
            for layer, update in self._updates()
            for name, tensor in update.stored().items()
        }

    def train(self, mode: bool = True) -> None:
        """Turn dropout on or off; the mode of the frozen layers is unchanged."""
        for layer in self.layers.values():
            layer.training = mode

    @property
    def has_dropout(self) -> bool:
        """Whether any layer has dropout."""
        return any(layer.has_dropout for layer in self.layers.values())

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Record the shapes of the dropout masks during a forward pass within this context, without dropout."""
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
        """Draw the dropout masks of the next forward passes; layers with dropout cannot train without one.

        Args:
            num_rows: rows per branch.
            generator: on the device of the layers.

        Raises:
            RuntimeError: no forward pass has run within `measuring`.
        """
        layers = [layer for layer in self.layers.values() if layer.has_dropout]
        if not layers:
            return
        shapes, keep = [layer.mask_shape(num_rows) for layer in layers], layers[0].keep
        sizes = [math.prod(shape) for shape in shapes]
        uniform = torch.rand(sum(sizes), generator=generator, device=keep.device, dtype=keep.dtype)
        for layer, shape, values in zip(layers, shapes, uniform.split(sizes), strict=True):
            layer.set_mask(values.view(shape))

    @contextmanager
    def masks_of_rows(self, rows: slice, num_rows: int) -> Iterator[None]:
        """Use the dropout masks of these rows only, in a pass over a part of a batch with `num_rows` rows per branch.

        The context includes the backward pass, because gradient checkpointing repeats the forward pass during it.
        """
        whole = [(layer, layer.mask) for layer in self.layers.values() if layer.mask is not None]
        for layer, mask in whole:
            layer.mask = mask.unflatten(1, (num_rows, -1))[:, rows].flatten(1, 2)
        try:
            yield
        finally:
            for layer, mask in whole:
                layer.mask = mask

    def _updates(self) -> list[tuple[str, LowRankUpdate]]:
        return [(name, update) for name, layer in self.layers.items() for update in layer.updates]


def _note_positions(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    assert isinstance(layer, BranchLoRALayer)
    layer.positions = tuple(output.shape[2:] if isinstance(layer, BranchLoRAConv2d) else output.shape[1:-1])


def inject(
    model: nn.Module, groups: Sequence[ResolvedGroup], num_branches: int, generator: torch.Generator
) -> AdapterStack:
    """Replace the selected layers by adapted ones, in place, without changing the outputs of the model.

    The new layers inherit the training mode of the replaced ones; see `AdapterStack.train` for dropout.

    Args:
        model: frozen base model without adapters.
        groups: LoRA groups; the updates of several groups in one layer are summed.
        num_branches: of the stacked batches; with 1, all rows belong to the positive branch.
        generator: CPU generator of the initial values.

    Raises:
        InputError: a selector matches no layer, a convolution is grouped, or the rank with svd_init or orthogonal_init
            exceeds that of the weight.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    planned: dict[str, list[LowRankUpdate]] = {}
    principal = functools.cache(principal_factors)  # shared by the groups of both branches
    for index, group in enumerate(groups):
        for name in select_layers(model, group.layers):
            layer = _plain_layer(modules, name)
            planned.setdefault(name, []).append(_new_update(layer, index, group, generator, principal))
    return _install(model, modules, planned, groups, num_branches, (1.0, 1.0))


def load_adapters(
    model: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    groups: Sequence[ResolvedGroup],
    num_branches: int,
    strengths: tuple[float, float] = (1.0, 1.0),
) -> AdapterStack:
    """Inject adapters from `AdapterStack.state_dict`; the tensors determine layers and ranks.

    Args:
        model: frozen base model without adapters.
        tensors: from `AdapterStack.state_dict`; they are copied.
        groups: the LoRA groups of the training, for alpha and branch.
        num_branches: of the stacked batches.
        strengths: (negative, positive), a factor on all updates of a branch, shared groups included.

    Raises:
        InputError: a key, shape or group does not match the model and the groups.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    planned: dict[str, list[LowRankUpdate]] = {}
    for learned in learned_updates(tensors, groups):
        factors = learned.factors
        _check_shapes(learned.layer, _plain_layer(modules, learned.layer), factors)
        _check_halves(learned)
        down, up = factors.down.detach().clone(), factors.up.detach().clone()
        bias = None if factors.bias is None else factors.bias.detach().clone()
        planned.setdefault(learned.layer, []).append(LowRankUpdate(learned.index, learned.group, down, up, bias))
    return _install(model, modules, planned, groups, num_branches, strengths)


def _install(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    planned: Mapping[str, Sequence[LowRankUpdate]],
    groups: Sequence[ResolvedGroup],
    num_branches: int,
    strengths: tuple[float, float],
) -> AdapterStack:
    layers: dict[str, BranchLoRALayer] = {}
    for name in sorted(planned):
        base = _plain_layer(modules, name)
        if isinstance(base, nn.Linear):
            layers[name] = BranchLoRALinear(base, planned[name], num_branches, strengths)
        else:
            geometry = ConvGeometry.of(base, name)
            layers[name] = BranchLoRAConv2d(base, planned[name], num_branches, strengths, geometry)
        model.set_submodule(name, layers[name])
    return AdapterStack(layers, tuple(groups))


def _plain_layer(modules: Mapping[str, nn.Module], name: str) -> nn.Linear | nn.Conv2d:
    """Return the layer with this name.

    Raises:
        InputError: it does not exist, has adapters already, or is a grouped convolution.
    """
    layer, parent = modules.get(name), modules.get(name.rpartition(".")[0])
    adapted = isinstance(layer, BranchLoRALayer) or isinstance(parent, BranchLoRALayer)
    if adapted or not isinstance(layer, nn.Linear | nn.Conv2d):
        got = "a layer with adapters" if adapted else "no such layer"
        raise InputError(
            expected=f"a Linear or Conv2d {name!r} without adapters", got=got, remedy="start from the base model"
        )
    if isinstance(layer, nn.Conv2d) and (layer.groups != 1 or layer.padding_mode != "zeros"):
        raise InputError(
            expected=f"a convolution {name!r} with groups=1 and padding_mode='zeros'",
            got=f"groups={layer.groups} and padding_mode={layer.padding_mode!r}",
            remedy="exclude it from the LoRA layers",
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


def _check_halves(learned: LearnedUpdate) -> None:
    """Check that the rows of an update with orthogonal_init are pairs.

    Raises:
        InputError: their number is odd.
    """
    if learned.group.orthogonal_init is not None and learned.factors.rank % 2:
        raise InputError(
            expected=f"an even rank in {learned.layer} for orthogonal_init of {learned.group.name}",
            got=f"{learned.factors.rank}",
            remedy="the file is damaged: train the concept again",
        )
