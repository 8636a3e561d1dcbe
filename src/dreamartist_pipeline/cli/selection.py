"""Check which pipelines and nodes a run selects, before Kedro opens a session."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import click
from kedro.framework.project import pipelines
from kedro.pipeline import Pipeline
from kedro.runner import ParallelRunner, SequentialRunner, ThreadRunner
from kedro.utils import load_obj

from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.hooks.configuration import nearest

_FILTERS = {  # argument of Kedro's command -> option, argument of Pipeline.filter, and what its values name
    "tags": ("--tags", "tags", "tag"),
    "node_names": ("--nodes", "node_names", "node"),
    "from_nodes": ("--from-nodes", "from_nodes", "node"),
    "to_nodes": ("--to-nodes", "to_nodes", "node"),
    "from_inputs": ("--from-inputs", "from_inputs", "dataset"),
    "to_outputs": ("--to-outputs", "to_outputs", "dataset"),
    "namespaces": ("--namespaces", "node_namespaces", "namespace"),
}


def check_words(words: Sequence[str], options: Mapping[str, Any]) -> None:
    """Refuse words that are no options: a pipeline without its option, or a value of `--params` without quotes.

    Args:
        words: of the command line, without options and their values.
        options: name -> value, of the options that are given.

    Raises:
        click.UsageError: there are some; the message has the command that was meant.
    """
    if not words:
        return
    params = options.get("params")
    near = get_close_matches(words[0], pipelines.keys(), n=1)
    if near and not {"pipeline", "pipelines"} & options.keys() and (params is None or near == [words[0]]):
        remedy = f"a pipeline is given as --pipeline {near[0]}"
    elif params is None and not any("=" in word for word in words):
        remedy = "a pipeline is given as --pipeline NAME, parameters as --params KEY=VALUE,KEY=VALUE"
    else:
        value = " ".join([params, *words] if params else words)
        remedy = f'put the whole value of --params in double quotes: --params "{value}"'
    raise click.UsageError(f"expected options; got '{' '.join(words)}'; {remedy}")


def check_selection(options: Mapping[str, Any]) -> None:
    """Check the pipelines, the nodes and the runner of `kedro run`.

    Raises:
        InputError: an unknown pipeline, node, tag or dataset, no node at all, or a runner that cannot run these nodes.
    """
    check_runner(options["runner"])
    names = options["pipelines"] or ["__default__" if options["pipeline"] is None else options["pipeline"]]
    for name in names:
        _check_known("pipeline", [name], pipelines.keys())
    selected = sum((pipelines[name] for name in names), Pipeline([]))
    given = {name: options[name] for name in _FILTERS if options[name]}
    known = {
        "tag": {tag for node in selected.nodes for tag in node.tags},
        "node": [node.name for node in selected.nodes],
        "dataset": selected.datasets(),
        "namespace": {node.namespace for node in selected.nodes if node.namespace},
    }
    filters = {}
    for name, values in given.items():
        _, argument, kind = _FILTERS[name]
        _check_known(kind, values, known[kind])
        filters[argument] = values
    try:
        selected.filter(**filters)
    except ValueError as error:  # no node is left
        options_given = " and ".join(_FILTERS[name][0] for name in given)
        raise InputError(
            expected=f"at least one node of {' + '.join(names)}",
            got=f"none that fits {options_given}",
            remedy="change these options, or leave them out",
        ) from error


def _check_known(kind: str, values: Iterable[str], known: Iterable[str]) -> None:
    names = sorted(known)
    for value in values:
        if value not in names:
            raise InputError(
                expected=f"a {kind} out of {', '.join(names)}" if names else f"no {kind}, as there are none",
                got=f"'{value}'",
                remedy=nearest(value, names, otherwise="choose one of them" if names else "leave it out"),
            )


def check_runner(name: str | None) -> None:
    """Refuse a runner that is unknown, or that runs nodes in other processes or threads than the MLflow run.

    Raises:
        InputError: an unknown runner, ParallelRunner or ThreadRunner.
    """
    try:
        runner = load_obj(name or SequentialRunner.__name__, "kedro.runner")
    except (ImportError, AttributeError, ValueError):
        runner = None
    if runner is None or issubclass(runner, ParallelRunner | ThreadRunner):
        raise InputError(
            expected=f"the runner {SequentialRunner.__name__}",
            got=f"{name}" + ("" if runner else ", which does not exist"),
            remedy="leave out --runner: nodes share models in memory and log to the MLflow run of one thread; to train "
            "several subjects at a time, start a command for each",
        )
