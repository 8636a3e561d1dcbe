"""The bytes of every exported file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from dreamartist_pipeline.backbones.concepts import with_schedule_of
from dreamartist_pipeline.backbones.families import Backbone
from dreamartist_pipeline.backbones.schedulers import make_scheduler
from dreamartist_pipeline.backbones.sigma_paths import sigma_path
from dreamartist_pipeline.core.captions import fill_negative_prompt, fill_template, slot_names
from dreamartist_pipeline.core.concept import Concept, ConceptMetadata, TriggerWord
from dreamartist_pipeline.core.embeddings import with_plain_words
from dreamartist_pipeline.core.layout import FileNames
from dreamartist_pipeline.core.sigmas import SigmaPath
from dreamartist_pipeline.core.strengths import RecommendedSettings
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.interop.branch_adapters import BranchAdapter, branch_adapter
from dreamartist_pipeline.interop.comfyui import (
    BranchInputs,
    Picture,
    build_workflow,
    comfyui_sampler,
    embedding_prompt,
)
from dreamartist_pipeline.interop.companion_texts import ExportSummary, diffusers_script, readme
from dreamartist_pipeline.interop.file_facts import FileFacts
from dreamartist_pipeline.interop.kohya import write_kohya
from dreamartist_pipeline.interop.layer_names import diffusers_loses_layers
from dreamartist_pipeline.interop.peft_files import write_peft
from dreamartist_pipeline.interop.toolkit import write_toolkit
from dreamartist_pipeline.interop.word_files import write_embedding
from dreamartist_pipeline.params import ExportParams

WORKFLOW, SCRIPT, README = "comfyui_workflow.json", "generate_with_diffusers.py", "README.txt"
BRANCHES = ("positive", "negative")
LORA_FOLDERS = {"kohya": "lora", "peft": "diffusers"}
_WRITERS = {"kohya": write_kohya, "peft": write_peft}
_SD_LATENT_SCALE = 8  # pixels per latent in ComfyUI


@dataclass(frozen=True)
class ExportSource:
    """A concept in the form of other tools.

    Attributes:
        adapters: branch -> its adapter; branches without one are left out.
        words: positive first in every slot.
        metadata: of the concept.
        base_model: with the noise schedule of the concept; may be on the meta device.
    """

    adapters: dict[str, BranchAdapter]
    words: tuple[TriggerWord, ...]
    metadata: ConceptMetadata
    base_model: Backbone

    @property
    def names(self) -> FileNames:
        """Names of the base model's parts in files of other tools."""
        return self.base_model.file_names

    def text_layers(self, branch: str) -> list[list[str]]:
        """Return the adapted layers of each text encoder in a branch."""
        return [list(self.adapters[branch].networks.get(encoder, {})) for encoder in self.names.embedding_keys]


def read_source(concept: Concept, base_model: Backbone) -> ExportSource:
    """Return a concept in the form of other tools.

    Raises:
        InputError: an incomplete concept, or one that other tools cannot express.
    """
    adapters = {branch: branch_adapter(concept, branch) for branch in BRANCHES}
    return ExportSource(
        adapters={branch: adapter for branch, adapter in adapters.items() if adapter.num_layers},
        words=concept.trigger_words(),
        metadata=concept.metadata,
        base_model=with_schedule_of(concept, base_model),
    )


def lora_name(branch: str, file_format: str, params: ExportParams) -> str:
    """Return the name of a branch's LoRA file; `file_format` is "kohya" or "peft"."""
    return f"{LORA_FOLDERS[file_format]}/{_title(branch, params)}.safetensors"


def _title(branch: str, params: ExportParams) -> str:
    return params.title + ("-neg" if branch == "negative" else "")


# ------------------------------------------------------------------------------------------------- concept files


def concept_files(
    source: ExportSource, params: ExportParams, recommended: RecommendedSettings | None = None
) -> dict[str, bytes]:
    """Return the concept's files in the chosen formats.

    Raises:
        InputError: formats that store no part of this concept, or one that cannot store it.
    """
    dtype = getattr(torch, params.dtype)
    files = {
        lora_name(branch, file_format, params): write(adapter, _facts(branch, source, params, recommended), dtype)
        for file_format, write in _WRITERS.items()
        if file_format in params.formats
        for branch, adapter in source.adapters.items()
    }
    if "embeddings" in params.formats:
        for word in source.words:
            facts = _facts(word.branch, source, params, recommended)
            files[f"embeddings/{word.name}.safetensors"] = write_embedding(word, facts, dtype)
    if "toolkit" in params.formats:
        written = write_toolkit(source.adapters, source.words, source.metadata.last_step, source.names)
        files |= {f"toolkit/{name}": file for name, file in written.items()}
    if not files:
        raise InputError(
            expected=f"a format for a concept of {'LoRAs' if source.adapters else 'trigger words'} only",
            got=f"export.formats={list(params.formats)}",
            remedy=f"add {'kohya' if source.adapters else 'embeddings'}",
        )
    return files


