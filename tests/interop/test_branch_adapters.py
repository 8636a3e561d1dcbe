"""The intermediate representation: the updates of each branch, and concepts built from it."""

from __future__ import annotations

import pytest
import torch

from dreamartist_pipeline.core.concept import Concept, TriggerWord
from dreamartist_pipeline.core.layout import BaseModelIdentity
from dreamartist_pipeline.core.lora_factors import LoRAFactors
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.interop.branch_adapters import (
    BranchAdapter,
    added_up,
    branch_adapter,
    build_concept,
)
from refusals import says

from .conftest import ATTENTION, CONV, expected_biases, expected_updates, with_groups

TINY = BaseModelIdentity("tiny", "0123", "stable-diffusion", ("unet", "text_encoder"))


@pytest.mark.parametrize("branch", ["positive", "negative"])
def test_every_layers_update_is_the_sum_of_the_groups_that_act_on_the_branch(concept: Concept, branch: str) -> None:
    updates = {at: factors.update() for at, factors in branch_adapter(concept, branch).by_layer().items()}
    expected = expected_updates(concept, branch)
    assert updates.keys() == expected.keys()
    for at, update in updates.items():
        torch.testing.assert_close(update, expected[at], rtol=1e-6, atol=1e-6)


def test_the_groups_of_a_layer_are_concatenated_along_the_rank(concept: Concept) -> None:
    layers = branch_adapter(concept, "positive").networks["unet"]
    assert layers[ATTENTION].rank == 2 + 3
    assert layers[CONV].down.shape == (2 + 1, 4, 3, 3)
    assert layers[CONV].up.shape == (7, 2 + 1, 1, 1)


def test_a_single_group_keeps_its_tensors_and_its_scale(concept: Concept) -> None:
    factors = branch_adapter(concept, "negative").networks["unet"][ATTENTION]
    assert torch.equal(factors.up, concept.tensors[f"unet.{ATTENTION}.2.negative.up"])
    assert factors.scale == 0.5 / 1


def test_by_hand_rank_two_and_alpha_three() -> None:
    factors = LoRAFactors(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 1.0]]), 3 / 2)
    assert factors.update().tolist() == [[1.5, 3.0]]
    assert factors.up_for_scale(0.5).tolist() == [[3.0, 3.0]]


@pytest.mark.parametrize("branch", ["positive", "negative"])
def test_every_layers_bias_is_the_sum_of_those_that_act_on_the_branch(concept_with_bias: Concept, branch: str) -> None:
    adapter = branch_adapter(concept_with_bias, branch)
    biases = {at: f.bias_for_scale(1.0) for at, f in adapter.by_layer().items() if f.bias is not None}
    expected = expected_biases(concept_with_bias, branch)
    assert biases.keys() == expected.keys()
    for at, bias in biases.items():
        torch.testing.assert_close(bias, expected[at], rtol=1e-6, atol=1e-6)


def test_a_bias_by_hand() -> None:
    factors = LoRAFactors(torch.ones(2, 1), torch.ones(3, 2), 3 / 2, torch.tensor([1.0, 0.0, -2.0]))
    assert factors.bias_for_scale(1.0).tolist() == [1.5, 0.0, -3.0]
    assert LoRAFactors(torch.ones(2, 1), torch.ones(3, 2), 1.0).bias_for_scale(0.5).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(("group", "has_bias"), [(0, False), (1, True)])
def test_a_bias_that_metadata_do_not_agree_with_is_refused(
    concept_with_bias: Concept, group: int, has_bias: bool
) -> None:
    wrong = with_groups(concept_with_bias, "unet", *({"bias": has_bias} if i == group else {} for i in range(4)))
    with pytest.raises(InputError, check=says(expected="unet.0.positive", got=f"group {group}")):
        branch_adapter(wrong, "positive")


def test_a_concept_built_from_branch_adapters_has_the_same_biases(concept_with_bias: Concept) -> None:
    adapters = {branch: branch_adapter(concept_with_bias, branch) for branch in ("positive", "negative")}
    built = build_concept(adapters, (), TINY)
    assert [group.bias for group in built.metadata.lora["unet"]] == [True, True]
    assert [group.bias for group in built.metadata.lora["text_encoder"]] == [True, False]
    for branch, adapter in adapters.items():
        for at, factors in branch_adapter(built, branch).by_layer().items():
            expected = adapter.by_layer()[at].bias_for_scale(1.0)
            torch.testing.assert_close(factors.bias_for_scale(1.0), expected, rtol=1e-5, atol=1e-6)


