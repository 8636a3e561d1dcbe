"""Verify exported files: read them with this project's readers and with diffusers, and compare with the concept."""

from __future__ import annotations

import ast
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from dreamartist_pipeline.backbones.concepts import attach
from dreamartist_pipeline.backbones.families import Backbone
from dreamartist_pipeline.backbones.layouts import layout_of
from dreamartist_pipeline.backbones.lora_files import (
    Probe,
    base_prediction,
    concept_predictions,
    file_prediction,
    make_probe,
)
from dreamartist_pipeline.core.concept import Concept
from dreamartist_pipeline.core.lora_factors import LoRAFactors
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.interop.branch_adapters import BranchAdapter
from dreamartist_pipeline.interop.comfyui import check_workflow
from dreamartist_pipeline.interop.kohya import read_kohya
from dreamartist_pipeline.interop.layer_names import (
    diffusers_loses_layers,
    known_to_a1111,
    known_to_comfyui,
    known_to_comfyui_as_peft,
)
from dreamartist_pipeline.interop.peft_files import read_peft
from dreamartist_pipeline.interop.toolkit import read_toolkit
from dreamartist_pipeline.interop.word_files import read_vectors
from dreamartist_pipeline.params import ExportParams
from dreamartist_pipeline.pipelines.export.writing import (
    LORA_FOLDERS,
    SCRIPT,
    WORKFLOW,
    ExportSource,
    describe,
    lora_name,
    read_source,
)

UPDATE_LIMITS = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}
"""Limit of ‖difference‖ / ‖update‖ by the dtype of the file."""

EFFECT_LIMITS = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}
"""Limit of the difference of predictions, as a share of the adapter's effect, by the dtype of the file."""

_ROUNDING = 2e-5  # added to the limit, as a share of the prediction: float32 sums in another order

_TOOLKIT = "toolkit/"
_READERS = {"kohya": read_kohya, "peft": read_peft}


@dataclass(frozen=True)
class _Reference:
    """The concept and the base model with their predictions, computed once on first use."""

    backbone: Backbone
    concept: Concept

    @cached_property
    def source(self) -> ExportSource:
        return read_source(self.concept, self.backbone)

    @cached_property
    def probe(self) -> Probe:
        return make_probe(self.backbone, clip_skip=self.concept.metadata.clip_skip)

    @cached_property
    def base(self) -> torch.Tensor:
        return base_prediction(self.backbone, self.probe)

    @cached_property
    def by_branch(self) -> dict[str, torch.Tensor]:
        return concept_predictions(self.backbone, self.concept, self.probe)

    @cached_property
    def modules(self) -> dict[str, list[str]]:
        return {network: list(layers) for network, layers in layout_of(self.backbone).shapes.items()}


def verify_files(
    backbone: Backbone, concept: Concept, files: Mapping[str, bytes], params: ExportParams
) -> dict[str, Any]:
    """Read every file back and compare.

    Args:
        backbone: the base model, in float32.
        concept: the exported concept.
        files: name -> bytes, from `writing.concept_files` and `writing.companions`.
        params: of the export.

    Returns:
        Plain values: title, dtype, base model, and per file size, hash, what was compared, differences and limits; for
        the workflow, why images in ComfyUI differ, or "".

    Raises:
        InputError: a file that differs from the concept, or an example prompt whose trigger word is beyond the text
            encoder's context.
    """
    reference = _Reference(backbone, concept)
    summary = describe(reference.source, files, params)
    prompts = attach(backbone, concept, params.strength).prompts
    prompts.check_not_cut([summary.prompt, summary.negative_prompt])
    prompts.warn_without_word([summary.prompt])
    entries: dict[str, dict[str, Any]] = {name: {} for name in files}
    for file_format in _READERS:
        for branch in reference.source.adapters:
            if (name := lora_name(branch, file_format, params)) in files:
                entries[name] = _check_lora(files[name], name, file_format, branch, reference, params)
    for word in reference.source.words:
        if (name := f"embeddings/{word.name}.safetensors") in files:
            got = read_vectors(files[name], name, reference.source.names.embedding_keys)
            entries[name] = _check_words(got, word.vectors, name, params.dtype)
    entries |= _check_toolkit(files, reference)
    _check_companions(files)
    if summary.workflow:
        entries[WORKFLOW] = {"difference": summary.workflow.difference}
    described = {
        name: {"bytes": len(file), "sha256": hashlib.sha256(file).hexdigest(), **entries[name]}
        for name, file in sorted(files.items())
    }
    return {"title": params.title, "dtype": params.dtype, "base_model": backbone.name, "files": described}


