"""`kedro import-config`: convert a training configuration of HCP-Diffusion."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click
from kedro.utils import find_kedro_project
from omegaconf import OmegaConf

from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.hooks.run import shown
from dreamartist_pipeline.whole_files import written_whole

_CONFIGS = "cfgs"  # the toolkit's folder of configurations
_MAX_BYTES = 1_000_000
_OTHER = "give another file"
_RESERVED_ENVIRONMENTS = ("base", "local", "test", "sd15", "sd21", "sdxl")


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
        imported = read_toolkit_config(_read(file), lambda path: _near(file, path))
    except InputError as error:
        click.secho(f"Error: {error}", fg="red", err=True)
        raise click.exceptions.Exit(1) from error
    notes = [_printable(f"{key} = {reason}") for key, reason in imported.left_out.items()]
    head = "\n".join([f"Imported from {file.name}.", *(f"Not imported, or a default: {note}" for note in notes)])
    _write_yaml(folder / "globals.yml", imported.settings, head)
    _write_yaml(folder / "parameters.yml", imported.parameters, head)
    click.echo(f"Wrote {shown(folder)}/globals.yml and {shown(folder)}/parameters.yml.")
    click.echo("\n".join([f"\nNot imported, or a default: {len(notes)}", *(f"  {note}" for note in notes)]))
    click.echo(f"\nTrain with it: kedro run --env {name} --pipeline train --params subject=NAME,image=FILE")


def _environment_folder(name: str, force: bool) -> Path:
    """Return the folder of a new environment.

    Raises:
        InputError: not in a project folder, an invalid or reserved name, or an existing environment.
    """
    project: Path | None = find_kedro_project(Path.cwd())
    if project is None:
        raise InputError(expected="the project folder", got=f"{Path.cwd()}", remedy="change into it")
    if not re.fullmatch(r"\w[\w.-]*", name) or name in _RESERVED_ENVIRONMENTS:
        raise InputError(
            expected=f"a name of letters, digits and hyphens that is not {' or '.join(_RESERVED_ENVIRONMENTS)}",
            got=f"{name!r}",
            remedy="choose another name (--env NAME)",
        )
    folder = project / "conf" / name
    if folder.exists() and not force:
        raise InputError(
            expected="a new environment",
            got=f"{shown(folder)}, which exists",
            remedy="choose another name (--env NAME), or replace it (--force)",
        )
    return folder


def _near(file: Path, path: str) -> str | None:
    """Read a file named in `file`, None if it is not found.

    A path is relative to the folder of `file`, or to the toolkit's root, the parent of the folder `cfgs` that holds
    `file`. Base files are read from these two folders only, and prompt templates also from the root.

    Raises:
        InputError: the file is elsewhere, by its path or by a link, or is no UTF-8 text.
    """
    own = file.resolve().parent
    configs = next((folder for folder in (own, *own.parents) if folder.name == _CONFIGS), own)
    root = configs.parent if configs.name == _CONFIGS else own
    is_template = Path(path).suffix == ".txt"
    allowed = (own, root if is_template else configs)
    for folder in dict.fromkeys((own, root)):
        if _is_file(candidate := folder / path):
            if not any(candidate.resolve().is_relative_to(each) for each in allowed):
                raise InputError(
                    expected=f"{'prompt templates' if is_template else 'base files'} inside {allowed[-1]}",
                    got=f"{path} ({candidate.resolve()})",
                    remedy="copy the file there if you trust it, or leave it out of the configuration",
                )
            return _read(candidate)
    return None


def _read(file: Path) -> str:
    """Return the text of a file.

    Raises:
        InputError: it is too large, or no UTF-8.
    """
    if (size := file.stat().st_size) > _MAX_BYTES:
        raise InputError(expected=f"a text of at most {_MAX_BYTES:,} bytes in {file}", got=f"{size:,}", remedy=_OTHER)
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(expected=f"UTF-8 text in {file}", got=f"{error}", remedy=_OTHER) from error


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # the name is longer than the file system takes, or has a null character
        return False


def _printable(text: str) -> str:
    """Return a text from a file of others for the terminal and for comments, without control characters."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def _write_yaml(file: Path, values: dict[str, Any], head: str) -> None:
    comment = "".join(f"# {line}\n" for line in head.splitlines())
    with written_whole(file) as temporary:
        temporary.write_text(comment + OmegaConf.to_yaml(OmegaConf.create(_verbatim(values))), encoding="utf-8")


def _verbatim(value: Any) -> Any:
    """Escape every `${` in the texts of nested values: a run would resolve it, as in a line of a prompt template."""
    if isinstance(value, dict):
        return {name: _verbatim(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_verbatim(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value
