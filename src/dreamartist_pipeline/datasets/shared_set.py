"""A set of images in an object store, of which several machines draw shares."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from dreamartist_pipeline.datasets.image import is_whole_png, save_image
from dreamartist_pipeline.locks import LockHeldError
from dreamartist_pipeline.object_stores import SILENT_S, ObjectStore, StoreLock
from dreamartist_pipeline.whole_files import written_whole

if TYPE_CHECKING:
    from dreamartist_pipeline.core.image_set import DrawBatches

_SHARE_IMAGES = 32  # a minute or more of work for large models, and of loss when a machine is lost
_POLL_S = 1.0

log = logging.getLogger(__name__)


class SharedSet:
    """Draws the images of a set together with other machines, and copies theirs.

    The set is cut into shares of whole batches, the same for all machines. Each machine draws one share after another
    that is neither in the store nor locked, and waits at the end for those of the others; the share of a machine that
    is lost is drawn by another. Every image has its own seed, so that it does not matter who draws it.

    Args:
        store: the folder of the set.
        title: what it is, in messages.
        silent_s: after how long a machine that draws is taken for lost.
    """

    def __init__(self, store: ObjectStore, title: str, silent_s: float = SILENT_S) -> None:
        self._store, self._title, self._silent_s = store, title, silent_s

    def complete(self, files: Sequence[Path], batches: Sequence[Sequence[int]], draw: DrawBatches) -> None:
        """Let the folder of this machine, and the store, have all images.

        Args:
            files: of the images on this machine, in their order; those that are there need not be whole.
            batches: indices of the images that are drawn together.
            draw: see `ImagesToDraw.draw`.

        Raises:
            InputError: the store cannot be reached.
        """
        per_share = max(1, _SHARE_IMAGES // max(map(len, batches), default=1))
        shares = [batches[start : start + per_share] for start in range(0, len(batches), per_share)]
        locks = [
            StoreLock(self._store, f"share-{index:04d}.lock", f"share {index + 1} of the {self._title}", self._silent_s)
            for index in range(len(shares))
        ]
        left, waiting = dict(enumerate(shares)), False
        with tqdm(total=len(files), desc=f"{self._title} in the store", unit="image", delay=_POLL_S) as bar:
            while left:
                for index, share in self._stored(left, files).items():
                    bar.update(sum(map(len, share)))
                    del left[index]
                if any(self._draw(locks[index], share, files, draw) for index, share in left.items()):
                    waiting = False
                elif left:
                    if not waiting:
                        log.info("Other machines draw %d shares of the %s; waiting.", len(left), self._title)
                    waiting = True
                    time.sleep(_POLL_S)

    def has(self, files: Sequence[Path]) -> bool:
        """Return whether the store has all images."""
        return {file.name for file in files} <= self._store.names()

    def publish(self, texts: Mapping[str, bytes]) -> None:
        """Write the set's other files."""
        for name in texts.keys() - self._store.names():
            self._store.write(name, texts[name])

    def _stored(
        self, shares: Mapping[int, Sequence[Sequence[int]]], files: Sequence[Path]
    ) -> dict[int, Sequence[Sequence[int]]]:
        """Return the shares that are in the store, after their images have been copied to this machine."""
        names = self._store.names()
        return {
            index: share
            for index, share in shares.items()
            if all(files[one].name in names for batch in share for one in batch)
            and all(self._copied(files[one]) for batch in share for one in batch)
        }

    def _copied(self, file: Path) -> bool:
        """Copy an image that is missing here; one that is damaged in the store is removed there."""
        if is_whole_png(file):
            return True
        content = self._store.read(file.name)
        if content is None:  # another machine has found it damaged
            return False
        with written_whole(file) as temporary:
            temporary.write_bytes(content)
        if is_whole_png(file):
            return True
        log.warning("The image %s in %s is damaged and is drawn again.", file.name, self._store.url)
        self._store.remove(file.name)
        return False

    def _draw(self, lock: StoreLock, share: Sequence[Sequence[int]], files: Sequence[Path], draw: DrawBatches) -> bool:
        """Draw what is missing of a share, and return whether it was free."""
        try:
            with lock.hold():
                names = self._store.names()
                missing = [batch for batch in share if not all(files[one].name in names for one in batch)]
                drawn = [batch for batch in missing if not all(is_whole_png(files[one]) for one in batch)]
                new = [files[one] for batch in drawn for one in batch]
                for file, image in zip(new, draw(drawn) if drawn else (), strict=True):
                    save_image(image, file)
                    self._copy(file)
                for file in (files[one] for batch in missing if batch not in drawn for one in batch):
                    self._copy(file)
        except LockHeldError:
            return False
        return True

    def _copy(self, file: Path) -> None:
        self._store.write(file.name, file.read_bytes())
