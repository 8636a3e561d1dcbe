"""What the families of Stable Diffusion share: a UNet, a DDPM noise schedule, and CLIP text encoders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from dreamartist_pipeline.backbones.families.backbone import Backbone, ModelSource
from dreamartist_pipeline.core.diffusion import NoiseSchedule
from dreamartist_pipeline.core.layout import FileNames
from dreamartist_pipeline.core.unet_names import original_unet_names
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.schedulers import OTHER_SCHEDULES, SCHEDULERS, UNFIT_SCHEDULERS, ZERO_SNR

UNET, TEXT_ENCODER = "unet", "text_encoder"


@dataclass(kw_only=True)
class UNetBackbone(Backbone):
    """A base model with a UNet that predicts ε or v."""

    scheduler_class: ClassVar = DDPMScheduler

    objective: NoiseSchedule

    @property
    def unet(self) -> UNet2DConditionModel:
        """The denoiser."""
        return self.networks[UNET]

    @classmethod
    def check_index(cls, index: Mapping[str, Any], name: str) -> None:
        """Check the parts, and that the scheduler follows a noise schedule of DDPM.

        Raises:
            InputError: see `Backbone.check_index`, or it does not.
        """
        super().check_index(index, name)
        check_noise_schedule(index.get("scheduler", (None, None))[1], name)

    @classmethod
    def load(cls, source: ModelSource, device: torch.device, dtype: torch.dtype) -> Self:
        """Load every part; models that cannot be trained here are refused before any weights are read.

        Raises:
            InputError: a UNet with inputs beside the latents, latents of another distribution, or a scheduler with
                another noise schedule.
        """
        check_noise_schedule(source.parts.config("scheduler").get("_class_name"), source.parts.place)
        unet, autoencoder = source.parts.config(UNET), source.parts.config("vae")
        if autoencoder.get("latents_mean") is not None:
            raise InputError(
                expected="an autoencoder whose latents are multiplied by one scaling_factor",
                got=f"latents_mean in vae/config.json of {source.parts.place}, as in Playground v2.5",
                remedy="choose another base model",
            )
        in_channels, latent_channels = (
            unet.get("in_channels", 4),
            autoencoder.get("latent_channels", 4),
        )  # their defaults
        if in_channels != latent_channels:
            raise InputError(
                expected=f"a text-to-image model, whose UNet has the {latent_channels} input channels of its latents",
                got=f"{in_channels} input channels in {source.parts.place}, as in an inpainting model",
                remedy="set base_model to the text-to-image model it was made from; generate inpaints with init_mask",
            )
        return super().load(source, device, dtype)

    @classmethod
    def make_objective(cls, scheduler: Any, device: torch.device) -> NoiseSchedule:
        """Return the noise schedule of a DDPM scheduler, in float32.

        Raises:
            InputError: the model predicts neither ε nor v, or predicts ε with zero terminal SNR.
        """
        prediction_type = scheduler.config.prediction_type
        if scheduler.config.get(ZERO_SNR) and prediction_type == "epsilon":
            raise InputError(
                expected="v_prediction of a base model with zero terminal SNR, where ε is no target",
                got=f"{prediction_type} and {ZERO_SNR} in scheduler/scheduler_config.json",
                remedy=f"correct the one that is wrong: v models predict v, others have {ZERO_SNR} false",
            )
        return NoiseSchedule(scheduler.alphas_cumprod.float().to(device), prediction_type)

    def with_unet_names(self, names: FileNames) -> FileNames:
        """Return names with those that depend on the architecture of the UNet."""
        layers_per_block = self.unet.config.layers_per_block
        original = original_unet_names(self.layer_shapes[UNET], layers_per_block)
        return replace(names, layers_per_block=layers_per_block, original_unet_names=original)

    @property
    def image_px(self) -> int:
        """The side of the images that the UNet was trained on."""
        return int(self.unet.config.sample_size) * self.latent_scale


def check_noise_schedule(scheduler: object, place: str) -> None:
    """Check that a base model's scheduler is one of a noise schedule of DDPM, as far as its class tells.

    Args:
        scheduler: its class; None if it is not named.
        place: of the base model, for an error.

    Raises:
        InputError: it is not.
    """
    name = str(scheduler).removeprefix("Flax")
    reason = next((reason for reason, classes in OTHER_SCHEDULES.items() if name in classes), None)
    is_known = name in SCHEDULERS or any(name in classes for classes in UNFIT_SCHEDULERS.values())
    if scheduler is not None and (reason or not is_known):
        raise InputError(
            expected=f"a base model with a noise schedule of DDPM at {place}",
            got=f"the scheduler {scheduler}, which {reason or 'diffusers does not have'}",
            remedy="choose another base model",
        )
