"""Time the adapted layers of a UNet, one by one, in designs that compute the same.

    python benchmarks/adapted_layers.py                                     # the embedded base model, CPU, one thread
    python benchmarks/adapted_layers.py --threads 2 --rank 4
    python benchmarks/adapted_layers.py --base-model FOLDER --device cuda --dtype bfloat16

Every kind of layer (weight and input shape) that the selectors match is timed, forward and backward, and counted as
often as the UNet has it. Outputs and gradients of every design are compared with those of the plain computation first,
by autograd through W + up · down of each branch; a design that differs is an error.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dreamartist_pipeline.core.adapters import select_layers
from dreamartist_pipeline.core.branch_products import ConvGeometry, ConvProduct, LinearProduct, arranged_down

ROOT = Path(__file__).resolve().parents[1]
SELECTORS = (r"re:.*\.attn.?$", r"re:.*\.ff$", r"re:.*resnets\.\d+$")  # of the default method
FROZEN, OURS = "frozen layer", "this project"
_NUM_BRANCHES = 2
_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}  # relative, of a whole tensor


# ---------------------------------------------------------------------------------------------- layers


@dataclass(frozen=True)
class Kind:
    """Layers of the same shapes.

    Attributes:
        weight: `[out, in]` or `[out, in, kh, kw]`.
        rows: shape of the inputs, `[2·B, ...]`.
        geometry: of a convolution.
    """

    weight: tuple[int, ...]
    rows: tuple[int, ...]
    geometry: ConvGeometry | None


@dataclass(frozen=True)
class Case:
    """The tensors of one layer: frozen weight and bias, inputs and the gradient of the outputs, factors as leaves.

    `down` is `[2, R, in]` or `[2, R, in, kh, kw]`, `up` `[2, out, R]`.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    x: torch.Tensor
    gradient: torch.Tensor
    down: torch.Tensor
    up: torch.Tensor
    geometry: ConvGeometry | None

    def operate(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Apply a weight of this layer's shape, but for the number of outputs."""
        if self.geometry is None:
            return F.linear(x, weight, bias)
        return F.conv2d(x, weight, bias, self.geometry.stride, self.geometry.padding, self.geometry.dilation)


@torch.no_grad()
def find_kinds(unet: Any, num_rows: int, num_tokens: int) -> Counter[Kind]:
    """Return the kinds of the selected layers, with their numbers, for `num_rows` rows in both branches."""
    names, found, config = set(select_layers(unet, SELECTORS)), Counter[Kind](), unet.config

    def note(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
            assert isinstance(layer, nn.Linear | nn.Conv2d)
            geometry = ConvGeometry.of(layer, name) if isinstance(layer, nn.Conv2d) else None
            found[Kind(tuple(layer.weight.shape), tuple(inputs[0].shape), geometry)] += 1

        return hook

    handles = [unet.get_submodule(name).register_forward_hook(note(name)) for name in names]
    parameter = next(unet.parameters())
    latents = torch.zeros(num_rows, config.in_channels, config.sample_size, config.sample_size).to(parameter)
    hidden = torch.zeros(num_rows, num_tokens, config.cross_attention_dim).to(parameter)
    unet(latents, torch.zeros(num_rows, dtype=torch.long, device=parameter.device), hidden)
    for handle in handles:
        handle.remove()
    return found


def make_case(kind: Kind, rank: int, device: torch.device, dtype: torch.dtype) -> Case:
    """Draw the tensors of a layer."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    out, *rest = kind.weight
    fan_in = torch.Size(rest).numel()
    weight, bias = draw(*kind.weight, scale=fan_in**-0.5), draw(out)
    x = draw(*kind.rows).requires_grad_()
    down = draw(_NUM_BRANCHES, rank, *rest, scale=fan_in**-0.5).requires_grad_()
    up = draw(_NUM_BRANCHES, out, rank, scale=0.1).requires_grad_()
    case = Case(weight, bias, x, x, down, up, kind.geometry)
    return Case(weight, bias, x, draw(*case.operate(x.detach(), weight).shape), down, up, kind.geometry)


# ---------------------------------------------------------------------------------------------- designs

Design = Callable[[Case], torch.Tensor]


def frozen(case: Case) -> torch.Tensor:
    """The layer without adapters: the lower limit."""
    return case.operate(case.x, case.weight, case.bias)


def ours(case: Case) -> torch.Tensor:
    """This project's product with its own backward pass; for a convolution, down as one matrix product."""
    if case.geometry is None:
        y: torch.Tensor = LinearProduct.apply(case.x, case.weight, case.bias, case.down, case.up, None)  # type: ignore[no-untyped-call]
        return y
    geometry = case.geometry
    down = torch.stack([arranged_down(each, geometry) for each in case.down])
    y = ConvProduct.apply(case.x, case.weight, case.bias, down, case.up, None, geometry)  # type: ignore[no-untyped-call]
    return y


def branch_after_branch(case: Case) -> torch.Tensor:
    """Down and up of each branch on its rows, added to the outputs of the frozen layer."""
    outputs = []
    y = case.operate(case.x, case.weight, case.bias).chunk(_NUM_BRANCHES)
    for rows, of_rows, down, up in zip(case.x.chunk(_NUM_BRANCHES), y, case.down, case.up, strict=True):
        hidden = case.operate(rows, down)
        outputs.append(
            of_rows + (F.linear(hidden, up) if case.geometry is None else F.conv2d(hidden, up[..., None, None]))
        )
    return torch.cat(outputs)


def dense(case: Case) -> torch.Tensor:
    """W + up · down of each branch as one weight."""
    weights = case.weight + (case.up @ case.down.flatten(2)).view(_NUM_BRANCHES, *case.weight.shape)
    rows = zip(case.x.chunk(_NUM_BRANCHES), weights, strict=True)
    return torch.cat([case.operate(each, weight, case.bias) for each, weight in rows])


def one_product(case: Case) -> torch.Tensor:
    """One product with the rows of W and of down of both branches; a row's other branch is not used."""
    num_outputs, rank = case.weight.shape[0], case.down.shape[1]
    y = case.operate(case.x, torch.cat([case.weight, *case.down]))
    bias = case.bias if case.geometry is None else case.bias[:, None, None]
    outputs = []
    for branch, (rows, up) in enumerate(zip(y.chunk(_NUM_BRANCHES), case.up, strict=True)):
        ranks = slice(num_outputs + branch * rank, num_outputs + (branch + 1) * rank)
        if case.geometry is None:
            outputs.append(rows[..., :num_outputs] + bias + F.linear(rows[..., ranks], up))
        else:
            outputs.append(rows[:, :num_outputs] + bias + F.conv2d(rows[:, ranks], up[..., None, None]))
    return torch.cat(outputs)


def grouped(case: Case) -> torch.Tensor:
    """Down and up as convolutions with one group per branch, on inputs with the branches side by side."""
    y, geometry = case.operate(case.x, case.weight, case.bias), case.geometry
    assert geometry is not None
    inputs = case.x.unflatten(0, (_NUM_BRANCHES, -1)).transpose(0, 1).flatten(1, 2)  # [B, 2·in, H, W]
    options = (geometry.stride, geometry.padding, geometry.dilation, _NUM_BRANCHES)
    hidden = F.conv2d(inputs, case.down.flatten(0, 1), None, *options)  # [B, 2·R, h, w]
    update = F.conv2d(hidden, case.up.flatten(0, 1)[..., None, None], groups=_NUM_BRANCHES)  # [B, 2·out, h, w]
    return y + update.unflatten(1, (_NUM_BRANCHES, -1)).transpose(0, 1).flatten(0, 1)


def windows(case: Case) -> torch.Tensor:
    """Down as a product with the windows of the inputs (im2col)."""
    y, geometry = case.operate(case.x, case.weight, case.bias), case.geometry
    assert geometry is not None
    rows = geometry.windows(case.x).unflatten(0, (_NUM_BRANCHES, -1))  # [2, B, in · kh · kw, h · w]
    update = case.up[:, None] @ (case.down.flatten(2)[:, None] @ rows)  # [2, B, out, h · w]
    return y + update.flatten(0, 1).view_as(y)


def stacked(case: Case) -> torch.Tensor:
    """Batched products over the branches by autograd, rank activations as `[N, R]`."""
    y = case.operate(case.x, case.weight, case.bias)
    rows = case.x.reshape(_NUM_BRANCHES, -1, case.x.shape[-1])
    of_rows = y.view(_NUM_BRANCHES, -1, y.shape[-1])
    return torch.baddbmm(of_rows, torch.bmm(rows, case.down.mT), case.up.mT).view_as(y)


_COMMON: dict[str, Design] = {
    FROZEN: frozen,
    OURS: ours,
    "one branch after the other": branch_after_branch,
    "one product, [W; down]": one_product,
    "dense, W + up · down": dense,
}
LINEAR: dict[str, Design] = {**_COMMON, "batched by autograd": stacked}
CONVOLUTION: dict[str, Design] = {**_COMMON, "grouped by branch": grouped, "down on windows (im2col)": windows}


# ---------------------------------------------------------------------------------------------- agreement and timing


def run(design: Design, case: Case) -> list[torch.Tensor]:
    """Return the outputs and the gradients of the inputs and, but for the frozen layer, of the factors."""
    y = design(case)
    leaves = [case.x] if design is frozen else [case.x, case.down, case.up]
    return [y.detach(), *torch.autograd.grad(y, leaves, case.gradient)]


def check_agreement(designs: dict[str, Design], case: Case) -> None:
    """Compare the designs with adapters with the plain computation.

    Raises:
        SystemExit: one of them differs.
    """
    expected = run(dense, case)
    for name, design in designs.items():
        for what, wanted, got in zip(("outputs", "inputs", "down", "up"), expected, run(design, case), strict=False):
            error = float((got - wanted).norm() / wanted.norm())
            if design is not frozen and error > _TOLERANCE[case.x.dtype]:
                raise SystemExit(
                    f"'{name}' differs from the plain computation in {what} by {error:.1e}: {case.x.shape}"
                )


def seconds_by_design(
    kinds: Counter[Kind], rank: int, device: torch.device, dtype: torch.dtype, num_rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Return linear | convolution -> design -> seconds of all its layers, of every round."""
    totals: dict[str, dict[str, list[float]]] = {}
    for kind, number in kinds.items():
        family, designs = ("linear", LINEAR) if kind.geometry is None else ("convolution", CONVOLUTION)
        case = make_case(kind, rank, device, dtype)
        check_agreement(designs, case)
        sums = totals.setdefault(family, {name: [0.0] * num_rounds for name in designs})
        for index in range(num_rounds):
            for name in designs if index % 2 == 0 else reversed(designs):
                sums[name][index] += number * _seconds(designs[name], case)
    return totals


def _seconds(design: Design, case: Case) -> float:
    if case.x.is_cuda:
        torch.cuda.synchronize()
    clock = time.process_time if case.x.device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    begun = clock()
    run(design, case)
    if case.x.is_cuda:
        torch.cuda.synchronize()
    return clock() - begun


def make_report(
    totals: dict[str, dict[str, list[float]]], counts: dict[str, int], facts: dict[str, Any]
) -> dict[str, Any]:
    """Return facts and rows, with medians and quartiles in ms, as plain values."""
    rows = []
    for family, designs in totals.items():
        base = statistics.median(designs[FROZEN])
        for name, seconds in designs.items():
            low, median, high = statistics.quantiles(seconds, n=4)
            row = {"layers": f"{counts[family]} {family}", "design": name, "ms": 1000 * median}
            rows.append(row | {"low": 1000 * low, "high": 1000 * high, "ratio": median / base})
    return {"facts": facts, "rows": rows}


def as_markdown(report: dict[str, Any]) -> str:
    """Return the report as text with a table."""
    lines = [", ".join(f"{name} {value}" for name, value in report["facts"].items()), ""]
    lines += ["| layers | design | ms | quartiles | × frozen |", "|---|---|---:|---:|---:|"]
    for row in report["rows"]:
        cells = [row["layers"], row["design"], f"{row['ms']:.1f}", f"{row['low']:.1f} – {row['high']:.1f}"]
        lines.append(f"| {' | '.join(cells)} | {row['ratio']:.2f} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Check and time the designs, print and write the table."""
    from diffusers import UNet2DConditionModel

    options = _parse(arguments)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    torch.set_num_threads(options.threads)
    unet = UNet2DConditionModel.from_pretrained(options.base_model, subfolder="unet", local_files_only=True)
    kinds = find_kinds(unet.to(device), _NUM_BRANCHES * options.rows, options.tokens)
    totals = seconds_by_design(kinds, options.rank, device, dtype, options.rounds)
    facts = {
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU",
        "torch": torch.__version__,
        "dtype": options.dtype,
        "threads": options.threads,
        "rows per branch": options.rows,
        "rank": options.rank,
        "rounds": options.rounds,
    }
    counts = {"linear": 0, "convolution": 0}
    for kind, number in kinds.items():
        counts["linear" if kind.geometry is None else "convolution"] += number
    report = make_report(totals, counts, facts)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "adapted_layers.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (options.output / "adapted_layers.md").write_text(as_markdown(report), encoding="utf-8")
    print(f"{as_markdown(report)}\nwritten to {options.output}/adapted_layers.md and .json")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-model", type=Path, default=ROOT / "data/01_raw/base_model", help="folder of diffusers")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64", "bfloat16"))
    parser.add_argument("--rows", type=int, default=5, help="rows per branch")
    parser.add_argument("--tokens", type=int, default=40, help="length of the text states (SD 1.5: 77)")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; 1 measures this process's CPU time")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=ROOT / "data/08_reporting/benchmarks")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
