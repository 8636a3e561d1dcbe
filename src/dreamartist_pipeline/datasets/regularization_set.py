"""The regularization set: captioned images in a folder named after what made them, shared by all subjects.

Annotations here are evaluated (no `from __future__ import annotations`): kedro-viz reads the return type of `preview`.
"""

import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from kedro.io import AbstractDataset, DatasetError
from kedro_datasets._typing import ImagePreview

from dreamartist_pipeline.core.image_set import CaptionedImages, ImagesToDraw
from dreamartist_pipeline.datasets.image import grid_preview, save_image
from dreamartist_pipeline.datasets.whole_files import written_whole

if TYPE_CHECKING:
    from PIL.Image import Image

_CAPTIONS, _MANIFEST = "image_captions.json", "manifest.json"
_DAMAGE = (OSError, SyntaxError, ValueError)  # Pillow's, of a missing file too

log = logging.getLogger(__name__)


class RegularizationSetDataset(AbstractDataset[ImagesToDraw, CaptionedImages]):
    """The set that a subject uses: a save draws what is not there, a load reads captions, and pictures on demand.

    A set is `<path>/<key>/`: PNGs, image_captions.json (file name -> caption) and manifest.json. Until its last image
    is drawn it is `<path>/<key>.partial/`. Runs that save the same set wait for one of them.

    Args:
        filepath: a copy of the manifest, which says which set the subject uses.
        path: the folder of all sets.
    """

    def __init__(self, *, filepath: str, path: str, metadata: dict[str, Any] | None = None) -> None:
        self._filepath, self._path = Path(filepath), Path(path)
        self.metadata = metadata

    def load(self) -> CaptionedImages:
        """Return the captions in the order of the images, each with what reads its image.

        Raises:
            DatasetError: there is no set yet, or it is no longer whole; a damaged image is found when it is read.
        """
        manifest = _read_json(self._filepath) or {}
        folder = self._folder(str(manifest.get("key", "none")))
        captions = _read_json(folder / _CAPTIONS)
        if captions is None or not all((folder / name).is_file() for name in captions):
            raise DatasetError(
                f"expected a whole regularization set in {folder}, which {self._filepath} names; got none, or a part "
                "of it; draw what is missing (kedro run --pipelines prompts,regularization --params subject=NAME)"
            )
        return [(caption, partial(_read_image, folder / name)) for name, caption in captions.items()]

    def save(self, data: ImagesToDraw) -> None:
        """Draw the images that are missing or damaged, each on disk before the next, and say which set is in use.

        Raises:
            DatasetError: fewer images were drawn than asked for, or what drawing them raises.
        """
        self._path.mkdir(parents=True, exist_ok=True)
        data = data if self._folder(data.key).exists() else self._adopted(data)
        folder = self._folder(data.key)
        with FileLock(folder.with_name(f".{data.key}.lock")):
            partial_folder = folder if folder.exists() else folder.with_name(f"{data.key}.partial")
            _complete(partial_folder, data)
            if partial_folder != folder:
                partial_folder.replace(folder)
        _save_json(self._filepath, data.manifest)

    def _adopted(self, data: ImagesToDraw) -> ImagesToDraw:
        """Return the requested set under the name that it has here already, if it has another."""
        for file in sorted(self._path.glob(f"*/{_MANIFEST}")):
            manifest = _read_json(file) or {}
            if manifest.get("key") == file.parent.name and data.is_in(manifest):
                return replace(data, key=file.parent.name, manifest=manifest)
        return data

    def preview(self) -> ImagePreview:
        """Show the first pictures with their captions."""
        return grid_preview(self.load())

    def _folder(self, key: str) -> Path:
        if not re.fullmatch(r"[\w-]+", key):
            raise DatasetError(f"expected a key of letters, digits, '_' and '-'; got {key!r}; delete {self._filepath}")
        return self._path / key

    def _exists(self) -> bool:
        try:
            self.load()
        except DatasetError:
            return False
        return True

    def _describe(self) -> dict[str, Any]:
        return {"filepath": self._filepath.as_posix(), "path": self._path.as_posix()}


def _complete(folder: Path, data: ImagesToDraw) -> None:
    """Bring a folder to hold the whole set, batch by batch."""
    files = {folder / f"{index:06d}.png": caption for index, caption in enumerate(data.captions)}
    whole = [_is_whole(file) for file in files]
    starts = range(0, len(files), data.batch_size)
    batches = [range(len(files))[start : start + data.batch_size] for start in starts]
    missing = [batch for batch in batches if not all(whole[index] for index in batch)]
    if missing:
        log.info("Drawing the regularization set %s: %d images, %d already there.", data.key, len(files), sum(whole))
        _save_images([list(files)[index] for batch in missing for index in batch], data.draw(missing))
    else:
        log.info("The regularization set %s (%d images) is complete and is used again.", data.key, len(files))
    _save_json(folder / _CAPTIONS, {file.name: caption for file, caption in files.items()})
    _save_json(folder / _MANIFEST, data.manifest)


def _save_images(files: list[Path], images: Iterator["Image"]) -> None:
    """Write each image as it comes."""
    for num_saved, file in enumerate(files):
        image = next(images, None)
        if image is None:
            raise DatasetError(f"expected {len(files)} images to be drawn; got {num_saved}; this is an error of ours")
        save_image(image, file)


def _is_whole(file: Path) -> bool:
    """Whether a PNG is there with every byte that its checksums stand for."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            image.verify()
    except _DAMAGE:
        return False
    return True


def _read_image(file: Path) -> "Image":
    """Read one image of the set as RGB."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except _DAMAGE as error:
        raise DatasetError(
            f"expected an image of the regularization set in {file}; got: {error}; draw it again "
            "(kedro run --pipelines prompts,regularization --params subject=NAME)"
        ) from error


def _read_json(file: Path) -> dict[str, Any] | None:
    """Return the mapping in a file, or None where there is none that can be read."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _save_json(file: Path, content: Mapping[str, Any]) -> None:
    with written_whole(file) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
