"""A ComfyUI workflow in API format that applies one adapter per branch.

CreateHookLora → SetClipHooks(apply_to_conds) → CLIPTextEncode, once per branch, into one sampler: the hook is attached
to the branch's conditioning, so that the sampler applies each LoRA to its own rows of the batch only.
The sigmas are explicit, because ComfyUI's schedulers space them differently from those of diffusers.
CLIPTextEncode encodes for SDXL, too: without numbers of its own, ComfyUI conditions on the size of the drawn image, as
this project does.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dreamartist_pipeline.core.embeddings import plain_spelling, word_pattern
from dreamartist_pipeline.core.sigmas import SigmaPath
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import SamplerParams
from dreamartist_pipeline.schedulers import SCHEDULERS, SHORT_SCHEDULERS, SPACING_OPTIONS, ComfyUISampler

BASE_MODEL_FILE = "BASE_MODEL.safetensors"
"""A placeholder for the checkpoint, which users select in the first node."""

MANUAL_SIGMAS_SINCE = "0.7.0"
"""The first version of ComfyUI with the node ManualSigmas."""

_SAME_SCALE = 1e-5  # relative; closer to 1, a factor is omitted
_MAX_HUNDREDTHS = 1000  # LatentMultiply accepts factors up to 10

Link = list[Any]
"""[node id, index of its output]."""


@dataclass(frozen=True)
class BranchInputs:
    """Inputs of one branch.

    Attributes:
        lora_file: in ComfyUI's folder of LoRAs; None without an adapter.
        is_zeros: whether the conditioning is zeros, see `Backbone.zeros_for_empty_prompt`.
    """

    prompt: str
    lora_file: str | None
    strength: float
    is_zeros: bool = False


@dataclass(frozen=True)
class Picture:
    """Settings of the image and the base model.

    Attributes:
        clip_skip: how many of the text encoder's last layers are left out.
        zero_terminal_snr: of the noise schedule.
        text_layer: the layer of the text encoder without clip_skip, as CLIPSetLastLayer counts.
    """

    side_px: int
    seed: int
    prediction_type: str
    clip_skip: int = 0
    zero_terminal_snr: bool = False
    text_layer: int = -1


def build_workflow(
    positive: BranchInputs, negative: BranchInputs, picture: Picture, sampler: SamplerParams, path: SigmaPath
) -> dict[str, Any]:
    """Return node id -> {class_type, inputs}, the input of ComfyUI's /prompt.

    Args:
        positive: inputs of the positive branch.
        negative: inputs of the negative branch.
        picture: of the image and the base model.
        sampler: scheduler, steps and guidance.
        path: the sigmas of that scheduler.

    Raises:
        InputError: ComfyUI does not have the scheduler or one of its options.
    """
    text_encoder = ["last_layer", 0] if picture.clip_skip else ["base_model", 1]
    size = {"width": picture.side_px, "height": picture.side_px, "batch_size": 1}
    nodes = {
        "base_model": _node("CheckpointLoaderSimple", ckpt_name=BASE_MODEL_FILE),
        **_branch("positive", positive, text_encoder),
        **_branch("negative", negative, text_encoder),
        "latents": _node("EmptyLatentImage", **size),
    }
    denoised = _add_sampling(nodes, picture, sampler, path)
    nodes["decoded"] = _node("VAEDecode", samples=denoised, vae=["base_model", 2])
    nodes["image"] = _node("SaveImage", images=["decoded", 0], filename_prefix="dreamartist")
    if picture.prediction_type == "v_prediction":
        nodes["model_sampling"] = _node(
            "ModelSamplingDiscrete",
            model=["base_model", 0],
            sampling="v_prediction",
            zsnr=picture.zero_terminal_snr,
        )
    if picture.clip_skip:
        layer = picture.text_layer - picture.clip_skip
        nodes["last_layer"] = _node("CLIPSetLastLayer", clip=["base_model", 1], stop_at_clip_layer=layer)
    return nodes


def comfyui_sampler(sampler: SamplerParams) -> ComfyUISampler:
    """Return the closest sampler in ComfyUI.

    Raises:
        InputError: ComfyUI does not have the scheduler or one of its options.
    """
    known = SCHEDULERS[sampler.scheduler].comfyui
    if not isinstance(known, ComfyUISampler):
        names = ", ".join(name for name in SHORT_SCHEDULERS if isinstance(SCHEDULERS[name].comfyui, ComfyUISampler))
        raise InputError(
            expected="a scheduler that ComfyUI has too, for the workflow",
            got=f"{sampler.scheduler} ({known})",
            remedy=f"set export.sampler.scheduler to one of {names}, or to a class of diffusers that ComfyUI has; "
            "it is for the workflow and the script only, LoRA and embedding files do not depend on it; "
            "export.formats=[peft,toolkit,embeddings] exports without a workflow",
        )
    if unknown := sorted(sampler.scheduler_options.keys() - set(SPACING_OPTIONS)):
        raise InputError(
            expected=f"scheduler_options that a ComfyUI workflow supports, {', '.join(SPACING_OPTIONS)}",
            got=", ".join(unknown),
            remedy="remove them from export.sampler",
        )
    return known


def needs_manual_sigmas(path: SigmaPath) -> bool:
    """Return whether the workflow has explicit sigmas, which need ComfyUI `MANUAL_SIGMAS_SINCE` or newer."""
    return bool(path.segments) and not path.is_karras


# ------------------------------------------------------------------------------------------------- sampling


def _add_sampling(nodes: dict[str, Any], picture: Picture, sampler: SamplerParams, path: SigmaPath) -> Link:
    """Add the nodes from empty latents to denoised ones, and return the link to the latter."""
    known = comfyui_sampler(sampler)
    guided = {
        "model": ["model_sampling" if picture.prediction_type == "v_prediction" else "base_model", 0],
        "cfg": sampler.guidance_scale,
        "positive": ["positive_prompt", 0],
        "negative": ["negative_prompt", 0],
    }
    if needs_manual_sigmas(path):
        return _add_segments(nodes, known.name, guided, picture.seed, path)
    nodes["sampler"] = _node(
        "KSampler",
        **guided,
        seed=picture.seed,
        steps=sampler.num_inference_steps,
        sampler_name=known.name,
        scheduler="karras" if path.is_karras else known.schedule,
        latent_image=["latents", 0],
        denoise=1.0,
    )
    return ["sampler", 0]


def _add_segments(nodes: dict[str, Any], sampler_name: str, guided: dict[str, Any], seed: int, path: SigmaPath) -> Link:
    """Add one SamplerCustom per segment, starting at noise with the scale of the first segment.

    AddNoise sets this scale: SamplerCustom would scale by the first sigma, or by √(1 + σ²) if it is the largest.
    ComfyUI evaluates only flow-matching models at fractional timesteps; such segments treat the base model as one.
    """
    nodes["noise"] = _node("RandomNoise", noise_seed=seed)
    nodes["noise_scale"] = _node("ManualSigmas", sigmas=_format_sigmas([path.segments[0].scale]))
    nodes["solver"] = _node("KSamplerSelect", sampler_name=sampler_name)
    nodes["noisy_latents"] = _node(
        "AddNoise",
        model=guided["model"],
        noise=["noise", 0],
        sigmas=["noise_scale", 0],
        latent_image=["latents", 0],
    )
    if any(segment.is_flow for segment in path.segments):
        nodes["fractional_timesteps"] = _node("ModelSamplingSD3", model=["base_model", 0], shift=1.0)
    latents: Link = ["noisy_latents", 0]
    for index, segment in enumerate(path.segments):
        suffix = f"_{index + 1}" if len(path.segments) > 1 else ""
        if index:
            latents = _add_scaling(nodes, latents, segment.scale)
        nodes[f"sigmas{suffix}"] = _node("ManualSigmas", sigmas=_format_sigmas(segment.sigmas))
        nodes[f"sampler{suffix}"] = _node(
            "SamplerCustom",
            **guided | ({"model": ["fractional_timesteps", 0]} if segment.is_flow else {}),
            add_noise=False,
            noise_seed=seed,
            sampler=["solver", 0],
            sigmas=[f"sigmas{suffix}", 0],
            latent_image=latents,
        )
        latents = [f"sampler{suffix}", 0]
    return _add_scaling(nodes, latents, path.end_scale)


def _add_scaling(nodes: dict[str, Any], latents: Link, scale: float) -> Link:
    """Multiply latents by two nodes: the field has steps of 0.01, to which ComfyUI's editor may round."""
    if abs(scale - 1) < _SAME_SCALE:
        return latents
    for factor in _hundredths(scale):
        name = f"scaled_{sum(node['class_type'] == 'LatentMultiply' for node in nodes.values()) + 1}"
        nodes[name] = _node("LatentMultiply", samples=latents, multiplier=factor)
        latents = [name, 0]
    return latents


