"""Images on disk: the user's are read as bytes, the project's are written atomically."""

import base64
import inspect
import io
from pathlib import Path

import pytest
from kedro.io import DatasetError
from kedro_datasets._typing import TablePreview
from PIL import Image

from dreamartist_pipeline.datasets.image import (
    CaptionDataset,
    ImageDataset,
    ImageRunsDataset,
    OptionalImageDataset,
    ReferenceImageDataset,
    save_image,
)
from dreamartist_pipeline.datasets.inputs import FileError
from refusals import says

PREVIEWED = (ReferenceImageDataset, OptionalImageDataset, ImageDataset)


def shown(preview: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(preview)))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    file = tmp_path / "fox.png"
    Image.new("RGB", (1200, 600), "red").save(file)
    return file


# --------------------------------------------------------------------------------------------- reference image


def test_a_reference_image_is_read_as_its_bytes(picture: Path) -> None:
    assert ReferenceImageDataset(filepath=str(picture)).load() == picture.read_bytes()


def test_a_missing_reference_image_names_the_pictures_beside_it(picture: Path) -> None:
    dataset = ReferenceImageDataset(filepath=str(picture.with_name("focks.png")))

    assert not dataset.exists()
    with pytest.raises(FileError, check=says(expected="focks.png", got="no such file", remedy="fox.png")):
        dataset.load()


def test_a_folder_is_no_reference_image(picture: Path) -> None:
    with pytest.raises(FileError, check=says(got="a folder", remedy="image=PATH")):
        ReferenceImageDataset(filepath=str(picture.parent)).load()


def test_images_of_users_are_never_written(picture: Path) -> None:
    for dataset in (ReferenceImageDataset(filepath=str(picture)), OptionalImageDataset(filepath=str(picture))):
        with pytest.raises(DatasetError, match="read-only"):
            dataset.save(b"other")


def test_a_deep_picture_is_previewed_as_it_is_read(tmp_path: Path) -> None:
    Image.new("I", (16, 16), 257 * 100).save(tmp_path / "deep.tif")
    preview = shown(ReferenceImageDataset(filepath=str(tmp_path / "deep.tif")).preview())
    assert preview.getpixel((0, 0)) == (100, 100, 100)


def test_a_heic_picture_is_previewed_and_named_beside_a_missing_one(tmp_path: Path) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.from_pillow(Image.new("RGB", (64, 32), "red")).save(tmp_path / "cat.heic")
    assert shown(ReferenceImageDataset(filepath=str(tmp_path / "cat.heic")).preview()).size == (64, 32)
    with pytest.raises(FileError, match=r"cat\.heic"):
        ReferenceImageDataset(filepath=str(tmp_path / "kat.png")).load()


# --------------------------------------------------------------------------------------------- optional image


def test_an_error_names_an_optional_image_and_its_setting(tmp_path: Path) -> None:
    dataset = OptionalImageDataset(
        filepath=str(tmp_path / "photo.png"), what="the picture to start from", setting="init_image"
    )
    with pytest.raises(FileError, check=says(expected="the picture to start from", remedy="init_image=PATH")):
        dataset.load()


@pytest.mark.parametrize("filepath", [None, ""])
def test_an_optional_image_without_a_path_is_none(filepath: str | None) -> None:
    dataset = OptionalImageDataset(filepath=filepath)

    assert dataset.exists()
    assert dataset.load() is None
    assert dataset.preview() == ""


def test_an_optional_image_with_a_path_is_read(picture: Path) -> None:
    assert OptionalImageDataset(filepath=str(picture)).load() == picture.read_bytes()


def test_an_optional_image_whose_file_is_missing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileError, check=says(expected="mask.png", got="no such file", remedy="mask=PATH")):
        OptionalImageDataset(filepath=str(tmp_path / "mask.png")).load()


# --------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_an_image_comes_back_as_it_was_saved(tmp_path: Path, mode: str) -> None:
    dataset = ImageDataset(filepath=str(tmp_path / "deep" / "image.png"))
    image = Image.effect_noise((16, 8), 60).convert(mode)

    dataset.save(image)

    assert dataset.exists()
    assert dataset.load().mode == mode
    assert dataset.load().tobytes() == image.tobytes()


def test_a_missing_image_is_refused_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(FileError, check=says(expected="image.png", got="no such file")):
        ImageDataset(filepath=str(tmp_path / "image.png")).load()


def test_a_failing_save_leaves_the_earlier_image_and_no_debris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "image.png"
    save_image(Image.new("RGB", (8, 8), "red"), file)
    before = file.read_bytes()

    def half_saved(self: Image.Image, temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", half_saved)
    with pytest.raises(DatasetError, match="disk full"):
        ImageDataset(filepath=str(file)).save(Image.new("RGB", (8, 8), "blue"))

    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["image.png"]


@pytest.mark.parametrize("dataset_class", PREVIEWED)
def test_previews_are_small_pngs(picture: Path, dataset_class: type[ImageDataset]) -> None:
    preview = shown(dataset_class(filepath=str(picture)).preview())

    assert preview.format == "PNG"
    assert preview.size == (512, 256)


@pytest.mark.parametrize("dataset_class", PREVIEWED)
def test_kedro_viz_recognises_the_previews_by_their_type(dataset_class: type[ImageDataset]) -> None:
    assert inspect.signature(dataset_class.preview).return_annotation.__name__ == "ImagePreview"


def test_the_caption_is_the_text_beside_the_picture_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "cat.txt").write_text("white background,\n noto style\n", encoding="utf-8")
    assert CaptionDataset(filepath=str(tmp_path / "cat.png")).load() == "white background, noto style"


