"""Print the memory of a training step by case, counted without running it; optionally measure one case.

    python benchmarks/memory.py
    python benchmarks/memory.py --json data/08_reporting/memory.json
    python benchmarks/memory.py --measure

UNets and text encoders have the architecture of Stable Diffusion 1.5 at 512 px and of SDXL at 1024 px, in bfloat16,
with the adapters of the method `tutorial` (attention, rank 3) or `toolkit` (feed-forward layers too, up to rank 192),
and 4 + 1 rows in two branches. Nothing is loaded or computed: the step runs on the meta device.
`--measure` runs one step of 1 + 0 rows of Stable Diffusion 1.5 in float32 on the CPU with random weights, and compares
the peak of resident memory with the count (about 8 GiB).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from dreamartist_pipeline.backbones.families.backbone import checkpoint_gradients
from dreamartist_pipeline.core.adapters import AdapterStack, inject
from dreamartist_pipeline.core.diffusion import NoiseSchedule
from dreamartist_pipeline.core.memory import StepShape, count_step, measure_step
from dreamartist_pipeline.core.parameter_groups import parameter_groups
from dreamartist_pipeline.core.prompt_tokens import PromptTokens
from dreamartist_pipeline.core.training_step import TrainableModel
from dreamartist_pipeline.params import ResolvedGroup
from speed.random_models import CLIP_L, OPENCLIP_G, SD15_UNET, SDXL_UNET

GIB = 2**30
BYTES_PER_TRAINED_VALUE = 16  # float32: itself, its gradient, two moments
TEXT_SELECTORS = (r"re:.*self_attn$", r"re:.*mlp$")
METHODS: dict[str, dict[str, dict[str, Any]]] = {  # of conf/base/parameters_training.yml
    "tutorial": {
        "unet": {"rank": 3, "layers": [r"re:.*\.attn.?$"]},
        "text_encoder": {"rank": 1, "layers": TEXT_SELECTORS},
    },
    "toolkit": {
        "unet": {"rank": 0.01875, "layers": [r"re:.*\.to_k$", r"re:.*\.to_v$", r"re:.*\.ff$"]},
        "text_encoder": {"rank": 2, "layers": TEXT_SELECTORS},
    },
}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The architecture of a base model.

    Attributes:
        unet: arguments of UNet2DConditionModel; the others are its defaults, which are those of Stable Diffusion 1.
        text_encoders: arguments of CLIPTextConfig.
        latent_px: side of the latents.
        pooled_width: of the added conditioning of SDXL; 0 without.
    """

    unet: dict[str, Any]
    text_encoders: Sequence[dict[str, Any]]
    latent_px: int
    pooled_width: int = 0


