"""The project's own commands.

`kedro run`, with two things made easier: values that contain commas, and errors that end in one readable message; and
`kedro import-config`, which reads the reference toolkit's configurations.
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
_KEPT_ENVIRONMENTS = ("base", "local", "test", "sd15")
_PROMPT_KEYS = ("prompt", "prompts", "prior_prompts", "negative_prompt", "templates")
_READABLE = (InputError, TrainingError, ParameterValidationError, DatasetError)


def parse_params(ctx: click.Context, param: click.Parameter, value: str | dict[str, Any]) -> dict[str, Any]:
    """Read `key=value,key=value`; a comma starts a new parameter only where a `key=` follows it.

    Kedro splits at every comma, so that neither a prompt ("a red fox, blue background") nor a list could be given.
    The settings of a run are text as it stands, whatever it looks like: `subject=007` is not the number 7. So are
    prompts: in YAML, "{cat:1.2} asleep" is no text, and "a {cat: 1.2}" a mapping. Lists and quoted texts are YAML.
    """
    if isinstance(value, dict):
        return value
    items = [item.strip() for item in _NEXT_PARAMETER.split(value) if item.strip()]
    for item in items:
        if "=" not in item:
            raise click.BadParameter(f"expected key=value; got '{item}'; separate several by commas", ctx, param)
    names = [item.partition("=")[0].strip() for item in items]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise click.BadParameter(f"expected every parameter once; got {twice[0]} twice; leave one out", ctx, param)
    texts: dict[str, Any] = {}
    others: list[str] = []
    for item in items:
        name, _, text = (part.strip() for part in item.partition("="))
        if name in RUN_SETTINGS and text != "null":
            texts[name] = _home(text)
        elif name.rpartition(".")[2] in _PROMPT_KEYS and not text.startswith(("[", "'", '"')) and text != "null":
            others.append(f"{name}={json.dumps(text, ensure_ascii=False)}")
        else:
            others.append(item)
    for item in others:
        _check_yaml(item, ctx, param)
    return texts | cast(dict[str, Any], OmegaConf.to_container(OmegaConf.from_dotlist(others)))


def _check_yaml(item: str, ctx: click.Context, param: click.Parameter) -> None:
    try:
        OmegaConf.from_dotlist([item])
    except YAMLError as error:
        name = item.partition("=")[0]
        raise click.BadParameter(
            f"expected a value or a list in YAML for {name}, such as {name}=['a cat, asleep', 'a dog']; got '{item}', "
            f"which cannot be read; put texts with commas, colons or braces in quotes",
            ctx,
            param,
        ) from error


def _home(text: str) -> str:
    """Expand a leading `~`, which the shell leaves alone inside `image=~/cat.jpg`."""
    return str(Path(text).expanduser()) if text.startswith("~/") else text


def readable_message(error: BaseException) -> str:
    """Return what a user needs of an error: the innermost InputError, else the error's own text."""
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
            help="Parameters for this run: KEY=VALUE,KEY=VALUE; values may contain commas.",
        )
    )
    params.append(click.Option(["--traceback"], is_flag=True, help="On an error, show where it was raised."))
    return click.Command("run", params=params, callback=_report(callback), help=kedro_run.help)


@click.command("import-config")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--env", "name", help="Name of the environment to write; default: the file's name.")
@click.option("--force", is_flag=True, help="Replace an environment of that name.")
def import_config(file: Path, name: str | None, force: bool) -> None:
    """Turn FILE, a training configuration of HCP-Diffusion, into an environment under conf/.

    What has no counterpart here is listed with the reason. Train with it by `kedro run --env NAME --pipeline train`.
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
    head = "\n".join([f"Imported from {file.name}.", *(f"Not carried over, or not given: {note}" for note in notes)])
    _write_yaml(folder / "globals.yml", imported.settings, head)
    _write_yaml(folder / "parameters.yml", imported.parameters, head)
    click.echo(f"Wrote {folder}/globals.yml and {folder}/parameters.yml.")
    click.echo("\n".join([f"\nNot carried over, or not given: {len(notes)}", *(f"  {note}" for note in notes)]))
    click.echo(f"\nTrain with it: kedro run --env {name} --pipeline train --params subject=NAME,image=FILE")


def _environment_folder(name: str, force: bool) -> Path:
    """Return the folder of a new environment.

    Raises:
        InputError: not a project's folder, not a name of one's own, or the environment is there.
    """
    if not Path("pyproject.toml").is_file():
        raise InputError(expected="the project's folder", got=f"{Path.cwd()}", remedy="change into it")
    if not re.fullmatch(r"\w[\w.-]*", name) or name in _KEPT_ENVIRONMENTS:
        raise InputError(
            expected=f"a name of letters, digits and hyphens that is not {' or '.join(_KEPT_ENVIRONMENTS)}",
            got=f"{name!r}",
            remedy="choose another (--env NAME)",
        )
    folder = Path("conf") / name
    if folder.exists() and not force:
        raise InputError(
            expected="a new environment",
            got=f"{folder}, which is there already",
            remedy="choose another name (--env NAME), or replace it (--force)",
        )
    return folder


def _near(file: Path, path: str) -> str | None:
    """Read a file that `file` names: paths count from the toolkit's root, which is one of the folders above."""
    for folder in file.resolve().parents:
        if (folder / path).is_file():
            return (folder / path).read_text(encoding="utf-8")
    return None


def _write_yaml(file: Path, values: dict[str, Any], head: str) -> None:
    comment = "".join(f"# {line}\n" for line in head.splitlines())
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(comment + OmegaConf.to_yaml(OmegaConf.create(values)), encoding="utf-8")
    partial.replace(file)


@click.group(name="dreamartist_pipeline")
def cli() -> None:
    """Collect this project's own commands."""


run = _build_run_command()
cli.add_command(run)
cli.add_command(import_config)
