"""From a user's file to the prepared image and mask."""

import io
import json
import logging
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
from kedro.io import DataCatalog, MemoryDataset
from kedro.runner import SequentialRunner
from PIL import Image

from dreamartist_pipeline.core.tracking import NoTracker
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import BucketParams, IngestionParams
from dreamartist_pipeline.pipelines.ingestion import create_pipeline
from dreamartist_pipeline.pipelines.ingestion.nodes import prepare_reference
from refusals import says

BUCKET = BucketParams(side_px=16, multiple_px=8)


def png(image: Image.Image, **options: object) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG", **options)
    return data.getvalue()


def half_white_mask(size: tuple[int, int]) -> Image.Image:
    mask = Image.new("L", size, 0)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    return mask


def test_without_a_mask_everything_weighs_one() -> None:
    image, mask, _ = prepare_reference(png(Image.new("RGB", (40, 20), "red")), None, IngestionParams(bucket=BUCKET))

    assert (image.mode, image.size) == ("RGB", (16, 16))
    assert (mask.mode, mask.size) == ("L", (16, 16))
    assert mask.getextrema() == (127, 127)


def test_padding_weighs_nothing() -> None:
    params = IngestionParams(bucket=BUCKET, fit="pad", background_color="blue")

    image, mask, _ = prepare_reference(png(Image.new("RGB", (32, 16), "red")), None, params)

    assert image.getpixel((8, 1)) == (0, 0, 255)
    assert mask.getpixel((8, 1)) == 0
    assert mask.getpixel((8, 8)) == 127


def test_transparent_pixels_take_the_background_color() -> None:
    params = IngestionParams(bucket=BUCKET, background_color="#102030")

    image, *_ = prepare_reference(png(Image.new("RGBA", (16, 16), (255, 0, 0, 0))), None, params)

    assert image.getcolors() == [(256, (0x10, 0x20, 0x30))]


def test_the_mask_is_cropped_like_the_image() -> None:
    picture = Image.new("RGB", (64, 16), "red")
    picture.paste("blue", (0, 0, 32, 16))

    image, mask, _ = prepare_reference(png(picture), png(half_white_mask((64, 16))), IngestionParams(bucket=BUCKET))

    assert image.getpixel((2, 8)) == (0, 0, 255)
    assert image.getpixel((13, 8)) == (255, 0, 0)
    assert mask.getpixel((2, 8)) == 255
    assert mask.getpixel((13, 8)) == 0


def test_the_mask_of_a_turned_photo_follows_what_the_user_saw() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying, shown upright
    photo = png(Image.new("RGB", (64, 32), "red"), exif=exif)
    params = IngestionParams(bucket=BucketParams(side_px=32, multiple_px=8, keep_aspect=True))

    image, mask, _ = prepare_reference(photo, png(half_white_mask((32, 64))), params)

    assert image.size == mask.size
    assert image.width < image.height
    assert mask.getpixel((2, 20)) == 255


def test_a_smaller_mask_of_the_same_proportions_is_scaled() -> None:
    _, mask, _ = prepare_reference(
        png(Image.new("RGB", (64, 64))), png(half_white_mask((16, 16))), IngestionParams(bucket=BUCKET)
    )

    assert mask.getpixel((2, 8)) == 255
    assert mask.getpixel((13, 8)) == 0


def test_transparent_parts_of_a_mask_weigh_nothing() -> None:
    mask = Image.new("RGBA", (16, 16), (255, 255, 255, 0))
    mask.paste((255, 255, 255, 255), (0, 0, 8, 16))

    _, prepared, _ = prepare_reference(png(Image.new("RGB", (16, 16))), png(mask), IngestionParams(bucket=BUCKET))

    assert prepared.getpixel((2, 8)) == 255
    assert prepared.getpixel((13, 8)) == 0


def test_a_mask_of_other_proportions_is_refused() -> None:
    with pytest.raises(InputError, check=says(expected="64 × 32", got="32 × 64")):
        prepare_reference(
            png(Image.new("RGB", (64, 32))), png(half_white_mask((32, 64))), IngestionParams(bucket=BUCKET)
        )


