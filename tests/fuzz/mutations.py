"""Seeded mutations of files and of the values inside them: the same seed gives the same bytes."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable
from typing import Any

_INTEGERS = (0, 1, -1, 2, 7, 127, 128, 255, 256, 32767, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1)
_TEXT_TOKENS = (
    *("", " ", "\n", "\t", "\r\n", "\x00", "\ufeff", "\u2011", "\u202e", "e\u0301", "狐", "🦊", "\\", "/", "../", "~"),
    *("null", "true", ".nan", ".inf", "-1", "1e309", "9e307", "2147483648", "0x7f", "1_000", "2001-01-01"),
    *("{", "}", "[", "]", "(", ")", "${", "${foo}", "${env:HOME}", "${oc.env:HOME}", "{a:1.2}", "{a:9e307}", ":", ","),
    *("!!python/object/apply:os.system [id]", "&a [*a]", "*a", "<<: *a", "- ", "? ", "|", ">", "%", "#", "'", '"'),
    *('"9"*4000*4000', "re:(([a-z_0-9.]+)+)+!", "re:", "re:(", ".*", "(?=a)", "{1000000}", "%s%n"),
)
_VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2**31,
        2**63,
        -(2**63),
        10**30,
        0.0,
        -0.0,
        1e-308,
        9e307,
        float("nan"),
        float("inf"),
    ),
    *("", " ", "nan", "1e9", "-1", "\ud800", "\x00", "a" * 5000, "../../etc/passwd", "${oc.env:HOME}", "re:(a+)+!"),
    *([], {}, [[]], [None], [{}], {"": None}, {"a": {"a": {}}}),
)
_SURROGATES = (b"\xed\xa0\x80", b"\xed\xbf\xbf", b"\xff", b"\xe9", b"\xc0\x80", b"\xf4\x90\x80\x80", b"\xef\xbb\xbf")
_MAX_BYTES = 4_000_000  # a mutated input is no longer, so that repetition does not multiply

_Change = Callable[[bytes, random.Random], bytes]


def mutated(data: bytes, seed: int) -> bytes:
    """Return a damaged copy of a file: one to eight changes of bytes; for text, also of tokens, nesting and values."""
    generator = random.Random(seed)
    changes = _BYTE_CHANGES + (_TEXT_CHANGES * 2 if _is_text(data) else ())
    for _ in range(generator.choice((1, 1, 1, 2, 3, 8))):
        data = generator.choice(changes)(data, generator)[:_MAX_BYTES]
    return data


def mutated_tree(tree: Any, seed: int) -> Any:
    """Return a copy of nested lists and mappings in which one to three values or keys are replaced, moved or removed.

    A mapping may get keys that are no text.
    """
    generator = random.Random(seed)
    tree = copy.deepcopy(tree)
    for _ in range(generator.choice((1, 1, 2, 3))):
        tree = _changed_tree(tree, generator)
    return tree


# -------------------------------------------------------------------------------------------------------- bytes


def _span(data: bytes, generator: random.Random) -> tuple[int, int]:
    """Return the start and end of a random part, mostly a short one."""
    start = generator.randrange(len(data) + 1)
    longest = generator.choice((1, 4, 16, 64, 512, len(data)))
    return start, min(len(data), start + generator.randint(0, longest))


def _flip_bits(data: bytes, generator: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(generator.choice((1, 1, 2, 16)) if data else 0):
        changed[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    return bytes(changed)


def _replace_bytes(data: bytes, generator: random.Random) -> bytes:
    start, end = _span(data, generator)
    return data[:start] + generator.randbytes(end - start) + data[end:]


def _truncate(data: bytes, generator: random.Random) -> bytes:
    return data[: generator.randrange(len(data) + 1)]


def _remove(data: bytes, generator: random.Random) -> bytes:
    start, end = _span(data, generator)
    return data[:start] + data[end:]


def _repeat(data: bytes, generator: random.Random) -> bytes:
    start, end = _span(data, generator)
    return data[:start] + data[start:end] * generator.choice((2, 2, 3, 100)) + data[end:]


def _splice(data: bytes, generator: random.Random) -> bytes:
    """Copy one part over another place."""
    start, end = _span(data, generator)
    place = generator.randrange(len(data) + 1)
    return data[:place] + data[start:end] + data[place + generator.choice((0, end - start)) :]


def _write_integer(data: bytes, generator: random.Random) -> bytes:
    """Overwrite a few bytes by an integer that is a limit of some format: lengths, offsets, counts."""
    width = generator.choice((1, 2, 4, 8))
    value = generator.choice(_INTEGERS) % (1 << 8 * width)
    start = generator.randrange(min(len(data), generator.choice((64, 1024, len(data) + 1))) + 1)
    return data[:start] + value.to_bytes(width, generator.choice(("little", "big"))) + data[start + width :]


_BYTE_CHANGES: tuple[_Change, ...] = (
    _flip_bits,
    _replace_bytes,
    _truncate,
    _remove,
    _repeat,
    _splice,
    _write_integer,
)

# --------------------------------------------------------------------------------------------------------- text


def _is_text(data: bytes) -> bool:
    try:
        return "\x00" not in data[:4096].decode(errors="strict")
    except UnicodeDecodeError:
        return False


def _insert_token(data: bytes, generator: random.Random) -> bytes:
    start, end = _span(data, generator)
    return data[:start] + generator.choice(_TEXT_TOKENS).encode() + data[generator.choice((start, end)) :]


def _replace_word(data: bytes, generator: random.Random) -> bytes:
    """Replace one word or number, in all places or in one, by another of the file or by a token."""
    words = sorted(set(re.findall(rb"[\w.+-]+", data)))
    if not words:
        return _insert_token(data, generator)
    other = generator.choice((generator.choice(words), generator.choice(_TEXT_TOKENS).encode()))
    return data.replace(generator.choice(words), other, generator.choice((1, -1)))


def _nest(data: bytes, generator: random.Random) -> bytes:
    start, end = _span(data, generator)
    opening, closing = generator.choice(((b"[", b"]"), (b"{", b"}"), (b"{a: ", b"}"), (b"(", b")"), (b"${", b"}")))
    depth = generator.choice((1, 2, 30, 1000, 5000))
    return data[:start] + opening * depth + data[start:end] + closing * generator.choice((depth, 0, 1)) + data[end:]


def _no_utf8(data: bytes, generator: random.Random) -> bytes:
    start = generator.randrange(len(data) + 1)
    return data[:start] + generator.choice(_SURROGATES) + data[start:]


def _move_line(data: bytes, generator: random.Random) -> bytes:
    lines = data.split(b"\n")
    line = lines.pop(generator.randrange(len(lines)))
    lines.insert(generator.randrange(len(lines) + 1), generator.choice((line, b"  " + line, line.lstrip())))
    return b"\n".join(lines)


def _change_json(data: bytes, generator: random.Random) -> bytes:
    """Change the values of a JSON file; another text gets a token."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return _insert_token(data, generator)
    return json.dumps(mutated_tree(tree, generator.getrandbits(32)), skipkeys=True).encode()


