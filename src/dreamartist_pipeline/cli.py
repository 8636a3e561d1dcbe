"""The project's commands.

`kedro run`, extended by values with commas and by short error messages; and `kedro import-config`, which converts the
reference toolkit's configurations.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import click
from kedro.framework.cli.project import run as kedro_run
from kedro.io import DatasetError
from kedro.validation.exceptions import ParameterValidationError
from omegaconf import OmegaConf
from yaml import YAMLError

from dreamartist_pipeline.errors import InputError, TrainingError
from dreamartist_pipeline.hooks import RUN_SETTINGS, close_interrupted_run, input_error_in

_NEXT_PARAMETER = re.compile(r",(?=\s*[\w.\-]+\s*=)")
_RESERVED_ENVIRONMENTS = ("base", "local", "test", "sd15")
_PROMPT_KEYS = ("prompt", "prompts", "prior_prompts", "negative_prompt", "templates")
_READABLE = (InputError, TrainingError, ParameterValidationError, DatasetError)


def parse_params(ctx: click.Context, param: click.Parameter, value: str | dict[str, Any]) -> dict[str, Any]:
    """Parse `key=value,key=value`; a comma starts a new parameter only if a `key=` follows it.

    Kedro splits at every comma, also in prompts ("a red fox, blue background") and lists. Run settings are text:
    `subject=007` is not the number 7. So are prompts: in YAML, "{cat:1.2} asleep" is an error, and "a {cat: 1.2}" a
    mapping. Lists and quoted texts are YAML.
    """
    if isinstance(value, dict):
        return value
    items = [
        tuple(part.strip() for part in item.partition("=")) for item in _NEXT_PARAMETER.split(value) if item.strip()
    ]
    names = [name for name, _, _ in items]
    texts: dict[str, Any] = {}
    others: list[str] = []
    for name, equals, text in items:
        if not equals:
            raise click.BadParameter(f"expected key=value; got '{name}'; separate several by commas", ctx, param)
        if names.count(name) > 1:
            raise click.BadParameter(f"expected every parameter once; got {name} twice; leave one out", ctx, param)
        if name in RUN_SETTINGS and text != "null":
            texts[name] = _home(text)
        elif name.rpartition(".")[2] in _PROMPT_KEYS and not text.startswith(("[", "'", '"')) and text != "null":
            others.append(f"{name}={json.dumps(text, ensure_ascii=False)}")
        else:
            others.append(f"{name}={text}")
            _check_yaml(name, text, ctx, param)
    return texts | cast(dict[str, Any], OmegaConf.to_container(OmegaConf.from_dotlist(others)))


def _check_yaml(name: str, text: str, ctx: click.Context, param: click.Parameter) -> None:
    try:
        OmegaConf.from_dotlist([f"{name}={text}"])
    except YAMLError as error:
        raise click.BadParameter(
            f"expected a value or a list in YAML for {name}, such as {name}=['a cat, asleep', 'a dog']; got '{text}'; "
            "quote texts with commas, colons or braces",
            ctx,
            param,
        ) from error


def _home(text: str) -> str:
    """Expand a leading `~`, which the shell does not expand inside `image=~/cat.jpg`."""
    return str(Path(text).expanduser()) if text.startswith("~/") else text


def readable_message(error: BaseException) -> str:
    """Return the message of the InputError that caused an error, else the error's own text."""
    if (cause := input_error_in(error)) is not None:
        return str(cause)
    lines = str(error).splitlines()
    return "\n".join(line for line in lines if not line.strip().startswith("For further information visit"))


