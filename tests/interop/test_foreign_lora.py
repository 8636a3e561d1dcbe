"""LoRA files of other tools: detection of the format, rejection of other kinds of files, and shape checks."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch

from dreamartist_pipeline.backbones.families.sdxl import XL_NAMES
from dreamartist_pipeline.core.concept import FORMAT, Concept
from dreamartist_pipeline.decoding.unread_files import is_pickled
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
PLAIN = {f"{NAME}.lora_down.weight": torch.ones(2, 6), f"{NAME}.lora_up.weight": torch.ones(5, 2)}


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
        (f"{NAME}.dora_scale", "DoRA"),
        (f"unet.{ATTENTION}.lora_magnitude_vector.weight", "DoRA"),
        (f"{NAME}.lokr_w1", "LoKr"),
        (f"{NAME}.hada_w1_a", "LoHa"),
        (f"{NAME}.oft_blocks", "OFT"),
        (f"{NAME}.oft_R.weight", "OFT"),
        (f"{NAME}.a1.weight", "GLoRA"),
        (f"{NAME}.b2.weight", "GLoRA"),
        (f"{NAME}.on_input", "(IA)³"),
        (f"{NAME}.lora_mid.weight", "Tucker"),
        (f"{NAME}.w_norm", "norm layers"),
        (f"{NAME}.b_norm", "norm layers"),
        (f"{NAME}.diff", "differences"),
        ("lora_controlnet", "ControlNet"),
        (f"lora:{ATTENTION}.___.alpha", "HCP-Diffusion"),
        ("unet:0:up", "cloneofsimo"),
        ("text_encoder:11:down", "cloneofsimo"),
        ("emb_params", "embedding"),
        ("emp_params", "embedding"),
        ("<cat-toy>", "embedding"),
        (f"base_model.model.{ATTENTION}.lora_A.weight", "peft"),
        ("model.diffusion_model.out.2.weight", "model"),
    ],
)
def test_another_kind_of_file_is_refused_with_its_kind(key: str, kind: str) -> None:
    file = write_tensors(PLAIN | {key: torch.ones(2, 6)}, {})
    with pytest.raises(InputError, check=says(expected="fox.safetensors", got=f"({key}, …)")) as error:
        read_lora(file, "fox.safetensors", SHAPES, NAMES)
    assert kind in error.value.got.partition(f" ({key}")[0]


@pytest.mark.parametrize(
    ("layer", "model"),
    [
        ("lora_unet_double_blocks_0_img_attn_proj.lora_down", "Flux"),
        ("lora_unet_single_blocks_0_linear1.lora_down", "Flux"),
        ("lora_transformer_single_transformer_blocks_0_attn_to_q.lora_down", "Flux"),
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A", "Flux"),
        ("double_blocks.0.img_attn.qkv.lora_A", "Flux"),
        ("diffusion_model.double_blocks.0.img_attn.qkv.lora_A", "Flux"),
        ("double_blocks.0.processor.proj_lora1.down", "Flux"),
        ("lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down", "Stable Diffusion 3"),
        ("transformer.transformer_blocks.0.attn.to_q.lora_A", "a transformer"),
        ("lora_unet_transformer_blocks_1_attn_to_q.lora_down", "a transformer"),
        ("diffusion_model.blocks.0.self_attn.q.lora_A", "a transformer"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down", "SDXL"),
        ("lora_unet_input_blocks_4_1_proj_in.lora_down", "SDXL"),
        ("text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_A", "SDXL"),
        ("unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q.lora_A", "SDXL"),
        ("unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q.lora.down", "SDXL"),
        ("diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.lora_A", "ComfyUI"),
        ("diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.lora_down", "ComfyUI"),
        ("text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.lora_A", "OneTrainer"),
        ("input_blocks.4.1.transformer_blocks.0.attn1.to_q.lora_A", "Stable Diffusion's own code"),
    ],
)
def test_layers_of_another_base_model_are_named_by_that_model(layer: str, model: str) -> None:
    with pytest.raises(InputError, check=says(expected="fox.safetensors", got=model)):
        read_lora(write_tensors({f"{layer}.weight": torch.ones(2, 6)}, {}), "fox.safetensors", SHAPES, NAMES)


@pytest.mark.parametrize(
    "layer",
    [
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down",
        "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down",
        "unet.up_blocks.3.resnets.0.conv1.lora_A",
    ],
)
def test_on_an_sdxl_base_model_others_are_named_and_its_own_are_not(layer: str) -> None:
    shapes: dict[str, dict[str, tuple[int, ...]]] = {"unet": {}, "text_encoder": {}, "text_encoder_2": {}}
    with pytest.raises(InputError, check=says(got="Stable Diffusion 1.x or 2.x", remedy="give one for SDXL")):
        read_lora(write_tensors({f"{layer}.weight": torch.ones(2, 6)}, {}), "fox.safetensors", shapes, XL_NAMES)
    own = "lora_te2_text_model_encoder_layers_99_mlp_fc1.lora_down.weight"  # a layer too many
    with pytest.raises(InputError, check=says(got="unknown keys")):
        read_lora(write_tensors({own: torch.ones(2, 6)}, {}), "fox.safetensors", shapes, XL_NAMES)


def test_a_lora_for_sdxl_says_which_base_model_to_set() -> None:
    file = write_tensors({"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(2, 6)}, {})
    with pytest.raises(InputError, check=says(got="SDXL", remedy="set base_model to one for SDXL")):
        read_lora(file, "fox.safetensors", SHAPES, NAMES)


def test_a_layer_that_the_base_model_has_is_never_taken_for_another_models() -> None:
    """Deeper transformer blocks are SDXL's only where this base model has none."""
    layer = "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q"
    tensors = {f"unet.{layer}.lora_A.weight": torch.ones(2, 6), f"unet.{layer}.lora_B.weight": torch.ones(5, 2)}
    lora = read_lora(write_tensors(tensors, {}), "x", {"unet": {layer: (5, 6)}, "text_encoder": {}}, NAMES)
    assert list(lora.adapter.networks["unet"]) == [layer]