def _facts(
    branch: str, source: ExportSource, params: ExportParams, recommended: RecommendedSettings | None
) -> FileFacts:
    return FileFacts(
        title=_title(branch, params),
        trigger_phrase=", ".join(word.name for word in source.words if word.branch == branch),
        prediction_type=source.base_model.objective.prediction_type,
        names=source.names,
        usage_hint="" if recommended is None else f"Recommended: {recommended}",
    )


# ------------------------------------------------------------------------------------------------- companion files


def companions(
    source: ExportSource,
    files: Mapping[str, bytes],
    params: ExportParams,
    recommended: RecommendedSettings | None = None,
) -> dict[str, bytes]:
    """Return README, workflow and script; the latter two only if the formats they use are exported."""
    described = describe(source, files, params)
    summary = replace(described, recommended=recommended, uses_recommended=params.recommended)
    texts = {README: readme(summary)}
    if summary.has_script:
        texts[SCRIPT] = diffusers_script(summary, params.seed, params.sampler)
    if summary.workflow:
        texts[WORKFLOW] = _workflow(source, summary, summary.workflow, params)
    return {name: text.encode() for name, text in texts.items()}


def describe(source: ExportSource, files: Mapping[str, bytes], params: ExportParams) -> ExportSummary:
    """Return the content of the export, with filled example prompts."""
    names = [word.name for word in source.words]
    plain = {key: with_plain_words(getattr(params, key), names) for key in ("prompt", "negative_prompt")}
    params = params.model_copy(update=plain)  # other tools find their words in no other spelling
    words = {branch: [word for word in source.words if word.branch == branch] for branch in BRANCHES}
    slots = {branch: {word.slot: word.name for word in found} for branch, found in words.items()}
    unnamed = dict.fromkeys(slot_names(params.prompt), source.metadata.class_word)
    loras = {b: name for b in source.adapters if (name := lora_name(b, "kohya", params)) in files}
    diffusers_loras = {b: file for b in source.adapters if (file := _diffusers_lora(b, source, files, params))}
    has_words = not source.words or "embeddings" in params.formats
    has_tools = has_words and source.names.pipeline is not None
    has_workflow = has_tools and len(loras) == len(source.adapters)
    return ExportSummary(
        title=params.title,
        base_model=source.base_model.name,
        loras=loras,
        diffusers_loras=diffusers_loras,
        words={b: [word.name for word in found] for b, found in words.items()} if has_words else {},
        prompt=fill_template(params.prompt, unnamed | slots["positive"]),
        negative_prompt=fill_negative_prompt(params.negative_prompt, slots["positive"] | slots["negative"]),
        workflow=_sigma_path(source, params) if has_workflow else None,
        has_script=has_tools and len(diffusers_loras) == len(source.adapters),
        strength=params.strength,
        branches_are_equal=params.strength.positive == params.strength.negative and _branches_are_equal(source),
        clip_skip=source.metadata.clip_skip,
        zero_terminal_snr=source.base_model.zero_terminal_snr,
        names=source.names,
    )


def _sigma_path(source: ExportSource, params: ExportParams) -> SigmaPath:
    comfyui_sampler(params.sampler)  # not checked earlier for an import
    return sigma_path(make_scheduler(source.base_model, params.sampler), params.sampler)


def _diffusers_lora(branch: str, source: ExportSource, files: Mapping[str, bytes], params: ExportParams) -> str | None:
    """Return the file of a branch that diffusers loads completely; None if it is not exported."""
    text_layers = source.text_layers(branch)
    formats = [
        file_format
        for file_format in _WRITERS
        if not any(diffusers_loses_layers(file_format, layers) for layers in text_layers)
    ]
    return next((name for each in formats if (name := lora_name(branch, each, params)) in files), None)


def _branches_are_equal(source: ExportSource) -> bool:
    """Return whether both branches have the same adapter, as after a training without a negative branch."""
    if len(source.adapters) != len(BRANCHES):
        return False
    positive, negative = (adapter.by_layer() for adapter in source.adapters.values())
    return positive.keys() == negative.keys() and all(
        factors.update().equal(negative[at].update())
        and factors.bias_for_scale(1.0).equal(negative[at].bias_for_scale(1.0))
        for at, factors in positive.items()
    )


def _workflow(source: ExportSource, summary: ExportSummary, path: SigmaPath, params: ExportParams) -> str:
    words = [word.name for word in source.words]
    inputs = {
        branch: BranchInputs(
            prompt=embedding_prompt(prompt, words),
            lora_file=summary.loras[branch].rpartition("/")[2] if branch in summary.loras else None,
            strength=getattr(params.strength, branch),
            is_zeros=source.base_model.zeros_for_empty_prompt and not prompt.strip(),
        )
        for branch, prompt in (("positive", summary.prompt), ("negative", summary.negative_prompt))
    }
    base_model, metadata = source.base_model, source.metadata
    side_px = base_model.image_px // base_model.latent_scale * _SD_LATENT_SCALE
    prediction_type = base_model.objective.prediction_type
    picture = Picture(
        side_px,
        params.seed,
        prediction_type,
        metadata.clip_skip,
        base_model.zero_terminal_snr,
        source.names.comfyui_text_layer,
    )
    workflow = build_workflow(inputs["positive"], inputs["negative"], picture, params.sampler, path)
    return json.dumps(workflow, indent=1) + "\n"
