"""Prompts."""

from __future__ import annotations

from pathlib import Path

from dreamartist_pipeline.prompt_weights import parse_weights
from fuzz.fuzzing import Target

_PROMPTS = (
    "a {fox:1.3} in the {snow:0.8}, {{bright} light}",
    "two my-fox, blue background, ${style}",
)


def _parse(file: Path) -> object:
    return parse_weights(file.read_bytes().decode(errors="surrogateescape"))


TARGETS = [
    Target(
        "prompt weights",
        samples=lambda: {f"{number}.txt": prompt.encode() for number, prompt in enumerate(_PROMPTS)},
        read=_parse,
    )
]
