"""The project's commands.

`kedro run`, extended by values with commas and by short error messages; `kedro import-config`, which converts the
reference toolkit's configurations; `kedro personalize`, which starts a run for each of many subjects; `kedro
sweep`, which searches for the best parameters; and `kedro verify`, which compares a concept with its manifest.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from traceback import clear_frames
from typing import Any

import click
from kedro.framework.cli.project import run as kedro_run
from kedro.io import DatasetError
from kedro.validation.exceptions import ParameterValidationError

from dreamartist_pipeline.cli.import_config import import_config
from dreamartist_pipeline.cli.params import parse_params, with_params
from dreamartist_pipeline.cli.personalize import personalize_command
from dreamartist_pipeline.cli.selection import check_selection, check_words
from dreamartist_pipeline.cli.stopping import Stop, stopped_by_signals
from dreamartist_pipeline.cli.sweep import sweep_command
from dreamartist_pipeline.cli.verify import verify
from dreamartist_pipeline.errors import (
    STOPPED_BY_SIGNAL,
    InputError,
    StoppedEarly,
    TrainingError,
    input_error_in,
    out_of_memory_in,
)
from dreamartist_pipeline.hooks.console import program, quoted
from dreamartist_pipeline.hooks.logs import configure_logs
from dreamartist_pipeline.hooks.record import close_run, reason_of
from dreamartist_pipeline.params import ON_CPU
from dreamartist_pipeline.redaction import redact

_READABLE = (InputError, TrainingError, ParameterValidationError, DatasetError)


def readable_message(error: BaseException) -> str:
    """Return the message of the InputError that caused an error, else the error's own text."""
    if (cause := input_error_in(error)) is not None:
        return redact(str(cause))
    lines = redact(str(error)).splitlines()
    return "\n".join(line for line in lines if not line.strip().startswith("For further information visit"))


def _report(run: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(run)
    def reported(*args: Any, traceback: bool, **kwargs: Any) -> Any:
        with stopped_by_signals() as stop:
            try:
                return run(*args, **kwargs)
            except StoppedEarly as stopped:
                raise _end(stop, str(stopped), stopped.exit_code) from None
            except KeyboardInterrupt:
                raise _end(stop, stop.message, STOPPED_BY_SIGNAL) from None
            except Exception as error:
                if stop.name is not None:  # a library caught the interruption, and raised another error
                    raise _end(stop, stop.message, STOPPED_BY_SIGNAL) from None
                explained = with_memory_explained(error)
                close_run("FAILED", reason_of(explained))
                if traceback or not isinstance(explained, _READABLE):
                    raise
                click.secho(f"\nError: {readable_message(explained)}", fg="red", err=True)
                cause = input_error_in(explained)
                if cause is not None and ON_CPU in cause.remedy:
                    click.echo(
                        f"The command of this run on the CPU: {redact(command_with(sys.argv, ON_CPU))}", err=True
                    )
                click.echo("(--traceback shows where it was raised)", err=True)
                raise click.exceptions.Exit(1) from error

    return reported


def with_memory_explained(error: Exception) -> Exception:
    """Return an InputError for exhausted memory, and any other error as it is; see `out_of_memory_explained` too.

    What the failed functions hold is let go of, so that there is memory to close the run.
    """
    exhausted = out_of_memory_in(error)
    if exhausted is None or input_error_in(error) is not None:
        return error
    cause: BaseException | None = error
    while cause is not None:
        clear_frames(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__
    return InputError(
        expected="a run that fits into the memory",
        got=str(exhausted).partition("\n")[0] or type(exhausted).__name__,
        remedy="draw fewer images at once (sampler.batch_size=1) or smaller ones, use device.dtype=bfloat16 or "
        "device.quantize=int8, close other programs, or raise the limit of memory (ulimit -v); earlier results are "
        "unchanged",
    )


def _end(stop: Stop, message: str, exit_code: int) -> click.exceptions.Exit:
    """Close the MLflow run of a command that was stopped, and say so; return what ends the command."""
    stop.close()
    close_run("KILLED", message)
    click.echo(f"\n{message}", err=True)
    return click.exceptions.Exit(exit_code)


def command_with(arguments: list[str], params: str) -> str:
    """Return the command line of this process with further parameters, which replace those of the same name.

    Args:
        arguments: as in `sys.argv`.
        params: `key=value,key=value`.
    """
    name, *words = arguments
    given = ""
    for position in reversed(range(len(words))):  # of several --params, click takes the last
        option, equals, value = words[position].partition("=")
        if option == "--params":
            given = value if equals else words[position + 1]
            del words[position : position + (1 if equals else 2)]
            break
    return quoted([program(Path(name).stem), *words, "--params", with_params(given, params)])


class _RunCommand(click.Command):
    """`kedro run`; words that are no options are refused before the values of options are parsed."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the command line.

        Raises:
            click.UsageError: a word that is no option.
        """
        options, words, _ = self.make_parser(ctx).parse_args(args=list(args))
        check_words(words, options)
        return super().parse_args(ctx, args)


def _build_run_command() -> click.Command:
    callback = kedro_run.callback
    assert callback is not None

    def checked_run(**options: Any) -> Any:
        configure_logs(options["conf_source"])
        check_selection(options)
        return callback(**options)

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
    return _RunCommand(
        "run",
        params=params,
        callback=_report(checked_run),
        help=kedro_run.help,
    )


@click.group(name="dreamartist_pipeline")
def cli() -> None:
    """Commands of this project."""


run = _build_run_command()
cli.add_command(run)
cli.add_command(personalize_command(run))
cli.add_command(sweep_command(run))
cli.add_command(import_config)
cli.add_command(verify)
