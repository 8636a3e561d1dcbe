"""LoRA files of other tools: detection of the format, rejection of other kinds of files, and shape checks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dreamartist_pipeline.core.concept import FORMAT, Concept
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.interop.branch_adapters import BranchAdapter, LoRAFactors, branch_adapter
from dreamartist_pipeline.interop.file_facts import FileFacts
from dreamartist_pipeline.interop.foreign_lora import fitted, read_lora
from dreamartist_pipeline.interop.kohya import write_kohya
from dreamartist_pipeline.interop.peft_files import write_peft
from dreamartist_pipeline.interop.safetensors_bytes import write_tensors
from refusals import says

from .conftest import ATTENTION, CONV, MLP, NAMES, OUT, PROJ_IN, TEXT, expected_updates

SHAPES = {
    "unet": {ATTENTION: (5, 6), OUT: (6, 5), PROJ_IN: (6, 4, 1, 1), CONV: (7, 4, 3, 3)},
    "text_encoder": {TEXT: (4, 4), MLP: (8, 4)},
}
FACTS = FileFacts("fox", "my-fox", "epsilon", names=NAMES)
NAME = NAMES.kohya("unet", ATTENTION)


@pytest.mark.parametrize(("form", "write"), [("kohya", write_kohya), ("peft", write_peft)])
def test_the_format_is_found_by_the_keys(concept: Concept, form: str, write: object) -> None:
    file = write(branch_adapter(concept, "positive"), FACTS, torch.float32)  # type: ignore[operator]
    lora = read_lora(file, "fox.safetensors", SHAPES, NAMES)
    assert lora.form == form
    expected = expected_updates(concept, "positive")
    for at, factors in lora.adapter.by_layer().items():
        torch.testing.assert_close(factors.update(), expected[at], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("bundle_emb.my-fox.string_to_param.*", "embeddings"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "SDXL"),
        ("lora_unet_input_blocks_4_1_proj_in.lora_down.weight", "SDXL"),
        ("text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_A.weight", "SDXL"),
        (f"{NAME}.dora_scale", "DoRA"),
        (f"unet.{ATTENTION}.lora_magnitude_vector.weight", "DoRA"),
        (f"{NAME}.lokr_w1", "LoKr"),
        (f"{NAME}.hada_w1_a", "LoHa"),
        (f"{NAME}.oft_blocks", "OFT"),
        (f"{NAME}.lora_mid.weight", "Tucker"),
        (f"{NAME}.diff", "differences"),
        (f"lora:{ATTENTION}.___.alpha", "HCP-Diffusion"),
        ("emb_params", "embedding"),
        (f"base_model.model.{ATTENTION}.lora_A.weight", "peft"),
        (f"unet.{ATTENTION}.lora.down.weight", "diffusers"),
        (f"unet.{ATTENTION}.processor.to_q_lora.down.weight", "diffusers"),
        ("model.diffusion_model.out.2.weight", "model"),
    ],
)
def test_another_kind_of_file_is_refused_with_its_kind(key: str, kind: str) -> None:
    plain = {f"{NAME}.lora_down.weight": torch.ones(2, 6), f"{NAME}.lora_up.weight": torch.ones(5, 2)}
    file = write_tensors(plain | {key: torch.ones(2, 6)}, {})
    with pytest.raises(InputError, check=says(expected="fox.safetensors", got=f"({key}, …)")) as error:
        read_lora(file, "fox.safetensors", SHAPES, NAMES)
    assert kind in error.value.got.partition(" (")[0]


@pytest.mark.parametrize(
    ("key", "option"), [(f"lora:{ATTENTION}.___.alpha", "import.toolkit"), ("emb_params", "import.words")]
)
def test_a_file_for_another_option_is_refused_with_that_option(key: str, option: str) -> None:
    with pytest.raises(InputError, check=says(remedy=option)):
        read_lora(write_tensors({key: torch.ones(2, 6)}, {}), "x", SHAPES, NAMES)


def test_a_file_without_any_lora_is_refused_with_its_keys() -> None:
    with pytest.raises(InputError, check=says(expected="kohya", got="conv.bias, conv.weight")):
        read_lora(write_tensors({"conv.weight": torch.ones(1), "conv.bias": torch.ones(1)}, {}), "x", SHAPES, NAMES)


def test_a_concept_of_this_project_is_no_foreign_file() -> None:
    with pytest.raises(InputError, check=says(got="concept", remedy="training.start_from")):
        read_lora(write_tensors({"unet.x.0.positive.up": torch.ones(1)}, {"format": FORMAT}), "x", SHAPES, NAMES)


def test_shapes_of_another_base_model_are_named_by_layer() -> None:
    factors = LoRAFactors(torch.ones(2, 9), torch.ones(5, 2), 1.0)
    with pytest.raises(
        InputError, check=says(got=f"unet.{ATTENTION} is (2, 9) and (5, 2)", remedy="base_model")
    ) as error:
        fitted(BranchAdapter({"unet": {ATTENTION: factors}}), "x", SHAPES)
    assert "(2, 6) and (5, 2)" in error.value.got


def test_a_1x1_kernel_may_come_without_its_axes_and_a_matrix_with_them() -> None:
    adapter = BranchAdapter(
        {
            "unet": {
                PROJ_IN: LoRAFactors(torch.ones(2, 4), torch.ones(6, 2), 1.0),
                ATTENTION: LoRAFactors(torch.ones(2, 6, 1, 1), torch.ones(5, 2, 1, 1), 1.0),
            }
        }
    )
    layers = fitted(adapter, "x", SHAPES).networks["unet"]
    assert (layers[PROJ_IN].down.shape, layers[PROJ_IN].up.shape) == ((2, 4, 1, 1), (6, 2, 1, 1))
    assert (layers[ATTENTION].down.shape, layers[ATTENTION].up.shape) == ((2, 6), (5, 2))


@pytest.mark.parametrize("part", ["down", "up", "bias", "scale"])
def test_numbers_that_are_not_finite_are_refused_by_layer(part: str) -> None:
    values = {"down": torch.ones(2, 6), "up": torch.ones(5, 2), "bias": torch.ones(5), "scale": torch.ones(())}
    values[part].view(-1)[-1] = float("nan") if part == "up" else float("inf")
    factors = LoRAFactors(values["down"], values["up"], float(values["scale"]), values["bias"])
    with pytest.raises(InputError, check=says(expected="finite", got=f"unet.{ATTENTION}")):
        fitted(BranchAdapter({"unet": {ATTENTION: factors}}), "x", SHAPES)


@pytest.mark.parametrize("changes", [{"alpha": torch.ones(3)}, {"rank": 0}])
def test_several_alphas_and_no_ranks_are_refused(changes: dict[str, Any]) -> None:
    rank = changes.get("rank", 2)
    tensors = {"lora_down.weight": torch.ones(rank, 6), "lora_up.weight": torch.ones(5, rank), "alpha": torch.ones(())}
    file = write_tensors({f"{NAME}.{key}": changes.get(key, value) for key, value in tensors.items()}, {})
    with pytest.raises(InputError, check=says(expected=f"unet.{ATTENTION}", got="'alpha'")):
        read_lora(file, "x", SHAPES, NAMES)


@pytest.mark.parametrize("config", ["[1]", "{", '{"unet.lora_alpha": "four"}'])
def test_an_invalid_configuration_is_refused(config: str) -> None:
    tensors = {f"unet.{ATTENTION}.lora_A.weight": torch.ones(2, 6), f"unet.{ATTENTION}.lora_B.weight": torch.ones(5, 2)}
    with pytest.raises(InputError, check=says(expected="lora_adapter_metadata of x", got=repr(config))):
        read_lora(write_tensors(tensors, {"lora_adapter_metadata": config}), "x", SHAPES, NAMES)
