"""Start runs of this project for a node: which have been finished before, with which command, under which parent."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, cast

from kedro.framework.context import KedroContext
from kedro.framework.context.context import _convert_paths_to_absolute_posix
from kedro.framework.hooks import hook_impl
from kedro.framework.project import pipelines
from kedro.io import DataCatalog
from kedro.pipeline import Pipeline
from tqdm.auto import tqdm

from dreamartist_pipeline.catalog import ProjectCatalog
from dreamartist_pipeline.core.checkpoints import stop_requests
from dreamartist_pipeline.errors import STOPPED_BY_SIGNAL, InputError, StoppedEarly, input_error_in
from dreamartist_pipeline.executors import executor_for
from dreamartist_pipeline.hooks.configuration import build_parameters, check_subject
from dreamartist_pipeline.hooks.manifest import (
    MANIFEST,
    RunManifest,
    StoredFile,
    active_run_id,
    digest_of,
    read_manifest,
    stored_files,
)
from dreamartist_pipeline.hooks.parameters import flatten, plain_sections
from dreamartist_pipeline.hooks.record import PARENT_TAG
from dreamartist_pipeline.hooks.run import (
    MODEL_SETTINGS,
    PATH_SETTINGS,
    literal,
    path_of,
    plain,
    settings_in,
    with_local_copies,
)
from dreamartist_pipeline.hooks.store import ResultStore
from dreamartist_pipeline.params import RUN_SETTINGS, SECTIONS
from dreamartist_pipeline.redaction import redacted
from dreamartist_pipeline.starting_runs import (
    PARENT_RUN,
    RUN_KEY,
    STARTING,
    Executor,
    RunCommand,
    RunOutcome,
    RunRequest,
    RunResult,
    RunSource,
    Workers,
    progress_in,
    run_all,
)
from dreamartist_pipeline.tracking.delivery import optional
from dreamartist_pipeline.yaml_texts import merge_mappings

STARTER = "run_starter"
"""Dataset with a `starting_runs.RunStarter`, for nodes that start runs."""
_CONCEPT, _METRICS = "concept", "evaluation_metrics"
_PLACE = ("device.device", "device.processes", "training.scoring.halving.folder")  # which change the last bits at most
_PLACE_SETTINGS = ("store",)
_QUOTE = re.compile(r'((?<!\\)(?:\\\\)*)\\"')  # an escaped one, which the command line takes for the end
_BESIDE_BASE_MODEL = ("towers", "judge")  # folders; evaluations of the embedded base model measure with them
_OF_A_SUBJECT = ("subject", "class_word", "image", "mask", "caption")  # run settings
_LOGS = "data/09_tracking/run_logs"
_SHOWN = 4  # running subjects beside the progress bar

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _PlannedRun:
    """A run, with what is known before it is executed.

    Attributes:
        request: for it, with the parameters of the command that starts it.
        key: of its results.
        manifest_file: beside its concept.
        command: that executes it; None for one that is refused.
        finished: the earlier run with this key, if there is one.
        message: why it is refused.
        store: URL of its store.
    """

    request: RunRequest
    key: str
    manifest_file: Path
    command: RunCommand | None
    finished: RunManifest | None
    message: str | None = None
    store: str | None = None

    def outcome(self, errors: Mapping[str, str]) -> RunOutcome:
        """Return how it has ended."""
        message = self.message or errors.get(self.request.subject)
        return RunOutcome(self.request.subject, self.request.labels, message)


class Configurations(Protocol):
    """The project's configuration loader.

    Attributes:
        given_params: parameters of the command, with addresses of remote files.
    """

    given_params: dict[str, Any]

    def of_run(self, params: Mapping[str, Any], sections: Collection[str]) -> dict[str, dict[str, Any]]:
        """Return `globals`, `parameters` and `catalog` of another run of this environment, which reads sections."""

    def of_environment(self, key: str) -> dict[str, Any]:
        """Return what the files of this environment say, without those of the base, and with unresolved references."""


class StartingHooks:
    """Put what starts runs of this environment into the catalog."""

    @hook_impl
    def after_context_created(self, context: KedroContext) -> None:
        """Store the project and its configuration."""
        loader = cast("Configurations", context.config_loader)
        self._starter = ProjectRuns(Path(context.project_path), loader, _options(context), loader.given_params)

    @hook_impl
    def after_catalog_created(self, catalog: DataCatalog) -> None:
        """Store the starter, if the catalog has a place for it."""
        if (dataset := catalog.get(STARTER)) is not None:
            dataset.save(self._starter)


def _options(context: KedroContext) -> tuple[str, ...]:
    """Return the options by which another command has the same configuration."""
    options = ("--env", context.env) if context.env else ()
    conf_source = Path(context.config_loader.conf_source)
    return options if conf_source == context.project_path / "conf" else (*options, "--conf-source", str(conf_source))


class ProjectRuns:
    """Starts runs of a project, except those that have finished before.

    The results of a run depend on its pipelines, on its settings and parameters as they are after all configuration
    files, and on the contents of its files: the hash of these is its key. Where the files are, on which device it runs
    and how many runs there are at a time is not part of it, so that results can be copied to another machine. A run
    that has finished has its key in the manifest beside its concept.

    Args:
        project: its folder.
        loader: of the configuration.
        options: of `kedro run`, for the same configuration.
        given: parameters of the command that starts the runs: all runs have them, too. Sections replace values of a
            request; run settings do not.
        executor: makes what executes the commands.
    """

    def __init__(
        self,
        project: Path,
        loader: Configurations,
        options: Sequence[str] = (),
        given: Mapping[str, Any] | None = None,
        executor: Callable[[Workers], Executor] = executor_for,
    ) -> None:
        self._project, self._loader, self._options, self._executor = project, loader, tuple(options), executor
        self._given = {name: value for name, value in plain(given or {}).items() if name not in STARTING}

    def start(self, requests: Sequence[RunRequest] | RunSource, workers: Workers) -> tuple[RunOutcome, ...]:
        """Run what has not been finished before; see `starting_runs.RunStarter`."""
        parent, digests = active_run_id(), functools.cache(digest_of)
        plan = functools.partial(self._plan, parent=parent, threads=workers.threads, digests=digests)
        if isinstance(requests, Sequence):
            given = _all_with_given(requests, self._given)
            planned = [plan(one) for one in tqdm(given, "checking earlier runs", unit="run", leave=False)]
            if count := sum(one.finished is not None for one in planned):
                log.info("%d of %d runs are finished already, with the same parameters and files.", count, len(planned))
            return self._run(planned, len(planned), parent, workers)
        for one in _all_with_given(requests.examples(), self._given):
            self._identify(one, digests)
        lazily = (_planned_or_refused(self._with_given(one), plan) for one in requests)
        return self._run(lazily, len(requests), parent, workers, requests.ended)

    def environment_of(self, params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return parameters and run settings of an environment; see `starting_runs.RunStarter`."""
        values = with_given(params, self._given)
        settings = {name: value for name, value in values.items() if name in RUN_SETTINGS}
        sections = {name: value for name, value in values.items() if name not in RUN_SETTINGS}
        own = self._loader.of_environment
        settings = merge_mappings(own("globals"), settings)
        settings = {name: value for name, value in settings.items() if name not in _OF_A_SUBJECT}
        return redacted(merge_mappings(own("parameters"), sections)), redacted(settings)

    def _with_given(self, request: RunRequest) -> RunRequest:
        return replace(request, params=with_given(request.params, self._given))

    def _plan(
        self, request: RunRequest, parent: str | None, threads: int | None, digests: Callable[[Path], str]
    ) -> _PlannedRun:
        key, manifest_file, url = self._identify(request, digests)
        finished = self._finished(manifest_file, key, request.results, digests)
        if (store := self._store_at(url)) is not None:
            try:
                if finished is not None:
                    store.publish(manifest_file)  # of a run before there was a store, or whose copying has failed
                else:
                    store.fetch(manifest_file, key)
                    finished = self._finished(manifest_file, key, request.results, digest_of)
            except InputError as error:
                log.warning("%s: %s", request.subject, error)
        command = self._command(request, key, parent, threads)
        return _PlannedRun(request, key, manifest_file, command, finished, store=url)

    def _run(
        self,
        planned: Iterable[_PlannedRun],
        num_runs: int,
        parent: str | None,
        workers: Workers,
        noted: Callable[[RunResult], None] | None = None,
    ) -> tuple[RunOutcome, ...]:
        """Execute the runs that are not finished, and return the outcomes of all.

        Args:
            planned: all runs; the next one is asked for when a worker is free.
            num_runs: at most.
            parent: of all runs, in MLflow.
            workers: what executes them.
            noted: called with the result of each run.

        Raises:
            StoppedEarly: a signal.
        """
        course = _Course(planned, parent, noted, self._fetch, self._metrics)
        waiting = course.commands()
        if (first := next(waiting, None)) is None:
            return course.outcomes()

        def num_left() -> int:
            return num_runs - course.num_finished

        with stop_requests() as stop_requested, tqdm(total=num_left(), desc="runs", unit="run") as bar:

            def ended(command: RunCommand, error: str | None) -> None:
                bar.update()
                course.end(command, error)

            def watch(running: Sequence[RunCommand]) -> None:
                bar.total = num_left()
                bar.set_postfix_str(_states(running, len(course.errors)))

            run_all(chain([first], waiting), self._executor(workers), ended, stop_requested, watch)
            if stop_requested():
                raise StoppedEarly(
                    f"Stopped after {bar.n} of {num_left()} runs, of which finished ones are kept; the same command "
                    "continues.",
                    STOPPED_BY_SIGNAL,
                )
        return course.outcomes()

    def _store_at(self, url: str | None) -> ResultStore | None:
        return None if url is None else ResultStore(self._project, url)

    def _fetch(self, planned: _PlannedRun) -> str | None:
        """Copy the results of a run of another machine to this one; return why that was not possible."""
        if (store := self._store_at(planned.store)) is None:
            return None
        try:
            manifest = read_manifest(planned.manifest_file)
            if manifest is None or planned.key not in {run.key for run in manifest.runs.values()}:
                store.fetch(planned.manifest_file, planned.key)
        except InputError as error:
            return str(error)
        return None

    def _metrics(self, planned: _PlannedRun) -> dict[str, float]:
        """Return what a finished run has measured; nothing without an evaluation."""
        manifest = read_manifest(planned.manifest_file)
        runs = () if manifest is None else manifest.runs.values()
        files = [run.outputs[_METRICS] for run in runs if run.key == planned.key and _METRICS in run.outputs]
        if not files:
            return {}
        metrics: dict[str, float] = json.loads((self._project / files[-1].path).read_text(encoding="utf-8"))
        return metrics

    def _identify(self, request: RunRequest, digests: Callable[[Path], str]) -> tuple[str, Path, str | None]:
        """Return the key of a run, the file of its manifest, and the URL of its store.

        Raises:
            InputError: invalid parameters.
        """
        params = with_local_copies(literal_values(request.params))
        pipeline = sum((pipelines[name] for name in request.pipelines), Pipeline([]))
        read = [name for name in SECTIONS if f"params:{name}" in pipeline.inputs()]
        try:
            check_subject(request.subject)
            configuration = self._loader.of_run(params, read)
            sections = build_parameters(configuration["parameters"])
        except Exception as error:
            if (cause := input_error_in(error)) is None:
                raise
            raise InputError(cause.expected, cause.got, cause.remedy, where=request.subject) from error
        used, settings = {name: sections[name] for name in read}, settings_in(configuration["globals"], params)
        catalog = self._catalog(configuration["catalog"], {*pipeline.inputs(), _CONCEPT})
        names = {name for name in pipeline.inputs() if not name.startswith("params:") and name in catalog}
        content = {
            "pipelines": request.pipelines,
            "settings": {
                name: value for name, value in settings.items() if name not in (*PATH_SETTINGS, *_PLACE_SETTINGS)
            },
            "parameters": {
                name: value
                for name, value in flatten(plain_sections(used, exclude_defaults=True)).items()
                if name not in _PLACE
            },
            "files": self._files(names, catalog),
            "models": self._models(settings, digests),
        }
        concept = path_of(catalog, _CONCEPT)
        assert concept is not None
        text = json.dumps(content, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest(), concept.with_name(MANIFEST), settings["store"]

    def _catalog(self, configuration: dict[str, Any], names: set[str]) -> DataCatalog:
        """Return the catalog of a run with these datasets only."""
        absolute = _convert_paths_to_absolute_posix(self._project, configuration)
        return ProjectCatalog.from_config({name: absolute[name] for name in names & absolute.keys()})

    def _files(self, names: set[str], catalog: DataCatalog) -> dict[str, Any]:
        """Return dataset -> hash of its contents; of files that parameters name, the hash of each."""
        stored = stored_files(names, catalog, self._project)
        others = {name: catalog[name].load() for name in names - stored.keys() if catalog[name].exists()}
        return {name: file.sha256 for name, file in stored.items()} | {
            name: [hashlib.sha256(read()).hexdigest() for read in files.values()]
            for name, files in others.items()
            if isinstance(files, Mapping)
        }

    def _models(self, settings: Mapping[str, Any], digests: Callable[[Path], str]) -> dict[str, str | None]:
        """Return the hashes of the models that a run loads."""
        base_model = self._project / Path(settings["base_model"]).expanduser()
        beside = {name: base_model.with_name(name) for name in _BESIDE_BASE_MODEL}
        return {name: self._model(settings[name], digests) for name in MODEL_SETTINGS} | {
            name: digests(path) for name, path in beside.items() if path.exists()
        }

    def _model(self, location: str | None, digests: Callable[[Path], str]) -> str | None:
        """Return the hash of a model on this disk; of another one, its name."""
        path = None if location is None else self._project / Path(location).expanduser()
        return digests(path) if path is not None and path.exists() else location

    def _finished(
        self, manifest_file: Path, key: str, results: Sequence[str], digests: Callable[[Path], str]
    ) -> RunManifest | None:
        """Return the finished run with this key, if its results are there and unchanged."""
        try:
            manifest = read_manifest(manifest_file)
        except InputError:  # damaged: the run writes it again
            return None
        for run in () if manifest is None else manifest.runs.values():
            files = [run.outputs[name] for name in results if name in run.outputs]
            is_complete = len(files) == len(results) and all(self._is_unchanged(file, digests) for file in files)
            if run.key == key and is_complete:
                return run
        return None

    def _is_unchanged(self, file: StoredFile, digests: Callable[[Path], str]) -> bool:
        path = self._project / file.path
        return path.exists() and digests(path) == file.sha256

    def _command(self, request: RunRequest, key: str, parent: str | None, threads: int | None) -> RunCommand:
        return RunCommand(
            name=request.subject,
            arguments=(
                *("--pipelines", ",".join(request.pipelines), *self._options, "--params", as_params(request.params)),
            ),
            folder=self._project,
            environment={
                RUN_KEY: key,
                PARENT_RUN: parent,
                "MLFLOW_RUN_ID": None,
                **({} if threads is None else {"OMP_NUM_THREADS": str(threads)}),
            },
            log=self._project / _LOGS / f"{request.subject}.log",
        )


class _Course:
    """Runs on their way: those that are planned, executed and ended.

    Args:
        planned: all runs; the next one is asked for when its command is.
        parent: of all runs, in MLflow.
        noted: called with the result of each run that is finished before, or ends.
        fetch: brings the results of a run that has ended to this machine, or returns why it cannot.
        metrics: reads those of a finished run.

    Attributes:
        errors: name of a run that was executed -> message.
    """

    def __init__(
        self,
        planned: Iterable[_PlannedRun],
        parent: str | None,
        noted: Callable[[RunResult], None] | None,
        fetch: Callable[[_PlannedRun], str | None],
        metrics: Callable[[_PlannedRun], dict[str, float]],
    ) -> None:
        self._planned, self._parent, self._noted, self._fetch, self._metrics = planned, parent, noted, fetch, metrics
        self._known: dict[str, _PlannedRun] = {}
        self.errors: dict[str, str] = {}

    @property
    def num_finished(self) -> int:
        """Runs that had been finished before: of all runs, or of those asked for if they are planned one by one."""
        planned = self._planned if isinstance(self._planned, Sequence) else self._known.values()
        return sum(run.finished is not None for run in planned)

    def commands(self) -> Iterator[RunCommand]:
        """Yield the command of each run that is not finished."""
        for run in self._planned:
            self._known[run.request.subject] = run
            if run.command is not None and run.finished is None:
                yield run.command
                continue
            if run.finished is not None:
                _adopt_finished(run.finished, self._parent)
            else:
                log.warning("%s failed: %s", run.request.subject, run.message)
            self._note(run)

    def end(self, command: RunCommand, error: str | None) -> None:
        """Note how a command has ended."""
        error = error or self._fetch(self._known[command.name])
        if error is not None:
            self.errors[command.name] = error
            log.warning("%s failed: %s", command.name, error)
        self._note(self._known[command.name])

    def outcomes(self) -> tuple[RunOutcome, ...]:
        """Return the outcomes of all runs in their order."""
        return tuple(run.outcome(self.errors) for run in self._known.values())

    def _note(self, run: _PlannedRun) -> None:
        if self._noted is not None:
            outcome = run.outcome(self.errors)
            self._noted(RunResult(outcome, self._metrics(run) if outcome.message is None else {}))


def _planned_or_refused(request: RunRequest, plan: Callable[[RunRequest], _PlannedRun]) -> _PlannedRun:
    """Plan a run whose parameters follow from others: if they are invalid, it has failed, and the others go on."""
    try:
        return plan(request)
    except InputError as error:
        return _PlannedRun(request, "", Path(), None, None, f"{error}")


def _states(running: Sequence[RunCommand], num_failed: int) -> str:
    """Return what is shown beside the progress bar."""
    states = [f"{one.name} {progress_in(one.log)}".rstrip() for one in running]
    failed = [f"{num_failed} failed"] if num_failed else []
    return ", ".join([*failed, *states[:_SHOWN], *(["…"] if len(states) > _SHOWN else [])])


def _adopt_finished(run: RunManifest, parent: str | None) -> None:
    """Make a finished run a child of the one that asks for it now, if both are in MLflow."""
    if parent is not None and run.mlflow_run is not None:
        with optional("a finished run among the children"):
            _adopt(run.mlflow_run, parent)


def _all_with_given(requests: Sequence[RunRequest], given: Mapping[str, Any]) -> list[RunRequest]:
    """Return runs with the parameters of the command that starts them; see `with_given`.

    Raises:
        InputError: these make equal runs of different ones, which would count as several.
    """
    changed = [replace(one, params=with_given(one.params, given)) for one in requests]
    if _num_different(changed) < _num_different(requests):
        own = {name for one in requests for name in flatten(one.params)}
        raise InputError(
            expected="parameters of the command that leave different runs different",
            got=", ".join(f"{name}={value}" for name, value in flatten(given).items() if name in own),
            remedy="leave out what the runs differ in, such as training.seed",
        )
    return changed


def _num_different(requests: Sequence[RunRequest]) -> int:
    """Return how many runs there are that differ in more than their subjects."""
    contents = ({name: value for name, value in one.params.items() if name != "subject"} for one in requests)
    return len({json.dumps(content, sort_keys=True) for content in contents})


def with_given(params: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of a run with those of the command that starts it."""
    settings = {name: value for name, value in given.items() if name in RUN_SETTINGS}
    sections = {name: value for name, value in given.items() if name not in RUN_SETTINGS}
    return merge_mappings({**settings, **params}, sections)


def as_params(params: Mapping[str, Any]) -> str:
    """Return nested parameters as the value of `--params`: run settings as texts in quotes, all others as JSON."""
    return ",".join(f"{name}={as_text(name, value)}" for name, value in flatten(params).items())


def as_text(name: str, value: Any) -> str:
    """Return one value for `--params`."""
    if name in RUN_SETTINGS and value is not None:
        return f"'{value}'"
    return _QUOTE.sub(r"\1\\u0022", json.dumps(value, ensure_ascii=False))


def literal_values(value: Any) -> Any:
    """Return nested parameters with `${` escaped, as `kedro run` escapes those that it parses."""
    if isinstance(value, Mapping):
        return {name: literal_values(item) for name, item in value.items()}
    return literal(value)


def _adopt(run_id: str, parent: str) -> None:
    """Make a finished run a child of `parent`; one of another machine may not be in this store."""
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        mlflow.MlflowClient().set_tag(run_id, PARENT_TAG, parent)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
