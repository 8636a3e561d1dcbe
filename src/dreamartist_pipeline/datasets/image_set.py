"""Sets of images that the base model draws: a folder each, named by the hash of their settings, shared by all subjects.

Annotations here are evaluated (no `from __future__ import annotations`): kedro-viz reads the return type of `preview`.
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedro.io import AbstractDataset, DatasetError
from kedro_datasets._typing import ImagePreview

from dreamartist_pipeline.core.image_set import ImageSet, ImagesToDraw
from dreamartist_pipeline.datasets.image import PNG_DAMAGE, grid_preview, is_whole_png, save_image
from dreamartist_pipeline.datasets.inputs import FileError
from dreamartist_pipeline.datasets.shared_set import SharedSet
from dreamartist_pipeline.disk_space import check_free_space
from dreamartist_pipeline.locks import LocalLock
from dreamartist_pipeline.object_stores import ObjectStore
from dreamartist_pipeline.whole_files import written_whole

if TYPE_CHECKING:
    from PIL.Image import Image

_CAPTIONS, _MANIFEST = "image_captions.json", "manifest.json"
_WAIT_S = 24 * 60 * 60.0  # for another run that draws the same set
_MAX_NAMED = 5  # damaged images in a warning

log = logging.getLogger(__name__)


class ImageSetDataset(AbstractDataset[ImagesToDraw, ImageSet]):
    """The set that a subject uses: a save draws the missing images, a load reads the captions, and images on demand.

    A set is `<path>/<key>/`: PNGs, image_captions.json (file name -> caption) and manifest.json. Until its last image
    is drawn it is `<path>/<key>.partial/`. A lock file makes concurrent runs draw a set only once. With a store, what
    is missing here is drawn together with other machines, see `SharedSet`.

    Args:
        filepath: a copy of the manifest of the set that the subject uses.
        path: the folder of all sets.
        title: what it is, in messages.
        command: that draws it, in messages.
        store: URL of a folder with sets of all machines.
    """

    def __init__(
        self,
        *,
        filepath: str,
        path: str,
        title: str,
        command: str,
        store: str | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        self._filepath, self._path = Path(filepath), Path(path)
        self._title, self._command, self._store = title, command, store
        self.metadata = metadata

    def load(self) -> ImageSet:
        """Return each caption with a function that reads its image, in the order of the prompts, and the manifest.

        Raises:
            FileError: no set, or an incomplete one. A damaged image raises it when it is read.
        """
        folder = self.stored_at()
        captions, manifest = _read_json(folder / _CAPTIONS), _read_json(folder / _MANIFEST)
        if captions is None or manifest is None or not all((folder / name).is_file() for name in captions):
            raise FileError(
                expected=f"the {self._title} in {folder}, as named in {self._filepath}",
                got="no set, or an incomplete one",
                remedy=self._draw_again,
            )
        images = [(caption, partial(self._read_image, folder / name)) for name, caption in captions.items()]
        return ImageSet(images, manifest)

    def save(self, data: ImagesToDraw) -> None:
        """Draw missing and damaged images, each written before the next is drawn, then write the subject's manifest.

        Raises:
            FileError: a key that cannot be a folder's name.
            InputError: too little space on the disk, or the store cannot be reached.
            LockHeldError: another run has been drawing the same set for a day.
            DatasetError: another number of images than requested, or an error while drawing.
        """
        self._path.mkdir(parents=True, exist_ok=True)
        data = data if self._folder(data.key).exists() else self._adopted(data)
        folder = self._folder(data.key)
        lock = LocalLock(folder.with_name(f".{data.key}.lock"), f"the {self._title} {data.key}")
        with lock.hold(wait_s=_WAIT_S):
            partial_folder = folder if folder.exists() else folder.with_name(f"{data.key}.partial")
            self._complete(partial_folder, data)
            if partial_folder != folder:
                partial_folder.replace(folder)
        _save_json(self._filepath, data.manifest)

    def _adopted(self, data: ImagesToDraw) -> ImagesToDraw:
        """Return the requested set under the key of an equal set on disk, if there is one."""
        for file in sorted(self._path.glob(f"*/{_MANIFEST}")):
            manifest = _read_json(file) or {}
            if manifest.get("key") == file.parent.name and data.is_in(manifest):
                return replace(data, manifest=manifest)
        return data

    def preview(self) -> ImagePreview:
        """Show the first images with their captions."""
        return grid_preview(self.load())

    def stored_at(self) -> Path:
        """Return the folder of the subject's set."""
        return self._folder(str((_read_json(self._filepath) or {}).get("key", "none")))

    def _folder(self, key: str) -> Path:
        if not re.fullmatch(r"[\w-]+", key):
            raise FileError(
                expected="a key of letters, digits, '_' and '-'", got=f"{key!r}", remedy=f"delete {self._filepath}"
            )
        return self._path / key

    def _complete(self, folder: Path, data: ImagesToDraw) -> None:
        """Draw the missing images of a folder, batch by batch, then write captions and manifest."""
        files = {folder / f"{index:06d}.png": caption for index, caption in enumerate(data.captions)}
        whole = [is_whole_png(file) for file in files]
        _warn_damaged([file for file, is_whole in zip(files, whole, strict=True) if file.exists() and not is_whole])
        missing = [batch for batch in data.batches if not all(whole[index] for index in batch)]
        shared = self._shared(data.key)
        if not missing and (shared is None or shared.has([*files])):
            shared = None
            log.info("The %s %s (%d images) is complete and is reused.", self._title, data.key, len(files))
        else:
            log.info("Drawing the %s %s: %d images, %d already there.", self._title, data.key, len(files), sum(whole))
            num_missing = sum(map(len, missing))
            check_free_space(folder, num_missing * data.image_bytes, f"{num_missing} images", data.to_draw_fewer)
            if shared is not None:
                shared.complete([*files], data.batches, data.draw)
            else:
                requested = [[*files][index] for batch in missing for index in batch]
                for file, image in zip(requested, data.draw(missing), strict=True):
                    save_image(image, file)
        texts = {_CAPTIONS: {file.name: caption for file, caption in files.items()}, _MANIFEST: data.manifest}
        for name, content in texts.items():
            _save_json(folder / name, content)
        if shared is not None:
            shared.publish({name: (folder / name).read_bytes() for name in texts})

    def _shared(self, key: str) -> SharedSet | None:
        if self._store is None:
            return None
        return SharedSet(ObjectStore(self._store).folder(self._path.name, key), self._title)

    def _read_image(self, file: Path) -> "Image":
        """Read one image of the set as RGB."""
        from PIL import Image

        try:
            with Image.open(file, formats=["PNG"]) as image:
                return image.convert("RGB")
        except PNG_DAMAGE as error:
            raise FileError(
                expected=f"an image of the {self._title} in {file}", got=f"{error}", remedy=self._draw_again
            ) from error

    @property
    def _draw_again(self) -> str:
        return f"draw it again ({self._command})"

    def _exists(self) -> bool:
        try:
            self.load()
        except DatasetError:
            return False
        return True

    def _describe(self) -> dict[str, Any]:
        return {"filepath": self._filepath.as_posix(), "path": self._path.as_posix()}


def _warn_damaged(files: Sequence[Path]) -> None:
    if files:
        named = ", ".join(file.name for file in files[:_MAX_NAMED]) + (", …" if len(files) > _MAX_NAMED else "")
        log.warning("Damaged images in %s are drawn again: %s.", files[0].parent, named)


def _read_json(file: Path) -> dict[str, Any] | None:
    """Return the mapping in a JSON file, or None without a readable one."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _save_json(file: Path, content: Mapping[str, Any]) -> None:
    with written_whole(file) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
