"""This project's own concept file, as bytes."""

from __future__ import annotations

from dreamartist_pipeline.core.concept import FORMAT, Concept
from dreamartist_pipeline.core.errors import InputError
from dreamartist_pipeline.interop.safetensors_bytes import read_metadata, read_tensors


def read_concept(file: bytes, name: str) -> Concept:
    """Return the concept that a file holds.

    Args:
        file: its bytes.
        name: what to call it in an error.

    Raises:
        InputError: not a safetensors file, one of another tool, or one without the metadata of a concept.
    """
    tensors, metadata = read_tensors(file, name), read_metadata(file)
    if metadata.get("format") != FORMAT:
        raise InputError(
            f"expected a concept of this project in {name}; got a safetensors file of another kind; make a concept of "
            "it first (kedro run --pipeline import), and name that one"
        )
    concept = Concept(tensors, metadata)
    concept.value("num_branches")  # is it a whole one
    return concept