def _hundredths(scale: float) -> tuple[float, float]:
    """Return two multiples of 0.01, at most 10, with the product closest to `scale`."""
    pairs = (
        (first, min(max(round(scale * 1e4 / first), 1), _MAX_HUNDREDTHS)) for first in range(1, _MAX_HUNDREDTHS + 1)
    )
    first, second = min(pairs, key=lambda pair: (abs(pair[0] * pair[1] - scale * 1e4), abs(pair[0] - 100)))
    return first / 100, second / 100


def _format_sigmas(sigmas: Iterable[float]) -> str:
    """Return sigmas in the syntax of ManualSigmas, which has no exponents."""
    return ", ".join(f"{sigma:.9f}" for sigma in sigmas)


# ------------------------------------------------------------------------------------------------- branches


def _branch(name: str, inputs: BranchInputs, text_encoder: list[Any]) -> dict[str, Any]:
    nodes = _encoding(name, inputs, text_encoder)
    if inputs.is_zeros:
        nodes[f"{name}_empty"] = nodes.pop(f"{name}_prompt")
        nodes[f"{name}_prompt"] = _node("ConditioningZeroOut", conditioning=[f"{name}_empty", 0])
    return nodes


def _encoding(name: str, inputs: BranchInputs, text_encoder: list[Any]) -> dict[str, Any]:
    if inputs.lora_file is None:
        return {f"{name}_prompt": _node("CLIPTextEncode", text=inputs.prompt, clip=text_encoder)}
    strength = inputs.strength
    return {
        f"{name}_lora": _node(
            "CreateHookLora", lora_name=inputs.lora_file, strength_model=strength, strength_clip=strength
        ),
        f"{name}_text_encoder": _node(
            "SetClipHooks",
            clip=text_encoder,
            apply_to_conds=True,
            schedule_clip=False,
            hooks=[f"{name}_lora", 0],
        ),
        f"{name}_prompt": _node("CLIPTextEncode", text=inputs.prompt, clip=[f"{name}_text_encoder", 0]),
    }