# ------------------------------------------------------------------------------------------------- LoRA files


def _check_lora(
    file: bytes, name: str, file_format: str, branch: str, reference: _Reference, params: ExportParams
) -> dict[str, Any]:
    adapter = reference.source.adapters[branch]
    read = _READERS[file_format](file, name, reference.modules, reference.source.names)
    return {
        "branch": branch,
        "num_layers": adapter.num_layers,
        "update": _compare_updates(adapter, read, name, UPDATE_LIMITS[params.dtype]),
        "diffusers": _check_diffusers(file, name, file_format, branch, reference, params),
        "refused_layers": _refused_layers(adapter, file_format, reference),
    }


def _compare_updates(expected: BranchAdapter, got: BranchAdapter, name: str, limit: float) -> dict[str, float]:
    """Return the largest ‖difference‖ / ‖update‖ of all layers and biases.

    Raises:
        InputError: other layers, or a difference above the limit.
    """
    written, found = expected.by_layer(), got.by_layer()
    if written.keys() != found.keys():
        odd = sorted(".".join(at) for at in written.keys() ^ found.keys())
        raise InputError(
            expected=f"the concept's layers in {name}", got=f"other layers: {', '.join(odd)}", remedy="export it again"
        )
    differences = {at: _layer_difference(found[at], written[at]) for at in written}
    worst = max(differences, key=lambda at: differences[at])
    if not differences[worst] <= limit:
        raise InputError(
            expected=f"the concept's update of {'.'.join(worst)} in {name} up to {limit:g}",
            got=f"a relative difference of {differences[worst]:.3g}",
            remedy="set export.dtype to float32",
        )
    return {"relative_difference": differences[worst], "limit": limit}


def _layer_difference(got: LoRAFactors, expected: LoRAFactors) -> float:
    biases = _relative_difference(got.bias_for_scale(1.0), expected.bias_for_scale(1.0))
    return max(_relative_difference(got.update(), expected.update()), biases)


def _relative_difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    difference, size = float((got - expected).norm()), float(expected.norm())
    if not difference:
        return 0.0
    return difference / size if size else math.inf


def _check_diffusers(
    file: bytes, name: str, file_format: str, branch: str, reference: _Reference, params: ExportParams
) -> dict[str, Any]:
    """Compare diffusers' prediction with the file and the prediction of the concept's branch.

    Raises:
        InputError: diffusers rejects the file, adapts other layers, or its prediction differs.
    """
    adapter = reference.source.adapters[branch]
    loses_layers = any(diffusers_loses_layers(file_format, each) for each in reference.source.text_layers(branch))
    if reference.backbone.pipeline is None or loses_layers:
        return {"takes_all_layers": False}
    loaded = file_prediction(reference.backbone, file, name, reference.probe)
    expected_layers = {".".join(at) for at in adapter.by_layer()}
    if lost := sorted(expected_layers ^ loaded.layers):
        raise InputError(
            expected=f"the concept's layers from diffusers' loader of {name}",
            got=f"other layers: {', '.join(lost)}",
            remedy=f"remove {file_format} from export.formats",
        )
    expected = reference.by_branch[branch]
    difference = float((loaded.prediction - expected).abs().max())
    effect = float((expected - reference.base).abs().max())
    limit = EFFECT_LIMITS[params.dtype] * effect + _ROUNDING * float(expected.abs().max())
    if not difference <= limit:
        raise InputError(
            expected=f"the prediction of the concept's {branch} branch by diffusers with {name}, up to {limit:.3g}",
            got=f"a difference of {difference:.3g} (the adapter's effect is {effect:.3g})",
            remedy="set export.dtype to float32",
        )
    return {"takes_all_layers": True, "max_difference": difference, "limit": limit, "effect": effect}


