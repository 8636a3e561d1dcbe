"""The options of commands that start runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

_OPTIONS = (
    click.option("--env", "-e", default=None, help="Environment of the configuration; default: local."),
    click.option("--workers", type=click.IntRange(1), help="Runs at a time."),
    click.option("--threads", type=click.IntRange(1), help="Threads of each run."),
    click.option("--ray", metavar="ADDRESS", help="Ray cluster that executes the runs; local for this machine's GPUs."),
    click.option("--params", default="", help="Parameters of every run: KEY=VALUE,KEY=VALUE."),
    click.option("--traceback", is_flag=True, help="On an error, show where it was raised."),
)


def options_of_started_runs(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options to the function of a command, for a decorator."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
