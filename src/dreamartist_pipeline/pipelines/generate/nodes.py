"""Draw images of a trained concept, one adapter per branch."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from PIL.Image import Image

from dreamartist_pipeline.params import DeviceParams, GenerateParams

if TYPE_CHECKING:
    from dreamartist_pipeline.backbones.concepts import LoadedConcept
    from dreamartist_pipeline.core.concept import Concept
else:  # Kedro resolves the hints of a node when it registers the pipelines, without importing torch
    Concept = Any


def generate_images(
    base_model: str, concept: Concept, params: GenerateParams, device: DeviceParams
) -> tuple[dict[str, Image], Image]:
    """Draw `images_per_prompt` images of every prompt; image i of each prompt has the seed `params.seed` + i.

    A slot such as '{pt1}' in a prompt becomes the concept's positive trigger word, or its class word if it has none.

    Returns:
        The images, named `<prompt number>_<seed>`, their settings in `info`, and a sheet with one row per prompt.

    Raises:
        InputError: the concept was trained on another base model.
    """
    from tqdm import tqdm

    from dreamartist_pipeline.backbones.base_model import BaseModelFiles, load_backbone
    from dreamartist_pipeline.backbones.concepts import attach, generate
    from dreamartist_pipeline.core.images import image_grid

    backbone = load_backbone(BaseModelFiles(base_model), device)
    loaded = attach(backbone, concept, params.strength)
    filled = [fill_prompt(prompt, loaded, concept.metadata["class_word"]) for prompt in params.prompts]
    seeds = range(params.seed, params.seed + params.images_per_prompt)
    rows = [(index, prompt, seed) for index, prompt in enumerate(filled) for seed in seeds]
    with tqdm(total=len(rows), desc="generating", unit="image", delay=2.0) as bar:
        images = generate(
            backbone,
            loaded,
            [prompt for _, prompt, _ in rows],
            params.negative_prompt,
            [seed for _, _, seed in rows],
            params.sampler,
            bar.update,
        )
    for (_, prompt, seed), image in zip(rows, images, strict=True):
        for key, text in _drawn_with(prompt, seed, image, concept, params).items():
            image.info[key] = text
    named = {f"{index:03d}_{seed}": image for (index, _, seed), image in zip(rows, images, strict=True)}
    grid = image_grid(images, columns=params.images_per_prompt, labels=[prompt for _, prompt, _ in rows])
    return named, grid


def _drawn_with(prompt: str, seed: int, image: Image, concept: Concept, params: GenerateParams) -> dict[str, str]:
    """Return an image's settings: `parameters` in the form of A1111, `dreamartist` as JSON with all of them."""
    sampler = params.sampler
    shown = {
        "Steps": sampler.num_inference_steps,
        "Sampler": sampler.scheduler,
        "CFG scale": sampler.guidance_scale,
        "Seed": seed,
        "Size": f"{image.width}x{image.height}",
        "Model": concept.metadata["base_model"],
    }
    settings = {
        "prompt": prompt,
        "negative_prompt": params.negative_prompt,
        "seed": seed,
        "sampler": sampler.model_dump(mode="json", exclude={"batch_size"}),
        "strength": params.strength.model_dump(mode="json"),
        "base_model": concept.metadata["base_model"],
        "base_model_fingerprint": concept.metadata["base_model_fingerprint"],
        "config_sha256": concept.metadata.get("config_sha256", ""),
    }
    lines = [prompt, f"Negative prompt: {params.negative_prompt}"] if params.negative_prompt else [prompt]
    lines.append(", ".join(f"{name}: {value}" for name, value in shown.items()))
    return {"parameters": "\n".join(lines), "dreamartist": json.dumps(settings, ensure_ascii=False)}


def fill_prompt(prompt: str, loaded: LoadedConcept, class_word: str) -> str:
    """Fill a prompt's slots with the concept's positive trigger words, all others with its class word."""
    from dreamartist_pipeline.core.captions import fill_template, slot_names

    words = {slot: positive for slot, (positive, _) in loaded.trigger_words.items()}
    return fill_template(prompt, dict.fromkeys(slot_names(prompt), class_word) | words)
