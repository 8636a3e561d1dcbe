"""Time one training step of a UNet with a LoRA per branch, in four designs that compute the same.

    python benchmarks/dual_branch_layer.py                                   # a UNet of the embedded model's size, CPU
    python benchmarks/dual_branch_layer.py --base-model FOLDER --device cuda

A step is forward, guidance, loss and backward on [negative | positive] rows, with gradients of adapters and text
states, without the optimizer, which is the same for all designs.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import sys
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dreamartist_pipeline.core.adapters import inject, select_layers
from dreamartist_pipeline.core.branches import BRANCH_NAMES, combine, repeat
from dreamartist_pipeline.params import ResolvedGroup

_SELECTORS = (r"re:.*\.attn.?$",)
_GUIDANCE_SCALE = 3.0
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2}  # relative, of a whole tensor


@dataclass(frozen=True)
class Batch:
    """Latents and noise `[B, C, h, w]`, timesteps `[B]`, text states `[2B, L, D]` (a leaf)."""

    latents: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    hidden: torch.Tensor


Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""layer + "." + branch name -> (down `[rank, in]`, up `[out, rank]`)."""


# ---------------------------------------------------------------------------------------------- designs


class Design(ABC):
    """One way to run both branches.

    Args of the constructor: a UNet of its own (sharing the frozen tensors), and the adapters to start from.
    """

    name: str

    @abstractmethod
    def predict(self, latents: torch.Tensor, timesteps: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Return the prediction of both branches `[2B, C, h, w]` for stacked rows."""

    @abstractmethod
    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters by "<layer>.<branch>.<down|up>"."""


class Frozen(Design):
    """The UNet without adapters: the lower limit of a step."""

    name = "frozen UNet, no LoRA"

    def __init__(self, unet: nn.Module, factors: Factors) -> None:
        self.unet = unet

    def predict(self, latents: torch.Tensor, timesteps: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Return the frozen UNet's prediction."""
        return _prediction(self.unet, latents, timesteps, hidden)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return nothing."""
        return {}


class PeftTwoPasses(Design):
    """PEFT with an adapter per branch and `set_adapter` between two passes.

    `set_adapter` disables gradients of the other adapter; they are enabled again before each pass.
    """

    name = "PEFT, two passes, gradients repaired"

    def __init__(self, unet: nn.Module, factors: Factors) -> None:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = sorted({key.rpartition(".")[0] for key in factors})
        rank = next(iter(factors.values()))[0].shape[0]
        for branch in BRANCH_NAMES:
            config = LoraConfig(r=rank, lora_alpha=1, target_modules=layers)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # intended
                inject_adapter_in_model(config, unet, adapter_name=branch)
        self.unet = unet
        self.tuners = [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]
        self._parameters = self._copy(factors)

    def _copy(self, factors: Factors) -> dict[str, nn.Parameter]:
        found = {}
        for key, (down, up) in factors.items():
            layer, _, branch = key.rpartition(".")
            tuner: Any = self.unet.get_submodule(layer)
            for name, lora, values in (("down", tuner.lora_A, down), ("up", tuner.lora_B, up)):
                lora[branch].weight.data.copy_(values)
                found[f"{key}.{name}"] = lora[branch].weight
        return found

    def predict(self, latents: torch.Tensor, timesteps: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Return both branches' predictions, one pass each."""
        rows = zip(latents.chunk(2), timesteps.chunk(2), hidden.chunk(2), strict=True)
        predictions = []
        for branch, (z, t, h) in zip(BRANCH_NAMES, rows, strict=True):
            for tuner in self.tuners:
                tuner.set_adapter(branch)
            for parameter in self._parameters.values():
                parameter.requires_grad_(True)
            predictions.append(_prediction(self.unet, z, t, h))
        return torch.cat(predictions)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return both adapters' parameters."""
        return self._parameters


class SliceHook(Design):
    """A forward hook on every layer that adds each branch's update to its slice of the batch."""

    name = "hook that adds to a slice"

    def __init__(self, unet: nn.Module, factors: Factors) -> None:
        self.unet = unet
        self._parameters = {
            f"{key}.{name}": nn.Parameter(values.clone())
            for key, pair in factors.items()
            for name, values in zip(("down", "up"), pair, strict=True)
        }
        for layer in sorted({key.rpartition(".")[0] for key in factors}):
            for row, branch in enumerate(BRANCH_NAMES):
                down, up = (self._parameters[f"{layer}.{branch}.{name}"] for name in ("down", "up"))
                unet.get_submodule(layer).register_forward_hook(_slice_hook(row, down, up))

    def predict(self, latents: torch.Tensor, timesteps: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Return the hooked UNet's prediction."""
        return _prediction(self.unet, latents, timesteps, hidden)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the hooks' parameters."""
        return self._parameters


def _slice_hook(row: int, down: nn.Parameter, up: nn.Parameter) -> Callable[..., torch.Tensor]:
    scale = 1 / down.shape[0]

    def hook(module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        size = len(output) // len(BRANCH_NAMES)
        rows = slice(row * size, (row + 1) * size)
        update = F.linear(F.linear(inputs[0][rows], down.to(output.dtype)), up.to(output.dtype)) * scale
        output[rows] = output[rows] + update
        return output

    return hook


class Stacked(Design):
    """This project's layers: one batched product for both branches."""

    name = "stacked (this project)"

    def __init__(self, unet: nn.Module, factors: Factors) -> None:
        down = next(iter(factors.values()))[0]
        layers = tuple(sorted({key.rpartition(".")[0] for key in factors}))
        groups = [
            ResolvedGroup(name=branch, rank=down.shape[0], layers=layers, lr=1.0, branch=branch)
            for branch in BRANCH_NAMES
        ]
        self.unet = unet
        stack = inject(unet, groups, num_branches=2, generator=torch.Generator())
        self._parameters: dict[str, nn.Parameter] = {}
        for layer, module in stack.layers.items():
            for update in module.updates:
                key = f"{layer}.{update.group.branch}"
                update.down.data.copy_(factors[key][0])
                update.up.data.copy_(factors[key][1])
                self._parameters |= {f"{key}.down": update.down, f"{key}.up": update.up}

    def predict(self, latents: torch.Tensor, timesteps: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Return the adapted UNet's prediction."""
        return _prediction(self.unet, latents, timesteps, hidden)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the stack's parameters."""
        return self._parameters


def _prediction(unet: nn.Module, latents: torch.Tensor, timesteps: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    prediction: torch.Tensor = unet(latents, timesteps, hidden, return_dict=False)[0]
    return prediction


# ---------------------------------------------------------------------------------------------- one step, and agreement


@dataclass(frozen=True)
class Outcome:
    """Result of a step: the prediction `[2B, C, h, w]` and every gradient by name."""

    prediction: torch.Tensor
    gradients: dict[str, torch.Tensor | None]


def step(design: Design, batch: Batch) -> torch.Tensor:
    """Run one training step without optimizer and return the prediction of both branches."""
    for parameter in design.parameters().values():
        parameter.grad = None
    batch.hidden.grad = None
    prediction = design.predict(repeat(batch.latents, 2), repeat(batch.timesteps, 2), batch.hidden)
    guidance = torch.full((len(batch.latents),), _GUIDANCE_SCALE, device=prediction.device)
    loss = F.mse_loss(combine(prediction.float(), guidance, 2), batch.noise.float())
    loss.backward()  # type: ignore[no-untyped-call]
    return prediction.detach()


def outcome(design: Design, batch: Batch) -> Outcome:
    """Run one step and return prediction and gradients."""
    prediction = step(design, batch)
    gradients = {name: parameter.grad for name, parameter in design.parameters().items()}
    return Outcome(prediction, {**gradients, "text states": batch.hidden.grad})


def disagreements(ours: Outcome, theirs: Outcome, tolerance: float) -> list[str]:
    """Return the differences of two designs in prediction and gradients; missing and zero gradients count."""
    found = []
    if not _close(ours.prediction, theirs.prediction, tolerance):
        found.append("prediction")
    if set(ours.gradients) != set(theirs.gradients):
        found.append(f"parameters {sorted(set(ours.gradients) ^ set(theirs.gradients))[:4]}")
    for name in set(ours.gradients) & set(theirs.gradients):
        mine, other = ours.gradients[name], theirs.gradients[name]
        if mine is None or other is None or not mine.any() or not other.any():
            found.append(f"missing gradient of {name}")
        elif not _close(mine, other, tolerance):
            found.append(f"gradient of {name}")
    return found


def _close(first: torch.Tensor, second: torch.Tensor, tolerance: float) -> bool:
    first, second = first.double(), second.double()
    return bool((first - second).norm() <= tolerance * second.norm())


def check_agreement(designs: Sequence[Design], batch: Batch, dtype: torch.dtype) -> None:
    """Check that all designs with adapters compute the same.

    Raises:
        SystemExit: two of them differ.
    """
    adapted = [design for design in designs if design.parameters()]
    outcomes = [outcome(design, batch) for design in adapted]
    for design, other in zip(adapted[1:], outcomes[1:], strict=True):
        if wrong := disagreements(other, outcomes[0], _TOLERANCE[dtype]):
            raise SystemExit(
                f"expected '{design.name}' and '{adapted[0].name}' to compute the same; "
                f"got {len(wrong)} differences: {', '.join(wrong[:4])}"
            )
    print(f"{len(adapted)} designs agree in predictions and in {len(outcomes[0].gradients)} gradients.")


# ---------------------------------------------------------------------------------------------- set-up


def build_designs(base: nn.Module, rank: int) -> list[Design]:
    """Return all designs, on UNets of their own that share the frozen tensors, with the same adapters."""
    factors = make_factors(base, rank)
    return [kind(share_weights(base), factors) for kind in (Frozen, PeftTwoPasses, SliceHook, Stacked)]


def make_factors(unet: nn.Module, rank: int) -> Factors:
    """Draw adapters for all attention layers; up is not zero, so that down has a gradient."""
    generator = torch.Generator().manual_seed(0)
    factors: Factors = {}
    for layer in select_layers(unet, _SELECTORS):
        weight: torch.Tensor = unet.get_submodule(layer).weight  # type: ignore[assignment]
        dtype = torch.promote_types(weight.dtype, torch.float32)
        for branch in BRANCH_NAMES:
            down = torch.randn(rank, weight.shape[1], generator=generator) / weight.shape[1] ** 0.5
            up = torch.randn(weight.shape[0], rank, generator=generator) * 0.1
            factors[f"{layer}.{branch}"] = (down.to(weight.device, dtype), up.to(weight.device, dtype))
    return factors


def share_weights(module: nn.Module) -> nn.Module:
    """Copy the modules but not their tensors."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, shared)


def load_unet(folder: Path | None, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, int]:
    """Return a frozen UNet and the length of its text: the folder's, or a random one of the embedded model's size."""
    from diffusers import UNet2DConditionModel

    from dreamartist_pipeline.embedded.model import build_unet
    from dreamartist_pipeline.params import EmbeddedModelSize

    size = EmbeddedModelSize()
    if folder is not None:
        unet, num_tokens = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", local_files_only=True), 77
    else:
        torch.manual_seed(0)
        unet, num_tokens = build_unet(size), size.max_tokens
        nn.init.normal_(unet.conv_out.weight, std=0.1)  # the zero-initialised output layer has no gradient
    nn.Module.to(unet, device, dtype)
    return unet.eval().requires_grad_(False), num_tokens


def make_batch(unet: Any, num_rows: int, num_tokens: int, device: torch.device, dtype: torch.dtype) -> Batch:
    """Draw a batch for the UNet."""
    generator = torch.Generator().manual_seed(1)
    config = unet.config
    shape = (num_rows, config.in_channels, config.sample_size, config.sample_size)
    hidden = torch.randn(2 * num_rows, num_tokens, config.cross_attention_dim, generator=generator)
    return Batch(
        latents=torch.randn(shape, generator=generator).to(device, dtype),
        noise=torch.randn(shape, generator=generator).to(device, dtype),
        timesteps=torch.randint(0, 1000, (num_rows,), generator=generator).to(device),
        hidden=hidden.to(device, dtype).requires_grad_(True),
    )


# ---------------------------------------------------------------------------------------------- timing


def time_step_ms(design: Design, batch: Batch, device: torch.device) -> float:
    """Time one step by CUDA events on a GPU, CPU time of the process on one thread, or else wall-clock time."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        step(design, batch)
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end))
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    begun = clock()
    step(design, batch)
    return (clock() - begun) * 1000


def time_designs(
    designs: Sequence[Design], batch: Batch, device: torch.device, num_warmups: int, num_rounds: int
) -> dict[str, list[float]]:
    """Time the designs in alternation, so that other load affects all of them."""
    for design in designs:
        for _ in range(num_warmups):
            step(design, batch)
    times: dict[str, list[float]] = {design.name: [] for design in designs}
    for index in range(num_rounds):
        for design in designs if index % 2 == 0 else reversed(designs):
            times[design.name].append(time_step_ms(design, batch, device))
        print(f"\rround {index + 1}/{num_rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return times


def table(times: dict[str, list[float]]) -> str:
    """Return medians with quartiles and ratios as a markdown table."""
    medians = {name: statistics.median(values) for name, values in times.items()}
    lines = ["| design | ms a step | quartiles | × frozen UNet | × stacked |", "|---|---:|---:|---:|---:|"]
    for name, values in times.items():
        low, _, high = statistics.quantiles(values, n=4)
        ratios = [f"{medians[name] / medians[other]:.2f}" for other in (Frozen.name, Stacked.name)]
        lines.append(f"| {name} | {medians[name]:.1f} | {low:.1f} – {high:.1f} | {' | '.join(ratios)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Check and time the designs, print and write the table."""
    options = _parse(arguments)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    torch.set_num_threads(options.threads)
    unet, num_tokens = load_unet(options.base_model, device, dtype)
    batch = make_batch(unet, options.rows, num_tokens, device, dtype)
    designs = build_designs(unet, options.rank)
    check_agreement(designs, batch, dtype)
    num_warmups = options.warmups if options.warmups is not None else (20 if device.type == "cuda" else 3)
    times = time_designs(designs, batch, device, num_warmups, options.rounds)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    heading = (
        f"{machine}, {options.dtype}, {options.threads} CPU thread(s), torch {torch.__version__}; "
        f"{sum(p.numel() for p in unet.parameters()) / 1e6:.1f} M parameters, 2 × {options.rows} rows, "
        f"rank {options.rank}, {options.rounds} rounds after {num_warmups} warm-ups"
    )
    report = f"{heading}\n\n{table(times)}\n"
    print(f"\n{report}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(report, encoding="utf-8")
    print(f"written to {options.output}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-model", type=Path, help="folder in diffusers' layout; default: random, embedded size")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64", "bfloat16"))
    parser.add_argument("--rows", type=int, default=5, help="rows per branch (default: 4 reference + 1 regularization)")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; 1 measures this process's CPU time")
    parser.add_argument("--warmups", type=int, help="default: 20 on a GPU, 3 on a CPU")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path("data/08_reporting/benchmarks/dual_branch_layer.md"))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
