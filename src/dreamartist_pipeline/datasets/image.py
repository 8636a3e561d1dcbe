"""Datasets of single pictures: the user's own as bytes, the project's as Pillow images saved whole or not at all.

Annotations here are evaluated (no `from __future__ import annotations`): kedro-viz reads the return type of `preview`.
"""

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedro.io import AbstractDataset, DatasetError
from kedro_datasets._typing import ImagePreview
from kedro_datasets.partitions import PartitionedDataset

from dreamartist_pipeline.core.image_set import CaptionedImages
from dreamartist_pipeline.datasets.whole_files import written_whole

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.PngImagePlugin import PngInfo

_PREVIEW_SIDE_PX = 512
_PREVIEWED, _PREVIEW_COLUMNS, _PREVIEW_CELL_PX = 8, 4, 120


class ReferenceImageDataset(AbstractDataset[None, bytes]):
    """The reference image as the user's file holds it; decoding it, and judging it, is ingestion's step.

    Args:
        filepath: an image file.
    """

    def __init__(self, *, filepath: str, metadata: dict[str, Any] | None = None) -> None:
        self._filepath = Path(filepath)
        self.metadata = metadata

    def load(self) -> bytes:
        """Read the file's bytes."""
        return _read(self._filepath, "the reference image", "give its path as --params image=PATH")

    def save(self, data: None) -> None:
        """Refuse: it is input."""
        raise DatasetError(f"{self._filepath} is the user's own picture; it is only read")

    def preview(self) -> ImagePreview:
        """Show the picture, scaled down."""
        return _file_preview(self.load())

    def _exists(self) -> bool:
        return self._filepath.is_file()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": self._filepath.as_posix()}


class OptionalImageDataset(AbstractDataset[None, bytes | None]):
    """A picture that may be left out: loads to None without a filepath; a filepath without a file is an error.

    Args:
        filepath: an image file, or None.
        what: what the picture is called in messages.
        setting: the run's setting that names the file.
    """

    def __init__(
        self,
        *,
        filepath: str | None = None,
        what: str = "the attention mask",
        setting: str = "mask",
        metadata: dict[str, Any] | None = None,
    ) -> None:
        self._filepath = Path(filepath) if filepath else None
        self._what, self._setting = what, setting
        self.metadata = metadata

    def load(self) -> bytes | None:
        """Read the file's bytes, if there is a file to read."""
        if self._filepath is None:
            return None
        return _read(self._filepath, self._what, f"correct --params {self._setting}=PATH, or leave it out")

    def save(self, data: None) -> None:
        """Refuse: it is input."""
        raise DatasetError(f"{self._what} is the user's own picture; it is only read")

    def preview(self) -> ImagePreview:
        """Show the picture, scaled down; nothing when there is none."""
        data = self.load()
        return ImagePreview("") if data is None else _file_preview(data)

    def _exists(self) -> bool:
        return self._filepath is None or self._filepath.is_file()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": self._filepath and self._filepath.as_posix()}


class CaptionDataset(AbstractDataset[None, str]):
    """What the reference image shows beside the subject: a caption given, or the text file beside the image, or "".

    The text file has the image's name with the suffix .txt, as LoRA training tools expect it.

    Args:
        filepath: the reference image's file; under this name Kedro makes it absolute.
        caption: takes precedence over the text file.
    """

    def __init__(self, *, filepath: str, caption: str | None = None, metadata: dict[str, Any] | None = None) -> None:
        self._file = Path(filepath).with_suffix(".txt")
        self._caption = caption
        self.metadata = metadata

    def load(self) -> str:
        """Return the caption in one line; "" when there is none.

        Raises:
            DatasetError: the text file is not text in UTF-8.
        """
        if self._caption is not None:
            return str(self._caption).strip()
        if not self._file.is_file():
            return ""
        try:
            return " ".join(self._file.read_text(encoding="utf-8").split())
        except UnicodeDecodeError as error:
            raise DatasetError(
                f"expected the picture's caption as UTF-8 text in {self._file}; got something else ({error}); "
                'save it as UTF-8, rename it, or give --params caption="…"'
            ) from error

    def save(self, data: None) -> None:
        """Refuse: it is input."""
        raise DatasetError("the caption is the user's own text; it is only read")

    def _exists(self) -> bool:
        return True

    def _describe(self) -> dict[str, Any]:
        return {"file": self._file.as_posix(), "caption": self._caption}


