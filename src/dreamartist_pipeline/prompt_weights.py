"""Weighted words, "a {cat:1.2} on {a {red} sofa:0.8}": their syntax, which schema and text encoder share.

The syntax is the reference toolkit's (HCP-Diffusion, `TokenizerHook.parse_attn_mult` and its guide on inference):
`{text:weight}`, a weight of 1.1 where none is given, and groups within groups multiply. The weight of a group is the
number after the last colon before its closing brace. Where the toolkit stops with an IndexError or a bare float error,
the message here says what is wrong.
"""

from __future__ import annotations

import math
import re

from dreamartist_pipeline.errors import InputError

DEFAULT_WEIGHT = 1.1  # of "{text}"

_BRACE = re.compile(r"([{}])")
_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*")


def parse_weights(prompt: str) -> list[tuple[str, float]]:
    """Return the prompt's text in order, in parts of one weight each, without the braces and numbers.

    >>> parse_weights("a {cat} in {the {city:2}:1.5}")
    [('a ', 1.0), ('cat', 1.1), (' in ', 1.0), ('the ', 1.5), ('city', 3.0)]

    Raises:
        InputError: a brace without its partner, or something other than a number after a group's last colon.
    """
    pieces = _BRACE.split(prompt)  # text at even indices, braces between
    weights = [1.0]  # of the groups that are open, read from the end: a group's weight stands there
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


def checked_weights(prompt: str) -> str:
    """Return the prompt as it is, once its braces have been read.

    Raises:
        InputError: see `parse_weights`.
    """
    parse_weights(prompt)
    return prompt


def _split_weight(text: str, prompt: str) -> tuple[str, float]:
    """Cut "cat:1.2", which stands before a closing brace, into its text and its weight."""
    before, colon, number = text.rpartition(":")
    if not colon:
        return text, DEFAULT_WEIGHT
    weight = float(number) if _NUMBER.fullmatch(number) else math.nan
    if not math.isfinite(weight):
        raise InputError(
            expected="a weight such as {cat:1.2} after the colon within braces",
            got=f"{number!r} in {prompt!r}",
            remedy="write a number, or take the braces away",
        )
    return before, weight


def _unbalanced(prompt: str, what: str) -> InputError:
    return InputError(
        expected="weighted words such as {cat:1.2} and slots in braces",
        got=f"{what} in {prompt!r}",
        remedy="close the braces, or take them away",
    )
