"""A run of a small pipeline with the hooks of the outputs, in this process or as a program of its own.

`python small_run.py FOLDER TEXT [NODE]` runs it in a folder that holds the data of the subject fox. Every file of the
run holds TEXT; NODE stays in its function until the process is killed.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from kedro.framework.context import KedroContext
from kedro.framework.hooks.manager import _create_hook_manager
from kedro.pipeline import Pipeline, node
from kedro.runner import SequentialRunner

from dreamartist_pipeline.catalog import ProjectCatalog
from dreamartist_pipeline.hooks.outputs import OutputHooks

FILES = {
    "picture": "02/fox/picture.json",
    "plan": "06/fox/plan.json",
    "concept": "06/fox/concept.json",
    "history": "08/fox/history.json",
    "curves": "08/fox/curves.json",
    "sheet": "08/fox/sheet.json",
    "metrics": "08/fox/metrics.json",
}
CONCEPT_SET = ("picture", "plan", "concept", "history")


def catalog_in(folder: Path) -> ProjectCatalog:
    """Return the catalog."""
    datasets = {name: {"type": "json.JSONDataset", "filepath": str(folder / file)} for name, file in FILES.items()}
    return ProjectCatalog.from_config({**datasets, "text": {"type": "MemoryDataset"}})


def pipeline(waits_in: str = "", fails_in: str = "") -> Pipeline:
    """Return a pipeline with the shape of train + evaluate."""

    def work(name: str, num_outputs: int) -> Any:
        def function(text: str, *others: str) -> Any:
            assert set(others) <= {text}, "inputs of another run"
            if name == waits_in:
                print("waiting", flush=True)
                time.sleep(600)
            if name == fails_in:
                raise ZeroDivisionError
            return text if num_outputs == 1 else (text,) * num_outputs

        return function

    nodes = [
        node(work("prepare", 2), ["text"], ["picture", "plan"], name="prepare"),
        node(work("train", 2), ["text", "picture", "plan"], ["concept", "history"], name="train"),
        node(work("draw", 1), ["text", "history"], "curves", name="draw"),
        node(work("evaluate", 2), ["text", "concept", "picture"], ["sheet", "metrics"], name="evaluate"),
    ]
    return Pipeline(nodes)


def run(
    folder: Path,
    text: str,
    waits_in: str = "",
    fails_in: str = "",
    nodes: tuple[str, ...] = (),
    hooks: OutputHooks | None = None,
) -> None:
    """Run the pipeline, or some of its nodes, as a Kedro session does."""
    hooks, manager = hooks or OutputHooks(), _create_hook_manager()
    manager.register(hooks)
    hooks.after_context_created(cast(KedroContext, settings("fox")))
    catalog, part = catalog_in(folder), pipeline(waits_in, fails_in)
    part = part.only_nodes(*nodes) if nodes else part
    catalog["text"] = text
    manager.hook.before_pipeline_run(run_params={}, pipeline=part, catalog=catalog)
    try:
        SequentialRunner().run(part, catalog, manager)
    except Exception as error:
        manager.hook.on_pipeline_error(error=error, run_params={}, pipeline=part, catalog=catalog)
        raise
    manager.hook.after_pipeline_run(run_params={}, run_result={}, pipeline=part, catalog=catalog)


def settings(subject: str) -> Any:
    """Return as much of a Kedro context as names the subject."""
    return SimpleNamespace(config_loader=_Loader({"globals": {"subject": subject}}))


class _Loader(dict[str, Any]):
    runtime_params: dict[str, Any] = {}  # noqa: RUF012


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2], *sys.argv[3:])
