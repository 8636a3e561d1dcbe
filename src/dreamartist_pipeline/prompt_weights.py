"""The syntax of weighted words, "a {cat:1.2} on {a {red} sofa:0.8}".

It is the syntax of the reference toolkit (HCP-Diffusion, `TokenizerHook.parse_attn_mult` and its inference guide):
`{text:weight}` with a default weight of 1.1; weights of nested groups are multiplied. The weight is the number after
the last colon before the closing brace. Deviations: invalid input raises an InputError, weights are limited, and
`${text}` is plain text.
"""

from __future__ import annotations

import math
import re

from dreamartist_pipeline.errors import InputError

DEFAULT_WEIGHT = 1.1  # of "{text}"
MAX_WEIGHT = 1000.0  # beyond it, or below its negative, a text state is noise; float32 ends at 3e38
MAX_CHARACTERS = 20_000  # of a prompt; a text encoder reads a few hundred
_MAX_DEPTH = 50
_QUOTED = 200  # characters of a prompt in a message

_BRACE = re.compile(r"(\$\{[^{}]*\}|[{}])")  # or plain text with braces
_SURROGATE = re.compile("[\ud800-\udfff]")
_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*")


def parse_weights(prompt: str) -> list[tuple[str, float]]:
    """Split a prompt into (text, weight) parts, without braces and numbers.

    >>> parse_weights("a {cat} in {the {city:2}:1.5}")
    [('a ', 1.0), ('cat', 1.1), (' in ', 1.0), ('the ', 1.5), ('city', 3.0)]

    Raises:
        InputError: a brace is unbalanced, a weight is not a number or too large, groups are nested too deeply, or the
            prompt is too long or no valid Unicode.
    """
    _check_text(prompt)
    pieces = _BRACE.split(prompt)  # text at even indices, braces and ${text} between
    weights = [1.0]  # of the open groups; the prompt is parsed from its end, because a weight is at the end of a group
    parts: list[tuple[str, float]] = []
    for index in reversed(range(len(pieces))):
        match pieces[index]:
            case "}":
                pieces[index - 1], weight = _split_weight(pieces[index - 1], prompt)
                weights.append(_checked(weights[-1] * weight, len(weights), prompt))
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


def quoted(text: str) -> str:
    """Return a text for a message, in quotes, without characters that cannot be printed, and shortened."""
    return repr(text if len(text) <= _QUOTED else f"{text[:_QUOTED]}…")


def _check_text(prompt: str) -> None:
    """Check length and encoding.

    Raises:
        InputError: the prompt is too long, or has a lone surrogate, which stands for a byte that is not UTF-8.
    """
    if len(prompt) > MAX_CHARACTERS:
        raise InputError(
            expected=f"prompts of at most {MAX_CHARACTERS:,} characters",
            got=f"{len(prompt):,} in {quoted(prompt)}",
            remedy="shorten it",
        )
    if (surrogate := _SURROGATE.search(prompt)) is not None:
        raise InputError(
            expected="prompts in valid Unicode",
            got=f"{surrogate[0]!r} in {quoted(prompt)}",
            remedy="type the character again; in a file or a terminal, use UTF-8",
        )


def _checked(weight: float, depth: int, prompt: str) -> float:
    if depth > _MAX_DEPTH:
        raise InputError(
            expected=f"groups in at most {_MAX_DEPTH} pairs of braces", got=quoted(prompt), remedy="remove some"
        )
    if abs(weight) > MAX_WEIGHT:
        raise InputError(
            expected=f"weights of at most {MAX_WEIGHT:g}, those of nested groups multiplied",
            got=f"{weight:g} in {quoted(prompt)}",
            remedy="lower it; 1.5 is a strong weight",
        )
    return weight


def _split_weight(text: str, prompt: str) -> tuple[str, float]:
    """Split "cat:1.2" into text and weight."""
    before, colon, number = text.rpartition(":")
    if not colon:
        return text, DEFAULT_WEIGHT
    weight = float(number) if _NUMBER.fullmatch(number) else math.nan
    if not math.isfinite(weight):
        raise InputError(
            expected="a weight such as {cat:1.2} after the colon within braces",
            got=f"{quoted(number)} in {quoted(prompt)}",
            remedy="write a number, or remove the braces",
        )
    return before, weight


def _unbalanced(prompt: str, brace: str) -> InputError:
    return InputError(
        expected="weighted words such as {cat:1.2} and slots in braces",
        got=f"{brace} in {quoted(prompt)}",
        remedy="close the braces, or remove them",
    )
