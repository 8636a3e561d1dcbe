"""The files of a run: one run of a subject at a time, and files that belong together appear together."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from kedro.framework.context import KedroContext
from kedro.framework.hooks import hook_impl
from kedro.io import DataCatalog
from kedro.pipeline import Pipeline
from kedro.pipeline.node import Node

from dreamartist_pipeline.disk_space import PNG_PIXEL_BYTES, check_free_space, existing_folder
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.hooks.run import path_of, settings_of
from dreamartist_pipeline.locks import LocalLock
from dreamartist_pipeline.params import GenerateParams
from dreamartist_pipeline.starting_runs import RUN_KEY
from dreamartist_pipeline.whole_files import STAGED, finish_publishing, publish, remove_leftovers

_CONCEPT = "concept"
JOURNAL = ".publishing.json"
"""Name of the file, beside a concept, that says which results are being put in their places."""
_LOCK = ".lock"
_OF_ALL_SUBJECTS = {"judge": "the training of the judge", "pretrain": "the pretraining of the base model"}
_OTHER_FOLDERS = "choose other folders in the catalog"
_FREE_BYTES = 16 * 2**20  # the reports of a run, without its images and adapters
_LOST_WORKER_S = 300  # a started run waits for the one it replaces, which may save its state, or not know yet
_GENERATED = "generated_images"
_NUM_COPIES = 3  # of each generated image: itself, in the sheet, and in the tracking store's copy of that
_USUAL_SIDE_PX = 512  # where no size is given, which the base model decides


def lock_of(folder: Path, subject: str) -> LocalLock:
    """Return the lock of a subject, which is in the folder of its concept."""
    return LocalLock(folder / _LOCK, f"the subject {subject}")


class OutputHooks:
    """Let one run at a time write into the folders of a subject, and publish what belongs together at once.

    A run that is to replace a concept leaves the earlier one, its pictures, plan, prompts and reports unchanged until
    the new concept is complete; then all of them are replaced. Otherwise the files of one node are. They are stored in
    hidden folders until then. After a kill while they are replaced, the next run of the subject completes that.
    """

    def __init__(self) -> None:
        self._run = ExitStack()
        self._journal: Path | None = None
        self._final: dict[str, Path] = {}  # datasets that are stored aside
        self._unsaved: dict[str, set[str]] = {}  # node -> its outputs that are not saved yet
        atexit.register(self._end)  # Kedro calls no hook on Ctrl-C

    @hook_impl
    def after_context_created(self, context: KedroContext) -> None:
        """Store the subject."""
        self._subject = str(settings_of(context)["subject"])

    @hook_impl(tryfirst=True)  # after ConfigurationHooks and before MLflowHooks, see settings.HOOKS
    def before_pipeline_run(self, pipeline: Pipeline, catalog: DataCatalog) -> None:
        """Check the folders of the outputs, and lock those of the subject.

        Raises:
            InputError: a folder that is not writable, a full disk, or another run of the subject.
        """
        self._end()  # an interrupted run in this process
        self._catalog, self._journal = catalog, None
        folders = output_folders(pipeline, catalog)
        check_folders(folders)
        if _GENERATED in pipeline.all_outputs() and (images := path_of(catalog, _GENERATED)) is not None:
            check_images_fit(images, catalog.load("params:generate"))
        self._lock_shared(pipeline, catalog)
        concept = path_of(catalog, _CONCEPT)
        if concept is None or not any(self._subject in folder.parts for folder in folders):
            return
        place = folders[0] if write_error(concept.parent) else concept.parent  # a concept may be read-only
        wait_s = _LOST_WORKER_S if RUN_KEY in os.environ else 0
        self._run.enter_context(lock_of(place, self._subject).hold(wait_s))
        self._journal = place / JOURNAL
        self._final.clear()
        self._unsaved.clear()
        finish_publishing(self._journal)
        self._run.callback(self._discard, folders, self._journal)
        for folder in folders:
            remove_leftovers(folder)
            shutil.rmtree(folder / STAGED, ignore_errors=True)
        self._awaits_concept = _CONCEPT in pipeline.all_outputs() and catalog.exists(_CONCEPT)

    def _lock_shared(self, pipeline: Pipeline, catalog: DataCatalog) -> None:
        """Lock the checkpoints of a model that belongs to no subject: a second run would mix its parts with them."""
        for section, protects in _OF_ALL_SUBJECTS.items():
            if f"params:{section}" in pipeline.inputs():
                folder = Path(catalog.load(f"params:{section}").checkpoints)
                self._run.enter_context(LocalLock(folder / _LOCK, protects).hold())
                return  # that of the judge reads parameters of the pretraining

    @hook_impl
    def before_dataset_saved(self, dataset_name: str, node: Node) -> None:
        """Store a file aside if others belong to it."""
        if self._journal is None:
            return
        self._unsaved.setdefault(node.name, set(node.outputs))
        final = path_of(self._catalog, dataset_name)
        if (self._awaits_concept or len(node.outputs) > 1) and final is not None and self._is_plain_file(dataset_name):
            self._final.setdefault(dataset_name, final)
            self._move(dataset_name, final.parent / STAGED / final.name)

    @hook_impl
    def after_dataset_saved(self, dataset_name: str, node: Node) -> None:
        """After the last file of a set, put all of them in their places."""
        if self._journal is None:
            return
        self._unsaved[node.name].discard(dataset_name)
        if self._unsaved[node.name] or (self._awaits_concept and _CONCEPT not in node.outputs):
            return
        self._awaits_concept = False
        published = tuple(self._final)
        publish(self._final.values(), self._journal)
        self._return_to_final()
        for name in published:
            getattr(self._catalog.get(name), "published", lambda: None)()

    @hook_impl(trylast=True)
    def after_pipeline_run(self) -> None:
        """Release the lock."""
        self._end()

    @hook_impl(trylast=True)
    def on_pipeline_error(self) -> None:
        """Remove what was not published, and release the lock."""
        self._end()

    def _end(self) -> None:
        self._run.close()

    def _discard(self, folders: Iterable[Path], journal: Path) -> None:
        """Remove the files that are stored aside, unless an interruption has just stopped their publishing."""
        self._return_to_final()
        finish_publishing(journal)
        for folder in folders:
            shutil.rmtree(folder / STAGED, ignore_errors=True)

    def _return_to_final(self) -> None:
        for name, final in self._final.items():
            self._move(name, final)
        self._final.clear()

    def _move(self, name: str, file: Path) -> None:
        dataset: Any = self._catalog.get(name)
        dataset._filepath = type(dataset._filepath)(file)

    def _is_plain_file(self, name: str) -> bool:
        """Return whether a dataset is one local file without versions."""
        dataset: Any = self._catalog.get(name)
        is_local = getattr(dataset, "_protocol", "file") == "file" and getattr(dataset, "_version", None) is None
        return is_local and hasattr(dataset, "_filepath")


def output_folders(pipeline: Pipeline, catalog: DataCatalog) -> tuple[Path, ...]:
    """Return the folders of all files and folders that a pipeline writes."""
    datasets: list[Any] = [catalog.get(name) for name in sorted(pipeline.all_outputs())]
    paths = [getattr(dataset, name, None) for dataset in datasets for name in ("_filepath", "_path")]
    return tuple(dict.fromkeys(Path(path).parent for path in paths if path is not None))


def check_folders(folders: Iterable[Path]) -> None:
    """Check that files can be created in folders, or the folders themselves, and that their disks are not full.

    Raises:
        InputError: one of these is not so.
    """
    for present, folder in {existing_folder(folder): folder for folder in folders}.items():
        if (error := write_error(present)) is not None:
            raise InputError(
                expected=f"to write into {folder}",
                got=f"{error.strerror} ({present})",
                remedy=f"make it writable, or {_OTHER_FOLDERS}",
            ) from error
        check_free_space(folder, _FREE_BYTES, "the reports of a run", _OTHER_FOLDERS)


def check_images_fit(folder: Path, params: GenerateParams) -> None:
    """Check that there is room for the images of `generate`, which are saved when all are drawn.

    Raises:
        InputError: there is less.
    """
    width, height = params.size_px or (_USUAL_SIDE_PX, _USUAL_SIDE_PX)
    num_images = len(params.prompts) * params.images_per_prompt
    needed = _NUM_COPIES * num_images * PNG_PIXEL_BYTES * width * height
    check_free_space(folder, needed, f"{num_images:,} images", "lower generate.images_per_prompt or the size")


def write_error(folder: Path) -> OSError | None:
    """Return why no file can be created in a folder, or the folder itself; None if it is possible.

    It is tried: permissions do not tell it of read-only disks, nor to root.
    """
    try:
        with tempfile.TemporaryFile(dir=existing_folder(folder)):
            return None
    except OSError as error:
        return error
