"""Data sets, loss weights and image sizes of a toolkit configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.interop.toolkit_config import ImportedConfig
from dreamartist_pipeline.params import TrainingParams
from refusals import says

Import = Callable[..., ImportedConfig]
PAIR = Path(__file__).with_name("pair.yaml").read_text(encoding="utf-8")
TUTORIAL = Path(__file__).with_name("tutorial.yaml").read_text(encoding="utf-8")
FULL = Path(__file__).with_name("full.yaml").read_text(encoding="utf-8")
PLAIN_GROUP = "lora_unet: [{lr: 1e-4, rank: 2, layers: [conv_in]}]\n"


def test_caption_transforms_keep_their_order(read_full: Import) -> None:
    text = FULL.replace(
        """          transforms:
            - _target_: hcpdiff.utils.caption_tools.TemplateFill
              word_names: {dog: [pt-dog, pt-dog-neg]}""",
        """          transforms:
            - {_target_: hcpdiff.utils.caption_tools.TagDropout, p: 0.2}
            - _target_: hcpdiff.utils.caption_tools.TagShuffle
            - _target_: hcpdiff.utils.caption_tools.TemplateFill
              word_names: {dog: [pt-dog, pt-dog-neg]}""",
    ).replace("model: {", "model: {clip_skip: 1, ")
    training = read_full(text).parameters["training"]
    assert training["caption_transforms"] == [{"tag_dropout": 0.2}, "tag_shuffle"]
    assert training["clip_skip"] == 1
    TrainingParams.model_validate(training)


def test_the_older_layout_with_data_class_is_read(read_full: Import) -> None:
    config = OmegaConf.create(FULL)
    config.data_class, config.data = config.data.dataset_class, config.data.dataset1
    training = read_full(OmegaConf.to_yaml(config)).parameters["training"]
    assert (training["batch_size"], training["regularization_batch_size"]) == (4, 1)
    assert training["words"]["names"] == {"pt1": ["pt-dog", "pt-dog-neg"]}


@pytest.mark.parametrize(("given", "kept"), [("p: 0.0", 0.0), ("p: 0.3", 0.3), ("p: null", 0.1)])
def test_a_tag_dropout_of_zero_is_kept(imported_from: Import, given: str, kept: float) -> None:
    text = f"{PAIR}data: {{batch_size: 4, text_transforms: {{transforms: [{{_target_: x.TagDropout, {given}}}]}}}}\n"
    assert imported_from(text).parameters["training"]["caption_transforms"] == [{"tag_dropout": kept}]


@pytest.mark.parametrize(
    ("own", "other", "weight"), [(2.0, None, 0.5), (None, 3.0, 3.0), (2.0, 0, 0.0), (None, None, None)]
)
def test_the_loss_weight_is_relative_to_the_reference_images(
    imported_from: Import, own: Any, other: Any, weight: Any
) -> None:
    config: Any = OmegaConf.create(TUTORIAL)
    if own is not None:
        config.data.loss_weight = own
    if other is not None:
        config.data_class.loss_weight = other
    training = imported_from(OmegaConf.to_yaml(config)).parameters["training"]
    assert training.get("loss", {}).get("regularization_weight") == weight


def test_a_loss_weight_of_zero_for_the_reference_image_is_refused(imported_from: Import) -> None:
    config: Any = OmegaConf.create(TUTORIAL)
    config.data.loss_weight = 0
    with pytest.raises(InputError, check=says(expected="loss_weight", got="0 for the reference image")):
        imported_from(OmegaConf.to_yaml(config))


def test_a_loss_weight_without_a_regularization_set_is_named(imported_from: Import) -> None:
    imported = imported_from(PAIR + "data: {batch_size: 4, loss_weight: 2.0}\n")
    assert "relative" in imported.left_out["data.loss_weight"]


def test_an_unresolved_batch_size_is_named_with_its_default(imported_from: Import) -> None:
    left_out = imported_from(PAIR + "data: {batch_size: '${x.y}'}\n").left_out
    assert "${x.y}" in left_out["data.batch_size"]
    assert "4, as in this project's methods" in left_out["data.batch_size"]


@pytest.mark.parametrize(
    ("data", "key"),
    [
        ("data: {batch_size: 7, source: {img_root: imgs}}", "data.source.img_root"),
        ("data: {one: {batch_size: 7, source: {s: {img_root: imgs}}}}", "data.one.source.s.img_root"),
        ("dataloader: {threads: 2}\ndata: {batch_size: 7}", "dataloader.threads"),
    ],
)
def test_the_data_set_is_found_in_every_layout(imported_from: Import, data: str, key: str) -> None:
    imported = imported_from(f"{PAIR}{data}\n")
    assert imported.parameters["training"]["batch_size"] == 7
    assert key in imported.left_out
    assert not [name for name in imported.left_out if name.endswith("batch_size")]


def test_the_only_data_set_may_have_no_words(imported_from: Import) -> None:
    assert (
        imported_from(PLAIN_GROUP + "data: {batch_size: 3, word_names: {pt1: ''}}\n").parameters["training"][
            "batch_size"
        ]
        == 3
    )


@pytest.mark.parametrize(
    ("bucket", "side_px", "key"),
    [
        ("target_size: [500, 500]", 512, "data.bucket.target_size.0"),
        ("target_area: 250000", 512, "data.bucket.target_area"),
        ("target_area: 16*16", 64, "data.bucket.target_area"),
    ],
)
def test_a_rounded_side_is_named(imported_from: Import, bucket: str, side_px: int, key: str) -> None:
    imported = imported_from(PAIR + f"data: {{batch_size: 4, bucket: {{_target_: x.FixedBucket, {bucket}}}}}\n")
    assert imported.parameters["ingestion"]["bucket"]["side_px"] == side_px
    assert f"{side_px} is used" in imported.left_out[key]


@pytest.mark.parametrize("bucket", ["target_area: 512*512//2", "target_size: [big, big]", "target_size: 0"])
def test_an_unreadable_size_is_named_with_its_bucket(imported_from: Import, bucket: str) -> None:
    imported = imported_from(PAIR + f"data: {{batch_size: 4, bucket: {{_target_: x.RatioBucket, {bucket}}}}}\n")
    assert "ingestion" not in imported.parameters
    assert len([key for key in imported.left_out if key.startswith("data.bucket.")]) >= 2
