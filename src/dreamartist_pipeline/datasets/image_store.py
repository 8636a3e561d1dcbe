"""Sets of captioned images, each in a folder named after what made it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from kedro.io import AbstractDataset, DatasetError

from dreamartist_pipeline.datasets.image import save_image
from dreamartist_pipeline.datasets.whole_files import written_whole

if TYPE_CHECKING:
    from PIL.Image import Image

DrawBatch = Callable[[Sequence[int]], Iterable["Image"]]
"""Indices of some images -> those images, in the same order."""

_CAPTIONS, _MANIFEST = "image_captions.json", "manifest.json"


@dataclass(frozen=True)
class ImageStore:
    """Complete sets under `root/<key>/`: PNGs, image_captions.json (file name -> caption) and manifest.json.

    An unfinished set lives in `root/<key>.partial/` until its last image is written.
    """

    root: Path

    def has(self, key: str) -> bool:
        """Whether the set is complete: its manifest, its captions and every image are there."""
        folder = self.folder(key)
        if not (folder / _MANIFEST).is_file() or not (folder / _CAPTIONS).is_file():
            return False
        return all((folder / name).is_file() for name in self.captions(key))

    def captions(self, key: str) -> dict[str, str]:
        """File name -> caption, in the order of the images."""
        captions: dict[str, str] = json.loads((self.folder(key) / _CAPTIONS).read_text(encoding="utf-8"))
        return captions

    def manifest(self, key: str) -> dict[str, Any]:
        """What made the set."""
        manifest: dict[str, Any] = json.loads((self.folder(key) / _MANIFEST).read_text(encoding="utf-8"))
        return manifest

    def manifests(self) -> Iterator[dict[str, Any]]:
        """What made each of the complete sets."""
        for file in sorted(self.root.glob(f"*/{_MANIFEST}")):
            if not file.parent.name.endswith(".partial") and self.has(file.parent.name):
                yield self.manifest(file.parent.name)

    def images(self, key: str) -> Iterator[Image]:
        """Open the images one by one, in the order of `captions`."""
        from PIL import Image as PillowImage

        for name in self.captions(key):
            with PillowImage.open(self.folder(key) / name) as image:
                yield image.convert("RGB")

    def write(
        self, key: str, captions: Sequence[str], draw_batch: DrawBatch, batch_size: int, manifest: Mapping[str, Any]
    ) -> None:
        """Make a set batch by batch, each image on disk as soon as it is drawn, and publish it by one rename.

        An interrupted set goes on at the first batch that lacks an image; batches are cut alike every time, so that the
        set holds the same bytes whether or not it was interrupted. Runs that want the same set wait for one of them.

        Args:
            key: the set's name; must stand for everything that shapes the images.
            captions: one per image.
            draw_batch: draws the images of some indices.
            batch_size: how many indices it gets at once.
            manifest: what made the set; JSON types.

        Raises:
            RuntimeError: `draw_batch` gave another number of images than it was asked for.
        """
        with FileLock(self._lock_file(key)):
            if not self.has(key):  # another run may have made it while this one waited
                self._write(key, captions, draw_batch, batch_size, manifest)

    def _write(
        self, key: str, captions: Sequence[str], draw_batch: DrawBatch, batch_size: int, manifest: Mapping[str, Any]
    ) -> None:
        partial = self._open_partial(key)
        named = {f"{index:06d}.png": caption for index, caption in enumerate(captions)}
        files = [partial / name for name in named]
        for start in range(0, len(files), batch_size):
            batch = files[start : start + batch_size]
            if not all(file.is_file() for file in batch):
                _save_batch(batch, draw_batch(range(start, start + len(batch))))
        _save_json(partial / _CAPTIONS, named)
        _save_json(partial / _MANIFEST, dict(manifest))
        self._publish(partial, key)

    def num_present(self, key: str) -> int:
        """How many images of an unfinished set are there already."""
        return len(list(self._partial(key).glob("[0-9]*.png")))

    def folder(self, key: str) -> Path:
        """Where the complete set is, or will be."""
        if not re.fullmatch(r"[\w-]+", key):
            raise ValueError(f"expected a key of letters, digits, '_' and '-', got {key!r}")
        return self.root / key

    def _partial(self, key: str) -> Path:
        return self.folder(key).with_name(f"{key}.partial")

    def _lock_file(self, key: str) -> Path:
        self.root.mkdir(parents=True, exist_ok=True)
        return self.folder(key).with_name(f".{key}.lock")

    def _open_partial(self, key: str) -> Path:
        """Return the folder to go on in; a published set that lost files is taken back and completed."""
        partial = self._partial(key)
        if self.folder(key).exists() and not partial.exists():
            self.folder(key).replace(partial)
        partial.mkdir(parents=True, exist_ok=True)
        return partial

    def _publish(self, partial: Path, key: str) -> None:
        if self.folder(key).exists():
            shutil.rmtree(self.folder(key))
        partial.replace(self.folder(key))


def _save_batch(files: Sequence[Path], images: Iterable[Image]) -> None:
    num_saved = 0
    for file, image in zip(files, images, strict=False):
        save_image(image, file)
        num_saved += 1
    if num_saved != len(files):
        raise RuntimeError(f"expected {len(files)} images from draw_batch, got {num_saved}")


def _save_json(file: Path, content: Any) -> None:
    with written_whole(file) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


class ImageStoreDataset(AbstractDataset[None, ImageStore]):
    """Loads to an ImageStore over a folder.

    Args:
        path: the folder of all sets; need not exist yet.
    """

    def __init__(self, *, path: str, metadata: dict[str, Any] | None = None) -> None:
        self._path = Path(path)
        self.metadata = metadata

    def load(self) -> ImageStore:
        """Return the store; nothing is read yet."""
        return ImageStore(self._path)

    def save(self, data: None) -> None:
        """Refuse: sets are written one by one."""
        raise DatasetError("an image store is filled set by set by the node that draws them, not saved as a whole")

    def _exists(self) -> bool:
        return True

    def _describe(self) -> dict[str, Any]:
        return {"path": self._path.as_posix()}
