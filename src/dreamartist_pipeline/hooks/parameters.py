"""The parameters by which MLflow compares runs: a fixed list, and what differs from the presets in conf/base."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from dreamartist_pipeline.params import LoRAGroup, TrainingParams
from dreamartist_pipeline.redaction import redacted

_MAX_LENGTH = 6000  # MLflow's limit for the value of a parameter


def recorded_parameters(
    settings: Mapping[str, Any], sections: Mapping[str, BaseModel], presets: Mapping[str, BaseModel]
) -> dict[str, str]:
    """Return the parameters of a run.

    Args:
        settings: the run settings.
        sections: section -> its parameters, for all sections that the run uses.
        presets: the same sections in conf/base, for the same settings.
    """
    own_vae = {"vae": settings["vae"]} if settings.get("vae") is not None else {}
    fixed: dict[str, Any] = {"subject": settings["subject"], "base_model": settings["base_model"], **own_vae}
    shown: set[str] = set()
    if isinstance(training := sections.get("training"), TrainingParams):
        fixed |= {"method": settings["method"], **training_parameters(training)}
        shown = {f"training.{name}" for name in _shown_in_list(training)}
    if "pretrain" in sections:
        fixed["recipe"] = settings["recipe"]
    differing = {name: value for name, value in _differing(sections, presets).items() if name not in shown}
    return as_texts(fixed | differing)


def training_parameters(params: TrainingParams) -> dict[str, Any]:
    """Return the fixed list of a training: steps, guidance scale, seed, ranks and learning rates."""
    values = {"steps": params.num_steps, "guidance_scale": str(params.guidance_scale), "seed": params.seed}
    if params.words.names:
        values["lr.words"] = params.words.lr
    for network, groups in params.lora.items():
        for index, group in enumerate(groups):
            name = f"{network}.{index}.{group.branch if params.num_branches > 1 else 'shared'}"
            values |= {f"rank.{name}": group.rank, f"lr.{name}": group.lr}
    return values


def concept_parameters(metadata: Any) -> dict[str, str]:
    """Return what a concept's file knows of that list: all but the method and the configured learning rates.

    Args:
        metadata: a `core.concept.ConceptMetadata`; importing it here would import torch.
    """
    known = {"steps": metadata.num_steps, "guidance_scale": metadata.guidance_scale, "seed": metadata.seed}
    ranks = {f"rank.{group.name}": group.rank for groups in metadata.lora.values() for group in groups}
    return as_texts({name: value for name, value in (known | ranks).items() if value is not None})


def repeated_parameters(
    of_training: Mapping[str, str], own: Mapping[str, str], sections: Collection[str]
) -> dict[str, str]:
    """Return the parameters of a run that uses a concept: those of its training, and its own.

    Args:
        of_training: the recorded parameters of the training.
        own: those of this run.
        sections: that this run uses; the training's parameters of these are left out.
    """
    return {name: value for name, value in of_training.items() if name.split(".")[0] not in sections} | dict(own)


def plain_sections(sections: Mapping[str, BaseModel], exclude_defaults: bool = False) -> dict[str, Any]:
    """Return the sections as JSON types, with references in place of values of the environment."""
    return {
        name: redacted(section.model_dump(mode="json", exclude_defaults=exclude_defaults))
        for name, section in sections.items()
    }


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def number_lists(value: Any) -> Any:
    """Return the value with lists of mappings as mappings by index, so that MLflow shows each entry in a row."""
    if isinstance(value, dict):
        return {key: number_lists(item) for key, item in value.items()}
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return {str(index): number_lists(item) for index, item in enumerate(value)}
    return value


def as_texts(values: Mapping[str, Any]) -> dict[str, str]:
    """Return the values as MLflow stores them, with references in place of values of the environment."""
    return {name: redacted(str(value))[:_MAX_LENGTH] for name, value in values.items()}


def _differing(sections: Mapping[str, BaseModel], presets: Mapping[str, BaseModel]) -> dict[str, Any]:
    values, preset = (flatten(number_lists(plain_sections(each))) for each in (sections, presets))
    return {name: value for name, value in values.items() if name not in preset or preset[name] != value}


def _shown_in_list(params: TrainingParams) -> Iterator[str]:
    """Yield the keys of `training` that `training_parameters` contains under shorter names."""
    yield from ("num_steps", "guidance_scale", "seed", "words.lr")
    groups: Sequence[LoRAGroup]
    for network, groups in params.lora.items():
        for index in range(len(groups)):
            yield from (f"lora_{network}.{index}.{name}" for name in ("rank", "lr", "branch"))