@pytest.mark.parametrize(("width", "model"), [(768, "1.x"), (1024, "2.x"), (2048, "SDXL")])
def test_a_lora_that_does_not_fit_is_named_by_the_width_of_its_cross_attention(width: int, model: str) -> None:
    layer = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    tensors = {f"unet.{layer}.lora_A.weight": torch.ones(2, width), f"unet.{layer}.lora_B.weight": torch.ones(5, 2)}
    with pytest.raises(InputError, check=says(got=layer, remedy=model)):
        read_lora(write_tensors(tensors, {}), "x", {"unet": {layer: (5, 6)}, "text_encoder": {}}, NAMES)


# ------------------------------------------------------------------------------------------------- not safetensors


def pickled(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["fox.pt", "fox.bin", "fox.ckpt", "fox.safetensors", "fox"])
@pytest.mark.parametrize(
    ("content", "got", "remedy"),
    [
        (dict(PLAIN), "pickled", "save_file(torch.load(open('fox"),
        ([torch.ones(2, 6), torch.ones(5, 2)], "cloneofsimo", "lora_add"),
        ({"string_to_param": {"*": torch.ones(1, 6)}, "name": "fox"}, "embedding", "import.words"),
        ({"<fox>": torch.ones(1, 6)}, "embedding", "import.words"),
        ({"lora": {f"{ATTENTION}.___.alpha": torch.ones(())}}, "HCP-Diffusion", "import.toolkit"),
        ({"state_dict": {"model.diffusion_model.out.2.weight": torch.ones(1)}}, "whole model", "LoRA"),
        (torch.ones(1), "Tensor", "safetensors"),
        ({"step": 3, "lora": torch.ones(1)}, "pickled", "safetensors"),
        ({"lora": print}, "print", "safetensors"),
    ],
)
def test_a_pickle_is_named_by_what_it_holds_whatever_it_is_called(
    name: str, content: object, got: str, remedy: str
) -> None:
    with pytest.raises(InputError, check=says(expected=name, got=got, remedy=remedy)):
        read_lora(pickled(content), name, SHAPES, NAMES)


