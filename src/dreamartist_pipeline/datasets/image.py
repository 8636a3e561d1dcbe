"""Datasets of single images: the user's files as bytes, the project's as Pillow images written atomically.

Annotations here are evaluated (no `from __future__ import annotations`): kedro-viz reads the return type of `preview`.
"""

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedro.io import AbstractDataset
from kedro_datasets._typing import ImagePreview, TablePreview
from kedro_datasets.partitions import PartitionedDataset

from dreamartist_pipeline.core.image_set import CaptionedImages
from dreamartist_pipeline.datasets.inputs import PICTURE_SUFFIXES, FileError, ReadOnlyDataset, place_of
from dreamartist_pipeline.whole_files import write_new_folder, written_whole

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.PngImagePlugin import PngInfo

_PREVIEW_SIDE_PX = 512
_MAX_PREVIEWED_PIXELS = 100_000_000
_MAX_CAPTION_LINES, _MAX_CAPTION_WORDS = 5, 200  # a longer text is a licence, a story, a log
_MAX_CAPTION_BYTES = 100_000
_PREVIEWED, _PREVIEW_COLUMNS, _PREVIEW_CELL_PX = 8, 4, 120


class ReferenceImageDataset(ReadOnlyDataset[bytes]):
    """The bytes of the reference image's file; the ingestion pipeline decodes and checks them.

    Args:
        filepath: an image file.
    """

    def __init__(self, *, filepath: str, metadata: dict[str, Any] | None = None) -> None:
        self._filepath = Path(filepath)
        self.metadata = metadata

    def load(self) -> bytes:
        """Return the file's bytes.

        Raises:
            FileError: no such file.
        """
        return _read(self._filepath, "the reference image", "give its path as --params image=PATH")

    def preview(self) -> ImagePreview:
        """Show the image, scaled down; nothing without a file, as after an import."""
        return _picture_preview(self.load()) if self._exists() else ImagePreview("")

    def _exists(self) -> bool:
        return self._filepath.is_file()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": self._filepath.as_posix()}


class OptionalImageDataset(ReadOnlyDataset[bytes | None]):
    """An optional image file: loads None without a filepath; a filepath without a file is an error.

    Args:
        filepath: an image file, or None.
        what: name of the image in messages.
        setting: name of the run setting that holds the path.
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
        """Return the file's bytes, or None without a filepath.

        Raises:
            FileError: no such file.
        """
        if self._filepath is None:
            return None
        return _read(self._filepath, self._what, f"correct --params {self._setting}=PATH, or leave it out")

    def preview(self) -> ImagePreview:
        """Show the image, scaled down; nothing without a filepath."""
        data = self.load()
        return ImagePreview("") if data is None else _picture_preview(data)

    def _exists(self) -> bool:
        return self._filepath is None or self._filepath.is_file()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": self._filepath and self._filepath.as_posix()}


class CaptionDataset(ReadOnlyDataset[str]):
    """The reference image's caption: the one given, else the text file beside the image, else "".

    The text file has the image's name with the suffix .txt, as in LoRA training tools. A byte order mark is skipped.

    Args:
        filepath: the reference image's file; Kedro makes a path of this name absolute.
        caption: takes precedence over the text file.
    """

    def __init__(self, *, filepath: str, caption: str | None = None, metadata: dict[str, Any] | None = None) -> None:
        self._file = Path(filepath).with_suffix(".txt")
        self._caption = caption
        self.metadata = metadata

    def load(self) -> str:
        """Return the caption in one line; "" without a caption.

        Raises:
            FileError: the text file is not UTF-8, or not a caption: it has more than 5 lines or 200 words.
        """
        if self._caption is not None:
            return str(self._caption).strip()
        if not self._file.is_file():
            return ""
        if (size := self._file.stat().st_size) > _MAX_CAPTION_BYTES:
            raise FileError(
                expected=f"the image's caption in {self._file}, at most {_MAX_CAPTION_BYTES:,} bytes",
                got=f"{size:,} bytes",
                remedy='rename the file, or give --params caption="…" (caption= for none)',
            )
        try:
            text = self._file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise FileError(
                expected=f"the caption as UTF-8 text in {self._file}",
                got=f"{error}",
                remedy='save it as UTF-8, rename it, or set --params caption="…"',
            ) from error
        _check_is_caption(text, self._file)
        return " ".join(text.split())

    def preview(self) -> TablePreview:
        """Show the caption."""
        return TablePreview({"index": [0], "columns": ["caption"], "data": [[self.load() or "(none)"]]})

    def stored_at(self) -> Path:
        """Return the text file."""
        return self._file

    def _exists(self) -> bool:
        return True

    def _describe(self) -> dict[str, Any]:
        return {"file": self._file.as_posix(), "caption": self._caption}


def _check_is_caption(text: str, file: Path) -> None:
    lines, num_words = text.strip().splitlines(), len(text.split())
    if sum(bool(line.strip()) for line in lines) > _MAX_CAPTION_LINES or num_words > _MAX_CAPTION_WORDS:
        beginning = " ".join(text.split())[:60]
        raise FileError(
            expected=(
                f"the image's caption in {file}, at most {_MAX_CAPTION_LINES} lines and {_MAX_CAPTION_WORDS} words"
            ),
            got=f"{len(lines)} line{'s'[: len(lines) != 1]} and {num_words} words, beginning with {beginning!r}",
            remedy='shorten it, rename the file, or give --params caption="…" (caption= for none)',
        )


class ImageDataset(AbstractDataset["Image", "Image"]):
    """A Pillow image in a lossless file; a save replaces the file atomically.

    PNGs keep a generated image's settings (`image.info`, keys of `KEPT_TEXTS`) in their metadata.

    Args:
        filepath: the file; its suffix determines the format.
        save_args: further arguments of Pillow's `Image.save`.
    """

    def __init__(
        self, *, filepath: str, save_args: dict[str, Any] | None = None, metadata: dict[str, Any] | None = None
    ) -> None:
        self._filepath = Path(filepath)
        self._save_args = save_args or {}
        self.metadata = metadata

    def load(self) -> "Image":
        """Return the image in its own mode.

        Raises:
            FileError: no such file.
        """
        from PIL import Image

        data = _read(self._filepath, "an image", "run the pipeline that makes it")
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return image.copy()

    def save(self, data: "Image") -> None:
        """Write the file atomically."""
        save_image(data, self._filepath, **self._save_args)

    def preview(self) -> ImagePreview:
        """Show the image, scaled down."""
        return _file_preview(_read(self._filepath, "an image", "run the pipeline that makes it"))

    def _exists(self) -> bool:
        return self._filepath.is_file()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": self._filepath.as_posix(), "save_args": self._save_args}


class ImageRunsDataset(PartitionedDataset):  # type: ignore[misc]  # its library has no types
    """Named images in one folder per run, which appears when it is complete; the preview shows those of the newest run.

    Args:
        path: this run's folder; if it exists already, a save takes NAME-2, NAME-3, …. Sibling folders whose names begin
            with a digit belong to earlier runs.
        metadata: for kedro-viz.
    """

    def __init__(self, *, path: str, metadata: dict[str, Any] | None = None) -> None:
        self._path = path
        super().__init__(path=path, dataset=ImageDataset, filename_suffix=".png", metadata=metadata)

    def save(self, data: Mapping[str, "Image"]) -> None:
        """Write a new folder."""

        def write(folder: Path) -> None:
            for name, image in data.items():
                save_image(image, folder / f"{name}.png")

        self._path = write_new_folder(Path(self._path), write).as_posix()

    def preview(self) -> ImagePreview:
        """Show the first images of the newest run."""
        runs = sorted(folder for folder in Path(self._path).parent.glob("[0-9]*") if folder.is_dir())
        files = sorted(runs[-1].glob("*.png")) if runs else []
        return grid_preview([(file.stem, ImageDataset(filepath=str(file)).load) for file in files])


KEPT_TEXTS = ("parameters", "dreamartist")
"""Keys of `image.info` that are written to a PNG: generation settings, but no metadata of a user's own file."""


