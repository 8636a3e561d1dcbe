"""Families of base models. A new one is a subclass of `Backbone` in a file of its own, and a line here."""

from __future__ import annotations

from dreamartist_pipeline.backbones.families.backbone import Backbone, ModelSource
from dreamartist_pipeline.backbones.families.sd import StableDiffusion

__all__ = ["FAMILIES", "Backbone", "ModelSource"]

FAMILIES: list[type[Backbone]] = [StableDiffusion]
