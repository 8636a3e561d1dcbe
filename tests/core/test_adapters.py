from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from dreamartist_pipeline.core.adapters import (
    AdapterStack,
    BranchLoRALayer,
    inject,
    load_adapters,
    orthogonal_factors,
    principal_factors,
    rank_in,
    select_layers,
)
from dreamartist_pipeline.core.branches import BRANCH_NAMES, NEGATIVE, POSITIVE, combine, split
from dreamartist_pipeline.core.optimizers import flatten
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import ResolvedGroup
from refusals import says


class Attention(nn.Module):
    """Names and shapes of a diffusers attention block, small."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(8, 6, bias=False)
        self.to_k = nn.Linear(8, 6)
        self.to_out = nn.ModuleList([nn.Linear(6, 8), nn.Dropout(0.0)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.to_out[0](torch.tanh(self.to_q(x)) * self.to_k(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn1, self.attn2 = Attention(), Attention()
        self.ff = nn.Linear(8, 8)
        self.conv = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `[B, 5, 8]` to `[B, 5, 8]`."""
        return self.norm(self.ff(self.attn2(self.attn1(x))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: torch.Tensor, checkpointing: str = "none") -> torch.Tensor:
        for block in self.blocks:
            x = (
                block(x)
                if checkpointing == "none"
                else checkpoint(block, x, use_reentrant=checkpointing == "reentrant")
            )
        return x


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _group(branch: int | None = None, **changes: object) -> ResolvedGroup:
    values: dict[str, object] = {"name": f"unet[{branch}]", "rank": 2, "layers": (r"re:.*\.attn.?$",), "lr": 1e-4}
    name = "shared" if branch is None else BRANCH_NAMES[branch]
    return ResolvedGroup.model_validate(values | {"branch": name} | changes)


def _randomize(stack: AdapterStack) -> AdapterStack:
    """Set all parameters to random values."""
    generator = _generator(7)
    for parameters in stack.parameters_by_group().values():
        for parameter in parameters:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter)
    return stack


def remove(stack: AdapterStack, model: nn.Module) -> None:
    """Put the frozen layers back into the model."""
    for name, layer in stack.layers.items():
        model.set_submodule(name, layer.base)


def _draw_masks(stack: AdapterStack, model: nn.Module, x: torch.Tensor, seed: int = 0) -> None:
    """Draw the dropout masks of forward passes of `x`, two branches."""
    with stack.measuring():
        model(x)
    stack.draw_masks(len(x) // 2, _generator(seed))


@pytest.fixture
def model() -> Iterator[Model]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield Model().eval().requires_grad_(False)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(4, 5, 8, generator=_generator(1))  # two branches of two rows


# ------------------------------------------------------------------------------------------------- selectors


def test_a_regular_expression_takes_every_layer_at_or_under_its_matches(model: Model) -> None:
    assert select_layers(model, [r"re:blocks\.0\.attn.?$"]) == [
        f"blocks.0.{attention}.{layer}" for attention in ("attn1", "attn2") for layer in ("to_k", "to_out.0", "to_q")
    ]
    assert select_layers(model, [r"re:.*\.to_k$"])[0] == "blocks.0.attn1.to_k"


def test_a_name_is_matched_whole_and_selectors_add_up_once(model: Model) -> None:
    assert select_layers(model, ["blocks.1.ff"]) == ["blocks.1.ff"]
    assert select_layers(model, ["blocks.1.ff", r"re:.*\.(ff|conv)$"]) == [
        "blocks.0.conv", "blocks.0.ff", "blocks.1.conv", "blocks.1.ff",
    ]  # fmt: skip


def test_a_name_does_not_take_its_longer_neighbours() -> None:
    model = nn.ModuleDict({"key": nn.Linear(1, 1), "key_norm": nn.Linear(1, 1)})
    assert select_layers(model, ["key"]) == ["key"]


def test_a_class_filters_the_matched_modules(model: Model) -> None:
    assert select_layers(model, ["cls(Conv2d):re:.*"]) == ["blocks.0.conv", "blocks.1.conv"]
    assert select_layers(model, [r"cls(Attention):re:blocks\.1"])[0] == "blocks.1.attn1.to_k"


@pytest.mark.parametrize(
    ("selector", "near"),
    [
        (r"re:.*\.atn.?$", "attn1"),
        ("blocks.0.attn1.to_w", "blocks.0.attn1.to_q"),
        ("cls(Atention):re:.*", "Attention"),
    ],
)
def test_a_selector_that_matches_nothing_lists_near_names(model: Model, selector: str, near: str) -> None:
    with pytest.raises(InputError, check=says(got=repr(selector), remedy=near)):
        select_layers(model, ["blocks.0.ff", selector])


def test_a_selector_of_modules_without_layers_is_refused(model: Model) -> None:
    with pytest.raises(InputError, check=says(got="blocks.0.norm, blocks.1.norm")):
        select_layers(model, [r"re:.*norm$"])


# ------------------------------------------------------------------------------------------------- injection


@pytest.mark.parametrize(("out_features", "rank"), [(320, 6), (640, 12), (1280, 24), (8, 1)])
def test_a_float_rank_is_a_fraction_of_the_outputs(out_features: int, rank: int) -> None:
    assert rank_in(0.01875, out_features) == rank


def test_new_adapters_leave_the_outputs_bit_equal(model: Model, x: torch.Tensor) -> None:
    image = torch.randn(4, 2, 6, 6)
    before, before_conv = model(x), model.blocks[0].conv(image)
    inject(model, [_group(POSITIVE), _group(NEGATIVE, rank=3), _group(layers=("re:.*",))], 2, _generator())
    assert torch.equal(model(x), before)
    assert torch.equal(model.blocks[0].conv(image), before_conv)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_a_half_precision_model_adapters_are_float32_and_change_nothing(model: Model, dtype: torch.dtype) -> None:
    model = model.to(dtype)
    rows = torch.randn(4, 5, 8, generator=_generator()).to(dtype)
    before = model(rows)
    stack = inject(model, [_group(POSITIVE), _group(NEGATIVE)], 2, _generator())
    assert torch.equal(model(rows), before)
    assert {p.dtype for parameters in stack.parameters_by_group().values() for p in parameters} == {torch.float32}


def test_down_starts_like_a_linear_layer_and_up_at_zero(model: Model) -> None:
    stack = inject(model, [_group(POSITIVE, rank=64)], 2, _generator())
    down, up = (stack.state_dict()[f"blocks.0.attn1.to_q.0.positive.{factor}"] for factor in ("down", "up"))
    assert down.shape == (64, 8)
    assert 0.9 / math.sqrt(8) < down.abs().max() <= 1 / math.sqrt(8)  # uniform within ±1/√in
    assert torch.equal(up, torch.zeros(6, 64))


def test_the_same_seed_gives_the_same_adapters_whatever_the_global_generator_does(model: Model) -> None:
    def start(seed: int) -> dict[str, torch.Tensor]:
        torch.rand(seed + 1)
        stack = inject(model, [_group(POSITIVE), _group(NEGATIVE)], 2, _generator(seed))
        remove(stack, model)
        return stack.state_dict()

    first, again, other = start(0), start(0), start(1)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first if key.endswith("down"))


def test_a_model_with_adapters_takes_no_others(model: Model) -> None:
    inject(model, [_group(POSITIVE)], 2, _generator())
    with pytest.raises(InputError, check=says(expected="blocks.0.attn1.to_k", got="adapters")):
        inject(model, [_group(POSITIVE)], 2, _generator())


