"""Does a concept belong to a base model? It must fit its layout; other weights of that layout are only remarked on."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterator

from dreamartist_pipeline.backbones.families import Backbone
from dreamartist_pipeline.core.concept import Concept
from dreamartist_pipeline.errors import InputError

_OF_EARLIER_VERSIONS = re.compile(r"[0-9a-f]{16}")  # of files, not of weights: it says nothing about either
_SHOWN = 3  # layers named in an error

log = logging.getLogger(__name__)


def check_base_model(concept: Concept, backbone: Backbone) -> None:
    """Confirm that a concept fits a base model without adapters, and remark once where its weights are others.

    Raises:
        InputError: it was trained on one of another layout.
    """
    name, fingerprint = concept.metadata.base_model, concept.metadata.base_model_fingerprint
    if differences := list(_differences(concept, backbone)):
        raise InputError(
            expected=f"a base model of the layout that the concept was trained on, {name!r}",
            got=f"{backbone.name!r}, which differs in {'; '.join(differences)}",
            remedy="set base_model to the former, or train the concept again",
        )
    if fingerprint != backbone.fingerprint and not _OF_EARLIER_VERSIONS.fullmatch(fingerprint):
        _remark(name, fingerprint, backbone.name, backbone.fingerprint)


@functools.cache
def _remark(trained_on: str, _fingerprint: str, used: str, _its_fingerprint: str) -> None:
    """Log it once for each pair."""
    log.info(
        "The concept was trained on %r; %r has other weights of the same layout, such as a fine-tune has: "
        "its images will look different.",
        trained_on,
        used,
    )


def _differences(concept: Concept, backbone: Backbone) -> Iterator[str]:
    trained, here = concept.metadata, backbone.objective.prediction_type
    if trained.base_model_family != backbone.family:
        yield f"family ({backbone.family}, not {trained.base_model_family})"
    if trained.prediction_type not in (None, here):
        yield f"prediction_type ({here}, not {trained.prediction_type})"
    words = concept.trigger_words()
    for encoder, width in backbone.word_widths.items():
        widths = {word.vectors[encoder].shape[1] if encoder in word.vectors else 0 for word in words} - {width}
        if widths:
            yield f"the width of words in {encoder} ({width}, not {', '.join(map(str, widths))})"
    for network in concept.networks:
        yield from _different_layers(concept, network, backbone)


def _different_layers(concept: Concept, network: str, backbone: Backbone) -> Iterator[str]:
    """Yield what is wrong with the layers of one network, if anything."""
    here = backbone.layer_shapes.get(network, {})
    wrong = {
        update.layer: None
        for update in concept.updates(network)
        if here.get(update.layer) != (len(update.factors.up), *update.factors.down.shape[1:])
    }
    if wrong:
        yield f"{len(wrong)} layers of {network} ({', '.join(list(wrong)[:_SHOWN])}, …)"
