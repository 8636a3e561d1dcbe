"""The syntax of weighted words, "a {cat:1.2} on {a {red} sofa:0.8}".

It is the syntax of the reference toolkit (HCP-Diffusion, `TokenizerHook.parse_attn_mult` and its inference guide):
`{text:weight}` with a default weight of 1.1; weights of nested groups are multiplied. The weight is the number after
the last colon before the closing brace. Deviations: invalid input raises an InputError, and `${text}` is plain text.
"""

from __future__ import annotations

import math
import re

from dreamartist_pipeline.errors import InputError

DEFAULT_WEIGHT = 1.1  # of "{text}"

_BRACE = re.compile(r"(\$\{[^{}]*\}|[{}])")  # or plain text with braces
_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*")


def parse_weights(prompt: str) -> list[tuple[str, float]]:
    """Split a prompt into (text, weight) parts, without braces and numbers.

    >>> parse_weights("a {cat} in {the {city:2}:1.5}")
    [('a ', 1.0), ('cat', 1.1), (' in ', 1.0), ('the ', 1.5), ('city', 3.0)]

    Raises:
        InputError: a brace is unbalanced, or a weight is not a number.
    """
    pieces = _BRACE.split(prompt)  # text at even indices, braces and ${text} between
    weights = [1.0]  # of the open groups; the prompt is parsed from its end, because a weight is at the end of a group
    parts: list[tuple[str, float]] = []
    for index in reversed(range(len(pieces))):
        match pieces[index]:
            case "}":
                pieces[index - 1], weight = _split_weight(pieces[index - 1], prompt)
                weights.append(weights[-1] * weight)
            case "{":
                if len(weights) == 1:
                    raise _unbalanced(prompt, "'{' without '}'")
                weights.pop()
            case "":
                pass
            case text:
                parts.append((text, weights[-1]))
    if len(weights) > 1:
        raise _unbalanced(prompt, "'}' without '{'")
    return parts[::-1]


def _split_weight(text: str, prompt: str) -> tuple[str, float]:
    """Split "cat:1.2" into text and weight."""
    before, colon, number = text.rpartition(":")
    if not colon:
        return text, DEFAULT_WEIGHT
    weight = float(number) if _NUMBER.fullmatch(number) else math.nan
    if not math.isfinite(weight):
        raise InputError(
            expected="a weight such as {cat:1.2} after the colon within braces",
            got=f"{number!r} in {prompt!r}",
            remedy="write a number, or remove the braces",
        )
    return before, weight


def _unbalanced(prompt: str, brace: str) -> InputError:
    return InputError(
        expected="weighted words such as {cat:1.2} and slots in braces",
        got=f"{brace} in {prompt!r}",
        remedy="close the braces, or remove them",
    )
