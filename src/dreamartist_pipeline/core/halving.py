"""Trainings that end early because others are better: asynchronous successive halving, ASHA.

Li et al. 2020, "A System for Massively Parallel Hyperparameter Tuning", in the form that stops trainings instead of
pausing them. Trainings note how good they are at rungs, steps that lie ever further apart. One goes on if it is among
the best of those that have reached the same rung so far, so that none waits for another, and the first one goes on in
any case. Processes, also of several machines, share nothing but a folder.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from dreamartist_pipeline.params import HalvingParams
from dreamartist_pipeline.whole_files import written_whole

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Halving:
    """One training among others.

    Attributes:
        params: of all of them, and its name.
    """

    params: HalvingParams

    def is_stopped(self, step: int) -> bool:
        """Return whether this training was stopped at a rung up to a step."""
        own = (_read(rung / f"{self.params.run}.json") for rung in Path(self.params.folder).glob("*"))
        return any(record["is_stopped"] and record["step"] <= step for record in own if record is not None)

    def note(self, step: int, standing: float) -> None:
        """Note how good the training is after a step, if it has reached a rung there.

        What it noted at later steps, before it went back to a good state or began anew, is forgotten.

        Args:
            step: finished steps.
            standing: higher is better.

        Raises:
            InputError: the folder cannot be written.
        """
        folder, own = Path(self.params.folder), f"{self.params.run}.json"
        for rung in folder.glob("*"):
            if rung.name.isdecimal() and (earlier := _read(rung / own)) is not None and earlier["step"] >= step:
                (rung / own).unlink()
        rung = folder / str(self._rung(step))
        if step < self.params.first or (rung / own).exists():
            return
        others = [record for file in _notes(rung, "*.json") if (record := _read(file)) is not None]
        better = sum(other["standing"] > standing for other in others)
        allowed = max(1, (len(others) + 1) // self.params.factor)
        is_stopped = better >= allowed
        rung.mkdir(parents=True, exist_ok=True)
        with written_whole(rung / own) as temporary:
            record = {"step": step, "standing": standing, "is_stopped": is_stopped}
            temporary.write_text(json.dumps(record), encoding="utf-8")
        if is_stopped:
            log.info(
                "Stopped after step %d: %d of the %d other trainings that have got as far are better, and the best %d "
                "go on.",
                *(step, better, len(others), allowed),
            )

    def _rung(self, step: int) -> int:
        """Return the latest rung up to a step."""
        rung = self.params.first
        while rung * self.params.factor <= step:
            rung *= self.params.factor
        return rung


def stopped_runs(folder: Path) -> frozenset[str]:
    """Return the names of the trainings that were stopped."""
    noted = {file: _read(file) for file in _notes(folder, "*/*.json")}
    return frozenset(file.stem for file, record in noted.items() if record is not None and record["is_stopped"])


def _notes(folder: Path, pattern: str) -> list[Path]:
    """Return the files of notes, without those that are being written."""
    return [file for file in folder.glob(pattern) if not file.name.startswith(".")]


def _read(file: Path) -> dict[str, float] | None:
    """Return what is noted in a file; None if it does not exist, or is damaged."""
    try:
        record: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return record