class ImageDataset(AbstractDataset["Image", "Image"]):
    """A Pillow image in a lossless file; a save replaces the old file in one step.

    A drawn image's settings (`image.info`, keys of `KEPT_TEXTS`) are kept in the file's metadata, where it is a PNG.

    Args:
        filepath: where; the suffix names the format.
        save_args: what Pillow's `Image.save` takes besides.
    """

    def __init__(
        self, *, filepath: str, save_args: dict[str, Any] | None = None, metadata: dict[str, Any] | None = None
    ) -> None:
        self._filepath = Path(filepath)
        self._save_args = save_args or {}
        self.metadata = metadata

    def load(self) -> "Image":
        """Read the image in its own mode."""
        from PIL import Image

        data = _read(self._filepath, "an image", "run the pipeline that makes it")
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return image.copy()

    def save(self, data: "Image") -> None:
        """Write the image, whole or not at all."""
        save_image(data, self._filepath, **self._save_args)

    def preview(self) -> ImagePreview:
        """Show the image, scaled down."""
        return _file_preview(_read(self._filepath, "an image", "run the pipeline that makes it"))

    def _exists(self) -> bool:
        return self._filepath.is_file()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": self._filepath.as_posix(), "save_args": self._save_args}


class ImageRunsDataset(PartitionedDataset):  # type: ignore[misc]  # its library has no types
    """Named images in a folder that is new for every run; a preview shows those of the newest.

    Args:
        path: this run's folder; the folders beside it that begin with a digit are those of earlier runs.
        metadata: for kedro-viz.
    """

    def __init__(self, *, path: str, metadata: dict[str, Any] | None = None) -> None:
        super().__init__(path=path, dataset=ImageDataset, filename_suffix=".png", metadata=metadata)

    def preview(self) -> ImagePreview:
        """Show the first images of the newest run."""
        runs = sorted(folder for folder in Path(self._path).parent.glob("[0-9]*") if folder.is_dir())
        files = sorted(runs[-1].glob("*.png")) if runs else []
        return grid_preview([(file.stem, ImageDataset(filepath=str(file)).load) for file in files])


KEPT_TEXTS = ("parameters", "dreamartist")
"""What of `image.info` goes into a PNG: how the image was drawn, and nothing that a user's own picture brings along."""


def save_image(image: "Image", file: Path, **save_args: Any) -> None:
    """Write an image under a temporary name beside it, then rename: readers see the old file or the whole new one."""
    if file.suffix.lower() == ".png" and (texts := _texts(image)) is not None:
        save_args = {"pnginfo": texts, **save_args}
    with written_whole(file) as temporary:
        image.save(temporary, **save_args)


def _texts(image: "Image") -> "PngInfo | None":
    from PIL.PngImagePlugin import PngInfo

    texts = PngInfo()
    kept = [key for key in KEPT_TEXTS if key in image.info]
    for key in kept:
        texts.add_itxt(key, image.info[key])
    return texts if kept else None


def grid_preview(captioned: CaptionedImages) -> ImagePreview:
    """Return what kedro-viz shows of several images: the first ones, each above its caption; nothing of none."""
    from dreamartist_pipeline.core.images import image_grid

    first = captioned[:_PREVIEWED]
    if not first:
        return ImagePreview("")
    images, captions = [read() for _, read in first], [caption for caption, _ in first]
    return image_preview(image_grid(images, _PREVIEW_COLUMNS, captions, _PREVIEW_CELL_PX))


def _read(file: Path, what: str, remedy: str) -> bytes:
    if file.is_file():
        return file.read_bytes()
    got = "a folder" if file.is_dir() else "no such file"
    raise DatasetError(f"expected {what} at {file}; got {got}; {remedy}{_neighbours(file)}")


def _neighbours(file: Path) -> str:
    """Name the pictures that lie where this one was expected."""
    folder = file if file.is_dir() else file.parent
    if not folder.is_dir():
        return ""
    names = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    return f" (in {folder}: {', '.join(names[:12])}{', …' if len(names) > 12 else ''})" if names else ""


def _file_preview(data: bytes) -> ImagePreview:
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        return image_preview(image)


def image_preview(image: "Image") -> ImagePreview:
    """Return what kedro-viz shows of an image, scaled down."""
    small = image.convert("RGBA" if image.has_transparency_data else "RGB")
    small.thumbnail((_PREVIEW_SIDE_PX, _PREVIEW_SIDE_PX))
    png = io.BytesIO()
    small.save(png, "PNG")
    return ImagePreview(base64.b64encode(png.getvalue()).decode())