def _report(run: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(run)
    def reported(*args: Any, traceback: bool, **kwargs: Any) -> Any:
        try:
            return run(*args, **kwargs)
        except _READABLE as error:
            if traceback:
                raise
            click.secho(f"\nError: {readable_message(error)}", fg="red", err=True)
            click.echo("(--traceback shows where it was raised)", err=True)
            raise click.exceptions.Exit(1) from error
        except KeyboardInterrupt:
            close_interrupted_run()
            raise

    return reported


def _build_run_command() -> click.Command:
    callback = kedro_run.callback
    assert callback is not None
    params = [param for param in kedro_run.params if param.name != "params"]
    params.append(
        click.Option(
            ["--params"],
            type=click.UNPROCESSED,
            default="",
            callback=parse_params,
            help="Parameters of this run: KEY=VALUE,KEY=VALUE; values may contain commas.",
        )
    )
    params.append(click.Option(["--traceback"], is_flag=True, help="On an error, show where it was raised."))
    return click.Command("run", params=params, callback=_report(callback), help=kedro_run.help)


@click.command("import-config")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--env", "name", help="Name of the environment to write; default: the file's name.")
@click.option("--force", is_flag=True, help="Replace an environment of that name.")
def import_config(file: Path, name: str | None, force: bool) -> None:
    """Convert FILE, a training configuration of HCP-Diffusion, to an environment in conf/.

    Options without a counterpart are listed with the reason. Train with `kedro run --env NAME --pipeline train`.
    """
    from dreamartist_pipeline.interop.toolkit_config import read_toolkit_config

    name = name or re.sub(r"[^\w.-]+", "-", file.stem.replace("++", "-plus-plus"))
    try:
        folder = _environment_folder(name, force)
        imported = read_toolkit_config(file.read_text(encoding="utf-8"), lambda path: _near(file, path))
    except (InputError, UnicodeDecodeError) as error:
        click.secho(f"Error: {error}", fg="red", err=True)
        raise click.exceptions.Exit(1) from error
    notes = [f"{key} = {reason}" for key, reason in imported.left_out.items()]
    head = "\n".join([f"Imported from {file.name}.", *(f"Not imported, or a default: {note}" for note in notes)])
    _write_yaml(folder / "globals.yml", imported.settings, head)
    _write_yaml(folder / "parameters.yml", imported.parameters, head)
    click.echo(f"Wrote {folder}/globals.yml and {folder}/parameters.yml.")
    click.echo("\n".join([f"\nNot imported, or a default: {len(notes)}", *(f"  {note}" for note in notes)]))
    click.echo(f"\nTrain with it: kedro run --env {name} --pipeline train --params subject=NAME,image=FILE")


def _environment_folder(name: str, force: bool) -> Path:
    """Return the folder of a new environment.

    Raises:
        InputError: not in a project folder, an invalid or reserved name, or an existing environment.
    """
    if not Path("pyproject.toml").is_file():
        raise InputError(expected="the project folder", got=f"{Path.cwd()}", remedy="change into it")
    if not re.fullmatch(r"\w[\w.-]*", name) or name in _RESERVED_ENVIRONMENTS:
        raise InputError(
            expected=f"a name of letters, digits and hyphens that is not {' or '.join(_RESERVED_ENVIRONMENTS)}",
            got=f"{name!r}",
            remedy="choose another name (--env NAME)",
        )
    folder = Path("conf") / name
    if folder.exists() and not force:
        raise InputError(
            expected="a new environment",
            got=f"{folder}, which exists",
            remedy="choose another name (--env NAME), or replace it (--force)",
        )
    return folder


def _near(file: Path, path: str) -> str | None:
    """Read a file named in `file`; its path is relative to the toolkit's root, a parent folder of `file`."""
    for folder in file.resolve().parents:
        if _is_file(folder / path):
            return (folder / path).read_text(encoding="utf-8")
    return None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # the name is longer than the file system takes
        return False


def _write_yaml(file: Path, values: dict[str, Any], head: str) -> None:
    comment = "".join(f"# {line}\n" for line in head.splitlines())
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(comment + OmegaConf.to_yaml(OmegaConf.create(values)), encoding="utf-8")
    partial.replace(file)


@click.group(name="dreamartist_pipeline")
def cli() -> None:
    """Commands of this project."""


run = _build_run_command()
cli.add_command(run)
cli.add_command(import_config)