def test_words_are_listed_by_branch_and_slot(concept: Concept) -> None:
    words = concept.trigger_words()
    assert [(w.name, w.branch, w.slot, w.num_vectors) for w in words] == [
        ("my-fox", "positive", "pt1", 2),
        ("my-fox-neg", "negative", "pt1", 3),
    ]


def test_a_concept_built_from_branch_adapters_has_the_same_updates_and_words(concept: Concept) -> None:
    adapters = {branch: branch_adapter(concept, branch) for branch in ("positive", "negative")}
    built = build_concept(adapters, concept.trigger_words(), TINY, "fox", 7)
    for branch, adapter in adapters.items():
        again = branch_adapter(built, branch).by_layer()
        for at, factors in adapter.by_layer().items():
            torch.testing.assert_close(again[at].update(), factors.update(), rtol=1e-5, atol=1e-6)
    assert [w.name for w in built.trigger_words()] == ["my-fox", "my-fox-neg"]
    assert (built.metadata.num_vectors, built.metadata.num_branches, built.metadata.num_steps) == ((2, 3), 2, 7)
    assert built.metadata.base_model_fingerprint == "0123"
    assert built.metadata.class_word == "fox"


def test_positive_words_make_a_concept_of_one_branch() -> None:
    built = build_concept({}, [TriggerWord("cat-x", "pt1", "positive", {"text_encoder": torch.zeros(2, 4)})], TINY)
    assert built.metadata.num_branches == 1
    assert built.metadata.words == {"pt1": ("cat-x", "cat-x-neg")}


def test_a_negative_word_without_a_positive_one_is_refused() -> None:
    words = [
        TriggerWord("a-x", "pt1", "positive", {"text_encoder": torch.zeros(2, 4)}),
        TriggerWord("b-neg", "pt2", "negative", {"text_encoder": torch.zeros(2, 4)}),
    ]
    with pytest.raises(InputError, check=says(got="['pt2']")):
        build_concept({}, words, TINY)


def test_a_word_without_partner_may_have_another_number_of_vectors_than_a_pair() -> None:
    words = [
        TriggerWord("a-x", "pt1", "positive", {"text_encoder": torch.zeros(2, 4)}),
        TriggerWord("a-neg", "pt1", "negative", {"text_encoder": torch.zeros(3, 4)}),
        TriggerWord("bad-x", "quality", "positive", {"text_encoder": torch.zeros(5, 4)}),
    ]
    built = build_concept({}, words, TINY)
    assert built.metadata.words == {"pt1": ("a-x", "a-neg"), "quality": ("bad-x", "")}
    assert (built.metadata.num_vectors, built.metadata.num_branches) == ((None, 3), 2)
    assert [(w.name, w.num_vectors) for w in built.trigger_words()] == [("a-x", 2), ("a-neg", 3), ("bad-x", 5)]


def test_a_branch_without_adapters_is_empty(concept: Concept) -> None:
    only_words = {name: tensor for name, tensor in concept.tensors.items() if name.startswith("words")}
    assert branch_adapter(Concept(only_words, concept.metadata), "positive") == BranchAdapter({})


def test_a_tensor_of_an_unknown_group_is_named(concept: Concept) -> None:
    tensors = concept.tensors | {f"unet.{CONV}.9.positive.down": torch.zeros(1)}
    with pytest.raises(InputError, check=says(expected="unet.0.positive", got=f"group 9 in {CONV}")):
        branch_adapter(Concept(tensors, concept.metadata), "positive")


def test_adapters_add_up_layer_by_layer(concept: Concept) -> None:
    positive, negative = (branch_adapter(concept, branch) for branch in ("positive", "negative"))
    both = added_up([positive, negative]).by_layer()
    updates = [{at: f.update() for at, f in adapter.by_layer().items()} for adapter in (positive, negative)]
    assert both.keys() == updates[0].keys() | updates[1].keys()
    for at, factors in both.items():
        expected = sum(update[at] for update in updates if at in update)
        torch.testing.assert_close(factors.update(), expected, rtol=1e-5, atol=1e-5)


def test_a_shared_adapter_makes_a_concept_of_one_branch_that_acts_on_both(concept: Concept) -> None:
    adapter = branch_adapter(concept, "positive")
    built = build_concept({"shared": adapter}, (), TINY)
    assert built.metadata.num_branches == 1
    assert {group.branch for group in built.metadata.lora["unet"]} == {"shared"}
    for branch in ("positive", "negative"):
        again = branch_adapter(built, branch).by_layer()
        for at, factors in adapter.by_layer().items():
            torch.testing.assert_close(again[at].update(), factors.update(), rtol=1e-5, atol=1e-6)
