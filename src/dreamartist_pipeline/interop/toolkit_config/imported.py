"""A whole training configuration, translated and checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.interop.toolkit_config.data_sets import (
    find_data_sets,
    read_data,
    read_ingestion,
    read_regularization_weight,
)
from dreamartist_pipeline.interop.toolkit_config.lora_groups import read_lora_groups
from dreamartist_pipeline.interop.toolkit_config.optimization import (
    read_device,
    read_guidance_scale,
    read_loss,
    read_optimization,
)
from dreamartist_pipeline.interop.toolkit_config.source import ConfigReader, ReadText, read_config
from dreamartist_pipeline.interop.toolkit_config.words import (
    read_class_word,
    read_templates,
    read_trigger_words,
    read_words_parameters,
)
from dreamartist_pipeline.params import DeviceParams, IngestionParams, Params, TrainingParams

_HUB_ID = re.compile(r"(?!\.)[\w.-]+/[\w.-]+")
_SECTIONS: dict[str, type[Params]] = {
    "training": TrainingParams,
    "ingestion": IngestionParams,
    "device": DeviceParams,
}
_REQUIRED = {"training": {"num_steps": 1}}  # set by the method in a run


@dataclass(frozen=True)
class ImportedConfig:
    """A toolkit configuration as this project's configuration.

    Attributes:
        settings: for globals.yml: `method` (which has the defaults), `base_model`, `class_word`.
        parameters: for parameters.yml: `training`, `ingestion`, `device`.
        left_out: dotted key of the file -> its value and why it is not carried over, or the default that is used.
    """

    settings: dict[str, Any]
    parameters: dict[str, dict[str, Any]]
    left_out: dict[str, str]


def read_toolkit_config(text: str, read_text: ReadText) -> ImportedConfig:
    """Translate a training configuration of the reference toolkit.

    Args:
        text: the YAML file.
        read_text: returns the text of a file that the configuration names (base files, templates), None if not found.

    Raises:
        InputError: invalid YAML, nothing to train that is supported here, or invalid values.
    """
    reader = read_config(text, read_text)
    data_sets = find_data_sets(reader)
    groups = {network: read_lora_groups(reader, network) for network in ("lora_unet", "lora_text_encoder")}
    has_negative = any(group.get("branch") == "n" for network in groups.values() for group in network)
    words = read_trigger_words(reader, data_sets.reference, has_negative)
    if not (words.names or any(groups.values())):
        raise InputError(
            expected=(
                "LoRA groups (lora_unet, lora_text_encoder) or trigger words (tokenizer_pt.train and word_names) "
                "in the configuration"
            ),
            got=f"{', '.join(reader.children(''))}",
            remedy="import a configuration that trains adapters",
        )
    training: dict[str, Any] = {
        **groups,
        **read_data(reader, data_sets),
        "guidance_scale": read_guidance_scale(reader, has_negative or words.has_trained_pair),
        **read_loss(reader, read_regularization_weight(reader, data_sets)),
        **read_optimization(reader),
        **read_templates(reader, data_sets.reference, words, read_text),
    }
    if words.names:
        total_batch_size = training["batch_size"] + training["regularization_batch_size"]
        training |= read_words_parameters(reader, words, total_batch_size)
    sections = {
        "training": training,
        "ingestion": read_ingestion(reader, data_sets.reference),
        "device": read_device(reader),
    }
    parameters = {name: values for name, values in sections.items() if values}
    settings = {
        "method": "toolkit" if words.names else "lora",
        "base_model": _base_model(reader),
        "class_word": read_class_word(reader, data_sets.reference),
    }
    _check(parameters)
    return ImportedConfig({name: value for name, value in settings.items() if value}, parameters, reader.left_out())


def _base_model(reader: ConfigReader) -> str:
    """Return the base model, '' without one; 'owner/name' is a hub id, anything else a folder."""
    name = str(reader.read("model.pretrained_model_name_or_path") or "")
    return f"hub:{name}" if _HUB_ID.fullmatch(name) else name


def _check(parameters: Mapping[str, Mapping[str, Any]]) -> None:
    """Validate the sections.

    Raises:
        InputError: a value is invalid; the message lists all of them.
    """
    for name, values in parameters.items():
        try:
            _SECTIONS[name].model_validate({**_REQUIRED.get(name, {}), **values})
        except ValidationError as error:
            problems = [
                f"{'.'.join(map(str, (name, *problem['loc'])))}: {problem['msg']} (got {_shown(problem['input'])})"
                for problem in error.errors()
            ]
            raise InputError(
                expected="valid parameters of this project",
                got="; ".join(problems),
                remedy="correct the file",
            ) from error


def _shown(value: Any) -> str:
    return repr(value) if not isinstance(value, Mapping | list | tuple) else "these values together"
