"""References of a configuration, `${key}`, resolved without OmegaConf, so that no resolver can run.

The syntax is OmegaConf's: `${train.lr}`, `${.lr}` and `${..lr}` relative to the mapping, `${list[0]}`, `${a.${b}}`. All
else stays text: `${name:arguments}`, and a reference without a target or to itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from dreamartist_pipeline.errors import InputError

PRODUCT = re.compile(r"\d{1,6}(\s*[*,]\s*\d{1,6}){0,3}")
MAX_VALUES = 10_000  # OmegaConf's own limit for YAML aliases
_MAX_TEXT = 10_000  # characters of a text with its references
_INNERMOST = re.compile(r"(?<!\\)\$\{\s*(?P<dots>\.*)(?P<key>[^{}:$\\\s.][^{}:$\\]*?)\s*\}")
_RESOLVER = re.compile(r"\$\{[\w.]+:([^{}]*)\}")
_PART = re.compile(r"[^.\[\]]+")

_Keys = tuple[str | int, ...]


def has_resolver(text: str) -> bool:
    """Return whether something is left of a text's `${…}` without its references."""
    fewer = _INNERMOST.sub("", text)
    while fewer != text:
        text, fewer = fewer, _INNERMOST.sub("", fewer)
    return "${" in text


def resolved(config: Mapping[str, Any], max_values: int = MAX_VALUES) -> dict[str, Any]:
    """Return a configuration with its references replaced by their values.

    Mappings and lists that are referred to several times are shared, not copied.

    Args:
        config: as parsed.
        max_values: with every reference written out.

    Raises:
        InputError: references multiply the values, or the length of a text.
        RecursionError: a chain of references that is too long.
    """
    values: dict[str, Any] = _References(config).tree(config, ())
    _check_size(values, max_values)
    return values


class _References:
    """The values of one configuration, resolved on request."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        self._known: dict[_Keys, Any] = {}
        self._open: set[_Keys] = set()  # being resolved: a reference to one of them is a circle

    def tree(self, node: Any, keys: _Keys) -> Any:
        """Return the value at `keys`, whose form in the file is `node`.

        Raises:
            KeyError: it is being resolved.
        """
        if not isinstance(node, dict | list | str):
            return node
        if keys not in self._known:
            if keys in self._open:
                raise KeyError(keys)
            self._open.add(keys)
            try:
                self._known[keys] = self._resolved(node, keys)
            finally:
                self._open.discard(keys)
        return self._known[keys]

    def _resolved(self, node: dict[str, Any] | list[Any] | str, keys: _Keys) -> Any:
        if isinstance(node, dict):
            return {name: self.tree(value, (*keys, name)) for name, value in node.items()}
        if isinstance(node, list):
            return [self.tree(value, (*keys, index)) for index, value in enumerate(node)]
        return self._text(node, keys)

    def _text(self, text: str, keys: _Keys) -> Any:
        """Return a text with its references replaced; a text that is one reference becomes its value."""
        product = _RESOLVER.sub(r"\1", text)
        if product != text and PRODUCT.fullmatch(product):
            return product
        replaced = text
        while match := _INNERMOST.search(replaced):
            try:
                value = self._target(match, keys)
            except (KeyError, IndexError, ValueError):
                return text
            if match[0] == replaced:
                return value
            if isinstance(value, dict | list) or "${" in str(value):
                return text
            replaced = f"{replaced[: match.start()]}{value}{replaced[match.end() :]}"
            if len(replaced) > _MAX_TEXT:
                raise _multiplied(f"texts of at most {_MAX_TEXT} characters", f"more at {_dotted(keys)}")
        return text if "${" in replaced else replaced

    def _target(self, match: re.Match[str], keys: _Keys) -> Any:
        """Return the value of one reference in the text at `keys`.

        Raises:
            KeyError, IndexError, ValueError: there is none.
        """
        dots = len(match["dots"])
        start = keys[: len(keys) - dots] if dots else ()
        return self._at((*start, *_PART.findall(match["key"])))

    def _at(self, keys: _Keys) -> Any:
        """Return the value at a path, through references on the way."""
        node: Any = self._config
        for depth, key in enumerate(keys):
            node = self.tree(node, keys[:depth]) if isinstance(node, str) else node
            if isinstance(node, Mapping):
                node = node[key]
            elif isinstance(node, list):
                node = node[int(key)]
            else:
                raise KeyError(key)
        if node == "???":  # OmegaConf's mark of a missing value
            raise KeyError(keys)
        return self.tree(node, keys)


def _check_size(values: Mapping[str, Any], max_values: int) -> None:
    """Check that references do not multiply the values, as lists of references to lists of references do.

    Raises:
        InputError: there are more than `max_values`.
    """
    sizes: dict[int, int] = {}

    def size(node: Any) -> int:
        if not isinstance(node, Mapping | Sequence) or isinstance(node, str):
            return 1
        if id(node) not in sizes:
            sizes[id(node)] = 1 + sum(map(size, node.values() if isinstance(node, Mapping) else node))
        return sizes[id(node)]

    if (total := size(values)) > max_values:
        got = f"{total}" if total < 10 * max_values else f"more than {10 * max_values}"
        raise _multiplied(f"at most {max_values} values, with every reference written out", got)


def _multiplied(expected: str, got: str) -> InputError:
    return InputError(expected=expected, got=got, remedy="correct the file")


def _dotted(keys: _Keys) -> str:
    return ".".join(map(str, keys))
