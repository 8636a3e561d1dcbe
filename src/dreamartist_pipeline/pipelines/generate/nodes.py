"""Draw images of a trained concept, one adapter per branch."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from PIL.Image import Image

from dreamartist_pipeline.early_checks import PlannedConcept, checked_early
from dreamartist_pipeline.params import DeviceParams, GenerateParams

if TYPE_CHECKING:
    from dreamartist_pipeline.backbones.drawing import DrawingRequest, Drawn
    from dreamartist_pipeline.core.concept import Concept
else:  # Kedro resolves the hints of a node when it registers the pipelines, without importing torch
    Concept = Any

log = logging.getLogger(__name__)


def check_generate(params: GenerateParams, planned: PlannedConcept | None) -> None:
    """Confirm that the scheduler can draw by the noise schedule of the concept.

    Raises:
        InputError: it cannot.
    """
    from dreamartist_pipeline.backbones.schedulers import check_sampler

    check_sampler(params.sampler, planned is not None and planned.zero_terminal_snr)


@checked_early("generate", check_generate)
def generate_images(
    base_model: str,
    concept: Concept,
    params: GenerateParams,
    device: DeviceParams,
    init_image: bytes | None = None,
    init_mask: bytes | None = None,
) -> tuple[dict[str, Image], Image]:
    """Draw `images_per_prompt` images of every prompt; image i of each prompt has the seed `params.seed` + i.

    A slot such as '{pt1}' in a prompt becomes the concept's positive trigger word, or its class word if it has none.
    With `init_image` drawing starts from that picture; with `init_mask` only its white part is drawn anew.

    Returns:
        The images, named `<prompt number>_<seed>`, their settings in `info`, and a sheet with one row per prompt.

    Raises:
        InputError: a picture or a scheduler that cannot be used, or a concept that does not fit the base model.
    """
    from tqdm import tqdm

    from dreamartist_pipeline.backbones.base_model import open_base_model
    from dreamartist_pipeline.backbones.drawing import draw

    request = _request(params, init_image, init_mask)
    log.info("Adapter strengths: %s.", params.strength)
    backbone = open_base_model(base_model, device)
    num_images = len(request.prompts) * len(request.seeds)
    with tqdm(total=num_images, desc="generating", unit="image", delay=2.0) as bar:
        drawn = draw(backbone, concept, request, bar.update)
    names = [f"{index:03d}_{seed}" for index in range(len(request.prompts)) for seed in request.seeds]
    return dict(zip(names, drawn.images, strict=True)), _sheet(drawn, request)


def _request(params: GenerateParams, init_image: bytes | None, init_mask: bytes | None) -> DrawingRequest:
    """Return what is asked for, once it is clear that it can be drawn; no model is loaded for that."""
    from dreamartist_pipeline.backbones.drawing import DrawingRequest
    from dreamartist_pipeline.core.init_picture import read_init_picture

    return DrawingRequest(
        prompts=params.prompts,
        negative_prompt=params.negative_prompt,
        seeds=range(params.seed, params.seed + params.images_per_prompt),
        sampler=params.sampler,
        strength=params.strength,
        size_px=params.size_px,
        init=read_init_picture(init_image, init_mask, params.denoise, params.sampler.num_inference_steps),
    )


def _sheet(drawn: Drawn, request: DrawingRequest) -> Image:
    from dreamartist_pipeline.core.figures import prompt_sheet
    from dreamartist_pipeline.core.init_picture import tint_redrawn

    num_seeds = len(request.seeds)
    rows = [drawn.images[start : start + num_seeds] for start in range(0, len(drawn.images), num_seeds)]
    before = None if drawn.init is None else tint_redrawn(drawn.init)
    return prompt_sheet(drawn.prompts, request.seeds, rows, before)
