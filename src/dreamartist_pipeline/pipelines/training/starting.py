"""Training from an existing concept: read it, and load its values into the new adapters and words."""

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
    """Return the start concept; None without `start_from`.

    Raises:
        InputError: not a concept file.
    """
    if params.start_from is None:
        return None
    file = files[params.start_from]()
    return Start(read_concept(file, params.start_from), hashlib.sha256(file).hexdigest())


def apply_start(
    start: Start | None,
    stacks: Mapping[str, AdapterStack],
    words: Mapping[str, WordEmbedding],
    params: TrainingParams,
    base_model: Backbone,
) -> dict[str, Any]:
    """Load a concept's values into new adapters and words, and return the plan's entry about it.

    Args:
        start: None leaves the new values.
        stacks: network -> its new adapters; may be on the meta device.
        words: text encoder -> its new words.
        params: of the training.
        base_model: without adapters; may be on the meta device.

    Returns:
        `{}`, or `{"start": {"sha256": …, "taken_over": {group: layers or vectors}}}`.

    Raises:
        InputError: a concept for another base model, clip_skip or noise schedule, or one that does not fit the
            configured groups.
    """
    if start is None:
        return {}
    check_base_model(start.concept, base_model)
    _check_same_conditions(start.concept, params)
    return {"start": {"sha256": start.sha256, "taken_over": load_initial_values(stacks, words, start.concept)}}


def _check_same_conditions(concept: Concept, params: TrainingParams) -> None:
    """Check that the training has the concept's text layer and noise schedule."""
    for option in ("clip_skip", "zero_terminal_snr"):
        expected, got = (str(getattr(values, option)).lower() for values in (concept.metadata, params))
        if got != expected:
            raise InputError(
                expected=f"training.{option} {expected}, as in the training of training.start_from",
                got=got,
                remedy=f"set it to {expected}",
            )
