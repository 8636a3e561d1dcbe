"""A YAML file merged over its `_base_` files, read by dotted key with a record of which values are used.

References, `${key}`, are resolved. Resolvers, `${name:arguments}`, are never run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.interop.toolkit_config.unsupported import NO_EFFECT, REASONS_BY_PART, REASONS_BY_PREFIX

PRODUCT = re.compile(r"\d+(\s*[*,]\s*\d+)*")
_REFERENCE = re.compile(r"\$\{(?:[^{}:]|\$\{[^{}:]*\})*\}")  # ${a.b}, also ${a.${b}}
_RESOLVER = re.compile(r"\$\{[\w.]+:([^{}]*)\}")
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)")

ReadText = Callable[[str], str | None]  # path -> text of a file that a configuration names, None if it is not found


class ConfigReader:
    """Values of a configuration, with a record of which are used, left out and why, and which defaults are used.

    Args:
        config: the merged configuration.
        missing: `_base_ FILE` -> a remark, for base files that were not found.

    Attributes:
        values: dotted key -> value of everything that is not a mapping or list; unresolved values are None.
    """

    def __init__(self, config: Mapping[str, Any], missing: Mapping[str, str]) -> None:
        values = dict(_leaves(config))
        self._unresolved = {key: text for key, text in values.items() if text == "???" or "${" in str(text)}
        self.values = values | dict.fromkeys(self._unresolved)
        self._used = {
            key
            for key, value in values.items()
            if (key in NO_EFFECT and value == NO_EFFECT[key]) or key.endswith("._partial_")  # how a class is called
        }
        self._reasons: dict[str, str] = {}
        self._remarks = dict(missing)
        self._defaults: dict[str, str] = {}

    def read(self, key: str) -> Any:
        """Return a value, or None, and mark it as used; a number in quotes, '1e-4', is a number."""
        self.use([key])
        value = self.values.get(key)
        return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value

    def read_or(self, key: str, default: Any, source: str) -> Any:
        """Return a value; if there is none, return the default and record it with its source."""
        if (value := self.read(key)) is None:
            self.record_default(key, f"{default}, {source}")
            return default
        return value

    def read_set(self, names: Mapping[str, str]) -> dict[str, Any]:
        """Return name -> value of the keys that are set; `names` maps keys to names."""
        return {name: value for key, name in names.items() if (value := self.read(key)) is not None}

    def read_choice(self, key: str, choices: Mapping[str, str]) -> str | None:
        """Translate a name or the last part of a class path; return None, not marked as used, if it is unknown."""
        choice = choices.get(str(self.values.get(key)).rpartition(".")[2])
        if choice is not None:
            self.use([key])
        return choice

    def use(self, keys: Iterable[str]) -> None:
        """Mark values as carried over."""
        self._used.update(keys)

    def leave_out(self, keys: Collection[str], reason: str) -> None:
        """Mark values as not carried over, with a reason."""
        self._reasons |= dict.fromkeys(keys, reason)
        self._used.difference_update(keys)

    def record_default(self, key: str, remark: str) -> None:
        """Record the default for a missing value."""
        self._defaults[key] = remark

    def is_null(self, key: str) -> bool:
        """Return whether the value is an explicit null, as opposed to missing or unresolved."""
        return self.values.get(key, "") is None and key not in self._unresolved

    def children(self, prefix: str) -> list[str]:
        """Return the names directly under a key, or at the top for '', in the file's order."""
        start = f"{prefix}." if prefix else ""
        return list(dict.fromkeys(key[len(start) :].split(".")[0] for key in self.values if key.startswith(start)))

    def find(self, prefix: str, pattern: str) -> list[str]:
        """Return the keys under `prefix` that end in parts matching a regular expression."""
        below = re.compile(rf"{re.escape(prefix)}\.(.+\.)?({pattern})")
        return [key for key in self.values if below.fullmatch(key)]

    def left_out(self) -> dict[str, str]:
        """Return key -> what is not carried over and why, or which default is used."""
        unused = {k: v for k, v in self.values.items() if k not in self._used and v not in (None, "", [], {})}
        named = self._remarks | {key: f"{v!r}: {self._reason(key)}" for key, v in (unused | self._unresolved).items()}
        defaults = {
            key: f"{named[key]}; {remark}" if key in named else f"not given: {remark}"
            for key, remark in self._defaults.items()
        }
        return named | defaults

    def _reason(self, key: str) -> str:
        """Return the reason given, or the one for the longest known prefix or for a part of the key."""
        parts = key.split(".")
        prefixes = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
        reasons = [self._reasons.get(key), *map(REASONS_BY_PREFIX.get, prefixes), *map(REASONS_BY_PART.get, parts)]
        if text := self._unresolved.get(key):
            reasons.append("resolvers are not run" if _has_resolver(text) else "not defined in any file that was found")
        return next(filter(None, reasons), "not supported")


