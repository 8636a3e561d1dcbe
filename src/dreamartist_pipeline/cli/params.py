"""The value of `--params`: parameters of one run, separated by commas."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import yaml
from kedro.utils import find_kedro_project
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dreamartist_pipeline.hooks.configuration import as_list, nearest, yaml_list
from dreamartist_pipeline.hooks.run import literal, plain, with_paths_in
from dreamartist_pipeline.params import PROMPT_KEYS, RUN_SETTINGS, SECTIONS, is_prompt_text, takes_several
from dreamartist_pipeline.yaml_texts import check_events

_NEXT_PARAMETER = re.compile(r",(?=\s*[\w.\-]+\s*=)")
_TEXT_KEYS = (*PROMPT_KEYS, "caption", "class_word")  # texts in which a user may write `, name=`
_MAX_SHOWN = 300  # characters of a value in a message
_CLOSING = {"[": "]", "{": "}", "'": "'", '"': '"'}


def parse_params(ctx: click.Context, param: click.Parameter, value: str | dict[str, Any]) -> dict[str, Any]:
    """Parse `key=value,key=value`; a comma starts a new parameter only if a `key=` follows it.

    Kedro splits at every comma, also in prompts ("a red fox, blue background") and lists. Run settings and prompts are
    text: `subject=007` is not the number 7, "{cat:1.2} asleep" is no error of YAML, and `${` does not refer to another
    value. A quoted text may contain `, key=`. Lists and all other values are YAML. `device=cpu` is short for
    `device.device=cpu`. Relative paths are those of the working directory.
    """
    try:
        values = value if isinstance(value, dict) else _nested(_items(value), value)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, param) from error
    if isinstance(values.get("device"), str):
        values = values | {"device": {"device": values["device"]}}
    project: Path | None = find_kedro_project(Path.cwd())
    return values if project is None or project == Path.cwd() else with_paths_in(values, Path.cwd(), project)


def with_params(text: str, params: str) -> str:
    """Return a value of `--params` with further parameters, which replace those of the same name.

    Args:
        text: as given to `--params`.
        params: `key=value,key=value`.
    """
    added = _split(params)
    names = [_name(item) for item in added]
    kept = [item for item in _split(text) if not any(f"{name}.".startswith(f"{_name(item)}.") for name in names)]
    return ",".join([*(item.strip() for item in kept), *added])


def sets_any_of(text: str, section: str) -> bool:
    """Return whether a value of `--params` has a parameter of a section."""
    return any(f"{_name(item)}.".startswith(f"{section}.") for item in _split(text))


def sets_all_of(text: str, section: str) -> bool:
    """Return whether a value of `--params` has a whole section, as `section={…}`."""
    return any(_name(item) == section for item in _split(text))


def _items(text: str) -> Iterator[tuple[str, Any]]:
    """Yield each parameter's name and value.

    Raises:
        ValueError: an item that is no `key=value`, an unknown name inside a text, or a value that is not YAML.
    """
    items = _split(text)
    for index, item in enumerate(items):
        name, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            raise ValueError(f"expected key=value; got '{name}'; separate several by commas")
        if index and not _is_known(name) and _last(items[index - 1]) in _TEXT_KEYS:
            raise _inside_text(name, items, index)
        yield _name(item), _value(name, value)


def _name(item: str) -> str:
    """Return the name in `name=value`; that of `device=cpu` is `device.device`."""
    name, _, value = (part.strip() for part in item.partition("="))
    return "device.device" if name == "device" and not value.startswith("{") else name


def _last(item: str) -> str:
    return _name(item).rpartition(".")[2]


def _is_known(name: str) -> bool:
    return name.partition(".")[0] in (*RUN_SETTINGS, *SECTIONS)


def _inside_text(name: str, items: Sequence[str], index: int) -> ValueError:
    """Return an error for `, name=` after a text, with all parameters and the text in quotes.

    Args:
        name: unknown as a parameter.
        items: of the whole value.
        index: of the item with this name; the one before it is the text.
    """
    end = next((n for n in range(index, len(items)) if _is_known(_name(items[n]))), len(items))
    key, _, value = (part.strip() for part in ",".join(items[index - 1 : end]).partition("="))
    quoted = value if key in RUN_SETTINGS else value.replace("'", "''")  # of YAML
    meant = ",".join([*(item.strip() for item in items[: index - 1]), f"{key}='{quoted}'", *items[end:]])
    near = nearest(name.partition(".")[0], (*RUN_SETTINGS, *SECTIONS), otherwise="")
    return ValueError(
        f"expected a parameter before '='; got '{name}' after a comma; a text with a comma and '=' is written in quotes"
        f': --params "{meant}"' + (f"; for a parameter: {near}" if near else "")
    )


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


def _value(name: str, text: str) -> Any:
    """Parse the value of one parameter.

    Raises:
        ValueError: a list or another value that is not YAML, the message has the form that is; or one that is nested
            too deeply.
    """
    is_setting, is_prompt = name in RUN_SETTINGS, name.rpartition(".")[2] in PROMPT_KEYS
    if text == "null":
        return None
    if is_setting:
        return literal(_home(_unquoted(text)))
    if is_prompt_text(name, text):
        return literal(text)
    try:
        check_events(text, f"the value of {name}")
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[index, call-overload]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        text = text[:_MAX_SHOWN]
        raise ValueError(
            f"expected a value or a list in YAML for {name}; got '{text}'; quote texts with commas, colons or braces, "
            f'and the whole value of --params: --params "{name}={as_list(text)}"'
        ) from error
    return literal(value) if is_prompt else value


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] in "'\"" and text[-1] == text[0] else text


def _home(text: str) -> str:
    """Expand a leading `~`, which the shell does not expand inside `image=~/cat.jpg`."""
    return str(Path(text).expanduser()) if text.startswith("~/") else text


def _nested(items: Iterable[tuple[str, Any]], text: str) -> dict[str, Any]:
    """Return dotted names as nested mappings; `text` is the whole value of `--params`.

    Raises:
        ValueError: a name that is given twice, or with and without a further part.
    """
    values: dict[str, Any] = {}
    items = list(items)
    for name, value in items:
        *sections, key = name.split(".")
        target = _descend(values, sections)
        if target is None or key in target:
            raise _given_twice(name, [given for other, given in items if other == name], text)
        target[key] = value
    return values


def _given_twice(name: str, values: Sequence[Any], text: str) -> ValueError:
    remedy = "leave one out"
    if takes_several(name) and len(values) > 1:
        texts = [plain(one) for value in values for one in (value if isinstance(value, list) else [value])]
        remedy = f'give several as a list: --params "{with_params(text, f"{name}={yaml_list(texts)}")}"'
    return ValueError(f"expected every parameter once; got {name} twice; {remedy}")


def _descend(values: dict[str, Any], sections: Sequence[str]) -> dict[str, Any] | None:
    """Return the mapping at a path, made where it is missing; None if the path goes through another value."""
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            return None
        values = inner
    return values
