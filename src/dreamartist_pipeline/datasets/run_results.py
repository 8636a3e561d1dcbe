"""Runs that another run has started, and the reports that they have left in their folders.

Annotations here are evaluated (no `from __future__ import annotations`): kedro-viz reads the return type of `preview`.
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedro.io import AbstractDataset
from kedro_datasets._typing import TablePreview

from dreamartist_pipeline.datasets.inputs import FileError
from dreamartist_pipeline.starting_runs import RunOutcome, RunResult
from dreamartist_pipeline.whole_files import written_whole

if TYPE_CHECKING:
    from PIL.Image import Image


class RunResultsDataset(AbstractDataset[Sequence[RunOutcome], tuple[RunResult, ...]]):
    """The outcomes of runs in a JSON file; they are loaded with what the runs have measured.

    Args:
        filepath: the file.
        path: folder of reports, in which each run has a folder named by its subject.
        metrics: file of the metrics in that folder.
        history: file of the training steps, with a column `seconds`.
        picture: file of a picture that is read, too; None for none.
    """

    def __init__(
        self,
        *,
        filepath: str,
        path: str,
        metrics: str = "evaluation_metrics.json",
        history: str = "training_history.csv",
        picture: str | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        self._filepath, self._reports = Path(filepath), Path(path)
        self._metrics, self._history, self._picture = metrics, history, picture
        self.metadata = metadata

    def save(self, data: Sequence[RunOutcome]) -> None:
        """Replace the file."""
        rows = [{"subject": one.subject, "labels": dict(one.labels), "message": one.message} for one in data]
        with written_whole(self._filepath) as temporary:
            temporary.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")

    def load(self) -> tuple[RunResult, ...]:
        """Return every run with its metrics, if it has finished.

        Raises:
            FileError: no file, or a finished run without reports.
        """
        return tuple(self._result(outcome) for outcome in self._outcomes())

    def preview(self) -> TablePreview:
        """Show the runs and the messages of those that failed."""
        rows = [[one.subject, "finished" if one.message is None else one.message] for one in self._outcomes()]
        return TablePreview({"index": list(range(len(rows))), "columns": ["run", "outcome"], "data": rows})

    def _outcomes(self) -> list[RunOutcome]:
        if not self._exists():
            raise FileError(
                expected=f"a list of runs at {self._filepath}", got="no such file", remedy="start the runs first"
            )
        return [RunOutcome(**row) for row in json.loads(self._filepath.read_text(encoding="utf-8"))]

    def _result(self, outcome: RunOutcome) -> RunResult:
        import pandas as pd

        if outcome.message is not None:
            return RunResult(outcome)
        folder = self._reports / outcome.subject
        try:
            metrics = json.loads((folder / self._metrics).read_text(encoding="utf-8"))
            seconds = pd.read_csv(folder / self._history)["seconds"].tolist()
        except (OSError, ValueError, KeyError) as error:
            raise FileError(
                expected=f"{self._metrics} and {self._history} of a finished run in {folder}",
                got=f"{type(error).__name__}: {error}",
                remedy=f"delete {folder}, and run the same command again",
            ) from error
        picture = None if self._picture is None else partial(_read_picture, folder / self._picture)
        return RunResult(outcome, metrics, tuple(seconds), picture)

    def _exists(self) -> bool:
        return self._filepath.is_file()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": self._filepath.as_posix(), "path": self._reports.as_posix()}


def _read_picture(file: Path) -> "Image":
    from PIL import Image

    try:
        with Image.open(file, formats=["PNG"]) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise FileError(
            expected=f"the picture of a finished run in {file}",
            got=f"{type(error).__name__}: {error}",
            remedy=f"delete {file.parent}, and run the same command again",
        ) from error
