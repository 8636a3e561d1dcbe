"""The catalog: Kedro's, with datasets of local files that are written completely or not at all."""

from __future__ import annotations

import sys
from collections.abc import Callable, Set
from contextlib import AbstractContextManager, ExitStack
from io import FileIO
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem
from kedro.io import DataCatalog

from dreamartist_pipeline.whole_files import written_whole


class ProjectCatalog(DataCatalog):
    """Kedro's catalog, in which datasets of Kedro's libraries write their local files through `written_whole`.

    Those datasets open their files through fsspec; the project's own ones call `written_whole` themselves.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._provided: dict[str, Callable[[], Any]] = {}
        super().__init__(*args, **kwargs)

    @property
    def provided(self) -> Set[str]:
        """Names of the datasets whose values are not those of their files."""
        return self._provided.keys()

    def provide(self, name: str, value: Callable[[], Any]) -> None:
        """Load what a function returns in place of a dataset from now on."""
        self._provided[name] = value

    def load(self, ds_name: str, version: str | None = None) -> Any:
        """Load a dataset."""
        return self._provided[ds_name]() if ds_name in self._provided else super().load(ds_name, version)

    def exists(self, ds_name: str) -> bool:
        """Return whether a dataset has something to load."""
        found: bool = ds_name in self._provided or super().exists(ds_name)
        return found

    def save(self, ds_name: str, data: Any) -> None:
        """Save data to a dataset."""
        dataset: Any = self.get(ds_name)
        if type(getattr(dataset, "_fs", None)) is LocalFileSystem:
            dataset._fs = WholeFileSystem(**dataset._fs.storage_options)
        super().save(ds_name, data)


class WholeFileSystem(LocalFileSystem):  # type: ignore[misc]  # its library has no types
    """Local files, of which those that are opened for writing appear when they are closed without an error."""

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **kwargs: Any) -> Any:
        if mode != "wb":
            return super()._open(path, mode, block_size, **kwargs)
        return _WholeFile(written_whole(Path(self._strip_protocol(path))))


class _WholeFile(FileIO):
    """A new file that is open for writing.

    `close` does not know whether the `with` statement around it ends by an error, but Python does.
    """

    def __init__(self, whole: AbstractContextManager[Path]) -> None:
        with ExitStack() as stack:
            super().__init__(stack.enter_context(whole), "wb")
            self._error_before, self._ending = sys.exception(), stack.pop_all()

    def close(self) -> None:
        """Close the file and put it in its place, or remove it after an error."""
        if self.closed:
            return
        error = sys.exception()
        super().close()
        if error is None or error is self._error_before:
            self._ending.close()
        else:
            self._ending.__exit__(type(error), error, error.__traceback__)
