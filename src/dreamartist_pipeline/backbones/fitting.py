"""Checks that a concept fits a base model: another layout is an error, other weights of the same layout are logged."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterator

from dreamartist_pipeline.backbones.families import Backbone
from dreamartist_pipeline.core.concept import Concept
from dreamartist_pipeline.core.model_location import HUB
from dreamartist_pipeline.errors import InputError

_OF_EARLIER_VERSIONS = re.compile(
    r"[0-9a-f]{16}"
)  # fingerprints of files, which cannot be compared with those of weights
_SHOWN = 3  # layers named in an error

log = logging.getLogger(__name__)


def check_base_model(concept: Concept, backbone: Backbone) -> None:
    """Check that a concept fits a base model without adapters; log once if it was trained on other weights.

    Raises:
        InputError: it was trained on a base model of another layout.
    """
    name, fingerprint = concept.metadata.base_model, concept.metadata.base_model_fingerprint
    if differences := list(_differences(concept, backbone)):
        raise InputError(
            expected=f"a base model with the layout of {name!r}, which the concept was trained on",
            got=f"{backbone.name!r}, which differs in {'; '.join(differences)}",
            remedy=f"set base_model to {name}, or train the concept again",
        )
    same = (backbone.fingerprint, f"{HUB}{backbone.name}")  # the latter in concepts of earlier versions
    if fingerprint not in same and not _OF_EARLIER_VERSIONS.fullmatch(fingerprint):
        _log_other_weights(name, fingerprint, backbone.name, backbone.fingerprint)


@functools.cache
def _log_other_weights(trained_on: str, _trained_fingerprint: str, used: str, _used_fingerprint: str) -> None:
    """Log once for each pair of base models."""
    log.info(
        "The concept was trained on %r; %r has other weights of the same layout, so its images will differ.",
        trained_on,
        used,
    )


def _differences(concept: Concept, backbone: Backbone) -> Iterator[str]:
    metadata, prediction_type = concept.metadata, backbone.objective.prediction_type
    if metadata.base_model_family != backbone.family:
        yield f"family ({backbone.family}, not {metadata.base_model_family})"
    if metadata.prediction_type not in (None, prediction_type):
        yield f"prediction_type ({prediction_type}, not {metadata.prediction_type})"
    words = concept.trigger_words()
    for encoder, width in backbone.word_widths.items():
        widths = {word.vectors[encoder].shape[1] if encoder in word.vectors else 0 for word in words} - {width}
        if widths:
            yield f"the width of word vectors in {encoder} ({width}, not {', '.join(map(str, widths))})"
    for network in concept.networks:
        shapes = backbone.layer_shapes.get(network, {})
        wrong = {
            update.layer: None
            for update in concept.updates(network)
            if shapes.get(update.layer) != (len(update.factors.up), *update.factors.down.shape[1:])
        }
        if wrong:
            yield f"{len(wrong)} layers of {network} ({', '.join(list(wrong)[:_SHOWN])}, …)"