def test_a_black_mask_is_refused() -> None:
    with pytest.raises(InputError, check=says(expected="mask", got="black")):
        prepare_reference(
            png(Image.new("RGB", (16, 16))), png(Image.new("L", (16, 16), 0)), IngestionParams(bucket=BUCKET)
        )


@pytest.mark.parametrize(
    ("picture", "mask", "name"),
    [
        (b"nonsense", None, "the reference image"),
        (png(Image.new("L", (16, 16))), b"nonsense", "the attention mask"),
    ],
)
def test_an_error_names_the_invalid_one_of_the_two_files(picture: bytes, mask: bytes | None, name: str) -> None:
    with pytest.raises(InputError, check=says(expected=name, got="nonsense")):
        prepare_reference(picture, mask, IngestionParams(bucket=BUCKET))


def test_kedro_can_resolve_the_hints_of_the_node_and_validate_its_parameters() -> None:
    assert get_type_hints(prepare_reference)["params"] is IngestionParams


def test_the_stage_goes_from_the_users_files_to_prepared_image_and_mask() -> None:
    stage = create_pipeline(NoTracker())

    assert stage.inputs() == {"reference_image", "attention_mask_image", "params:ingestion"}
    assert stage.outputs() == {"prepared_image", "prepared_mask", "prepared_framing"}


# --------------------------------------------------------------------------------------------- what is said


class TagTracker(NoTracker):
    def __init__(self) -> None:
        self.tags: dict[str, str] = {}

    def set_tag(self, name: str, text: str) -> None:
        self.tags[name] = text