def _refused_layers(adapter: BranchAdapter, file_format: str, reference: _Reference) -> dict[str, list[str]]:
    """Return tool -> the layers that it ignores, for the tools that read this format."""
    names = reference.source.names
    layers = list(adapter.by_layer())
    if file_format == "peft":
        refused = {"ComfyUI": [at for at in layers if not known_to_comfyui_as_peft(*at)]}
    else:
        refused = {
            "ComfyUI": [at for at in layers if not known_to_comfyui(*at)],
            "A1111": [at for at in layers if not known_to_a1111(*at, names)],
        }
    return {tool: sorted(".".join(at) for at in found) for tool, found in refused.items()}


# ------------------------------------------------------------------------------------------------- other files


def _check_words(
    got: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], name: str, dtype: str
) -> dict[str, Any]:
    """Check that the vectors of every text encoder are the concept's, rounded to the dtype.

    Raises:
        InputError: other vectors.
    """
    for encoder, vectors in expected.items():
        rounded, found = vectors.to(getattr(torch, dtype)).float(), got.get(encoder, torch.empty(0))
        if found.shape != rounded.shape or not torch.equal(found, rounded):
            raise InputError(
                expected=f"the concept's vectors {list(vectors.shape)} in {name}",
                got=f"others {list(found.shape)}",
                remedy="export it again",
            )
    return {
        "num_vectors": len(next(iter(expected.values()))),
        "max_difference": max(float((got[encoder] - vectors).abs().max()) for encoder, vectors in expected.items()),
    }


def _check_toolkit(files: Mapping[str, bytes], reference: _Reference) -> dict[str, dict[str, Any]]:
    """Read the toolkit's folder, and compare adapters and words."""
    members = {name.removeprefix(_TOOLKIT): file for name, file in files.items() if name.startswith(_TOOLKIT)}
    if not members:
        return {}
    adapters, words = read_toolkit(members, reference.modules, reference.source.names)
    entries: dict[str, dict[str, Any]] = {}
    for word in reference.source.words:
        name = f"{_TOOLKIT}{word.name}.pt"
        got = dict.fromkeys(word.vectors, words.get(word.name, torch.empty(0)))  # of the only text encoder
        entries[name] = _check_words(got, word.vectors, name, "float32")
    for branch, adapter in reference.source.adapters.items():
        suffix = f"{'-neg' if branch == 'negative' else ''}-{reference.concept.metadata.last_step}.safetensors"
        names = [f"{_TOOLKIT}{network}{suffix}" for network in adapter.networks]
        read = adapters.get(branch, BranchAdapter({}))
        compared = _compare_updates(adapter, read, " and ".join(names), UPDATE_LIMITS["float32"])
        entries |= {name: {"branch": branch, "update": compared} for name in names}
    return entries


def _check_companions(files: Mapping[str, bytes]) -> None:
    """Check the syntax of workflow and script, and the files that the workflow loads.

    Raises:
        InputError: invalid syntax, or a file that is not exported.
    """
    if WORKFLOW in files:
        lora_files = [name.rpartition("/")[2] for name in files if name.startswith(f"{LORA_FOLDERS['kohya']}/")]
        check_workflow(json.loads(files[WORKFLOW]), lora_files, WORKFLOW)
    if SCRIPT in files:
        try:
            ast.parse(files[SCRIPT])
        except SyntaxError as error:
            raise InputError(
                expected=f"valid Python in {SCRIPT}", got=f"{error}", remedy="choose another export.prompt"
            ) from error
