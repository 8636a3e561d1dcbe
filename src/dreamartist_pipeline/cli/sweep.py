"""`kedro sweep`: the pipeline of that name, with the section of its parameters from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dreamartist_pipeline.cli.params import sets_any_of, with_params
from dreamartist_pipeline.cli.started_runs import options_of_started_runs
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.hooks.starting import as_text
from dreamartist_pipeline.yaml_texts import parse_mapping

_SECTION = "sweep"


def sweep_command(run: click.Command) -> click.Command:
    """Return the command, which calls `kedro run`."""

    @click.command("sweep")
    @click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
    @click.option("--trials", type=click.IntRange(1), help="Number of trials.")
    @options_of_started_runs
    def sweep(file: Path, env: str | None, params: str, traceback: bool, **options: Any) -> None:
        """Search for the best values of some parameters, each trial in runs of its own.

        FILE (.yml) has the values of the section `sweep` of the parameters (conf/base/parameters_sweep.yml), such as

        \b
          space: {training: {guidance_scale: ["2.0", "3.0"], words: {lr: {low: 1.0e-3, high: 2.0e-2, log: true}}}}
          trials: 12

        The best values become the environment best-<name>. The same command goes on where it was stopped.
        """  # noqa: D301 # \b keeps the lines of the example
        try:
            values = _read(file)
        except InputError as error:
            click.secho(f"Error: {error}", fg="red", err=True)
            raise click.exceptions.Exit(1) from error
        if values.keys() == {_SECTION} and isinstance(values[_SECTION], dict):
            values = values[_SECTION]
        given = values | {name: value for name, value in options.items() if value is not None}
        if sets_any_of(params, _SECTION):
            raise click.BadParameter(f"give what belongs to the sweep in {file}", param_hint="--params")
        own = ",".join(f"{_SECTION}.{name}={as_text(name, value)}" for name, value in given.items())
        arguments = ["--pipelines", _SECTION, "--params", with_params(own, params)]
        arguments += [] if env is None else ["--env", env]
        run.main([*arguments, *(["--traceback"] if traceback else [])], prog_name="kedro run")

    return sweep


def _read(file: Path) -> dict[str, Any]:
    """Return the values of a file.

    Raises:
        InputError: no YAML mapping.
    """
    try:
        return parse_mapping(file.read_text(encoding="utf-8-sig"), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            expected=f"UTF-8 text in {file}", got=str(error), remedy="give a file with the section `sweep`"
        ) from error