@pytest.mark.parametrize(
    ("file", "got"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "Git LFS"),
        (b"\n<!DOCTYPE html>\n<html><title>Log in</title></html>", "web page"),
        (b"not a file at all", "not a fi"),
        (write_tensors(PLAIN, {})[:-9], f"{len(write_tensors(PLAIN, {})) - 9} of its {len(write_tensors(PLAIN, {}))}"),
        (write_tensors(PLAIN, {})[:60], "header"),
    ],
)
def test_what_came_in_place_of_a_file_is_named(file: bytes, got: str) -> None:
    with pytest.raises(InputError, check=says(expected="fox.safetensors", got=got)):
        read_lora(file, "fox.safetensors", SHAPES, NAMES)


@pytest.mark.parametrize(
    ("path", "target"),
    [("loras/cat.ckpt", "loras/cat.safetensors"), ("loras/cat.safetensors", "loras/cat-converted.safetensors")],
)
def test_the_command_that_converts_a_pickle_has_its_path_and_keeps_it(path: str, target: str) -> None:
    refused = says(expected="cat", remedy=f"torch.load(open('{path}', 'rb'), weights_only=True), '{target}')")
    with pytest.raises(InputError, check=refused):
        read_lora(pickled(PLAIN), "cat", SHAPES, NAMES, path)


def test_a_dora_is_refused_with_a_way_to_a_lora() -> None:
    tensors = PLAIN | {f"{NAME}.dora_scale": torch.ones(1)}
    with pytest.raises(InputError, check=says(got="DoRA", remedy="extract_lora_from_models.py")):
        read_lora(write_tensors(tensors, {}), "x", SHAPES, NAMES)


def test_a_safetensors_file_may_begin_with_the_byte_of_a_pickle() -> None:
    for length in range(1, 129):
        file = write_tensors({"w" * length: torch.ones(1)}, {})
        if file.startswith(b"\x80"):
            assert not is_pickled(file)
            return
    raise AssertionError("no header of 128 bytes")


# ------------------------------------------------------------------------------------------------- alpha


def two_ranks(alphas: tuple[float, float], dtype: torch.dtype = torch.float32) -> bytes:
    """Return a kohya file with a layer of rank 2 and one of rank 3."""
    other = NAMES.kohya("text_encoder", TEXT)
    tensors = PLAIN | {f"{other}.lora_down.weight": torch.ones(3, 4), f"{other}.lora_up.weight": torch.ones(4, 3)}
    written = {f"{name}.alpha": torch.tensor(a).to(dtype) for name, a in zip((NAME, other), alphas, strict=True)}
    return write_tensors(tensors | written, {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_an_alpha_that_is_divided_by_the_rank_throughout_is_noted(dtype: torch.dtype, alpha: float) -> None:
    """As the reference's converter writes it; readers divide by the rank again."""
    file = two_ranks((alpha / 2, alpha / 3), dtype)
    (note,) = read_lora(file, "fox.safetensors", SHAPES, NAMES).notes
    for part in (f"{alpha:.0f} / rank", "fox.safetensors", "2 to 3", "--auto_scale_alpha", "import.toolkit"):
        assert part in note


def test_an_alpha_of_1_over_one_rank_is_noted() -> None:
    (note,) = read_lora(write_tensors(PLAIN | {f"{NAME}.alpha": torch.tensor(0.5)}, {}), "x", SHAPES, NAMES).notes
    assert "1 / rank" in note and "(2)" in note


@pytest.mark.parametrize("alphas", [(1.0, 1.0), (2.0, 3.0), (1.0, 1.5), (0.5, 0.5)])
def test_one_alpha_or_one_scale_for_several_ranks_is_not(alphas: tuple[float, float]) -> None:
    assert read_lora(two_ranks(alphas), "x", SHAPES, NAMES).notes == ()


@pytest.mark.parametrize("alpha", [1.0, 2.0, 0.25])
def test_other_alphas_are_not(alpha: float) -> None:
    file = write_tensors(PLAIN | {f"{NAME}.alpha": torch.tensor(alpha)}, {})
    assert read_lora(file, "x", SHAPES, NAMES).notes == ()


def test_an_alpha_of_1_is_1_over_rank_where_the_rank_is_1() -> None:
    factors = {f"{NAME}.lora_down.weight": torch.ones(1, 6), f"{NAME}.lora_up.weight": torch.ones(5, 1)}
    assert read_lora(write_tensors(factors | {f"{NAME}.alpha": torch.ones(())}, {}), "x", SHAPES, NAMES).notes == ()


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
