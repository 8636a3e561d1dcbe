"""JSON from others, with bounds on its length and depth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import from_json

from dreamartist_pipeline.errors import InputError

MAX_BYTES = 16 * 2**20
"""The largest JSON text: a tokenizer.json of CLIP has 4 MB, the header of an SDXL checkpoint less than 1 MB."""


def parse_json(text: str | bytes, max_bytes: int = MAX_BYTES) -> Any:
    """Return the value of a JSON text; NaN and Infinity are read, as diffusers writes them.

    Raises:
        ValueError: no JSON, more than `max_bytes`, nested more than 200 deep, or a number of more than 4,300 digits.
    """
    if len(text) > max_bytes:
        raise ValueError(f"{len(text):,} bytes where at most {max_bytes:,} are read")
    return from_json(text)


def read_json_object(file: Path, expected: str, name: str, remedy: str) -> dict[str, Any]:
    """Return the object in a JSON file.

    Args:
        file: to read; at most `MAX_BYTES` of it.
        expected: in an error.
        name: of the file in an error.
        remedy: in an error.

    Raises:
        InputError: it cannot be read, see `parse_json`, or holds another value.
    """
    try:
        with file.open("rb") as stream:
            content = parse_json(stream.read(MAX_BYTES + 1))
    except (OSError, ValueError) as error:
        raise InputError(expected=expected, got=f"invalid JSON in {name}: {error}", remedy=remedy) from error
    if not isinstance(content, dict):
        raise InputError(expected=expected, got=f"a {type(content).__name__} as {name}", remedy=remedy)
    return content


def reasons(error: ValidationError, at_most: int = 3) -> str:
    """Return the places and reasons of the first errors of a typed reader."""
    errors = error.errors(include_url=False, include_input=False)[:at_most]
    return "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in errors)
