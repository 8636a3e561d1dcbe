"""`kedro personalize`: the pipeline of that name, with its main parameters as an argument and options."""

from __future__ import annotations

from typing import Any

import click

from dreamartist_pipeline.cli.params import sets_all_of, with_params
from dreamartist_pipeline.cli.started_runs import options_of_started_runs
from dreamartist_pipeline.hooks.starting import as_params


def personalize_command(run: click.Command) -> click.Command:
    """Return the command, which calls `kedro run`."""

    @click.command("personalize")
    @click.argument("subjects")
    @options_of_started_runs
    def personalize(subjects: str, env: str | None, params: str, traceback: bool, **options: Any) -> None:
        """Train, evaluate and export every subject in SUBJECTS, each in a run of its own.

        SUBJECTS is a table (.csv or .parquet) with the columns subject and image, and any run settings (class_word,
        caption, mask) and parameters (training.seed); or a folder of pictures. The same command goes on where it was
        stopped, and does what is missing or has changed.
        """
        given = {"subjects": subjects} | {name: value for name, value in options.items() if value is not None}
        if sets_all_of(params, "personalize"):
            raise click.BadParameter(
                "give its parameters one by one, such as personalize.export=false", param_hint="--params"
            )
        own = as_params({"personalize": given})
        arguments = ["--pipelines", "personalize", "--params", with_params(params, own)]
        arguments += [] if env is None else ["--env", env]
        run.main([*arguments, *(["--traceback"] if traceback else [])], prog_name="kedro run")

    return personalize
