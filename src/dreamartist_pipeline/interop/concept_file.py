"""The concept file of this project."""

from __future__ import annotations

from pathlib import Path

from dreamartist_pipeline.core.concept import Concept, ConceptMetadata
from dreamartist_pipeline.interop.safetensors_bytes import header_of, read_tensors, save_tensors


def read_concept(file: bytes, name: str) -> Concept:
    """Return the concept in a file.

    Args:
        file: its bytes.
        name: its name in an error.

    Raises:
        InputError: not a safetensors file, not a concept, or a damaged one.
    """
    metadata = ConceptMetadata.read(header_of(file, name).metadata, name)  # before the tensors
    concept = Concept(read_tensors(file, name), metadata)
    concept.check(name)
    return concept


def write_concept(concept: Concept, file: Path) -> None:
    """Write the file of a concept; equal concepts give equal bytes."""
    save_tensors(concept.tensors, concept.metadata.write(), file)
