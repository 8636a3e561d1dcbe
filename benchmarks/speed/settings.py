"""Base model and training of a benchmark, from the project's configuration."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dreamartist_pipeline.backbones.base_model import BaseModelFiles, load_backbone
from dreamartist_pipeline.backbones.families import Backbone
from dreamartist_pipeline.params import DeviceParams, TrainingParams
from dreamartist_pipeline.settings import CONFIG_LOADER_ARGS, CONFIG_LOADER_CLASS
from speed.designs import without_dropout
from speed.report import FOLDER, ROOT

EMBEDDED = ROOT / "data" / "01_raw" / "base_model"
ATTENTION = r"re:.*\.attn.?$"


@dataclass(frozen=True)
class Settings:
    """What is measured, and where.

    Attributes:
        files: of the base model.
        side_px: of the reference picture.
    """

    files: BaseModelFiles

    backbone: Backbone
    params: TrainingParams
    side_px: int

    def facts(self) -> dict[str, Any]:
        """Return what a report says about them."""
        unet_size = sum(p.numel() for p in self.backbone.networks["unet"].parameters()) / 1e6
        return {
            "base model": f"{self.backbone.name} ({unet_size:.1f} M parameters in the UNet)",
            "dtype": str(self.backbone.dtype).removeprefix("torch."),
            "pixels": self.side_px,
            "rows": f"{self.params.batch_size} + {self.params.regularization_batch_size}, both branches",
        }


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `read_settings` and the reports read."""
    parser.add_argument("--base-model", type=Path, default=EMBEDDED, help="folder in diffusers' layout")
    parser.add_argument("--env", help="environment in conf/, such as sd15; default: base")
    parser.add_argument("--method", help="of conf/base/parameters_training.yml; default: that of the environment")
    parser.add_argument("--side-px", type=int, help="side of the picture; default: the base model's")
    parser.add_argument("--rows", type=int, nargs=2, metavar=("REFERENCE", "REGULARIZATION"), help="default: 4 1")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--threads", type=int, default=2, help="of the CPU; with 1, the CPU time counts")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the report")


def read_settings(options: argparse.Namespace) -> Settings:
    """Load the base model, and read the training from the configuration, without dropout and previews."""
    torch.set_num_threads(options.threads)
    device = DeviceParams(device=options.device, dtype=options.dtype)
    files = BaseModelFiles(options.base_model)
    backbone = load_backbone(files, device)
    params = read_training(options.env, options.method)
    if options.rows:
        rows = dict(zip(("batch_size", "regularization_batch_size"), options.rows, strict=True))
        params = params.model_copy(update=rows)
    return Settings(files, backbone, params, options.side_px or backbone.image_px)


def read_training(env: str | None = None, method: str | None = None) -> TrainingParams:
    """Return the training of an environment, of its own or another method, without dropout and previews."""
    given = {"subject": "speed"} | ({"method": method} if method else {})
    loader = CONFIG_LOADER_CLASS(conf_source=str(ROOT / "conf"), env=env, runtime_params=given, **CONFIG_LOADER_ARGS)
    params = without_dropout(TrainingParams.model_validate(loader["parameters"]["training"]))
    return params.model_copy(update={"preview": params.preview.model_copy(update={"every": 0})})


def attention_only(params: TrainingParams, rank: int, selectors: Sequence[str] = (ATTENTION,)) -> TrainingParams:
    """Return a training of LoRA groups on the UNet's attention layers, without text encoder and trigger words."""
    values = params.model_dump(exclude={"words", *(f"lora_{network}" for network in params.lora)})
    groups = [{"lr": 1e-4, "rank": rank, "branch": branch, "layers": list(selectors)} for branch in ("p", "n")]
    return TrainingParams.model_validate({**values, "lora_unet": groups})
