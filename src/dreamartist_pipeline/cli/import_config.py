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
        imported = read_toolkit_config(file.read_text(encoding="utf-8"), lambda path: _near(file, path))
    except (InputError, UnicodeDecodeError) as error:
        click.secho(f"Error: {error}", fg="red", err=True)
        raise click.exceptions.Exit(1) from error
    notes = [f"{key} = {reason}" for key, reason in imported.left_out.items()]
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
    with written_whole(file) as temporary:
        temporary.write_text(comment + OmegaConf.to_yaml(OmegaConf.create(values)), encoding="utf-8")
