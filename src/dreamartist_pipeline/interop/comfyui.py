"""A ComfyUI workflow in API format that applies one adapter per branch.

CreateHookLora → SetClipHooks(apply_to_conds) → CLIPTextEncode, once per branch, into one KSampler: the hook is attached
to the branch's conditioning, so that the sampler applies each LoRA to its own rows of the batch only.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dreamartist_pipeline.core.embeddings import plain_spelling, word_pattern
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import SamplerParams
from dreamartist_pipeline.schedulers import COMFYUI_SPACINGS, SCHEDULERS

BASE_MODEL_FILE = "BASE_MODEL.safetensors"
"""A placeholder for the checkpoint, which users select in the first node."""


@dataclass(frozen=True)
class BranchInputs:
    """Inputs of one branch.

    Attributes:
        lora_file: in ComfyUI's folder of LoRAs; None without an adapter.
    """

    prompt: str
    lora_file: str | None
    strength: float


@dataclass(frozen=True)
class Picture:
    """Settings of the image and the base model.

    Attributes:
        clip_skip: how many of the text encoder's last layers are left out.
        zero_terminal_snr: of the concept's training.
    """

    side_px: int
    seed: int
    prediction_type: str
    clip_skip: int = 0
    zero_terminal_snr: bool = False


def build_workflow(
    positive: BranchInputs, negative: BranchInputs, picture: Picture, sampler: SamplerParams
) -> dict[str, Any]:
    """Return node id -> {class_type, inputs}, the input of ComfyUI's /prompt.

    Raises:
        InputError: ComfyUI does not have the scheduler or one of its options.
    """
    sampler_name, scheduler = comfyui_sampler(sampler, picture.zero_terminal_snr)
    model = ["model_sampling", 0] if picture.prediction_type == "v_prediction" else ["base_model", 0]
    text_encoder = ["last_layer", 0] if picture.clip_skip else ["base_model", 1]
    size = {"width": picture.side_px, "height": picture.side_px, "batch_size": 1}
    nodes = {
        "base_model": _node("CheckpointLoaderSimple", ckpt_name=BASE_MODEL_FILE),
        **_branch("positive", positive, text_encoder),
        **_branch("negative", negative, text_encoder),
        "latents": _node("EmptyLatentImage", **size),
        "sampler": _node(
            "KSampler",
            model=model,
            seed=picture.seed,
            steps=sampler.num_inference_steps,
            cfg=sampler.guidance_scale,
            sampler_name=sampler_name,
            scheduler=scheduler,
            positive=["positive_prompt", 0],
            negative=["negative_prompt", 0],
            latent_image=["latents", 0],
            denoise=1.0,
        ),
        "decoded": _node("VAEDecode", samples=["sampler", 0], vae=["base_model", 2]),
        "image": _node("SaveImage", images=["decoded", 0], filename_prefix="dreamartist"),
    }
    if picture.prediction_type == "v_prediction":
        nodes["model_sampling"] = _node(
            "ModelSamplingDiscrete",
            model=["base_model", 0],
            sampling="v_prediction",
            zsnr=picture.zero_terminal_snr,
        )
    if picture.clip_skip:
        layer = -1 - picture.clip_skip
        nodes["last_layer"] = _node("CLIPSetLastLayer", clip=["base_model", 1], stop_at_clip_layer=layer)
    return nodes


def comfyui_sampler(sampler: SamplerParams, zero_terminal_snr: bool) -> tuple[str, str]:
    """Return KSampler's sampler_name and scheduler.

    Raises:
        InputError: ComfyUI does not have the scheduler or one of its options.
    """
    known = SCHEDULERS[sampler.scheduler].comfyui
    if known is None:
        names = ", ".join(name for name, scheduler in SCHEDULERS.items() if scheduler.comfyui)
        raise InputError(
            expected="a scheduler that ComfyUI has too, for the workflow",
            got=sampler.scheduler,
            remedy=f"set export.sampler.scheduler to one of {names}",
        )
    if unknown := sorted(sampler.scheduler_options.keys() - COMFYUI_SPACINGS.keys()):
        raise InputError(
            expected=f"scheduler_options that a ComfyUI workflow supports, {', '.join(COMFYUI_SPACINGS)}",
            got=", ".join(unknown),
            remedy="remove them from export.sampler",
        )
    sampler_name, scheduler = known
    if sampler.scheduler_options.get("use_karras_sigmas") is False and scheduler == "karras":
        scheduler = "normal"
    if zero_terminal_snr:
        scheduler = "sgm_uniform"  # starts at the last timestep
    chosen = [spacing for option, spacing in COMFYUI_SPACINGS.items() if sampler.scheduler_options.get(option)]
    return sampler_name, (chosen or [scheduler])[0]


def _branch(name: str, inputs: BranchInputs, text_encoder: list[Any]) -> dict[str, Any]:
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