SD15 = Architecture(SD15_UNET, [CLIP_L], 64)
SDXL = Architecture(SDXL_UNET, [CLIP_L, OPENCLIP_G], 128, pooled_width=1280)


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table; see `core.training_step.Execution` for `micro_batch`."""

    name: str
    architecture: Architecture
    checkpointing: bool = False
    micro_batch: int | None = None
    dtype: torch.dtype = torch.bfloat16
    num_rows: int = 5
    method: str = "tutorial"


CASES = [
    Case("SD1.5 512 px", SD15),
    Case("SD1.5 512 px, passes of 3 rows", SD15, micro_batch=3),
    Case("SD1.5 512 px, passes of 2 rows", SD15, micro_batch=2),
    Case("SD1.5 512 px, passes of 1 row", SD15, micro_batch=1),
    Case("SD1.5 512 px, checkpointing", SD15, checkpointing=True),
    Case("SD1.5 512 px, float32", SD15, dtype=torch.float32),
    Case("SDXL 1024 px", SDXL),
    Case("SDXL 1024 px, passes of 1 row", SDXL, micro_batch=1),
    Case("SDXL 1024 px, checkpointing", SDXL, checkpointing=True),
    Case("SDXL 1024 px, checkpointing, passes of 1 row", SDXL, checkpointing=True, micro_batch=1),
]


MEASURED = Case("SD1.5 512 px, float32, 1 + 0 rows", SD15, dtype=torch.float32, num_rows=1)


def build_model(case: Case, device: torch.device) -> tuple[TrainableModel, list[nn.Module]]:
    """Return the model of a case with adapters in UNet and text encoders, and its networks."""
    with device:
        unet = UNet2DConditionModel(**case.architecture.unet)
        encoders = [CLIPTextModel(CLIPTextConfig(**config)) for config in case.architecture.text_encoders]
    networks = [network.to(case.dtype).eval().requires_grad_(False) for network in (unet, *encoders)]
    stacks = {
        name: adapt(network, name, METHODS[case.method][name.removesuffix("_2")])
        for name, network in zip(("unet", "text_encoder", "text_encoder_2"), networks, strict=False)
    }
    for network in networks if case.checkpointing else ():
        checkpoint_gradients(network)
    return TrainableModel(
        denoise=functools.partial(denoise, unet, case.architecture),
        encode=functools.partial(encode, encoders),
        objective=NoiseSchedule(torch.linspace(0.99, 0.01, 1000), "epsilon"),
        groups=parameter_groups(stacks, {}, words_lr=0.0),
        num_branches=2,
        latent_adapters=(stacks.pop("unet"),),
        prompt_adapters=tuple(stacks.values()),
    ), networks


def adapt(network: nn.Module, name: str, values: dict[str, Any]) -> AdapterStack:
    """Put a LoRA group of each branch into a network."""
    groups = [
        ResolvedGroup.model_validate({"name": f"{name}.{i}.{branch}", "branch": branch, "lr": 1e-4, **values})
        for i, branch in enumerate(("positive", "negative"))
    ]
    return inject(network, groups, 2, torch.Generator().manual_seed(0))


def denoise(
    unet: UNet2DConditionModel,
    architecture: Architecture,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    hidden: torch.Tensor,
    framing: None,
) -> torch.Tensor:
    """Return the prediction of the UNet; numbers do not matter, so the framing is zeros."""
    added = {}
    if width := architecture.pooled_width:
        rows, like = len(latents), {"device": latents.device, "dtype": unet.dtype}
        added = {"text_embeds": torch.zeros(rows, width, **like), "time_ids": torch.zeros(rows, 6, **like)}
    prediction: torch.Tensor = unet(
        latents.to(unet.dtype), timesteps, hidden, added_cond_kwargs=added, return_dict=False
    )[0]
    return prediction


def encode(encoders: Sequence[CLIPTextModel], tokens: PromptTokens) -> torch.Tensor:
    """Return the text states of all encoders side by side."""
    ids = tokens.split([tokens.ids.shape[-1] // len(encoders)] * len(encoders))
    return torch.cat([encoder(part.ids)[0] for encoder, part in zip(encoders, ids, strict=True)], dim=-1)


def shape_of(case: Case) -> StepShape:
    """Return the sizes of a step with three templates and one regularization prompt."""
    side = case.architecture.latent_px
    return StepShape((4, side, side), case.num_rows, min(4, case.num_rows), 77 * len(case.architecture.text_encoders))


def count(case: Case) -> dict[str, Any]:
    """Return the row of a case, in GiB and TFLOP."""
    model, networks = build_model(case, torch.device("meta"))
    counted = count_step(model, shape_of(case), case.micro_batch)
    frozen = [p for network in networks for p in network.parameters() if not p.requires_grad]
    trained = sum(group.num_parameters for group in model.groups)
    sizes = {
        "weights": sum(parameter.nbytes for parameter in frozen),
        "kept": counted.kept_bytes,
        "peak of activations": counted.peak_bytes,
        "optimizer": BYTES_PER_TRAINED_VALUE * trained,
    }
    total = sizes["weights"] + sizes["peak of activations"] + sizes["optimizer"]
    gib = {name: round(size / GIB, 2) for name, size in (sizes | {"total": total}).items()}
    return {"case": case.name, **gib, "TFLOP": round(counted.flops / 1e12, 1)}


def measure(case: Case) -> dict[str, Any]:
    """Run a case on the CPU, and return the peak of resident memory beside the count."""
    unit = 1024  # ru_maxrss on Linux
    model, _ = build_model(case, torch.device("cpu"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    started = time.perf_counter()
    seconds = measure_step(model, shape_of(case), torch.device("cpu"), case.micro_batch)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    counted = count(case)
    return {
        "case": case.name,
        "counted peak of activations": counted["peak of activations"],
        "measured growth of resident memory": round((peak - before) / GIB, 2),
        "peak of resident memory": round(peak / GIB, 2),
        "seconds of a step": round(seconds, 1),
        "seconds of both steps": round(time.perf_counter() - started, 1),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows as a Markdown table."""
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([str(row[name]) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: Sequence[str] | None = None, counted: Callable[[Case], dict[str, Any]] = count) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--measure", action="store_true", help="run one step of real size")
    parser.add_argument("--cases", default="", help="only cases whose name contains this text")
    parser.add_argument("--method", choices=METHODS, default="tutorial", help="whose adapters")
    options = parser.parse_args(arguments)
    cases = [dataclasses.replace(case, method=options.method) for case in CASES if options.cases in case.name]
    if not cases:
        parser.error(f"no case contains {options.cases!r}")
    rows = [counted(case) for case in cases]
    print(f"Memory in GiB (counted), both branches, 4 + 1 rows, adapters of the method {options.method}:\n")
    print(table(rows))
    written: dict[str, Any] = {"torch": torch.__version__, "method": options.method, "counted": rows}
    if options.measure:
        written["measured"] = [measure(MEASURED)]
        print(f"\nMeasured on the CPU, {torch.get_num_threads()} threads:\n")
        print(table(written["measured"]))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