def test_a_grouped_convolution_is_refused() -> None:
    model = nn.ModuleDict({"conv": nn.Conv2d(4, 4, 3, groups=2)})
    with pytest.raises(InputError, check=says(expected="'conv'", got="groups=2")):
        inject(model, [_group(layers=("conv",))], 2, _generator())


def test_the_stack_lists_the_parameters_of_each_group(model: Model) -> None:
    groups = [
        _group(POSITIVE, layers=("blocks.0.ff",)),
        _group(NEGATIVE, layers=("blocks.0.ff", "blocks.1.ff"), rank=1),
    ]
    stack = inject(model, [*groups, _group(layers=("blocks.0.conv",), rank=1)], 2, _generator())
    assert [len(parameters) for parameters in stack.parameters_by_group().values()] == [2, 4, 2]


# ------------------------------------------------------------------------------------------------- arithmetic

MIXED = [
    [_group(POSITIVE, rank=3), _group(NEGATIVE, rank=3)],
    [_group(POSITIVE, rank=3, alpha=2.0), _group(NEGATIVE, rank=1)],
    [_group(POSITIVE, rank=4)],
    [_group(NEGATIVE, rank=5, alpha=0.7)],
    [_group(rank=2)],
    [_group(rank=2, alpha=3.0), _group(POSITIVE, rank=1), _group(POSITIVE, rank=0.5), _group(NEGATIVE, rank=7)],
]


def _dense_update(stack: AdapterStack, layer: str, branch: int) -> torch.Tensor | float:
    """Σ_g alpha / rank · up · down of the groups that act on a branch, as one matrix over flattened kernels."""
    total: torch.Tensor | float = 0.0
    for update in stack.layers[layer].updates:
        if update.group.branch in (BRANCH_NAMES[branch], "shared"):
            total = total + update.group.alpha / update.rank * update.up.flatten(1) @ update.down.flatten(1)
    return total


CONVOLUTIONS: list[dict[str, object]] = [
    {"kernel_size": 1},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "padding": 1, "stride": 2},
    {"kernel_size": (3, 1), "padding": "same", "bias": False},
    {"kernel_size": 3, "padding": 2, "dilation": 2},
    {"kernel_size": 2, "padding": "valid"},
]


@pytest.mark.parametrize("groups", MIXED)
@pytest.mark.parametrize("shape", [(6, 8), (6, 5, 8), (6, 2, 3, 8)])
def test_a_linear_layer_equals_w_plus_ba_of_each_branch(groups: list[ResolvedGroup], shape: tuple[int, ...]) -> None:
    groups = [group.model_copy(update={"layers": ("layer",)}) for group in groups]
    model = nn.ModuleDict({"layer": nn.Linear(8, 6)}).double()
    stack = _randomize(inject(model, groups, 2, _generator()))
    layer, x = stack.layers["layer"], torch.randn(shape, dtype=torch.float64, generator=_generator(2))
    naive = [
        F.linear(rows, layer.weight + _dense_update(stack, "layer", branch), layer.bias)
        for branch, rows in enumerate(split(x, 2))
    ]
    torch.testing.assert_close(layer(x), torch.cat(naive), rtol=0, atol=1e-12)


@pytest.mark.parametrize("groups", MIXED)
@pytest.mark.parametrize("convolution", CONVOLUTIONS)
def test_a_convolution_equals_w_plus_ba_of_each_branch(
    groups: list[ResolvedGroup], convolution: dict[str, object]
) -> None:
    groups = [group.model_copy(update={"layers": ("layer",)}) for group in groups]
    model = nn.ModuleDict({"layer": nn.Conv2d(3, 6, **convolution)}).double()  # type: ignore[arg-type]
    stack = _randomize(inject(model, groups, 2, _generator()))
    layer, x = stack.layers["layer"], torch.randn(4, 3, 8, 7, dtype=torch.float64, generator=_generator(2))
    base = layer.base
    naive = []
    for branch, rows in enumerate(split(x, 2)):
        update = _dense_update(stack, "layer", branch)
        weight = base.weight + (update.reshape(base.weight.shape) if isinstance(update, torch.Tensor) else 0)
        naive.append(F.conv2d(rows, weight, base.bias, base.stride, base.padding, base.dilation))
    torch.testing.assert_close(layer(x), torch.cat(naive), rtol=0, atol=1e-12)


def test_with_one_branch_all_rows_are_positive(model: Model, x: torch.Tensor) -> None:
    both = _randomize(inject(model, [_group(POSITIVE), _group()], 2, _generator()))
    positive_rows = split(model(torch.cat([x, x])), 2)[POSITIVE]
    saved = both.state_dict()
    remove(both, model)
    load_adapters(model, saved, both.groups, num_branches=1)
    torch.testing.assert_close(model(x), positive_rows, rtol=0, atol=1e-6)


@pytest.mark.parametrize("layer", ["ff", "conv"])
def test_a_number_of_rows_that_is_no_multiple_of_the_branches_is_refused(model: Model, layer: str) -> None:
    stack = inject(model, [_group(POSITIVE, layers=("blocks.0.ff", "blocks.0.conv"))], 2, _generator())
    with pytest.raises(ValueError, match="2 rows, got 3"):
        stack.layers[f"blocks.0.{layer}"](torch.zeros(3, 2, 8, 8))


# ------------------------------------------------------------------------------------------------- gradients


def parameters_by_branch(stack: AdapterStack) -> dict[str, list[nn.Parameter]]:
    """Return the parameters of negative, positive and shared groups."""
    found: dict[str, list[nn.Parameter]] = {"negative": [], "positive": [], "shared": []}
    for layer in stack.layers.values():
        for update in layer.updates:
            found[update.group.branch] += update.learned().values()
    return found


def _gradients(stack: AdapterStack) -> dict[str, list[torch.Tensor]]:
    return {
        branch: [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
        for branch, parameters in parameters_by_branch(stack).items()
    }


@pytest.mark.parametrize("checkpointing", ["none", "reentrant", "non-reentrant"])
def test_a_branch_gets_no_gradient_from_the_other_ones_rows(model: Model, x: torch.Tensor, checkpointing: str) -> None:
    groups = [_group(POSITIVE, rank=3), _group(NEGATIVE, rank=1), _group(layers=("re:.*ff$",))]
    stack = _randomize(inject(model, groups, 2, _generator()))
    for branch, own, other in ((NEGATIVE, "negative", "positive"), (POSITIVE, "positive", "negative")):
        model.zero_grad()
        split(model(x.requires_grad_(), checkpointing), 2)[branch].square().sum().backward()
        gradients = _gradients(stack)
        assert all(gradient.abs().max() > 0 for gradient in gradients[own] + gradients["shared"])
        assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients[other])


@pytest.mark.parametrize("checkpointing", ["reentrant", "non-reentrant"])
def test_checkpointing_changes_no_gradient(model: Model, x: torch.Tensor, checkpointing: str) -> None:
    stack = _randomize(inject(model, [_group(POSITIVE, dropout=0.3), _group(NEGATIVE, rank=1)], 2, _generator()))
    stack.train()
    _draw_masks(stack, model, x)

    def gradients(checkpointing: str) -> dict[str, list[torch.Tensor]]:
        model.zero_grad()
        combine(model(x.requires_grad_(), checkpointing), torch.full((2,), 3.0), 2).square().sum().backward()
        return _gradients(stack)

    plain, recomputed = gradients("none"), gradients(checkpointing)
    for branch, expected in plain.items():
        assert all(torch.equal(a, b) for a, b in zip(expected, recomputed[branch], strict=True))


