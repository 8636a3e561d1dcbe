"""LoRA groups of a toolkit configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.interop.toolkit_config import ImportedConfig
from dreamartist_pipeline.params import TrainingParams
from refusals import says

Import = Callable[..., ImportedConfig]
TUTORIAL = Path(__file__).with_name("tutorial.yaml").read_text(encoding="utf-8")
FULL = Path(__file__).with_name("full.yaml").read_text(encoding="utf-8")
PLAIN_GROUP = "lora_unet: [{lr: 1e-4, rank: 2, layers: [conv_in]}]\n"


def test_lora_groups_keep_their_values_and_branches(imported: ImportedConfig) -> None:
    positive, negative = imported.parameters["training"]["lora_unet"]
    assert positive == {"lr": 1e-4, "rank": 0.01875, "branch": "p", "dropout": 0.1, "layers": [r"re:.*\.attn.?$"]}
    assert negative == {"lr": 4e-5, "rank": 3, "branch": "n", "alpha": 2.0, "layers": [r"re:.*\.attn.?$"]}


def test_the_older_type_is_a_branch_and_text_encoder_layers_lose_their_prefix(imported: ImportedConfig) -> None:
    (group,) = imported.parameters["training"]["lora_text_encoder"]
    assert group == {"lr": 1e-5, "rank": 1, "branch": "p", "layers": ["encoder.layers.0.mlp"]}


def test_bias_and_svd_init_are_carried_over(read_full: Import) -> None:
    text = FULL.replace("dropout: 0.1", "dropout: 0.1, svd_init: true, bias: true")
    imported = read_full(text)
    assert not [key for key in imported.left_out if key.endswith(("svd_init", "bias"))]
    group = TrainingParams.model_validate(imported.parameters["training"]).lora_unet[0]
    assert (group.svd_init, group.bias) == (True, True)


def test_an_unsupported_group_option_is_named(read_full: Import) -> None:
    imported = read_full(FULL.replace("dropout: 0.1", "dropout: 0.1, rank_groups: 2"))
    assert imported.left_out["lora_unet.0.rank_groups"] == "2: not supported"
    TrainingParams.model_validate(imported.parameters["training"])


def test_alpha_is_multiplied_by_the_rank_if_the_toolkit_does_not_divide_by_it(imported_from: Import) -> None:
    text = TUTORIAL.replace("branch: p,", "branch: p, alpha: 0.5, alpha_auto_scale: False,")
    imported = imported_from(text)
    assert imported.parameters["training"]["lora_unet"][0]["alpha"] == 1.5  # 0.5 · 3, of which a third is 0.5
    assert "lora_unet.0.alpha_auto_scale" not in imported.left_out


def test_alpha_without_division_is_named_if_the_rank_is_a_fraction(imported_from: Import) -> None:
    text = TUTORIAL.replace("rank: 3, branch: p,", "rank: 0.01, branch: p, alpha_auto_scale: False,")
    imported = imported_from(text)
    assert "alpha" not in imported.parameters["training"]["lora_unet"][0]
    assert "alpha / rank" in imported.left_out["lora_unet.0.alpha_auto_scale"]


def test_a_group_without_lr_and_rank_gets_the_toolkits_defaults(imported_from: Import) -> None:
    imported = imported_from(PLAIN_GROUP.replace("lr: 1e-4, rank: 2, ", "") + "data: {batch_size: 4}\n")
    assert imported.parameters["training"]["lora_unet"] == [{"lr": 1e-5, "rank": 1, "layers": ["conv_in"]}]
    assert {"lora_unet.0.lr", "lora_unet.0.rank"} <= set(imported.left_out)


def test_a_group_without_layers_is_left_out_and_named(imported_from: Import) -> None:
    imported = imported_from(TUTORIAL + "lora_text_encoder: [{lr: 1e-5, rank: 1, layers: []}]\n")
    assert imported.parameters["training"]["lora_text_encoder"] == []
    assert "lora_text_encoder.0.layers" in imported.left_out


def test_an_unresolved_layer_is_not_a_selector(imported_from: Import) -> None:
    imported = imported_from(PLAIN_GROUP.replace("[conv_in]", "[conv_in, '${x.y}']") + "data: {batch_size: 4}\n")
    assert imported.parameters["training"]["lora_unet"][0]["layers"] == ["conv_in"]
    assert "lora_unet.0.layers.1" in imported.left_out


def test_an_unknown_branch_is_refused(imported_from: Import) -> None:
    with pytest.raises(InputError, check=says(got="training.lora_unet.0.branch:")) as error:
        imported_from(TUTORIAL.replace("branch: p", "branch: 0"))
    assert "(got 0)" in error.value.got


def test_a_layer_that_is_a_mapping_is_named(imported_from: Import) -> None:
    imported = imported_from(PLAIN_GROUP.replace("[conv_in]", "[conv_in, {a: b}]") + "data: {batch_size: 4}\n")
    assert imported.parameters["training"]["lora_unet"][0]["layers"] == ["conv_in"]
    assert "lora_unet.0.layers.1.a" in imported.left_out


def test_an_alpha_that_is_no_number_is_refused_where_it_would_be_rescaled(imported_from: Import) -> None:
    group = PLAIN_GROUP.replace("rank: 2", "rank: 2, alpha: abc, alpha_auto_scale: False")
    with pytest.raises(InputError, check=says(got="training.lora_unet.0.alpha")):
        imported_from(group + "data: {batch_size: 4}\n")
