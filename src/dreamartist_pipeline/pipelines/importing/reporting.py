"""The report of an import."""

from __future__ import annotations

import dataclasses
from typing import Any

from dreamartist_pipeline.core.concept import Concept
from dreamartist_pipeline.core.lora_factors import SHARED, LoRAFactors
from dreamartist_pipeline.interop.branch_adapters import BranchAdapter
from dreamartist_pipeline.interop.foreign_concept import Imported

_NOTES = {
    SHARED: "the positive LoRA acts on both branches, as in other tools (import.positive_acts_on)",
    "positive": "the negative branch has no adapter and is the base model",
    "negative": "the positive branch has no adapter and is the base model",
}


def describe(imported: Imported, concept: Concept, hint: str = "") -> dict[str, Any]:
    """Return the report: adapters and words of each branch, their files, and a hint about the base model if any."""
    return {
        "base_model": {
            "name": concept.metadata.base_model,
            "fingerprint": concept.metadata.base_model_fingerprint,
        },
        "adapters": {branch: _networks(adapter) for branch, adapter in imported.adapters.items()},
        "words": [
            {"slot": word.slot, "branch": word.branch, "name": word.name, "vectors": word.num_vectors}
            for word in imported.words
        ],
        "sources": [dataclasses.asdict(source) for source in imported.sources],
        "left_out": {branch: list(layers) for branch, layers in imported.left_out.items()},
        "notes": [
            *(_NOTES[branch] for branch in imported.adapters if len(imported.adapters) == 1),
            *(
                f"{len(layers)} text-encoder layers of the {branch} LoRA are left out: with clip_skip "
                f"{concept.metadata.clip_skip}, the text states are read before them"
                for branch, layers in imported.left_out.items()
            ),
            *imported.notes,
            *([hint] if hint else []),
        ],
    }


def _networks(adapter: BranchAdapter) -> dict[str, dict[str, Any]]:
    return {
        network: {
            "layers": len(layers),
            "ranks": sorted({factors.rank for factors in layers.values()}),
            "parameters": sum(_num_parameters(factors) for factors in layers.values()),
        }
        for network, layers in adapter.networks.items()
    }


def _num_parameters(factors: LoRAFactors) -> int:
    bias = 0 if factors.bias is None else factors.bias.numel()
    return factors.down.numel() + factors.up.numel() + bias


def summary(report: dict[str, Any]) -> str:
    """Return the report as text."""
    lines = [
        f"  {branch:<10}{network}: {entry['layers']} layers, ranks {', '.join(map(str, entry['ranks']))}"
        for branch, networks in report["adapters"].items()
        for network, entry in networks.items()
    ]
    for word in report["words"]:
        lines.append(f"  {word['branch']:<10}word {word['name']}: {word['vectors']} vectors, slot {{{word['slot']}}}")
    lines += [f"  {'from':<10}{source['file']} ({source['holds']})" for source in report["sources"]]
    return "\n".join(lines + [f"  {'note':<10}{note}" for note in report["notes"]])