_TEXT_CHANGES: tuple[_Change, ...] = (_insert_token, _replace_word, _nest, _no_utf8, _move_line, _change_json)

# -------------------------------------------------------------------------------------------------------- values


def _changed_tree(tree: Any, generator: random.Random) -> Any:
    places = list(_places(tree))
    if not places:
        return copy.deepcopy(generator.choice(_VALUES))
    parent, key = generator.choice(places)
    change = generator.randrange(6)
    if change == 0:
        del parent[key]
    elif change == 1 and isinstance(parent, dict):
        parent[generator.choice((None, 1, True, "", "a", "\ud800", f"{key}x", 2.5))] = parent.pop(key)
    elif change == 2:
        other_parent, other_key = generator.choice(places)
        parent[key] = copy.deepcopy(other_parent[other_key])
    elif change == 3:
        for _ in range(generator.choice((1, 2, 200))):
            parent[key] = generator.choice(([parent[key]], {"a": parent[key]}))
    else:
        parent[key] = copy.deepcopy(generator.choice(_VALUES))
    return tree


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Return (parent, key) of all values of nested lists and mappings."""
    found: list[tuple[Any, Any]] = []
    waiting = [tree]
    while waiting:
        parent = waiting.pop()
        keys = list(parent) if isinstance(parent, dict) else range(len(parent)) if isinstance(parent, list) else ()
        found += [(parent, key) for key in keys]
        waiting += [parent[key] for key in keys]
    return found
