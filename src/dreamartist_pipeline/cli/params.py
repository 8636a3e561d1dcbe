"""The value of `--params`: parameters of one run, separated by commas."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import yaml
from kedro.utils import find_kedro_project
from omegaconf import OmegaConf

from dreamartist_pipeline.hooks.configuration import as_list
from dreamartist_pipeline.hooks.run import RUN_SETTINGS, with_paths_in
from dreamartist_pipeline.params import SECTIONS

_NEXT_PARAMETER = re.compile(r",(?=\s*[\w.\-]+\s*=)")
_PROMPT_KEYS = ("prompt", "prompts", "prior_prompts", "negative_prompt", "templates")
_CLOSING = {"[": "]", "{": "}", "'": "'", '"': '"'}
_INTERPOLATION = re.compile(r"(?<!\\)\$\{")


def parse_params(ctx: click.Context, param: click.Parameter, value: str | dict[str, Any]) -> dict[str, Any]:
    """Parse `key=value,key=value`; a comma starts a new parameter only if a `key=` follows it.

    Kedro splits at every comma, also in prompts ("a red fox, blue background") and lists. Run settings and prompts are
    text: `subject=007` is not the number 7, "{cat:1.2} asleep" is no error of YAML, and `${` does not refer to another
    value. A quoted text may contain `, key=`. Lists and all other values are YAML. `device=cpu` is short for
    `device.device=cpu`. Relative paths are those of the working directory.
    """
    try:
        values = value if isinstance(value, dict) else _nested(_items(value))
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, param) from error
    if isinstance(values.get("device"), str):
        values = values | {"device": {"device": values["device"]}}
    project: Path | None = find_kedro_project(Path.cwd())
    return values if project is None or project == Path.cwd() else with_paths_in(values, Path.cwd(), project)


def _items(text: str) -> Iterator[tuple[str, Any]]:
    """Yield each parameter's name and value.

    Raises:
        ValueError: an item that is no `key=value`, an unknown name inside a text, or a value that is not YAML.
    """
    previous = ""
    for item in _split(text):
        name, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            raise ValueError(f"expected key=value; got '{name}'; separate several by commas")
        if previous and not _is_known(name):
            raise ValueError(
                f"expected a parameter before '='; got '{name}' after a comma; quote a text with a comma and '=': "
                f"{previous.partition('=')[0].strip()}='{previous.partition('=')[2].strip()}, {item.strip()}'"
            )
        previous = item
        yield ("device.device" if name == "device" and not value.startswith("{") else name), _value(name, value)


def _split(text: str) -> list[str]:
    """Split at the commas before a `key=`, but not inside quotes or brackets around a whole value."""
    parts, items = [part for part in _NEXT_PARAMETER.split(text) if part.strip()], []
    while parts:
        length = next((n for n in range(1, len(parts) + 1) if _is_closed(",".join(parts[:n]))), 1)
        items.append(",".join(parts[:length]))
        del parts[:length]
    return items


def _is_closed(item: str) -> bool:
    value = item.partition("=")[2].strip()
    return not value or value[0] not in _CLOSING or (len(value) > 1 and value[-1] == _CLOSING[value[0]])


def _is_known(name: str) -> bool:
    """Return whether a name is a parameter, or like one; a misspelt one is reported with the nearest name."""
    known, first = (*RUN_SETTINGS, *SECTIONS), name.partition(".")[0]
    return first in known or bool(difflib.get_close_matches(first, known, n=1))


def _value(name: str, text: str) -> Any:
    """Parse the value of one parameter.

    Raises:
        ValueError: a list or another value that is not YAML; the message has the form that is.
    """
    is_setting, is_prompt = name in RUN_SETTINGS, name.rpartition(".")[2] in _PROMPT_KEYS
    if text == "null":
        return None
    if is_setting:
        return _literal(_home(_unquoted(text)))
    if is_prompt and not text.startswith(("[", "'", '"')):
        return _literal(text)
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[index, call-overload]
    except yaml.YAMLError as error:
        raise ValueError(
            f"expected a value or a list in YAML for {name}, such as {name}={as_list(text)}; got '{text}'; "
            "quote texts with commas, colons or braces"
        ) from error
    return _literal(value) if is_prompt else value


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] in "'\"" and text[-1] == text[0] else text


def _home(text: str) -> str:
    """Expand a leading `~`, which the shell does not expand inside `image=~/cat.jpg`."""
    return str(Path(text).expanduser()) if text.startswith("~/") else text


def _literal(value: Any) -> Any:
    """Escape `${` in texts, which OmegaConf would replace by another value of the configuration."""
    if isinstance(value, str):
        return _INTERPOLATION.sub(r"\\${", value)
    return [_literal(item) for item in value] if isinstance(value, list) else value


def _nested(items: Iterator[tuple[str, Any]]) -> dict[str, Any]:
    """Return dotted names as nested mappings.

    Raises:
        ValueError: a name that is given twice, or with and without a further part.
    """
    values: dict[str, Any] = {}
    for name, value in items:
        *sections, key = name.split(".")
        target = _descend(values, sections)
        if target is None or key in target:
            raise ValueError(f"expected every parameter once; got {name} twice; leave one out")
        target[key] = value
    return values


def _descend(values: dict[str, Any], sections: Sequence[str]) -> dict[str, Any] | None:
    """Return the mapping at a path, made where it is missing; None if the path goes through another value."""
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            return None
        values = inner
    return values
