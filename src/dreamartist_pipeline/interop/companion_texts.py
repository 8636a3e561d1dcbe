"""The README of an export, and its script for diffusers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pprint import pformat
from string import Template

from dreamartist_pipeline.params import SamplerParams, StrengthParams
from dreamartist_pipeline.schedulers import SCHEDULERS, ZERO_TERMINAL_SNR

_COMFYUI = """\
ComfyUI: equivalent, one adapter per branch
  1. Copy lora/*.safetensors to models/loras and embeddings/*.safetensors to models/embeddings.
  2. Load comfyui_workflow.json (menu Workflow, Open) and choose the checkpoint in its first node."""
_DIFFUSERS = """\
diffusers: equivalent, one adapter per branch
  python generate_with_diffusers.py BASE_MODEL "{prompt}\""""


@dataclass(frozen=True)
class ExportSummary:
    """The content of an export.

    Attributes:
        loras: branch -> file in the kohya format.
        diffusers_loras: branch -> a file that diffusers loads completely.
        words: branch -> trigger words.
    """

    title: str
    base_model: str
    loras: Mapping[str, str]
    diffusers_loras: Mapping[str, str]
    words: Mapping[str, Sequence[str]]
    prompt: str
    negative_prompt: str
    has_workflow: bool
    has_script: bool
    branches_are_equal: bool
    clip_skip: int = 0
    zero_terminal_snr: bool = False


def diffusers_script(summary: ExportSummary, seed: int, sampler: SamplerParams, strength: StrengthParams) -> str:
    """Return a script that generates images with one adapter per branch in plain diffusers."""
    scheduler = SCHEDULERS[sampler.scheduler]
    rescaled = ZERO_TERMINAL_SNR if summary.zero_terminal_snr else {}
    settings = {
        "loras": dict(summary.diffusers_loras),
        "words": [word for words in summary.words.values() for word in words],
        "prompt": summary.prompt,
        "negative_prompt": summary.negative_prompt,
        "seed": seed,
        "strength": {"positive": strength.positive, "negative": strength.negative},
        "scheduler": scheduler.class_name,
        "scheduler_options": scheduler.options_for(summary.zero_terminal_snr) | rescaled | sampler.scheduler_options,
        "num_inference_steps": sampler.num_inference_steps,
        "guidance_scale": sampler.guidance_scale,
        "batch_size": sampler.batch_size,
        "clip_skip": summary.clip_skip,
    }
    template = files("dreamartist_pipeline.interop").joinpath("templates/generate_with_diffusers.py.txt")
    return Template(template.read_text(encoding="utf-8")).substitute(settings=pformat(settings, sort_dicts=False))


def readme(summary: ExportSummary) -> str:
    """Return the export's README: its files, and how each tool uses them."""
    sections = [
        _heading(summary),
        _COMFYUI if summary.has_workflow else "",
        _DIFFUSERS.format(prompt=summary.prompt) if summary.has_script else "",
        _a1111(summary),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _heading(summary: ExportSummary) -> str:
    contents = {file: f"LoRA, {branch}" for branch, file in summary.loras.items()} | {
        f"embeddings/{word}.safetensors": f"trigger word, {branch}"
        for branch, words in summary.words.items()
        for word in words
    }
    width = max(map(len, contents), default=0)
    lines = [
        f"{summary.title}: a DreamArtist++ concept for the base model {summary.base_model}.",
        "",
        "It has one LoRA per branch: the positive one for the prompt, the negative one for the negative prompt. Images",
        "differ if both are applied to both prompts. Use it with the base model it was trained on.",
        "",
        *(f"  {file:<{width}}  {content}" for file, content in contents.items()),
    ]
    return "\n".join(lines).rstrip()


def _a1111(summary: ExportSummary) -> str:
    positive = ", ".join(summary.words.get("positive", ()))
    negative_prompt = summary.negative_prompt
    negative = ", ".join(word for word in summary.words.get("negative", ()) if word not in negative_prompt)
    lora = summary.loras.get("positive", "").rpartition("/")[2].removesuffix(".safetensors")
    if summary.branches_are_equal:
        return "\n".join(
            [
                "A1111 / Forge: equivalent, because both branches have the same LoRA here",
                f"  prompt           {summary.prompt} <lora:{lora}:1>",
                *([f"  negative prompt  {negative_prompt}"] if negative_prompt else []),
            ]
        )
    return "\n".join(
        [
            "A1111 / Forge: a fallback that is NOT equivalent",
            "  They cannot apply a LoRA to the negative prompt only. The closest is the positive LoRA, which acts on",
            "  both prompts, with both embeddings. Images differ from those of ComfyUI, diffusers and this project.",
            f"  prompt           {summary.prompt}{f' <lora:{lora}:1>' if lora else ''}"
            + (f"   (trigger word: {positive})" if positive else ""),
            f"  negative prompt  {', '.join(part for part in (negative, negative_prompt) if part)}",
        ]
    )