PNG_DAMAGE = (OSError, SyntaxError, ValueError)
"""What Pillow raises for missing and damaged files."""


def save_image(image: "Image", file: Path, **save_args: Any) -> None:
    """Write an image atomically, a PNG with the texts of `KEPT_TEXTS`."""
    texts = _kept_texts(image)
    if texts.chunks and file.suffix.lower() == ".png":
        save_args = {"pnginfo": texts, **save_args}
    with written_whole(file) as temporary:
        image.save(temporary, **save_args)


def is_whole_png(file: Path) -> bool:
    """Return whether a PNG exists and its checksums are right."""
    from PIL import Image

    try:
        with Image.open(file, formats=["PNG"]) as image:
            image.verify()
    except PNG_DAMAGE:
        return False
    return True


def png_bytes(image: "Image") -> bytes:
    """Return an image as a PNG with the texts of `KEPT_TEXTS`."""
    stream = io.BytesIO()
    image.save(stream, "PNG", pnginfo=_kept_texts(image))
    return stream.getvalue()


def _kept_texts(image: "Image") -> "PngInfo":
    from PIL.PngImagePlugin import PngInfo

    texts = PngInfo()
    for key in KEPT_TEXTS:
        if key in image.info:
            texts.add_itxt(key, image.info[key])
    return texts


def grid_preview(captioned: CaptionedImages) -> ImagePreview:
    """Return the kedro-viz preview of several images: the first ones, each above its caption."""
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
    raise FileError(expected=f"{what} at {file}", got=got, remedy=f"{remedy}{place_of(file) or _images_beside(file)}")


def _images_beside(file: Path) -> str:
    """Return the names of the images in the folder of a missing file, as a remark."""
    folder = file if file.is_dir() else file.parent
    if not folder.is_dir():
        return ""
    names = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES)
    return f" (in {folder}: {', '.join(names[:12])}{', …' if len(names) > 12 else ''})" if names else ""


def _picture_preview(data: bytes) -> ImagePreview:
    """Show a user's picture as ingestion reads it: upright, of any depth and format."""
    from dreamartist_pipeline.core.images import decode_image

    return image_preview(decode_image(data, "the picture", _MAX_PREVIEWED_PIXELS, setting=None))


def _file_preview(data: bytes) -> ImagePreview:
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        return image_preview(image)


def image_preview(image: "Image") -> ImagePreview:
    """Return the kedro-viz preview of an image, scaled down."""
    small = image.convert("RGBA" if image.has_transparency_data else "RGB")
    small.thumbnail((_PREVIEW_SIDE_PX, _PREVIEW_SIDE_PX))
    png = io.BytesIO()
    small.save(png, "PNG")
    return ImagePreview(base64.b64encode(png.getvalue()).decode())
