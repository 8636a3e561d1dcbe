"""The README of an export, and its script for diffusers."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pprint import pformat
from string import Template

from dreamartist_pipeline.core.layout import FileNames
from dreamartist_pipeline.core.sigmas import SigmaPath
from dreamartist_pipeline.core.strengths import RecommendedSettings
from dreamartist_pipeline.interop.comfyui import MANUAL_SIGMAS_SINCE, needs_manual_sigmas
from dreamartist_pipeline.params import SamplerParams, StrengthParams
from dreamartist_pipeline.schedulers import SCHEDULERS, ZERO_TERMINAL_SNR

_WIDTH = 110  # of lines that are wrapped


@dataclass(frozen=True)
class ExportSummary:
    """The content of an export.

    Attributes:
        loras: branch -> file in the kohya format.
        diffusers_loras: branch -> a file that diffusers loads completely.
        words: branch -> trigger words.
        workflow: the sigmas of the ComfyUI workflow; None if there is no workflow.
        strength: of each branch's adapter, in all examples.
        branches_are_equal: whether both branches have the same adapter with the same strength.
        clip_skip: number of the text encoder's last layers that are skipped.
        names: of the base model's parts in files.
        recommended: by the evaluation of the concept; None if it does not recommend any.
        uses_recommended: whether the examples have the recommended values.
    """

    title: str
    base_model: str
    loras: Mapping[str, str]
    diffusers_loras: Mapping[str, str]
    words: Mapping[str, Sequence[str]]
    prompt: str
    negative_prompt: str
    workflow: SigmaPath | None
    has_script: bool
    strength: StrengthParams
    branches_are_equal: bool
    names: FileNames
    clip_skip: int = 0
    zero_terminal_snr: bool = False
    recommended: RecommendedSettings | None = None
    uses_recommended: bool = False


def diffusers_script(summary: ExportSummary, seed: int, sampler: SamplerParams) -> str:
    """Return a script that generates images with one adapter per branch in plain diffusers."""
    scheduler = SCHEDULERS[sampler.scheduler]
    rescaled = ZERO_TERMINAL_SNR if summary.zero_terminal_snr else {}
    settings = {
        "pipeline": summary.names.pipeline,
        "loras": dict(summary.diffusers_loras),
        "words": [word for words in summary.words.values() for word in words],
        "text_encoders": dict(summary.names.embedding_keys),
        "prompt": summary.prompt,
        "negative_prompt": summary.negative_prompt,
        "seed": seed,
        "strength": {"positive": summary.strength.positive, "negative": summary.strength.negative},
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
        _recommended(summary),
        _comfyui(summary),
        _diffusers(summary),
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


def _recommended(summary: ExportSummary) -> str:
    settings = summary.recommended
    if settings is None:
        return ""
    others = (
        "The examples below have those of export.strength and export.sampler; export.recommended=true writes these."
    )
    strength = settings.strength
    texts = [
        f"LoRA strength {strength.positive:g} positive, {strength.negative:g} negative; guidance scale (CFG) "
        f"{settings.guidance_scale:g}",
        *(f"{reason[:1].upper()}{reason[1:]}." for reason in settings.reasons),
        "The examples below have these values." if summary.uses_recommended else others,
    ]
    wrapper = textwrap.TextWrapper(_WIDTH, initial_indent="  ", subsequent_indent="    ")
    lines = [line for text in texts for line in wrapper.wrap(text)]
    return "\n".join(["Recommended settings, from the evaluation after the training", *lines])


def _comfyui(summary: ExportSummary) -> str:
    path = summary.workflow
    if path is None:
        return ""
    heading = "one adapter per branch, but images differ" if path.difference else "equivalent, one adapter per branch"
    loras, has_words = "lora/*.safetensors" if summary.loras else "", any(summary.words.values())
    lines = [
        f"ComfyUI: {heading}",
        *([f"  {path.difference[0].upper()}{path.difference[1:]}."] if path.difference else []),
        f"  Install: {_copy_instruction(loras, 'models/loras', has_words, 'models/embeddings')}; no custom nodes.",
        *([f"  Needs ComfyUI {MANUAL_SIGMAS_SINCE} or newer."] if needs_manual_sigmas(path) else []),
        "  Load comfyui_workflow.json (menu Workflow, Open) and select the checkpoint in its first node.",
    ]
    return "\n".join(lines)


def _copy_instruction(loras: str, lora_folder: str, has_words: bool, embedding_folder: str) -> str:
    """Return which files to copy to which folders of a tool."""
    places = [f"{loras} to {lora_folder}"] if loras else []
    if has_words:
        places.append(f"embeddings/*.safetensors to {embedding_folder}")
    return f"copy {' and '.join(places)}"


def _diffusers(summary: ExportSummary) -> str:
    if not summary.has_script:
        return ""
    lines = [
        "diffusers: equivalent, one adapter per branch",
        "  Install: pip install diffusers transformers peft; the script reads its files from this folder.",
        f'  python generate_with_diffusers.py BASE_MODEL "{summary.prompt}"',
    ]
    return "\n".join(lines)


def _a1111(summary: ExportSummary) -> str:
    lora = summary.loras.get("positive", "")
    has_words = any(summary.words.values())
    if not lora and not has_words:
        return ""
    equal = ["A1111 / Forge: equivalent, because both branches have the same LoRA here"]
    fallback = [
        "A1111 / Forge: a fallback that is NOT equivalent",
        "  They cannot apply a LoRA to the negative prompt only. The closest is the positive LoRA, which acts on",
        "  both prompts, with both embeddings. Images differ from those of ComfyUI, diffusers and this project.",
    ]
    name, strength = lora.rpartition("/")[2].removesuffix(".safetensors"), summary.strength.positive
    prompt = _for_a1111(summary.prompt) + (f" <lora:{name}:{strength:g}>" if lora else "")
    trigger_words = "" if summary.branches_are_equal else ", ".join(summary.words.get("positive", ()))
    negative_prompt = _a1111_negative_prompt(summary)
    lines = [
        *(equal if summary.branches_are_equal else fallback),
        f"  Install: {_copy_instruction(lora, 'models/Lora', has_words, 'embeddings')}; no extension.",
        f"  prompt           {prompt}" + (f"   (trigger word: {trigger_words})" if trigger_words else ""),
        *([f"  negative prompt  {negative_prompt}"] if negative_prompt else []),
        *([f"  settings         {_a1111_clip_skip(summary)}"] if summary.clip_skip else []),
    ]
    return "\n".join(lines)


def _a1111_clip_skip(summary: ExportSummary) -> str:
    if summary.names.a1111_has_clip_skip:
        return f"Clip skip {summary.clip_skip + 1}"
    return f"clip_skip {summary.clip_skip} of this concept cannot be set for {summary.names.title}: images differ"


def _a1111_negative_prompt(summary: ExportSummary) -> str:
    """Return the negative prompt, preceded by the negative trigger words that it does not contain."""
    words = () if summary.branches_are_equal else summary.words.get("negative", ())
    missing = [word for word in words if word not in summary.negative_prompt]
    return ", ".join(part for part in (*missing, _for_a1111(summary.negative_prompt)) if part)


def _for_a1111(prompt: str) -> str:
    """Return a prompt without weights for A1111: parentheses, brackets and backslashes are escaped."""
    return re.sub(r"[()\[\]\\]", r"\\\g<0>", prompt)