@pytest.mark.parametrize("checkpointing", ["none", "reentrant", "non-reentrant"])
def test_factors_packed_once_give_the_outputs_and_gradients_of_every_pass(
    model: Model, x: torch.Tensor, checkpointing: str
) -> None:
    groups = [
        _group(POSITIVE, rank=3, alpha=2.0, bias=True),
        _group(NEGATIVE, svd_init=True),
        _group(layers=("re:.*",)),
    ]
    stack = _randomize(inject(model.double(), groups, 2, _generator()))
    x = x.double().requires_grad_()

    def outputs_and_gradients() -> list[torch.Tensor]:
        model.zero_grad()
        outputs = [model(rows, checkpointing) for rows in (x, 2 * x)]  # two backward passes, as in micro-batches
        for y in outputs:
            combine(y, torch.full((2,), 3.0), 2).square().sum().backward()
        return [y.detach() for y in outputs] + [g for gradients in _gradients(stack).values() for g in gradients]

    plain = outputs_and_gradients()
    with stack.packed():
        packed = outputs_and_gradients()
    for expected, actual in zip(plain, packed, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


FLAT = [
    ([_group(POSITIVE, layers=("re:.*",)), _group(NEGATIVE, layers=("re:.*",))], 2, True),
    ([_group(POSITIVE, layers=("re:.*",), alpha=2.0), _group(NEGATIVE, layers=("re:.*",), alpha=3.0)], 2, True),
    ([_group(layers=("re:.*",), rank=3)], 1, True),
    ([_group(layers=("re:.*",))], 2, False),
    ([_group(POSITIVE, rank=3), _group(NEGATIVE, rank=1)], 2, False),
    ([_group(POSITIVE, layers=("re:.*",)), _group(NEGATIVE)], 2, False),
    ([_group(POSITIVE, svd_init=True), _group(NEGATIVE)], 2, False),
]


@pytest.mark.parametrize(("groups", "num_branches", "is_flat"), FLAT)
def test_flat_parameters_get_the_gradients_of_their_parts(
    model: Model, x: torch.Tensor, groups: list[ResolvedGroup], num_branches: int, is_flat: bool
) -> None:
    groups = [group.model_copy(update={"name": f"unet.{index}"}) for index, group in enumerate(groups)]
    stack = _randomize(inject(model.double(), groups, num_branches, _generator()))
    images = torch.randn(4, 2, 6, 6, dtype=torch.float64, generator=_generator(2))

    def gradients() -> list[torch.Tensor]:
        parameters = [p for ps in stack.parameters_by_group().values() for p in ps]
        for parameter in parameters:
            parameter.grad = None if parameter.grad is None else parameter.grad.zero_()
        with stack.packed():
            for factor in (1.0, 2.0):  # two backward passes; the second block's convolution takes no part
                (model(x.double() * factor).square().sum() + model.blocks[0].conv(images).sum()).backward()
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]

    expected = gradients()
    flats = {name: flatten(parameters) for name, parameters in stack.parameters_by_group().items()}
    stack.use_flat(flats)
    actual = gradients()
    for parameter, wanted, got in zip(
        [p for ps in stack.parameters_by_group().values() for p in ps], expected, actual, strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
        assert parameter.grad is not None
    total = torch.cat([flat.grad for flat in flats.values() if flat.grad is not None]).norm()
    torch.testing.assert_close(total, torch.cat([g.flatten() for g in expected]).norm())
    with stack.packed():
        first = next(iter(stack.layers.values())).packed
        assert first is not None and (type(first.down.grad_fn).__name__ == "_PackFlatBackward") == is_flat


def test_factors_are_packed_again_after_the_parameters_have_changed(model: Model, x: torch.Tensor) -> None:
    stack = _randomize(inject(model, [_group(POSITIVE), _group(NEGATIVE)], 2, _generator()))
    with stack.packed():
        before = model(x)
    for parameters in stack.parameters_by_group().values():
        for parameter in parameters:
            parameter.data *= 2
    with stack.packed():
        packed = model(x)
    assert torch.equal(packed, model(x)) and not torch.equal(packed, before)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("convolution", [None, *CONVOLUTIONS])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_products_gradients_are_those_of_the_plain_computation(
    dtype: torch.dtype, tolerance: float, convolution: dict[str, object] | None, memory_format: torch.memory_format
) -> None:
    """Gradients of inputs and factors, with gates, against autograd through W + BA of each branch."""
    layer: nn.Module = nn.Linear(6, 7) if convolution is None else nn.Conv2d(6, 7, **convolution)  # type: ignore[arg-type]
    model = nn.ModuleDict({"layer": layer}).to(dtype)
    groups = [_layer_group(POSITIVE, rank=3, alpha=2.0, timestep_min_rank=1), _layer_group(NEGATIVE, rank=1)]
    stack = _randomize(inject(model, [*groups, _layer_group(rank=2)], 2, _generator()))
    x = torch.randn((4, 5, 6) if convolution is None else (4, 6, 8, 7), generator=_generator(2)).to(dtype)
    if convolution is not None:
        x = x.to(memory_format=memory_format)
    stack.set_noise_levels(torch.ones(4, dtype=dtype))
    parameters = [p for ps in stack.parameters_by_group().values() for p in ps]
    outputs, gradients = _outputs_and_gradients(stack.layers["layer"], x, parameters)
    expected, plain = _outputs_and_gradients(functools.partial(_plain, stack.layers["layer"]), x, parameters)
    for actual, wanted in zip([outputs, *gradients], [expected, *plain], strict=True):
        assert (actual - wanted).norm() <= tolerance * wanted.norm()


def _outputs_and_gradients(
    operate: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, parameters: list[nn.Parameter]
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    rows = x.clone().requires_grad_()
    outputs = operate(rows)
    return outputs.detach(), torch.autograd.grad(outputs.sin().sum(), [rows, *parameters])


def _plain(layer: BranchLoRALayer, x: torch.Tensor) -> torch.Tensor:
    """Return the outputs of `layer` at the last timestep, by autograd through W + Σ scale · up · down."""
    outputs = []
    for branch, rows in zip(BRANCH_NAMES, split(x, 2), strict=True):
        weight = layer.weight
        for update in layer.updates:
            if update.group.branch in (branch, "shared"):
                rank = update.group.timestep_min_rank or update.rank
                change = update.up.flatten(1)[:, :rank] @ update.down.flatten(1)[:rank]
                weight = weight + update.scale * change.view_as(weight)
        base = layer.base
        if isinstance(base, nn.Linear):
            outputs.append(F.linear(rows, weight, base.bias))
        else:
            outputs.append(F.conv2d(rows, weight, base.bias, base.stride, base.padding, base.dilation))
    return torch.cat(outputs)


def test_adapted_layers_compile_as_one_graph(model: Model, x: torch.Tensor) -> None:
    stack = _randomize(inject(model, [_group(POSITIVE, layers=("re:.*",)), _group(NEGATIVE, rank=1)], 2, _generator()))
    with stack.packed():
        model(x).square().sum().backward()
        expected = _gradients(stack)
        model.zero_grad()
        torch.compile(model, backend="eager", fullgraph=True)(x).square().sum().backward()
    for branch, gradients in _gradients(stack).items():
        assert all(map(torch.equal, gradients, expected[branch]))


def test_an_input_without_gradient_gets_none(model: Model, x: torch.Tensor) -> None:
    stack = _randomize(inject(model, [_group(POSITIVE, layers=("re:.*",))], 2, _generator()))
    for layer, rows in ((stack.layers["blocks.0.ff"], x), (stack.layers["blocks.0.conv"], torch.randn(4, 2, 6, 6))):
        layer(rows).sum().backward()
        assert rows.grad is None
        assert all(p.grad is not None for p in layer.updates[0].parameters())


# ------------------------------------------------------------------------------------------------- merged weights


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("strengths", [(1.0, 1.0), (0.5, 1.2)])
@pytest.mark.parametrize("num_branches", [1, 2])
@pytest.mark.parametrize("groups", MIXED)
@pytest.mark.parametrize("layer", ["ff", "conv"])
def test_merged_weights_give_the_outputs_of_adapters_apart(
    groups: list[ResolvedGroup],
    layer: str,
    num_branches: int,
    strengths: tuple[float, float],
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    branch = {"branch": "shared"} if num_branches == 1 else {}  # as in a training without a negative branch
    groups = [g.model_copy(update={"layers": (f"blocks.0.{layer}",), "bias": True, **branch}) for g in groups]
    x = torch.randn(4, 2, 8, 8, dtype=dtype, generator=_generator(2))
    saved = _randomize(inject(Model().to(dtype), groups, num_branches, _generator())).state_dict()
    model = Model().to(dtype)
    model.to(memory_format=torch.channels_last if num_branches == 2 else torch.contiguous_format)
    adapted = load_adapters(model, saved, groups, num_branches, strengths).layers[f"blocks.0.{layer}"]
    expected = adapted(x)
    with AdapterStack({layer: adapted}, tuple(groups)).merged():
        torch.testing.assert_close(adapted(x), expected, rtol=tolerance, atol=10 * tolerance)
    assert adapted.merged is None and torch.equal(adapted(x), expected)


def test_weights_are_merged_once_where_the_branches_have_the_same(model: Model) -> None:
    shared, apart = ("blocks.0.ff",), ("blocks.1.ff",)
    groups = [_group(layers=shared), _group(NEGATIVE, layers=apart), _group(POSITIVE, layers=apart)]
    stack = inject(model, groups, 2, _generator())
    with stack.merged():
        merged = [stack.layers[name].merged for name in (*shared, *apart)]
    assert [each and len(each.weights) for each in merged] == [1, 2]
    assert stack.merged_bytes == 3 * 8 * 8 * 4
    saved = stack.state_dict()
    remove(stack, model)
    assert load_adapters(model, saved, groups, 2, strengths=(0.5, 1.0)).merged_bytes == 4 * 8 * 8 * 4


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_rank_by_timestep_is_not_merged(kind: str) -> None:
    model, stack, x = _by_timestep(kind)
    outputs = []
    for level in (0.0, 1.0):
        stack.set_noise_levels(torch.full((4,), level))
        outputs.append(model(x))
    with stack.merged():
        assert stack.merged_bytes == 0
        for level, expected in zip((0.0, 1.0), outputs, strict=True):
            stack.set_noise_levels(torch.full((4,), level))
            assert torch.equal(model(x), expected)


def test_layers_that_train_with_dropout_are_not_merged() -> None:
    _, stack = _adapted("linear", _layer_group(POSITIVE, dropout=0.5))
    stack.train()
    with pytest.raises(RuntimeError, match="dropout to be off"), stack.merged():
        pass


def test_a_convolution_with_uneven_padding_is_refused() -> None:
    model = nn.ModuleDict({"conv": nn.Conv2d(4, 4, 2, padding="same")})
    with pytest.raises(InputError, check=says(expected="'conv'", got="padding='same'")):
        inject(model, [_group(layers=("conv",))], 2, _generator())


def test_a_branch_alone_gets_the_gradient_it_gets_in_the_stack(model: Model) -> None:
    """Positive and negative adapters in one pass of both branches, against each branch's own model."""
    model = model.double()
    rows = torch.randn(4, 5, 8, dtype=torch.float64, generator=_generator(3))
    groups = [_group(POSITIVE, rank=3), _group(NEGATIVE, rank=1)]
    stack = _randomize(inject(model, groups, 2, _generator()))
    combine(model(rows), torch.tensor([3.0, 2.0]), 2).square().sum().backward()
    stacked = _gradients(stack)
    layers, parameters = stack.layers, {id(p) for ps in stack.parameters_by_group().values() for p in ps}
    assert all(p.grad is None for p in model.parameters() if id(p) not in parameters)
    remove(stack, model)

    def naive(branch: int) -> torch.Tensor:
        weights = {
            f"{name}.weight": layer.weight + _dense_update(stack, name, branch) for name, layer in layers.items()
        }
        return torch.func.functional_call(model, weights, (split(rows, 2)[branch],))

    for parameter_list in stack.parameters_by_group().values():
        for parameter in parameter_list:
            parameter.grad = None
    combine(torch.cat([naive(NEGATIVE), naive(POSITIVE)]), torch.tensor([3.0, 2.0]), 2).square().sum().backward()
    for branch, expected in _gradients(stack).items():
        for a, b in zip(stacked[branch], expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_training_steps_leave_frozen_weights_bit_equal(model: Model, x: torch.Tensor) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stack = inject(model, [_group(POSITIVE), _group(NEGATIVE), _group(layers=("re:.*ff$",))], 2, _generator())
    start = stack.state_dict()
    groups = [{"params": parameters} for parameters in stack.parameters_by_group().values()]
    optimizer = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.1)
    for _ in range(2):  # in the first step, only up moves
        optimizer.zero_grad()
        combine(model(x), torch.full((2,), 3.0), 2).square().mean().backward()
        optimizer.step()
    assert not any(torch.equal(start[key], tensor) for key, tensor in stack.state_dict().items())
    remove(stack, model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


# ------------------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_dropout_acts_on_the_update_only_and_only_in_training(kind: str) -> None:
    base: nn.Module = nn.Linear(8, 6) if kind == "linear" else nn.Conv2d(8, 6, 1)
    x = torch.randn((200, 8) if kind == "linear" else (200, 8, 2, 2), generator=_generator())
    model = nn.ModuleDict({"layer": base}).eval()
    groups = [_group(POSITIVE, layers=("layer",), rank=1, dropout=0.25), _group(NEGATIVE, layers=("layer",), rank=1)]
    stack = _randomize(inject(model, groups, 2, _generator()))
    layer = stack.layers["layer"]
    whole = layer(x) - base(x)
    assert torch.equal(layer(x) - base(x), whole)  # not training: no randomness
    stack.train()
    assert not base.training
    _draw_masks(stack, layer, x)
    assert layer.training and not base.training
    dropped = layer(x) - base(x)
    assert torch.equal(layer(x) - base(x), dropped)  # the same mask until the next is drawn
    negative, positive = split(dropped, 2)
    torch.testing.assert_close(negative, split(whole, 2)[NEGATIVE])  # its group has no dropout
    ratio = (positive / split(whole, 2)[POSITIVE]).movedim(1, -1)  # a single rank: whole vectors are dropped or kept
    kept = ratio.abs().amax(-1) > 0.5
    torch.testing.assert_close(ratio[kept], torch.full_like(ratio[kept], 1 / 0.75), rtol=1e-3, atol=1e-3)
    assert ratio[~kept].abs().max() < 1e-3
    assert 0.6 < kept.float().mean() < 0.9
    stack.draw_masks(100, _generator(1))
    assert not torch.equal(layer(x) - base(x), dropped)
    stack.draw_masks(100, _generator(0))
    assert torch.equal(layer(x) - base(x), dropped)
    stack.train(False)
    assert torch.equal(layer(x) - base(x), whole)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_mask_covers_every_row_position_and_rank(kind: str) -> None:
    base: nn.Module = nn.Linear(8, 6) if kind == "linear" else nn.Conv2d(8, 6, 3, stride=2, padding=1)
    x = torch.zeros((4, 3, 5, 8) if kind == "linear" else (4, 8, 6, 10))
    model = nn.ModuleDict({"layer": base})
    groups = [_group(POSITIVE, layers=("layer",), rank=3, dropout=0.5), _group(NEGATIVE, layers=("layer",), rank=1)]
    stack = inject(model, groups, 2, _generator())
    layer = stack.layers["layer"]
    with stack.measuring():
        layer(x)
    stack.draw_masks(2 * 100, _generator())
    assert layer.mask is not None
    assert layer.mask.shape == ((2, 200 * 15, 3) if kind == "linear" else (2, 200, 3, 3, 5))
    by_rank = layer.mask if kind == "linear" else layer.mask.flatten(3).transpose(2, 3).flatten(1, 2)
    assert by_rank[NEGATIVE].all()
    torch.testing.assert_close(by_rank[POSITIVE].float().mean(0), torch.full((3,), 0.5), atol=0.03, rtol=0)


def test_training_without_masks_or_with_those_of_another_batch_is_refused() -> None:
    model = nn.ModuleDict({"layer": nn.Linear(8, 6)})
    stack = inject(model, [_group(POSITIVE, layers=("layer",), dropout=0.5)], 2, _generator())
    layer, x = stack.layers["layer"], torch.zeros(4, 8)
    stack.train()
    with pytest.raises(RuntimeError, match="AdapterStack.measuring"):
        stack.draw_masks(2, _generator())
    with pytest.raises(RuntimeError, match=r"\(2, 2, 2\), got none; call draw_masks"):
        layer(x)
    _draw_masks(stack, layer, x)
    layer(x)
    with pytest.raises(RuntimeError, match=r"of \(2, 4, 2\), got \(2, 2, 2\)"):
        layer(torch.zeros(8, 8))


def test_adapters_start_in_the_mode_of_their_layer(model: Model, x: torch.Tensor) -> None:
    _randomize(inject(model, [_group(POSITIVE, dropout=0.5)], 2, _generator()))
    assert torch.equal(model(x), model(x))


# ------------------------------------------------------------------------------------------------- save and load

SAVED = [_group(POSITIVE, rank=3, alpha=2.0), _group(NEGATIVE, rank=0.3), _group(layers=("re:.*(ff|conv)$",), rank=1)]


def test_keys_name_layer_group_branch_and_factor(model: Model) -> None:
    state = inject(model, SAVED, 2, _generator()).state_dict()
    assert {key for key in state if key.startswith(("blocks.0.attn1.to_q", "blocks.1.conv"))} == {
        "blocks.0.attn1.to_q.0.positive.down",
        "blocks.0.attn1.to_q.0.positive.up",
        "blocks.0.attn1.to_q.1.negative.down",
        "blocks.0.attn1.to_q.1.negative.up",
        "blocks.1.conv.2.shared.down",
        "blocks.1.conv.2.shared.up",
    }
    assert all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in state.values())


def test_loaded_adapters_give_the_same_outputs_and_save_the_same_tensors(model: Model, x: torch.Tensor) -> None:
    image = torch.randn(4, 2, 6, 6)
    stack = _randomize(inject(model, SAVED, 2, _generator()))
    saved, expected, expected_conv = stack.state_dict(), model(x), model.blocks[0].conv(image)
    remove(stack, model)
    again = load_adapters(model, saved, SAVED, 2)
    assert torch.equal(model(x), expected)
    assert torch.equal(model.blocks[0].conv(image), expected_conv)
    assert list(again.state_dict()) == list(saved)
    assert all(torch.equal(again.state_dict()[key], saved[key]) for key in saved)


def test_loading_copies_the_tensors(model: Model, x: torch.Tensor) -> None:
    stack = _randomize(inject(model, SAVED, 2, _generator()))
    saved = stack.state_dict()
    remove(stack, model)
    load_adapters(model, saved, SAVED, 2)
    expected = model(x)
    for tensor in saved.values():
        tensor.zero_()
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("layer", ["ff", "conv"])
def test_a_strength_scales_the_update_of_its_branch(model: Model, layer: str) -> None:
    groups = [_group(branch, layers=(f"blocks.0.{layer}",)) for branch in (POSITIVE, NEGATIVE, None)]
    rows = torch.randn(4, 2, 8, 8, generator=_generator())
    before = split(getattr(model.blocks[0], layer)(rows), 2)
    stack = _randomize(inject(model, groups, 2, _generator()))
    whole = split(getattr(model.blocks[0], layer)(rows), 2)
    saved = stack.state_dict()
    remove(stack, model)
    load_adapters(model, saved, groups, 2, strengths=(0.5, 0.25))
    scaled = split(getattr(model.blocks[0], layer)(rows), 2)
    for branch, strength in ((NEGATIVE, 0.5), (POSITIVE, 0.25)):
        update = (whole[branch] - before[branch]) * strength
        torch.testing.assert_close(scaled[branch] - before[branch], update, rtol=0, atol=1e-5)


def test_strength_zero_is_the_base_model(model: Model, x: torch.Tensor) -> None:
    before = model(x)
    stack = _randomize(inject(model, SAVED, 2, _generator()))
    saved = stack.state_dict()
    remove(stack, model)
    load_adapters(model, saved, SAVED, 2, strengths=(0.0, 0.0))
    assert torch.equal(model(x), before)


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        ({"lora_up.weight": torch.zeros(1)}, says(got="lora_up.weight")),
        ({"blocks.0.ff.5.positive.down": torch.zeros(1, 8)}, says(got="['down'] of positive group 5 in blocks.0.ff")),
        ({"blocks.0.ff.0.positive.down": torch.zeros(1, 8)}, says(expected="blocks.0.ff", got="{'down': (1, 8)}")),
        ({"blocks.0.ff.0.negative.up": torch.zeros(1, 8)}, says(got="['up'] of negative group 0 in blocks.0.ff")),
        ({"blocks.0.ff.2.shared.up": torch.zeros(9, 1)}, says(expected="(8, 1) for blocks.0.ff", got="(9, 1)")),
        (
            {"block.2.shared.up": torch.zeros(8, 1), "block.2.shared.down": torch.zeros(1, 8)},
            says(expected="'block'", got="no such layer"),
        ),
        (
            {"blocks.2.shared.up": torch.zeros(8, 1), "blocks.2.shared.down": torch.zeros(1, 8)},
            says(expected="'blocks'", got="no such layer"),
        ),
    ],
)
def test_tensors_that_do_not_belong_are_refused_and_leave_the_model_as_it_was(
    model: Model, changes: dict[str, torch.Tensor], check: Callable[[InputError], bool]
) -> None:
    stack = inject(model, SAVED, 2, _generator())
    saved = stack.state_dict() | changes
    remove(stack, model)
    modules = dict(model.named_modules())
    with pytest.raises(InputError, check=check):
        load_adapters(model, saved, SAVED, 2)
    assert dict(model.named_modules()) == modules


# --------------------------------------------------------------------------------------------- rank by timestep


def _by_timestep(kind: str) -> tuple[nn.Sequential, AdapterStack, torch.Tensor]:
    """One layer with two branches' groups of rank 4, the positive one down to rank 2; four rows, two a branch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6) if kind == "linear" else nn.Conv2d(8, 6, 3, padding=1))
    groups = [_group(NEGATIVE, rank=4, layers=("0",)), _group(POSITIVE, rank=4, layers=("0",), timestep_min_rank=2)]
    stack = _randomize(inject(model, groups, 2, _generator()))
    shape = (4, 3, 8) if kind == "linear" else (4, 8, 5, 5)
    return model, stack, torch.randn(shape, generator=_generator(1))


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_the_active_rank_of_each_row_falls_from_full_to_the_lowest(kind: str) -> None:
    model, stack, x = _by_timestep(kind)
    negative, positive = stack.layers["0"].updates
    base, operate = stack.layers["0"].base, F.linear if kind == "linear" else F.conv2d
    stack.set_noise_levels(torch.tensor([0.0, 1.0, 0.5, 1.0]))
    y = model(x)
    for row, update, rank in ((0, negative, 4), (1, negative, 4), (2, positive, 3), (3, positive, 2)):
        delta = torch.einsum("or,r...->o...", update.up.flatten(1)[:, :rank], update.down[:rank]) / 4
        options = {} if kind == "linear" else {"padding": 1}
        expected = operate(x[row : row + 1], base.weight + delta, base.bias, **options)
        assert torch.allclose(y[row : row + 1], expected, atol=1e-4)


def test_checkpointing_gives_the_same_gradients_with_a_rank_by_timestep() -> None:
    found = []
    for again in (False, True):
        model, stack, x = _by_timestep("linear")
        stack.set_noise_levels(torch.tensor([0.0, 1.0, 0.5, 1.0]))
        y = checkpoint(model, x, use_reentrant=False) if again else model(x)
        y.square().sum().backward()
        found.append([p.grad for group in stack.parameters_by_group().values() for p in group])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_unknown_timesteps_are_refused_rather_than_taken_for_zero() -> None:
    model, _, x = _by_timestep("linear")
    with pytest.raises(RuntimeError, match="4 rows, got none; call set_noise_levels"):
        model(x)


def test_a_lowest_rank_above_the_rank_is_refused() -> None:
    with pytest.raises(InputError, check=says(expected="timestep_min_rank of unet[None] at most its rank 2", got="3")):
        inject(nn.Sequential(nn.Linear(8, 6)), [_group(layers=("0",), timestep_min_rank=3)], 2, _generator())


# --------------------------------------------------------------------------------------------- a bias


def _adapted(kind: str, *groups: ResolvedGroup) -> tuple[nn.ModuleDict, AdapterStack]:
    """One layer of 4 inputs and 6 outputs with adapters; rows `[B, 4]`, or `[B, 4, 3, 3]` for the convolution."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base: nn.Module = nn.Linear(4, 6) if kind == "linear" else nn.Conv2d(4, 6, 3, padding=1)
    model = nn.ModuleDict({"layer": base})
    return model, inject(model, groups, 2, _generator())


def _rows(kind: str) -> torch.Tensor:
    return torch.randn((4, 4) if kind == "linear" else (4, 4, 3, 3), generator=_generator(1))


def _layer_group(branch: int | None = None, **changes: object) -> ResolvedGroup:
    return _group(branch, layers=("layer",), **changes)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_bias_adds_alpha_over_rank_times_itself_to_the_rows_of_its_branch(kind: str) -> None:
    plain, shared = _layer_group(NEGATIVE), _layer_group(alpha=8.0, bias=True)
    _, stack = _adapted(kind, _layer_group(POSITIVE, rank=2, alpha=3.0, bias=True), plain, shared)
    bias = torch.tensor([1.0, -2.0, 0.0, 4.0, 0.5, 0.0])
    x, layer = _rows(kind), stack.layers["layer"]
    before = split(layer(x), 2)
    for update, factor in zip(layer.updates, (1.0, None, 10.0), strict=True):
        if update.bias is not None:
            update.bias.data = factor * bias
    after = split(layer(x), 2)
    shape = (6,) if kind == "linear" else (6, 1, 1)
    expected = {NEGATIVE: 8 / 2 * 10 * bias, POSITIVE: (3 / 2 + 8 / 2 * 10) * bias}
    for branch, change in expected.items():
        actual = after[branch] - before[branch]
        torch.testing.assert_close(actual, change.view(shape).expand_as(actual), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_bias_starts_at_zero_and_gets_its_branchs_gradient_alone(kind: str) -> None:
    groups = [_layer_group(branch, bias=True) for branch in (NEGATIVE, POSITIVE)]
    _, stack = _adapted(kind, *groups)
    layer, x = stack.layers["layer"], _rows(kind)
    assert torch.equal(layer(x), layer.base(x))
    split(layer(x), 2)[POSITIVE].sum().backward()
    negative, positive = (update.bias for update in layer.updates)
    assert negative is not None and positive is not None
    rows = 2 if kind == "linear" else 2 * 3 * 3
    assert positive.grad is not None
    assert positive.grad.tolist() == [rows * 1.0 / 2] * 6  # alpha / rank for each row or pixel
    assert negative.grad is None or not negative.grad.any()


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_under_autocast_a_bias_does_not_change_the_outputs_dtype(kind: str) -> None:
    model, _ = _adapted(kind)
    stack = inject(
        model.to(torch.bfloat16), [_layer_group(POSITIVE, bias=True), _layer_group(NEGATIVE)], 2, _generator()
    )
    with torch.autocast("cpu", torch.bfloat16):  # rows come as float32 out of a normalisation
        assert stack.layers["layer"](_rows(kind)).dtype == torch.bfloat16


def test_a_bias_is_one_of_its_groups_parameters() -> None:
    _, stack = _adapted("linear", _layer_group(POSITIVE, rank=2, bias=True), _layer_group(NEGATIVE, rank=2))
    counts = [sum(p.numel() for p in parameters) for parameters in stack.parameters_by_group().values()]
    assert counts == [2 * 4 + 6 * 2 + 6, 2 * 4 + 6 * 2]
    assert list(stack.num_layers_by_group().values()) == [1, 1]


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_strength_scales_the_bias_too(kind: str) -> None:
    groups = [_layer_group(branch, bias=True) for branch in (POSITIVE, NEGATIVE)]
    model, stack = _adapted(kind, *groups)
    layer, x = _randomize(stack).layers["layer"], _rows(kind)
    base, whole, saved = split(layer.base(x), 2), split(layer(x), 2), stack.state_dict()
    remove(stack, model)
    scaled = split(load_adapters(model, saved, groups, 2, strengths=(0.5, 0.25)).layers["layer"](x), 2)
    for branch, strength in ((NEGATIVE, 0.5), (POSITIVE, 0.25)):
        change = (whole[branch] - base[branch]) * strength
        torch.testing.assert_close(scaled[branch] - base[branch], change, rtol=0, atol=1e-5)


def test_a_saved_bias_comes_back_and_a_missing_or_unexpected_one_is_refused() -> None:
    groups = [_layer_group(POSITIVE, bias=True)]
    model, stack = _adapted("linear", *groups)
    saved = _randomize(stack).state_dict()
    expected = stack.layers["layer"](_rows("linear"))
    assert sorted(saved) == [f"layer.0.positive.{name}" for name in ("bias", "down", "up")]
    remove(stack, model)
    with pytest.raises(InputError, check=says(got="['bias', 'down', 'up'] of positive group 0")):
        load_adapters(model, saved, [_layer_group(POSITIVE)], 2)
    with pytest.raises(InputError, check=says(got="['down', 'up'] of positive group 0")):
        load_adapters(model, {key: saved[key] for key in saved if not key.endswith("bias")}, groups, 2)
    with pytest.raises(InputError, check=says(expected="for layer", got="'bias': (5,)")):
        load_adapters(model, saved | {"layer.0.positive.bias": torch.zeros(5)}, groups, 2)
    assert torch.equal(load_adapters(model, saved, groups, 2).layers["layer"](_rows("linear")), expected)


# --------------------------------------------------------------------------------------------- start by SVD


def test_principal_factors_by_hand() -> None:
    weight = torch.tensor([[0.0, 9.0, 0.0], [4.0, 0.0, 0.0], [0.0, 0.0, 1.0]])  # singular values 9, 4, 1
    down, up = principal_factors(weight, 2)
    assert down.abs().tolist() == [[0.0, 3.0, 0.0], [2.0, 0.0, 0.0]]  # √9 and √4
    assert up.abs().tolist() == [[3.0, 0.0], [0.0, 2.0], [0.0, 0.0]]
    assert (up @ down).tolist() == [[0.0, 9.0, 0.0], [4.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (6, 4, 3, 3)])
def test_the_principal_part_is_the_best_approximation_and_evenly_split(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=_generator())
    down, up = principal_factors(weight, 2)
    assert down.shape == (2, *shape[1:])
    assert up.shape == (shape[0], 2, *[1] * (len(shape) - 2))
    rest = weight.flatten(1) - up.flatten(1) @ down.flatten(1)
    values = torch.linalg.svdvals(weight.flatten(1))
    torch.testing.assert_close(rest.square().sum(), values[2:].square().sum())  # Eckart and Young
    torch.testing.assert_close(down.flatten(1).norm(dim=1), values[:2].sqrt())
    torch.testing.assert_close(up.flatten(1).norm(dim=0), values[:2].sqrt())


SVD = [
    _layer_group(POSITIVE, rank=2, alpha=3.0, svd_init=True, bias=True),
    _layer_group(NEGATIVE, rank=3, svd_init=True),
    _layer_group(rank=1),
]


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_down_and_up_start_at_the_principal_part_and_the_outputs_stay_bit_equal(kind: str) -> None:
    _, stack = _adapted(kind, *SVD)
    layer, x = stack.layers["layer"], _rows(kind)
    for update, rank in zip(layer.updates[:2], (2, 3), strict=True):
        down, up = principal_factors(layer.weight, rank)
        assert torch.equal(update.down, down) and torch.equal(update.up, up)
    assert torch.equal(layer(x), layer.base(x))


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_what_was_subtracted_is_the_start_times_alpha_over_rank(kind: str) -> None:
    """W_b x = (W − scale · up₀ down₀ + scale · up down) x for each branch, merged by hand."""
    _, stack = _adapted(kind, *SVD[:2])
    layer, x = stack.layers["layer"], _rows(kind)
    operate = F.linear if kind == "linear" else functools.partial(F.conv2d, padding=1)
    _randomize(stack)
    outputs = split(layer(x), 2)
    for update, branch, scale in zip(layer.updates, (POSITIVE, NEGATIVE), (3 / 2, 1 / 3), strict=True):
        down, up = principal_factors(layer.weight, update.rank)
        change = up_down(update.up, update.down) - up_down(up, down)
        bias = layer.base.bias + (0 if update.bias is None else scale * update.bias)
        expected = operate(split(x, 2)[branch], layer.weight + scale * change.view_as(layer.weight), bias)
        torch.testing.assert_close(outputs[branch], expected, rtol=1e-5, atol=1e-5)


def up_down(up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return up.flatten(1) @ down.flatten(1)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_the_factors_get_the_gradients_of_an_ordinary_pair(kind: str) -> None:
    _, stack = _adapted(kind, *SVD[:2])
    layer, x = _randomize(stack).layers["layer"], _rows(kind)
    layer(x).square().sum().backward()
    operate = F.linear if kind == "linear" else functools.partial(F.conv2d, padding=1)
    for update, branch, scale in zip(layer.updates, (POSITIVE, NEGATIVE), (3 / 2, 1 / 3), strict=True):
        down, up = (p.detach().clone().requires_grad_() for p in (update.down, update.up))
        start = up_down(*reversed(principal_factors(layer.weight, update.rank)))
        weight = layer.weight + scale * (up_down(up, down) - start).view_as(layer.weight)
        bias = layer.base.bias + (0 if update.bias is None else scale * update.bias.detach())
        operate(split(x, 2)[branch], weight, bias).square().sum().backward()
        torch.testing.assert_close(update.down.grad, down.grad, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(update.up.grad, up.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_trained_factors_are_saved_as_a_plain_lora_of_twice_the_rank(kind: str) -> None:
    model, stack = _adapted(kind, *SVD)
    x = _rows(kind)
    optimizer = torch.optim.AdamW([p for group in stack.parameters_by_group().values() for p in group], lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        combine(stack.layers["layer"](x), torch.full((2,), 3.0), 2).square().mean().backward()
        optimizer.step()
    trained, saved = stack.layers["layer"](x), stack.state_dict()
    assert (trained - stack.layers["layer"].base(x)).abs().max() > 0.1
    assert saved["layer.0.positive.down"].shape[0] == 2 * 2
    assert saved["layer.1.negative.up"].shape[1] == 2 * 3
    remove(stack, model)
    again = load_adapters(model, saved, SVD, 2)
    torch.testing.assert_close(again.layers["layer"](x), trained, rtol=0, atol=1e-5)
    assert all(torch.equal(again.state_dict()[key], saved[key]) for key in saved)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_start_by_svd_changes_nothing_in_half_precision_either(dtype: torch.dtype) -> None:
    model = nn.ModuleDict({"layer": nn.Linear(8, 6)}).to(dtype)
    x = torch.randn(4, 8, generator=_generator()).to(dtype)
    layer = inject(model, SVD, 2, _generator()).layers["layer"]
    assert torch.equal(layer(x), layer.base(x))
    assert layer.updates[0].down.dtype == torch.float32


def test_a_start_by_svd_is_the_same_every_time_and_draws_no_random_numbers() -> None:
    saved = []
    for seed in (0, 1):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = nn.ModuleDict({"layer": nn.Linear(4, 6)})
            model["layer"].weight.data = torch.arange(24.0).sin().view(6, 4)
            state = torch.get_rng_state()
            saved.append(inject(model, SVD[:2], 2, _generator(seed)).state_dict())
            assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(saved[0][key], saved[1][key]) for key in saved[0])


def test_on_the_meta_device_only_shapes_are_computed() -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({"layer": nn.Conv2d(4, 6, 3)})
    update = inject(model, SVD[:1], 2, _generator()).layers["layer"].updates[0]
    assert update.down.is_meta
    assert (update.down.shape, update.up.shape) == ((2, 4, 3, 3), (6, 2, 1, 1))


def test_a_start_by_svd_leaves_the_rank_by_timestep_of_another_group_alone() -> None:
    by_timestep = _layer_group(POSITIVE, rank=4, timestep_min_rank=2)
    _, stack = _adapted("linear", _layer_group(POSITIVE, rank=2, svd_init=True), by_timestep)
    x = _rows("linear")
    svd, other = _randomize(stack).layers["layer"].updates
    stack.set_noise_levels(torch.ones(4))
    layer = stack.layers["layer"]
    start = up_down(*reversed(principal_factors(layer.weight, 2)))
    weight = layer.weight + (up_down(svd.up, svd.down) - start) / 2 + up_down(other.up[:, :2], other.down[:2]) / 4
    expected = F.linear(x[2:], weight, layer.bias)
    torch.testing.assert_close(layer(x)[2:], expected, rtol=1e-5, atol=1e-5)


def test_a_start_by_svd_of_more_ranks_than_the_weight_has_is_refused() -> None:
    with pytest.raises(InputError, check=says(expected="at most 4 for svd_init", got="5")):
        _adapted("linear", _layer_group(POSITIVE, svd_init=True, rank=5))


# --------------------------------------------------------------------------------------------- orthogonal start


SHAPES = [(6, 4), (4, 6), (6, 4, 3, 3)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("generator", [_generator(), None], ids=["random", "weight"])
def test_the_ranks_of_an_orthogonal_start_are_orthonormal(
    shape: tuple[int, ...], generator: torch.Generator | None
) -> None:
    start = orthogonal_factors(torch.randn(shape, generator=_generator(1)), 3, generator)
    assert (start.down.shape, start.up.shape) == ((3, *shape[1:]), (shape[0], 3, *[1] * (len(shape) - 2)))
    down, up = start.down.flatten(1), start.up.flatten(1)
    torch.testing.assert_close(down @ down.mT, torch.eye(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(up.mT @ up, torch.eye(3), rtol=0, atol=1e-5)
    assert start.values.tolist() == sorted(start.values.tolist(), reverse=True)


def test_an_orthogonal_start_has_the_smallest_components_of_a_random_matrix_or_the_largest_of_the_weight() -> None:
    weight = torch.tensor([[0.0, 9.0, 0.0], [4.0, 0.0, 0.0], [0.0, 0.0, 1.0]])  # singular values 9, 4, 1
    of_weight = orthogonal_factors(weight, 2, None)
    assert of_weight.values.tolist() == [9.0, 4.0]
    assert (of_weight.up * of_weight.values @ of_weight.down).tolist() == [[0, 9, 0], [4, 0, 0], [0, 0, 0]]
    drawn = torch.randn(3, 3, generator=_generator()) / 2
    start = orthogonal_factors(weight, 2, _generator())
    torch.testing.assert_close(start.values, torch.linalg.svdvals(drawn)[1:])
    torch.testing.assert_close(start.down @ drawn.mT @ start.up, torch.diag(start.values))


ORTHOGONAL = [
    _layer_group(POSITIVE, rank=4, alpha=3.0, orthogonal_init="random", timestep_min_rank=1, bias=True),
    _layer_group(NEGATIVE, rank=3, orthogonal_init="weight"),
    _layer_group(rank=1),
]


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("level", [0.0, 0.4, 1.0])
def test_an_orthogonal_start_leaves_the_outputs_bit_equal_at_every_timestep(kind: str, level: float) -> None:
    _, stack = _adapted(kind, *ORTHOGONAL)
    layer, x = stack.layers["layer"], _rows(kind)
    stack.set_noise_levels(torch.full((len(x),), level))
    assert torch.equal(layer(x), layer.base(x))


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize(("level", "num_active"), [(0.0, 4), (1 / 3, 3), (1.0, 1)])
def test_the_ranks_of_a_timestep_are_taken_from_the_update_and_from_its_start(
    kind: str, level: float, num_active: int
) -> None:
    """W x + scale · (B S M A − B₀ S₀ M A₀) x, merged by hand (Soboleva et al. 2025, eq. 7), and the gradients."""
    _, stack = _adapted(kind, ORTHOGONAL[0])
    layer, x = stack.layers["layer"], _rows(kind)
    (update,) = layer.updates
    start = [tensor.detach().clone() for tensor in (update.up, update.values, update.down)]
    _randomize(stack)
    stack.set_noise_levels(torch.full((len(x),), level))
    learned = [tensor.detach().clone().requires_grad_() for tensor in (update.up, update.values, update.down)]
    active = (torch.arange(4) < num_active).float()
    up_values_down = [up.flatten(1) * values * active @ down.flatten(1) for up, values, down in (learned, start)]
    weight = layer.base.weight + 3 / 4 * (up_values_down[0] - up_values_down[1]).view_as(layer.base.weight)
    operate = F.linear if kind == "linear" else functools.partial(F.conv2d, padding=1)
    expected = operate(split(x, 2)[POSITIVE], weight, layer.base.bias + 3 / 4 * update.bias.detach())
    outputs = split(layer(x), 2)[POSITIVE]
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-4)
    outputs.square().sum().backward()
    expected.square().sum().backward()
    for parameter, by_hand in zip((update.up, update.values, update.down), learned, strict=True):
        torch.testing.assert_close(parameter.grad, by_hand.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_all_three_factors_are_trained_and_saved_as_a_plain_lora_with_its_ranks_by_timestep(kind: str) -> None:
    model, stack = _adapted(kind, *ORTHOGONAL)
    x = _rows(kind)
    levels = torch.linspace(0, 1, len(x))
    stack.set_noise_levels(levels)
    (group,) = (parameters for name, parameters in stack.parameters_by_group().items() if name == ORTHOGONAL[0].name)
    before = [parameter.detach().clone() for parameter in group]
    optimizer = torch.optim.AdamW([p for group in stack.parameters_by_group().values() for p in group], lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        combine(stack.layers["layer"](x), torch.full((2,), 3.0), 2).square().mean().backward()
        optimizer.step()
    assert len(group) == 4 and not any(torch.equal(*pair) for pair in zip(before, group, strict=True))
    trained, saved = stack.layers["layer"](x), stack.state_dict()
    assert {name.rpartition(".")[2] for name in saved} == {"down", "up", "bias"}
    assert saved["layer.0.positive.down"].shape[0] == 2 * 4
    remove(stack, model)
    again = load_adapters(model, saved, ORTHOGONAL, 2)
    again.set_noise_levels(levels)
    torch.testing.assert_close(again.layers["layer"](x), trained, rtol=0, atol=1e-5)
    again.set_noise_levels(1 - levels)
    assert not torch.allclose(again.layers["layer"](x), trained, rtol=0, atol=1e-3)
    assert all(torch.equal(again.state_dict()[key], saved[key]) for key in saved)


def test_a_saved_orthogonal_update_of_an_odd_rank_is_refused() -> None:
    model, stack = _adapted("linear", ORTHOGONAL[1])
    saved = stack.state_dict()
    remove(stack, model)
    name = "layer.0.negative"
    odd = {f"{name}.down": saved[f"{name}.down"][:5], f"{name}.up": saved[f"{name}.up"][:, :5]}
    with pytest.raises(InputError, check=says(expected="even rank in layer for orthogonal_init", got="5")):
        load_adapters(model, odd, ORTHOGONAL[1:2], 2)


def test_a_random_orthogonal_start_depends_on_the_seed_only_and_that_of_the_weight_on_nothing() -> None:
    def saved(seed: int, group: ResolvedGroup) -> torch.Tensor:
        model = nn.ModuleDict({"layer": nn.Linear(4, 6)})
        model["layer"].weight.data = torch.arange(24.0).sin().view(6, 4)
        return inject(model, [group], 2, _generator(seed)).layers["layer"].updates[0].down.detach()

    drawn, of_weight = ORTHOGONAL[0].model_copy(update={"rank": 2}), ORTHOGONAL[1]
    assert torch.equal(saved(0, drawn), saved(0, drawn))
    assert not torch.allclose(saved(0, drawn), saved(1, drawn), atol=0.1)
    assert torch.equal(saved(0, of_weight), saved(1, of_weight))


def test_an_orthogonal_start_on_the_meta_device_has_shapes_only() -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({"layer": nn.Conv2d(4, 6, 3)})
    update = inject(model, ORTHOGONAL[:1], 2, _generator()).layers["layer"].updates[0]
    assert update.down.is_meta
    assert (update.down.shape, update.values.shape, update.up.shape) == ((4, 4, 3, 3), (4,), (6, 4, 1, 1))


def test_an_orthogonal_start_of_more_ranks_than_the_weight_has_is_refused() -> None:
    with pytest.raises(InputError, check=says(expected="at most 4 for orthogonal_init", got="5")):
        _adapted("linear", _layer_group(POSITIVE, orthogonal_init="random", rank=5))
