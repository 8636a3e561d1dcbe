"""Files in the formats of kohya, peft and the toolkit: their content, and the same updates when read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import save

from dreamartist_pipeline.backbones.families.sd import V2_NAMES
from dreamartist_pipeline.core.concept import Concept
from dreamartist_pipeline.core.lora_factors import LoRAFactors
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.interop.branch_adapters import BranchAdapter, branch_adapter
from dreamartist_pipeline.interop.file_facts import FileFacts
from dreamartist_pipeline.interop.kohya import read_kohya, write_kohya
from dreamartist_pipeline.interop.peft_files import read_peft, write_peft
from dreamartist_pipeline.interop.safetensors_bytes import (
    read_metadata,
    read_tensors,
    tensor_bytes,
    write_tensors,
)
from dreamartist_pipeline.interop.toolkit import read_toolkit, write_toolkit
from refusals import says

from .conftest import ATTENTION, CONV, MLP, MODULES, NAMES, OUT, TEXT, expected_biases, expected_updates, newer

FACTS = FileFacts("fox", "my-fox", "epsilon", names=NAMES)
RoundTrip = Callable[[BranchAdapter, str], BranchAdapter]


def through_kohya(adapter: BranchAdapter, _: str) -> BranchAdapter:
    return read_kohya(write_kohya(adapter, FACTS, torch.float32), "fox", MODULES, NAMES)


def through_peft(adapter: BranchAdapter, _: str) -> BranchAdapter:
    return read_peft(write_peft(adapter, FACTS, torch.float32), "fox", MODULES, NAMES)


def through_toolkit(adapter: BranchAdapter, branch: str) -> BranchAdapter:
    return read_toolkit(write_toolkit({branch: adapter}, (), 7, NAMES), MODULES, NAMES)[0][branch]


def through_newer_toolkit(adapter: BranchAdapter, branch: str) -> BranchAdapter:
    return read_toolkit(newer(write_toolkit({branch: adapter}, (), 7, NAMES)), MODULES, NAMES)[0][branch]


@pytest.mark.parametrize("branch", ["positive", "negative"])
@pytest.mark.parametrize("round_trip", [through_kohya, through_peft, through_toolkit])
def test_a_round_trip_gives_the_branchs_updates_back(concept: Concept, round_trip: RoundTrip, branch: str) -> None:
    updates = round_trip(branch_adapter(concept, branch), branch).by_layer()
    expected = expected_updates(concept, branch)
    assert updates.keys() == expected.keys()
    for at, factors in updates.items():
        torch.testing.assert_close(factors.update(), expected[at], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("branch", ["positive", "negative"])
@pytest.mark.parametrize("round_trip", [through_peft, through_toolkit, through_newer_toolkit])
def test_a_round_trip_gives_the_branchs_biases_back(
    concept_with_bias: Concept, round_trip: RoundTrip, branch: str
) -> None:
    updates = round_trip(branch_adapter(concept_with_bias, branch), branch).by_layer()
    expected = expected_biases(concept_with_bias, branch)
    for at, factors in updates.items():
        bias = expected.get(at, torch.zeros(len(factors.up)))
        torch.testing.assert_close(factors.bias_for_scale(1.0), bias, rtol=1e-5, atol=1e-5)
    assert {at for at, factors in updates.items() if factors.bias_for_scale(1.0).any()} == expected.keys()


def test_a_peft_network_has_a_bias_in_all_layers_or_in_none(concept_with_bias: Concept) -> None:
    file = write_peft(branch_adapter(concept_with_bias, "positive"), FACTS, torch.float32)
    biases = [key.removesuffix(".lora_B.bias") for key in read_tensors(file, "fox") if key.endswith(".bias")]
    assert len(biases) == 4 and all(name.startswith("unet.") for name in biases)
    assert f"unet.{CONV}" in biases


def test_the_toolkits_bias_belongs_to_its_up_projection(concept_with_bias: Concept) -> None:
    files = write_toolkit({"positive": branch_adapter(concept_with_bias, "positive")}, (), 7, NAMES)
    tensors = read_tensors(files["unet-7.safetensors"], "x")
    bias = concept_with_bias.tensors[f"unet.{OUT}.0.positive.bias"]
    assert torch.equal(tensors[f"lora:{OUT}.___.layer.lora_up.bias"], bias)  # scaled by alpha, as in a concept
    assert float(tensors[f"lora:{OUT}.___.alpha"]) == torch.tensor(1 / 3)
    assert not [key for key in tensors if MLP in key]


def test_a_bias_of_another_size_is_refused() -> None:
    key = f"lora:{ATTENTION}.___"
    tensors = {f"{key}.layer.W_down": torch.ones(2, 6), f"{key}.layer.W_up": torch.ones(5, 2)}
    tensors |= {f"{key}.alpha": torch.tensor(1.0), f"{key}.layer.bias": torch.ones(6)}
    with pytest.raises(InputError, check=says(expected=f"unet.{ATTENTION}", got="'bias': (6,)")):
        read_toolkit({"unet-1.safetensors": write_tensors(tensors, {})}, MODULES, NAMES)


def test_a_kohya_file_has_one_alpha_and_the_true_scale_in_up(concept: Concept) -> None:
    tensors = read_tensors(write_kohya(branch_adapter(concept, "positive"), FACTS, torch.float32), "fox")
    assert {float(tensor) for key, tensor in tensors.items() if key.endswith(".alpha")} == {1.0}
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    expected = expected_updates(concept, "positive")["unet", ATTENTION]
    up, down = tensors[f"{name}.lora_up.weight"], tensors[f"{name}.lora_down.weight"]
    torch.testing.assert_close(up @ down * 1.0 / 5, expected, rtol=1e-5, atol=1e-6)  # up · down · alpha / rank


SMALL = [  # sizes of up and down, and alpha / rank
    ((1e-3, 0.05), 1 / 192),
    ((1e-5, 0.05), 1.0),
    ((2e2, 1e-7), 1.0),
]


def rounded_difference(
    adapter: BranchAdapter, write: Callable[..., bytes], read: Callable[..., BranchAdapter]
) -> float:
    read_back = read(write(adapter, FACTS, torch.float16), "fox", MODULES, NAMES).by_layer()
    updates = {at: factors.update() for at, factors in adapter.by_layer().items()}
    return max(float((read_back[at].update() - update).norm() / update.norm()) for at, update in updates.items())


@pytest.mark.parametrize(("write", "read"), [(write_kohya, read_kohya), (write_peft, read_peft)])
@pytest.mark.parametrize(("sizes", "scale"), SMALL)
def test_small_updates_keep_their_precision_in_float16(
    write: Callable[..., bytes], read: Callable[..., BranchAdapter], sizes: tuple[float, float], scale: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(5, 4, generator=generator), torch.randn(4, 6, generator=generator)
    uneven = torch.tensor([1.0, 0.1, 10.0, 1.0])  # different norms per rank
    factors = LoRAFactors(down * sizes[1], up * sizes[0] * uneven, scale)
    conv = LoRAFactors(torch.randn(2, 4, 3, 3, generator=generator) * sizes[1], up[:, :2, None, None] * sizes[0], scale)
    adapter = BranchAdapter({"unet": {ATTENTION: factors, CONV: conv}})
    assert rounded_difference(adapter, write, read) < 6e-4


def test_ranks_without_an_effect_are_written_unchanged() -> None:
    factors = LoRAFactors(torch.ones(2, 3), torch.tensor([[0.0, 1.0]] * 5), 1.0)
    down, up = factors.balanced_for_scale(1.0)
    assert torch.equal(down[0], factors.down[0]) and torch.equal(up[:, 0], factors.up[:, 0])


def test_balancing_does_not_change_a_bit_of_the_update(concept: Concept) -> None:
    for factors in branch_adapter(concept, "positive").by_layer().values():
        down, up = factors.balanced_for_scale(factors.scale)
        assert torch.equal(LoRAFactors(down, up, factors.scale).update(), factors.update())
        assert (up.flatten(1).norm(dim=0) / down.flatten(1).norm(dim=1)).log2().abs().max() <= 1


def test_text_encoder_names_have_text_model_whether_or_not_the_module_has_it() -> None:
    assert NAMES.kohya("text_encoder", TEXT) == "lora_te_text_model_encoder_layers_0_self_attn_out_proj"
    assert NAMES.kohya("text_encoder", f"text_model.{TEXT}") == NAMES.kohya("text_encoder", TEXT)


def test_kohya_metadata_describe_the_file(concept: Concept) -> None:
    adapter = branch_adapter(concept, "positive")
    file = write_kohya(adapter, FileFacts("fox", "my-fox", "v_prediction", names=V2_NAMES), torch.float32)
    metadata = read_metadata(file)
    assert metadata["sshs_model_hash"] == hashlib.sha256(tensor_bytes(file)).hexdigest()
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("5", "1.0")
    assert (metadata["ss_base_model_version"], metadata["ss_v2"]) == ("sd_v2", "True")
    assert metadata["ss_network_module"] == "networks.lora"
    assert metadata["ss_output_name"] == metadata["modelspec.title"] == "fox"
    assert metadata["modelspec.prediction_type"] == "v"
    assert metadata["modelspec.trigger_phrase"] == "my-fox"
    assert read_metadata(write_kohya(adapter, FACTS, torch.float32))["ss_base_model_version"] == "sd_v1"


@pytest.mark.parametrize("write", [write_kohya, write_peft])
def test_the_dtype_is_that_of_every_tensor(concept: Concept, write: Callable[..., bytes]) -> None:
    tensors = read_tensors(write(branch_adapter(concept, "positive"), FACTS, torch.bfloat16), "fox")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_equal_concepts_give_equal_bytes(concept: Concept) -> None:
    first, second = (write_kohya(branch_adapter(concept, "positive"), FACTS, torch.float32) for _ in range(2))
    assert first == second


def test_peft_keys_are_named_by_network_and_module(concept: Concept) -> None:
    keys = set(read_tensors(write_peft(branch_adapter(concept, "positive"), FACTS, torch.float32), "fox"))
    assert {f"unet.{CONV}.lora_A.weight", f"text_encoder.text_model.{TEXT}.lora_B.weight"} <= keys


# --------------------------------------------------------------------------------------------- readers

NAME = NAMES.kohya("unet", ATTENTION)
PAIR = {f"{NAME}.lora_down.weight": torch.ones(2, 6), f"{NAME}.lora_up.weight": torch.ones(5, 2)}


def test_a_kohya_file_without_alpha_has_scale_one_and_with_alpha_that_over_the_rank() -> None:
    without = read_kohya(write_tensors(PAIR, {}), "x", MODULES, NAMES)
    with_alpha = read_kohya(write_tensors(PAIR | {f"{NAME}.alpha": torch.tensor(8.0)}, {}), "x", MODULES, NAMES)
    assert without.networks["unet"][ATTENTION].scale == 1.0
    assert with_alpha.networks["unet"][ATTENTION].scale == 8.0 / 2


def test_unknown_keys_are_listed() -> None:
    tensors = PAIR | {f"{name}.lora_up.weight": torch.ones(1) for name in ("lora_unet_nowhere", "bundle_emb_x")}
    with pytest.raises(InputError, check=says(got="bundle_emb_x.lora_up.weight, lora_unet_nowhere.lora_up.weight")):
        read_kohya(write_tensors(tensors, {}), "x.safetensors", MODULES, NAMES)
    with pytest.raises(InputError, check=says(expected="peft", got=NAME)):
        read_peft(write_tensors(PAIR, {}), "x.safetensors", MODULES, NAMES)
    with pytest.raises(InputError, check=says(expected="toolkit", got=NAME)):
        read_toolkit({"unet-1.safetensors": write_tensors(PAIR, {})}, MODULES, NAMES)


def test_of_very_many_unknown_keys_the_first_are_listed() -> None:
    tensors = {f"lora_unet_nowhere_{i:02}.lora_up.weight": torch.ones(1) for i in range(15)}
    with pytest.raises(InputError, check=says(got="lora_unet_nowhere_11.lora_up.weight and 3 more")):
        read_kohya(write_tensors(tensors, {}), "x", MODULES, NAMES)


def test_half_a_pair_is_refused_by_name() -> None:
    with pytest.raises(InputError, check=says(expected=f"unet.{ATTENTION}", got="{'up': (5, 2)}")):
        read_kohya(write_tensors({f"{NAME}.lora_up.weight": torch.ones(5, 2)}, {}), "x", MODULES, NAMES)


def test_factors_that_do_not_belong_together_are_refused() -> None:
    for up in (torch.ones(5, 3), torch.ones(5)):
        with pytest.raises(InputError, check=says(expected=f"unet.{ATTENTION}", got=f"'up': {tuple(up.shape)}")):
            read_kohya(write_tensors(PAIR | {f"{NAME}.lora_up.weight": up}, {}), "x", MODULES, NAMES)


def test_an_ambiguous_kohya_name_is_refused() -> None:
    with pytest.raises(InputError, check=says(got="down_blocks.0 and down.blocks.0")):
        read_kohya(write_tensors(PAIR, {}), "x", {"unet": ["down_blocks.0", "down.blocks.0"]}, NAMES)


def test_another_file_than_safetensors_is_refused() -> None:
    with pytest.raises(InputError, check=says(expected="safetensors file x")):
        read_kohya(b"not a file at all", "x", MODULES, NAMES)


def test_an_empty_file_is_refused() -> None:
    with pytest.raises(InputError, check=says(got="no tensors")):
        read_kohya(save({}), "x", MODULES, NAMES)


OLD_ATTENTION = f"{ATTENTION.removesuffix('.to_q')}.processor"
OLD_TEXT = TEXT.removesuffix(".out_proj")


def peft_file(**config: object) -> bytes:
    tensors = {f"unet.{ATTENTION}.lora_A.weight": torch.ones(2, 6), f"unet.{ATTENTION}.lora_B.weight": torch.ones(5, 2)}
    return write_tensors(tensors, {"lora_adapter_metadata": json.dumps({f"unet.{k}": v for k, v in config.items()})})


def test_diffusers_metadata_give_a_peft_file_its_alpha() -> None:
    adapter = read_peft(peft_file(r=2, lora_alpha=6), "x", MODULES, NAMES)
    assert adapter.networks["unet"][ATTENTION].scale == 6 / 2


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"use_rslora": True}, 6 / 2**0.5),
        ({"alpha_pattern": {"to_q": 1}}, 1 / 2),
        ({"alpha_pattern": {f"^{ATTENTION}": 1}}, 1 / 2),
        ({"alpha_pattern": {"^to_q": 1, "o_q": 1}}, 6 / 2),  # neither is the layer's name nor a whole end of it
        ({"alpha_pattern": {"attn1.to_q": 1, "to_q": 4}}, 1 / 2),  # the first that fits
        ({"alpha_pattern": {"to_q": 1}, "use_rslora": True}, 1 / 2**0.5),
        ({"alpha_pattern": {}, "use_rslora": False}, 6 / 2),
        ({"alpha_pattern": None}, 6 / 2),
    ],
)
def test_diffusers_metadata_say_how_every_layer_is_scaled(config: dict[str, object], scale: float) -> None:
    adapter = read_peft(peft_file(r=2, lora_alpha=6, **config), "x", MODULES, NAMES)
    assert adapter.networks["unet"][ATTENTION].scale == pytest.approx(scale)


@pytest.mark.parametrize("pattern", [{"(a+)+": 1}, {"to_q": "four"}, {"to_q": None}, ["to_q"], {"to_q": 10**400}])
def test_patterns_that_are_no_names_with_numbers_are_refused(pattern: object) -> None:
    with pytest.raises(InputError, check=says(expected="alpha_pattern", got="alpha_pattern")):
        read_peft(peft_file(alpha_pattern=pattern, lora_alpha=6), "x", MODULES, NAMES)


@pytest.mark.parametrize(
    ("down", "up", "network", "layer"),
    [
        (f"unet.{ATTENTION}.lora.down", f"unet.{ATTENTION}.lora.up", "unet", ATTENTION),
        (*(f"unet.{OLD_ATTENTION}.to_q_lora.{part}" for part in ("down", "up")), "unet", ATTENTION),
        (*(f"{OLD_ATTENTION}.to_q_lora.{part}" for part in ("down", "up")), "unet", ATTENTION),
        (*(f"unet.{OLD_ATTENTION}.to_out_lora.{part}" for part in ("down", "up")), "unet", OUT),
        (*(f"text_encoder.{TEXT}.lora_linear_layer.{part}" for part in ("down", "up")), "text_encoder", TEXT),
        (
            *(f"text_encoder.text_model.{TEXT}.lora_linear_layer.{part}" for part in ("down", "up")),
            "text_encoder",
            TEXT,
        ),
        (
            *(f"text_encoder.text_model.{OLD_TEXT}.to_out_lora.{part}" for part in ("down", "up")),
            "text_encoder",
            TEXT,
        ),
    ],
)
def test_every_spelling_of_diffusers_is_read(down: str, up: str, network: str, layer: str) -> None:
    file = write_tensors({f"{down}.weight": torch.ones(2, 6), f"{up}.weight": torch.ones(5, 2)}, {})
    adapter = read_peft(file, "x", MODULES, NAMES)
    assert list(adapter.networks[network]) == [layer]
    assert adapter.networks[network][layer].scale == 1


def test_an_alpha_beside_the_factors_is_read_where_there_are_no_metadata() -> None:
    name = f"unet.{ATTENTION}"
    tensors = {"lora_down.weight": torch.ones(2, 6), "lora_up.weight": torch.ones(5, 2), "alpha": torch.tensor(6.0)}
    file = write_tensors({f"{name}.{key}": tensor for key, tensor in tensors.items()}, {})
    assert read_peft(file, "x", MODULES, NAMES).networks["unet"][ATTENTION].scale == 3


@pytest.mark.parametrize("prefix", ["lora_te_text_model_", "lora_te_", "lora_te1_text_model_", "lora_te1_"])
def test_every_kohya_name_of_the_only_text_encoder_is_read(prefix: str) -> None:
    name = f"{prefix}{TEXT.replace('.', '_')}"
    file = write_tensors({f"{name}.lora_down.weight": torch.ones(1, 4), f"{name}.lora_up.weight": torch.ones(4, 1)}, {})
    assert list(read_kohya(file, "x", MODULES, NAMES).networks["text_encoder"]) == [TEXT]


def test_a_peft_file_saved_by_transformers_5_lacks_text_model_and_is_read_all_the_same() -> None:
    tensors = {
        f"text_encoder.{TEXT}.lora_A.weight": torch.ones(1, 4),
        f"text_encoder.{TEXT}.lora_B.weight": torch.ones(4, 1),
    }
    assert TEXT in read_peft(write_tensors(tensors, {}), "x", MODULES, NAMES).networks["text_encoder"]
