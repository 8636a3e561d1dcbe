"""Families of base models: one subclass of `Backbone` per module, listed in `FAMILIES`."""

from __future__ import annotations

from dreamartist_pipeline.backbones.families.backbone import Backbone, ModelSource
from dreamartist_pipeline.backbones.families.sd import StableDiffusion
from dreamartist_pipeline.backbones.families.sdxl import StableDiffusionXL

__all__ = ["FAMILIES", "Backbone", "ModelSource"]

FAMILIES: list[type[Backbone]] = [StableDiffusion, StableDiffusionXL]