def _node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def embedding_prompt(prompt: str, words: Iterable[str]) -> str:
    """Return a prompt for ComfyUI, with `embedding:my-cat` for a trigger word.

    ComfyUI ends an embedding's name at a space or comma, and reads parentheses as weights: words are surrounded by
    spaces, parentheses are escaped.
    """
    prompt = unicodedata.normalize("NFC", prompt)
    name_of = {plain_spelling(word): word for word in words}

    def embedding(match: re.Match[str]) -> str:
        before, after = prompt[: match.start()][-1:], prompt[match.end() :][:1]
        if before == ":":  # "embedding:my-cat" already
            return match[0]
        space_before = "" if not before or before.isspace() else " "
        space_after = "" if not after or after.isspace() or after == "," else " "
        return f"{space_before}embedding:{name_of[plain_spelling(match[0])]}{space_after}"

    replaced = word_pattern(name_of.values()).sub(embedding, prompt)
    return re.sub(r"[()]", r"\\\g<0>", replaced)


def check_workflow(workflow: Mapping[str, Any], lora_files: Iterable[str], name: str) -> None:
    """Check that every link has its node, and that every LoRA is in the export.

    Raises:
        InputError: a node or a LoRA is missing.
    """
    known = set(lora_files)
    for node, content in workflow.items():
        for field, value in content["inputs"].items():
            if isinstance(value, list) and value[0] not in workflow:
                raise InputError(
                    expected=f"a node {value[0]!r} in {name}, which {node}.{field} links to",
                    got="none",
                    remedy="export the concept again",
                )
            if field == "lora_name" and value not in known:
                raise InputError(
                    expected=f"the LoRA {value!r}, which {name} loads, in the export",
                    got=f"{sorted(known)}",
                    remedy="export the concept again",
                )