def test_a_caption_that_is_given_takes_precedence_over_the_text_file(tmp_path: Path) -> None:
    (tmp_path / "cat.txt").write_text("white background", encoding="utf-8")
    assert CaptionDataset(filepath=str(tmp_path / "cat.png"), caption=" blue sky ").load() == "blue sky"


def test_a_byte_order_mark_is_no_part_of_the_caption(tmp_path: Path) -> None:
    (tmp_path / "cat.txt").write_text("white background", encoding="utf-8-sig")
    assert CaptionDataset(filepath=str(tmp_path / "cat.png")).load() == "white background"


@pytest.mark.parametrize("text", ["a\n" * 5, "a\n\n" * 5, "word " * 200])
def test_a_caption_may_have_5_lines_and_200_words(tmp_path: Path, text: str) -> None:
    (tmp_path / "cat.txt").write_text(text, encoding="utf-8")
    assert CaptionDataset(filepath=str(tmp_path / "cat.png")).load() == " ".join(text.split())


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ("a\n" * 6, "6 lines and 6 words"),
        ("a\n\n" * 6, "11 lines and 6 words"),
        ("word " * 201, "1 line and 201 words"),
    ],
)
def test_a_text_that_is_plainly_no_caption_is_refused(tmp_path: Path, text: str, got: str) -> None:
    (tmp_path / "cat.txt").write_text(text, encoding="utf-8")
    with pytest.raises(FileError, check=says(expected="cat.txt", got=got, remedy="caption=")):
        CaptionDataset(filepath=str(tmp_path / "cat.png")).load()
    given = CaptionDataset(filepath=str(tmp_path / "cat.png"), caption="a sofa")
    assert given.load() == "a sofa"


def test_a_picture_without_a_caption_has_an_empty_one(tmp_path: Path) -> None:
    assert CaptionDataset(filepath=str(tmp_path / "cat.png")).load() == ""


def test_a_caption_file_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cat.txt").write_bytes(b"\xff\xfe\x00caption")
    with pytest.raises(FileError, check=says(expected="cat.txt", remedy="UTF-8")):
        CaptionDataset(filepath=str(tmp_path / "cat.png")).load()


def test_a_png_keeps_how_it_was_drawn_and_nothing_else(tmp_path: Path) -> None:
    image = Image.new("RGB", (4, 4))
    image.info |= {"parameters": "a fox, ≤ 3", "Author": "somebody"}
    dataset = ImageDataset(filepath=str(tmp_path / "image.png"))
    dataset.save(image)
    assert dataset.load().info == {"parameters": "a fox, ≤ 3"}


def test_images_of_a_run_are_read_by_name_and_the_newest_run_is_previewed(tmp_path: Path) -> None:
    for run, colors in (("2026-01-02", ["red"]), ("2026-01-03", ["green"] * 9)):
        images = {f"{index:03d}_7": Image.new("RGB", (16, 16), color) for index, color in enumerate(colors)}
        ImageRunsDataset(path=str(tmp_path / run)).save(images)
    (tmp_path / "export").mkdir()
    next_run = ImageRunsDataset(path=str(tmp_path / "2026-01-04"))
    shown = Image.open(io.BytesIO(base64.b64decode(next_run.preview())))
    assert shown.width == 4 * 124 + 4
    assert shown.getpixel((60, 60)) == (0, 128, 0)
    assert inspect.signature(next_run.preview).return_annotation.__name__ == "ImagePreview"
    assert sorted(ImageRunsDataset(path=str(tmp_path / "2026-01-03")).load())[0] == "000_7"


def test_runs_of_one_second_have_folders_of_their_own(tmp_path: Path) -> None:
    runs = [ImageRunsDataset(path=str(tmp_path / "2026-01-02")) for _ in range(3)]
    for run, color in zip(runs, ("red", "green", "blue"), strict=True):
        run.save({"000_7": Image.new("RGB", (4, 4), color)})
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["2026-01-02", "2026-01-02-2", "2026-01-02-3"]
    assert [run.load()["000_7"]().getpixel((0, 0)) for run in runs] == [(255, 0, 0), (0, 128, 0), (0, 0, 255)]


def test_a_run_that_is_interrupted_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DatasetError):
        ImageRunsDataset(path=str(tmp_path / "2026-01-02")).save({"a": Image.new("RGB", (4, 4)), "b": None})
    assert not list(tmp_path.iterdir())


def test_without_a_run_there_is_nothing_to_preview(tmp_path: Path) -> None:
    assert ImageRunsDataset(path=str(tmp_path / "2026-01-04")).preview() == ""


def test_the_preview_of_a_caption_shows_it_and_says_when_there_is_none(tmp_path: Path) -> None:
    shown = [CaptionDataset(filepath=str(tmp_path / "cat.png"), caption=caption).preview() for caption in ("sky", None)]
    assert [table["data"] for table in shown] == [[["sky"]], [["(none)"]]]
    assert CaptionDataset.preview.__annotations__["return"] is TablePreview  # kedro-viz compares the type
