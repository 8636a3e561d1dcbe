"""A training that begins with a concept: reading it, and giving its values to what trains."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from dreamartist_pipeline.backbones.families import Backbone
from dreamartist_pipeline.backbones.fitting import check_base_model
from dreamartist_pipeline.core.adapters import AdapterStack
from dreamartist_pipeline.core.concept import Concept
from dreamartist_pipeline.core.embeddings import WordEmbedding
from dreamartist_pipeline.core.starting import Start, load_initial_values
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.interop.concept_file import read_concept
from dreamartist_pipeline.interop.user_files import UserFiles
from dreamartist_pipeline.params import TrainingParams


def read_start(files: UserFiles, params: TrainingParams) -> Start | None:
    """Return what the training begins with; None without `start_from`.

    Raises:
        InputError: it is no concept.
    """
    if params.start_from is None:
        return None
    file = files[params.start_from]()
    return Start(read_concept(file, params.start_from), hashlib.sha256(file).hexdigest())


def begin_from(
    start: Start | None,
    stacks: Mapping[str, AdapterStack],
    words: Mapping[str, WordEmbedding],
    params: TrainingParams,
    base_model: Backbone,
) -> dict[str, Any]:
    """Give fresh adapters and words the concept's values, and return what the plan says about it.

    Args:
        start: None leaves everything fresh.
        stacks: network -> its fresh adapters; also on the meta device.
        words: text encoder -> the fresh words.
        params: of the training.
        base_model: without adapters; also on the meta device.

    Returns:
        `{}`, or `{"start": {"sha256": …, "taken_over": {group: layers or vectors}}}`.

    Raises:
        InputError: the concept belongs to a base model of another layout, another text layer or noise schedule, or
            something of it has no place in this training.
    """
    if start is None:
        return {}
    check_base_model(start.concept, base_model)
    _check_clip_skip(start.concept, params)
    _check_noise_schedule(start.concept, params)
    return {"start": {"sha256": start.sha256, "taken_over": load_initial_values(stacks, words, start.concept)}}


def _check_clip_skip(concept: Concept, params: TrainingParams) -> None:
    """Confirm that the training reads the text states of the layer that the concept was trained with."""
    expected = concept.metadata.clip_skip
    if params.clip_skip != expected:
        raise InputError(
            expected=f"training.clip_skip {expected}, which the concept in training.start_from was trained with",
            got=f"{params.clip_skip}",
            remedy=f"set it to {expected}",
        )


def _check_noise_schedule(concept: Concept, params: TrainingParams) -> None:
    """Confirm that the training has the noise schedule that the concept was trained with."""
    expected, got = (str(value).lower() for value in (concept.metadata.zero_terminal_snr, params.zero_terminal_snr))
    if got != expected:
        raise InputError(
            expected=f"training.zero_terminal_snr {expected}, as the concept in training.start_from was trained",
            got=got,
            remedy=f"set it to {expected}",
        )
