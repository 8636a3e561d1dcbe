"""Draw images with a trained concept, one adapter per branch."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from PIL.Image import Image

from dreamartist_pipeline.core.captions import check_slots
from dreamartist_pipeline.core.devices import check_device
from dreamartist_pipeline.core.kept_steps import KeptSteps, check_step, concept_at
from dreamartist_pipeline.core.model_location import ModelLocation
from dreamartist_pipeline.early_checks import PlannedConcept, checked_early, optional_inputs
from dreamartist_pipeline.params import DeviceParams, GenerateParams

if TYPE_CHECKING:
    from dreamartist_pipeline.core.concept import Concept
else:  # Kedro evaluates a node's annotations when it registers the pipelines; importing torch is slow
    Concept = Any

log = logging.getLogger(__name__)


def check_generate(params: GenerateParams, planned: PlannedConcept | None) -> None:
    """Check that the prompts have no unknown slots, and that the scheduler supports the concept's noise schedule.

    Raises:
        InputError: an unknown slot or an unsuitable scheduler.
    """
    from dreamartist_pipeline.backbones.schedulers import check_sampler

    check_slots(params.prompts, () if planned is None else planned.slots)
    check_sampler(params.sampler, planned is not None and planned.zero_terminal_snr)


@checked_early("device", check_device)
@checked_early("generate", check_generate)
@checked_early("generate", check_step, "concept_steps")
@optional_inputs("recommended_settings")
def generate_images(
    base_model: ModelLocation,
    concept: Concept,
    params: GenerateParams,
    device: DeviceParams,
    init_image: bytes | None = None,
    init_mask: bytes | None = None,
    concept_steps: KeptSteps | None = None,
    recommended_settings: dict[str, Any] | None = None,
) -> tuple[dict[str, Image], Image]:
    """Draw `images_per_prompt` images of every prompt; image i of each prompt has the seed `params.seed` + i.

    A slot such as '{pt1}' is filled with the concept's positive trigger word, or its class word without one.
    `init_image` is for img2img; with `init_mask`, only its white part is redrawn (inpainting).

    Returns:
        The images, named `<prompt number>_<seed>`, their settings in `info`, and a sheet with one row per prompt.

    Raises:
        InputError: an invalid image or scheduler, a step that is not kept, a concept that does not fit the base model,
            or no recommended settings for `params.recommended`.
    """
    from tqdm import tqdm

    from dreamartist_pipeline.backbones.base_model import open_base_model
    from dreamartist_pipeline.backbones.drawing import DrawingRequest, draw
    from dreamartist_pipeline.core.figures import prompt_sheet
    from dreamartist_pipeline.core.init_picture import read_init_picture, tint_redrawn
    from dreamartist_pipeline.core.strengths import RecommendedSettings, with_recommended

    concept = concept_at(concept, concept_steps or {}, params.step, "generate.step")
    recommended = RecommendedSettings.read(recommended_settings, concept)
    params = with_recommended(params, recommended, "generate")
    seeds = range(params.seed, params.seed + params.images_per_prompt)
    request = DrawingRequest(
        prompts=params.prompts,
        negative_prompt=params.negative_prompt,
        seeds=seeds,
        sampler=params.sampler,
        strength=params.strength,
        size_px=params.size_px,
        init=read_init_picture(init_image, init_mask, params.denoise, params.sampler.num_inference_steps),
    )
    log.info("Adapter strengths: %s.", params.strength)
    backbone = open_base_model(base_model, device)
    with tqdm(total=len(params.prompts) * len(seeds), desc="generating", unit="image", delay=2.0) as bar:
        drawn = draw(backbone, concept, request, bar.update)
    names = [f"{index:03d}_{seed}" for index in range(len(params.prompts)) for seed in seeds]
    rows = [drawn.images[start : start + len(seeds)] for start in range(0, len(drawn.images), len(seeds))]
    before = None if drawn.init is None else tint_redrawn(drawn.init)
    return dict(zip(names, drawn.images, strict=True)), prompt_sheet(drawn.prompts, seeds, rows, before)
