"""The trials of a sweep while it runs: which values they have, and what Optuna is told of their results."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import ParameterSearchParams, SweptRange
from dreamartist_pipeline.pipelines.compare.planning import SEARCH, SEED, SUBJECT, TRIAL, VALUES, trial_run
from dreamartist_pipeline.pipelines.compare.space import ParameterPath, dimensions, dotted
from dreamartist_pipeline.pipelines.compare.trials import FINISHED, STOPPED, Trial, judged_trials
from dreamartist_pipeline.starting_runs import RunRequest, RunResult

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

_SEED_DIGITS, _NAME_DIGITS = 8, 6
_OF_A_CALL = {"trials", "workers", "threads", "ray", "name", "images", "folder"}  # on which values do not depend
_STEP = 1  # Optuna compares trials that were stopped early at equal steps


class Search:
    """The trials of a sweep, kept in a file, so that the same sweep goes on with them.

    Optuna chooses the values (Akiba et al. 2019). Those of trial N depend on the seed, on N and, for `tpe`, on the
    trials that have ended before.

    Args:
        params: of the sweep.
        environment: other parameters and run settings of its runs.
        journal: Optuna's file. Another search begins anew in it.

    Attributes:
        name: a hash of all that the trials depend on, except pictures and models.
        num_trials: at most.

    Raises:
        InputError: Optuna is not installed, or the file is damaged.
    """

    def __init__(self, params: ParameterSearchParams, environment: Any, journal: Path) -> None:
        self._params, self._space = params, dimensions(params.space)
        size = math.prod(len(self._indices(path)) for path in self._space)
        self.num_trials = min(params.trials, size) if params.search == "grid" else params.trials
        content = params.model_dump(mode="json", exclude=_OF_A_CALL)
        text = json.dumps([content, environment], sort_keys=True, default=str)
        self.name = hashlib.sha256(text.encode()).hexdigest()[:_NAME_DIGITS]
        self._study = _open_study(journal, self.name)

    def __iter__(self) -> Iterator[Trial]:
        """Yield the trials of earlier calls, then new ones; each is chosen when it is asked for."""
        yield from self.trials
        while (number := len(self.trials)) < self.num_trials:
            yield self._ask(number)

    @property
    def trials(self) -> list[Trial]:
        """All trials so far."""
        return [self._trial_of(one) for one in self._study.get_trials(deepcopy=False)[: self.num_trials]]

    def tell(self, trial: Trial) -> None:
        """Note the result of a trial; that of an earlier call stays."""
        from optuna.trial import Trial as Running
        from optuna.trial import TrialState

        known = self._study.get_trials(deepcopy=False)[trial.number]
        if known.state.is_finished():
            return
        if trial.state == FINISHED:
            self._study.tell(trial.number, trial.score)
        elif trial.state == STOPPED:
            Running(self._study, known._trial_id).report(trial.score, _STEP)
            self._study.tell(trial.number, state=TrialState.PRUNED)
        else:
            self._study.tell(trial.number, state=TrialState.FAIL)

    def _ask(self, number: int) -> Trial:
        from optuna.samplers import RandomSampler, TPESampler

        distributions = {dotted(path): self._distribution(path) for path in self._space}
        seed = int(hashlib.sha256(f"{self._params.seed} {number}".encode()).hexdigest()[:_SEED_DIGITS], 16)
        if self._params.search == "tpe":
            self._study.sampler = TPESampler(seed=seed, multivariate=True, constant_liar=True)
        else:
            self._study.sampler = RandomSampler(seed=seed)
        if self._params.search == "grid":
            combinations = itertools.product(*(self._indices(path) for path in self._space))
            chosen = next(itertools.islice(combinations, number, None))
            self._study.enqueue_trial(dict(zip(distributions, chosen, strict=True)))
        self._study.ask(distributions)
        return self.trials[number]

    def _trial_of(self, known: FrozenTrial) -> Trial:
        return Trial(known.number, {path: self._value(path, known.params[dotted(path)]) for path in self._space})

    def _indices(self, path: ParameterPath) -> range:
        values = self._space[path]
        return range(0) if isinstance(values, SweptRange) else range(len(values))

    def _distribution(self, path: ParameterPath) -> BaseDistribution:
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        values = self._space[path]
        if not isinstance(values, SweptRange):
            return CategoricalDistribution([*self._indices(path)])
        if values.integer:
            return IntDistribution(int(values.low), int(values.high), log=values.log)
        return FloatDistribution(values.low, values.high, log=values.log)

    def _value(self, path: ParameterPath, suggested: Any) -> Any:
        values = self._space[path]
        return suggested if isinstance(values, SweptRange) else values[suggested]


def _open_study(journal: Path, name: str) -> Study:
    try:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
    except ImportError as error:
        raise InputError(
            expected="Optuna for a sweep", got=str(error), remedy="pip install 'dreamartist-pipeline[sweep]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    journal.parent.mkdir(parents=True, exist_ok=True)
    try:
        storage = JournalStorage(JournalFileBackend(str(journal)))
        return optuna.create_study(storage=storage, study_name=name, direction="maximize", load_if_exists=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(
            expected=f"the trials of earlier sweeps in {journal}",
            got=f"{type(error).__name__}: {error}",
            remedy="move the file away: the trials are chosen anew, and finished runs are not repeated",
        ) from error


# ------------------------------------------------------------------------------------------------- the runs


class SweepRuns:
    """The runs of a sweep; a `starting_runs.RunSource`.

    Args:
        params: of the sweep.
        environment: other parameters and run settings of its runs.
    """

    def __init__(self, params: ParameterSearchParams, environment: Any = None) -> None:
        self._params = params
        self.search = Search(params, environment, Path(params.folder) / params.name / "trials.journal")
        self._results: dict[int, list[RunResult]] = {}

    def __len__(self) -> int:
        """Return how many runs there are."""
        num_trials: int = self.search.num_trials
        return num_trials * self._num_runs

    def __iter__(self) -> Iterator[RunRequest]:
        """Yield the runs of one trial after the other."""
        for trial in self.search:
            yield from self._runs_of(trial)

    def examples(self) -> Sequence[RunRequest]:
        """Return a run with the first values, and one with each of the others beside the first ones."""
        space = dimensions(self._params.space)
        ends = {path: _ends_of(values) if isinstance(values, SweptRange) else values for path, values in space.items()}
        first = {path: values[0] for path, values in ends.items()}
        others = [first | {path: value} for path, values in ends.items() for value in values[1:]]
        return [self._runs_of(Trial(0, values))[0] for values in (first, *others)]

    def ended(self, result: RunResult) -> None:
        """Take a result, and tell Optuna the objective of the trial after its last run."""
        number = result.outcome.labels[TRIAL]
        results = self._results.setdefault(number, [])
        results.append(result)
        if len(results) == self._num_runs:
            (trial,) = judged_trials(results, self._params)
            self.search.tell(trial)

    @property
    def _num_runs(self) -> int:
        return len(self._params.subjects) * len(self._params.seeds)

    def _runs_of(self, trial: Trial) -> list[RunRequest]:
        values = {dotted(path): value for path, value in trial.values.items()}
        labels = {SEARCH: self.search.name, TRIAL: trial.number, VALUES: values}
        return [
            trial_run(self._params, {**labels, SUBJECT: subject, SEED: seed})
            for subject, seed in itertools.product(self._params.subjects, self._params.seeds)
        ]


def _ends_of(values: SweptRange) -> tuple[float, float]:
    return (int(values.low), int(values.high)) if values.integer else (values.low, values.high)