def read_config(text: str, read_text: ReadText) -> ConfigReader:
    """Load a configuration and its base files.

    Args:
        text: the YAML file.
        read_text: finds base files.

    Raises:
        InputError: not a YAML mapping, circular base files, or invalid references.
    """
    missing: dict[str, str] = {}
    try:
        config = _load(text, read_text, missing)
        _escape_dangling(config)
        values = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    except OmegaConfBaseException as error:
        raise InputError(expected="valid references", got=f"{error}", remedy="correct the file") from error
    return ConfigReader(values, missing)


def _load(text: str, read_text: ReadText, missing: dict[str, str], ancestors: tuple[str, ...] = ()) -> DictConfig:
    """Return a file merged over its base files; adds those not found to `missing`."""
    try:
        config = OmegaConf.create(text)
    except YAMLError as error:
        raise InputError(expected="a YAML file", got=f"a syntax error: {error}", remedy="correct it") from error
    if not isinstance(config, DictConfig):
        raise InputError(expected="a YAML mapping", got="something else", remedy="import a training configuration")
    config = OmegaConf.create(_without_resolvers(OmegaConf.to_container(config, resolve=False)))
    bases = config.pop("_base_", None) or []
    merged = OmegaConf.create()
    for base in [bases] if isinstance(bases, str) else bases:
        if base in ancestors:
            raise InputError(expected="base files without a cycle", got=f"{base!r} again", remedy="correct _base_")
        if (base_text := read_text(base)) is None:
            missing[f"_base_ {base}"] = "the file was not found; its values are not carried over"
        else:
            merged = cast(DictConfig, OmegaConf.merge(merged, _load(base_text, read_text, missing, (*ancestors, base))))
    return cast(DictConfig, OmegaConf.merge(merged, config))


def _without_resolvers(value: Any) -> Any:
    """Escape texts with resolvers, which are not run; replace a resolver of a product by the product."""
    if isinstance(value, dict):
        return {name: _without_resolvers(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_resolvers(item) for item in value]
    if not isinstance(value, str) or not _has_resolver(value):
        return value
    arguments = _RESOLVER.sub(r"\1", value)
    return arguments if PRODUCT.fullmatch(arguments) else _escaped(value)


def _has_resolver(text: str) -> bool:
    return "${" in _REFERENCE.sub("", text)


def _escaped(text: str) -> str:
    """Return a text that OmegaConf takes literally: an odd number of backslashes precedes every `${`."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def _escape_dangling(node: DictConfig | ListConfig) -> None:
    """Escape references without a target, in place."""
    for name in list(node) if isinstance(node, DictConfig) else range(len(node)):
        try:
            value = node[name]
        except (InterpolationResolutionError, MissingMandatoryValue):
            value = node[name] = _escaped(OmegaConf.to_container(node, resolve=False)[name])  # type: ignore[index]
        if isinstance(value, DictConfig | ListConfig) and not OmegaConf.is_interpolation(node, name):
            _escape_dangling(value)


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of everything that is not a mapping or list; empty ones count as values."""
    if isinstance(value, Mapping | Sequence) and not isinstance(value, str) and value:
        for name, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _leaves(item, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, value
