"""The trained result of one subject: adapter pair, embedding pair, and the metadata needed to use them again."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

import torch

from dreamartist_pipeline.core.errors import InputError

FORMAT = "dreamartist-concept-1"
WORDS = "words"
_LORA = "lora_"
_FIRST_ENCODER = "text_encoder"


@dataclass(frozen=True)
class Concept:
    """A concept as it is stored: named tensors and flat text metadata.

    tensors: float32, contiguous, on the CPU, named `<network>.<layer>.<group>.<branch>.<down|up|bias>` for
        adapters (network such as `unet` or `text_encoder`, group its index in the configuration, branch `negative`,
        `positive` or `shared`; alpha and rank are in the metadata, not folded in) and `words.<branch>.<slot>` `[n, D]`
        for words; see `words_part` for those of further text encoders.
    metadata: text to text, JSON with sorted keys where a value is not a plain word. It holds neither times nor paths,
        so that the same training writes the same bytes.
    """

    tensors: dict[str, torch.Tensor] = field(repr=False)
    metadata: dict[str, str]

    def value(self, key: str) -> Any:
        """Return one JSON value of the metadata.

        Raises:
            InputError: the metadata lacks the key, so this is not a concept of this project.
        """
        if self.metadata.get("format") != FORMAT or key not in self.metadata:
            raise InputError(
                f"expected a concept file of format {FORMAT!r} with {key!r} in its metadata; "
                f"got format {self.metadata.get('format')!r} with {sorted(self.metadata)}; "
                "train the concept again, or convert the file first"
            )
        return json.loads(self.metadata[key])

    @property
    def networks(self) -> list[str]:
        """The networks of the base model that it was made for, adapted or not."""
        return [key.removeprefix(_LORA) for key in self.metadata if key.startswith(_LORA)]

    def word_vectors(self, key: str) -> dict[str, torch.Tensor]:
        """Return text encoder -> the vectors `[n, D]` of a word, "<branch>.<slot>"; empty without such a word."""
        pattern = re.compile(rf"{WORDS}(?:_(?P<encoder>[^.]+))?\.{re.escape(key)}")
        found = {pattern.fullmatch(name): tensor for name, tensor in self.tensors.items()}
        return {match["encoder"] or _FIRST_ENCODER: tensor for match, tensor in found.items() if match}

    def part(self, prefix: str) -> dict[str, torch.Tensor]:
        """Return the tensors under `prefix.`, named without it."""
        return {
            name.removeprefix(f"{prefix}."): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(f"{prefix}.")
        }


def words_part(encoder: str) -> str:
    """Return what the vectors for a text encoder begin with: `words`, or `words_text_encoder_2` for a second one."""
    return WORDS if encoder == _FIRST_ENCODER else f"{WORDS}_{encoder}"


def to_json(value: object) -> str:
    """Return `value` as compact JSON with sorted keys: the one spelling used in metadata."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
