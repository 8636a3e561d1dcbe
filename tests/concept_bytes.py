"""The file of a concept, in memory."""

from __future__ import annotations

from dreamartist_pipeline.core.concept import Concept
from dreamartist_pipeline.interop.safetensors_bytes import write_tensors


def concept_bytes(concept: Concept) -> bytes:
    """Return the bytes that `write_concept` writes."""
    return write_tensors(concept.tensors, concept.metadata.write())
