"""YAML files as mappings, with bounds on length, depth and numbers that are checked before anything is built."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml
from omegaconf._yaml import get_yaml_loader

from dreamartist_pipeline.errors import InputError

MAX_CHARACTERS = 200_000  # of a file; the toolkit's, and those of conf/, have a few thousand
_MAX_DEPTH = 50
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where libyaml is there
_SHOWN = 60  # characters of a wrong value in an error
_VALUES = (str, int, float, type(None))  # besides lists and mappings


def parse_mapping(text: str, what: str) -> dict[str, Any]:
    """Return a YAML mapping; keys are texts, references and resolvers stay text.

    Args:
        text: of a file.
        what: the file is, in messages.

    Raises:
        InputError: it is none, or too long or nested too deeply, or has a text that is no valid Unicode.
    """
    if len(text) > MAX_CHARACTERS:
        raise InputError(
            expected=f"{what} of at most {MAX_CHARACTERS:,} characters",
            got=f"{len(text):,}",
            remedy="give another file, or shorten it",
        )
    try:
        check_events(text, what)
        values = yaml.load(text, Loader=get_yaml_loader())  # OmegaConf's own, as safe as PyYAML's SafeLoader
    except InputError:
        raise
    except (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError) as error:  # of `!!int x`
        raise InputError(
            expected=f"a YAML file as {what}", got=f"a syntax error: {error}", remedy="correct the file"
        ) from error
    if not isinstance(values, dict):
        raise InputError(
            expected=f"a YAML mapping as {what}",
            got="a list" if isinstance(values, list) else f"a single value, {text.strip()[:_SHOWN]!r}",
            remedy="give another file, or correct it",
        )
    mapping: dict[str, Any] = _with_text_keys(values, what)
    return mapping


def merge_mappings(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mapping over another; mappings in both are merged, all other values replaced."""
    both = {
        name: merge_mappings(base[name], value)
        if isinstance(value, dict) and isinstance(base.get(name), dict)
        else value
        for name, value in over.items()
    }
    return {**base, **both}


def too_deep(what: str) -> InputError:
    """Return the error for values, or what they refer to, that are nested too deeply."""
    return InputError(
        expected=f"{what}, nested at most {_MAX_DEPTH} deep",
        got="values, references or base files that are nested too deeply",
        remedy="correct it",
    )


def check_events(text: str, what: str) -> None:
    """Check nesting and single values by the parser's events, before anything is built.

    Args:
        text: in YAML.
        what: it is, in messages.

    Raises:
        InputError: values are nested too deeply, or a number is too long.
        YAMLError: a syntax error.
    """
    depth = 0
    for event in yaml.parse(text, Loader=_LOADER):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        value = event.value if isinstance(event, yaml.ScalarEvent) else ""
        if depth > _MAX_DEPTH or value.count("${") > _MAX_DEPTH:
            raise too_deep(what)
        if len(value) > _SHOWN and not re.search(r"[^\d:_.,+-]", value):
            raise InputError(
                expected=f"numbers in {what}", got=f"one of {len(value):,} digits", remedy="correct the file"
            )


def _with_text_keys(value: Any, what: str) -> Any:
    """Return nested values with all keys as text.

    Raises:
        InputError: a text is no valid Unicode, or a value of another kind than those of JSON.
    """
    if isinstance(value, dict):
        return {str(_with_text_keys(name, what)): _with_text_keys(item, what) for name, item in value.items()}
    if isinstance(value, list):
        return [_with_text_keys(item, what) for item in value]
    if not isinstance(value, _VALUES):
        raise InputError(
            expected=f"texts, numbers, lists and mappings in {what}",
            got=f"a {type(value).__name__}, {str(value)[:_SHOWN]!r}",
            remedy="correct the file",
        )
    if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
        raise InputError(expected="valid Unicode", got=f"{value[:_SHOWN]!r}", remedy="correct the file")
    return value