def noise(size: tuple[int, int]) -> Image.Image:
    """Return patches of random colours, which stay different when the picture is made smaller."""
    width, height = size
    colors = np.random.default_rng(0).integers(0, 256, (max(2, height // 10), max(2, width // 10), 3), dtype=np.uint8)
    return Image.fromarray(colors).resize(size, Image.Resampling.NEAREST)


def logo(color: str) -> Image.Image:
    image = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    image.paste(color, (10, 10, 30, 30))
    return image


def warnings_of(image: Image.Image, caplog: pytest.LogCaptureFixture, **changes: object) -> list[str]:
    prepare_reference(png(image), None, IngestionParams(**{"bucket": BUCKET} | changes))
    own = [record for record in caplog.records if record.name.startswith("dreamartist_pipeline.pipelines.ingestion")]
    return [record.message for record in own if record.levelname == "WARNING"]


def test_what_was_made_of_the_picture_is_logged_and_tagged(caplog: pytest.LogCaptureFixture) -> None:
    tracker = TagTracker()
    with caplog.at_level(logging.INFO):
        prepare_reference(png(noise((40, 30))), None, IngestionParams(bucket=BUCKET), tracker)
    assert tracker.tags == {"reference_image": "40 × 30 → middle 30 × 30 (75 %) → 16 × 16"}
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert tracker.tags["reference_image"] in caplog.text


def test_the_color_behind_transparent_parts_is_said() -> None:
    tracker = TagTracker()
    prepare_reference(png(logo("red")), None, IngestionParams(bucket=BUCKET, background_color="teal"), tracker)
    assert tracker.tags == {"reference_image": "40 × 40 → 16 × 16, transparent parts on teal"}


@pytest.mark.parametrize(
    ("image", "changes", "parts"),
    [
        (noise((20, 200)), {}, ("10 %", "ingestion.fit=pad")),
        (noise((200, 20)), {"fit": "pad"}, ("12 %", "ingestion.fit=crop")),  # 16 × 2 of 16 × 16 px
        (noise((12, 12)), {}, ("12 × 12", "16 × 16", "ingestion.bucket.side_px")),
        (noise((10, 12)), {"fit": "pad"}, ("10 × 12", "ingestion.bucket.side_px")),
        (logo("white"), {}, ("ingestion.background_color=white", "black")),
        (logo("#0a0a0a"), {"background_color": "black"}, ("ingestion.background_color=black", "white")),
        (Image.new("RGBA", (40, 40), (255, 0, 0, 0)), {}, ("transparent everywhere",)),
        (Image.new("RGB", (40, 40), "red"), {}, ("nearly one colour",)),
        (Image.new("RGB", (80, 40), "red"), {"fit": "pad"}, ("nearly one colour",)),  # the padding does not count
    ],
    ids=[
        "crop",
        "padding",
        "enlarged",
        "enlarged and padded",
        "white logo",
        "black logo",
        "transparent",
        "red",
        "red padded",
    ],
)
def test_what_may_be_a_mistake_is_one_warning(
    image: Image.Image, changes: dict[str, str], parts: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    (warning,) = warnings_of(image, caplog, **changes)
    assert all(part in warning for part in parts), warning


@pytest.mark.parametrize("image", [noise((40, 21)), noise((16, 16)), logo("red")], ids=["half", "small", "logo"])
def test_a_usual_picture_is_no_mistake(image: Image.Image, caplog: pytest.LogCaptureFixture) -> None:
    assert warnings_of(image, caplog) == []


def test_no_bundled_picture_is_taken_for_a_mistake(caplog: pytest.LogCaptureFixture) -> None:
    bucket = BucketParams(side_px=64, multiple_px=8)
    files = sorted((Path(__file__).parents[2] / "data/01_raw/reference_images").glob("*.png"))
    assert len(files) > 10
    for file in files:
        prepare_reference(file.read_bytes(), None, IngestionParams(bucket=bucket))
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == []


# --------------------------------------------------------------------------------------------- with its datasets


def catalog_of(folder: Path, mask: str | None = None) -> DataCatalog:
    datasets = "dreamartist_pipeline.datasets.image"
    config = {
        "reference_image": {"type": f"{datasets}.ReferenceImageDataset", "filepath": f"{folder}/fox.png"},
        "attention_mask_image": {"type": f"{datasets}.OptionalImageDataset", "filepath": mask},
        "prepared_image": {"type": f"{datasets}.ImageDataset", "filepath": f"{folder}/prepared_image.png"},
        "prepared_mask": {"type": f"{datasets}.ImageDataset", "filepath": f"{folder}/prepared_mask.png"},
        "prepared_framing": {"type": "json.JSONDataset", "filepath": f"{folder}/prepared_framing.json"},
    }
    catalog = DataCatalog.from_config(config)
    catalog["params:ingestion"] = MemoryDataset(IngestionParams(bucket=BUCKET))
    return catalog


def test_a_run_saves_both_pictures_and_the_framing(tmp_path: Path) -> None:
    (tmp_path / "fox.png").write_bytes(png(Image.new("RGB", (40, 20), "red")))

    SequentialRunner().run(create_pipeline(NoTracker()), catalog_of(tmp_path))

    assert Image.open(tmp_path / "prepared_image.png").size == (16, 16)
    assert Image.open(tmp_path / "prepared_mask.png").mode == "L"
    framing = json.loads((tmp_path / "prepared_framing.json").read_text())
    assert framing == {"original_px": [40, 20], "crop_px": [8, 0], "size_px": [16, 16]}  # of 32 × 16


def test_a_bad_mask_leaves_the_earlier_results_as_they_were(tmp_path: Path) -> None:
    (tmp_path / "fox.png").write_bytes(png(Image.new("RGB", (40, 20), "red")))
    SequentialRunner().run(create_pipeline(NoTracker()), catalog_of(tmp_path))
    before = (tmp_path / "prepared_image.png").read_bytes()
    (tmp_path / "fox.png").write_bytes(png(Image.new("RGB", (40, 20), "blue")))
    (tmp_path / "mask.png").write_bytes(b"nonsense")

    with pytest.raises(InputError, check=says(expected="the attention mask", got="nonsense")):
        SequentialRunner().run(create_pipeline(NoTracker()), catalog_of(tmp_path, f"{tmp_path}/mask.png"))

    assert (tmp_path / "prepared_image.png").read_bytes() == before
