"""Initial values from a concept: exact updates in the ranks of the groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dreamartist_pipeline.core.adapters import AdapterStack, inject
from dreamartist_pipeline.core.concept import Concept, ConceptMetadata
from dreamartist_pipeline.core.embeddings import Vocabulary, WordEmbedding
from dreamartist_pipeline.core.starting import load_initial_values
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import ResolvedGroup
from refusals import says

DOWN, UP = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[4.0], [5.0]])  # rank 1: 3 inputs, 2 outputs


def model() -> nn.ModuleDict:
    return nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2), "c": nn.Conv2d(3, 2, 3)})


def spec(branch: str = "positive", group: int = 0, layers: tuple[str, ...] = ("a",), **changes: Any) -> ResolvedGroup:
    values = {"rank": 3, "lr": 1.0, "alpha": 6.0} | changes
    return ResolvedGroup(name=f"unet.{group}.{branch}", layers=layers, branch=branch, **values)


def stack(*specs: ResolvedGroup, device: str = "cpu", num_branches: int = 2) -> AdapterStack:
    with torch.device(device):
        network = model()
    return inject(network, specs, num_branches, torch.Generator().manual_seed(0))


def concept(
    *updates: tuple[str, int, str],
    words: dict[str, torch.Tensor] | None = None,
    names: dict[str, list[str]] | None = None,
    alpha: float = 0.5,
    **metadata: Any,
) -> Concept:
    """Return a concept with DOWN and UP in every (layer, group, branch)."""
    tensors = {}
    for layer, group, branch in updates:
        tensors |= {f"unet.{layer}.{group}.{branch}.down": DOWN, f"unet.{layer}.{group}.{branch}.up": UP}
    tensors |= {f"words.{key}": vectors for key, vectors in (words or {}).items()}
    options = {"alpha": alpha, "rank": 1, **metadata.pop("group", {})}
    groups = {group: spec(branch, group, **options) for _, group, branch in updates}
    fillers = [spec("positive", group) for group in range(max(groups, default=-1) + 1)]
    values = {
        "base_model": "tiny",
        "base_model_fingerprint": "0123",
        "num_steps": 1,
        "words": (names or {"pt1": ("my-x", "my-x-neg")}) if words else {},
        "num_vectors": (1, 2),
        "num_branches": 2,
        "lora": {"unet": [groups.get(i, filler) for i, filler in enumerate(fillers)], "text_encoder": []},
    }
    return Concept(tensors, ConceptMetadata.model_validate(values | metadata))


def update_of(adapters: AdapterStack, layer: str = "a", index: int = 0) -> torch.Tensor:
    update = adapters.layers[layer].updates[index]
    return (update.up.flatten(1) @ update.down.flatten(1) * update.scale).detach()


# --------------------------------------------------------------------------------------------- adapters


def test_the_update_is_the_concepts_whatever_rank_and_alpha_the_group_has() -> None:
    adapters = stack(spec())  # scale 6 / 3
    taken = load_initial_values({"unet": adapters}, {}, concept(("a", 0, "positive"), alpha=0.5))
    assert update_of(adapters).tolist() == [[2.0, 4.0, 6.0], [2.5, 5.0, 7.5]]  # 0.5 · up · down
    assert taken == {"unet.0.positive": 1}


def test_an_equal_scale_keeps_the_tensors_as_they_are() -> None:
    adapters = stack(spec(rank=1, alpha=0.7))
    load_initial_values({"unet": adapters}, {}, concept(("a", 0, "positive"), alpha=0.7))
    (update,) = adapters.layers["a"].updates
    assert torch.equal(update.up, UP) and torch.equal(update.down, DOWN)


def test_the_ranks_left_over_start_fresh() -> None:
    fresh = stack(spec()).layers["a"].updates[0].down.detach().clone()
    adapters = stack(spec())
    load_initial_values({"unet": adapters}, {}, concept(("a", 0, "positive")))
    (update,) = adapters.layers["a"].updates
    assert torch.equal(update.down[1:], fresh[1:]) and not torch.equal(update.down[0], fresh[0])
    assert update.up[:, 1:].abs().max() == 0


def test_a_bias_is_taken_over_by_a_group_that_has_one_and_refused_by_others() -> None:
    start = concept(("a", 0, "positive"), ("a", 1, "positive"), group={"bias": True})
    bias = {f"unet.a.{group}.positive.bias": torch.tensor([1.0, -2.0]) for group in (0, 1)}
    start = Concept({**start.tensors, **bias}, start.metadata)
    adapters = stack(spec(bias=True))  # scale 6 / 3
    load_initial_values({"unet": adapters}, {}, start)
    (update,) = adapters.layers["a"].updates
    assert update.bias is not None
    assert update.bias.tolist() == [0.5, -1.0]  # 2 · bias is the sum of both, 0.5 · bias each
    with pytest.raises(InputError, check=says(expected="bias for unet.a", remedy="training.lora_unet.0.bias")):
        load_initial_values({"unet": stack(spec())}, {}, start)


def test_a_convolution_is_taken_over_too() -> None:
    adapters = stack(spec(layers=("c",), rank=1, alpha=1.0))
    down, up = torch.arange(27.0).reshape(1, 3, 3, 3), torch.tensor([1.0, 2.0]).reshape(2, 1, 1, 1)
    start = concept(("c", 0, "positive"), alpha=1.0)
    tensors = {"unet.c.0.positive.down": down, "unet.c.0.positive.up": up}
    load_initial_values({"unet": adapters}, {}, Concept(tensors, start.metadata))
    (update,) = adapters.layers["c"].updates
    assert torch.equal(update.down, down) and torch.equal(update.up, up)


def test_of_several_groups_the_first_takes_it() -> None:
    adapters = stack(spec(), spec(group=1))
    taken = load_initial_values({"unet": adapters}, {}, concept(("a", 0, "positive")))
    assert taken == {"unet.0.positive": 1}
    assert update_of(adapters, index=1).abs().max() == 0


def test_several_groups_of_the_concept_add_up_in_one() -> None:
    adapters = stack(spec())
    load_initial_values({"unet": adapters}, {}, concept(("a", 0, "positive"), ("a", 1, "positive"), alpha=1.0))
    assert torch.equal(update_of(adapters), 2 * UP @ DOWN)


def test_a_branchs_update_goes_to_a_group_of_that_branch() -> None:
    adapters = stack(spec("negative"), spec("positive", 1))
    load_initial_values({"unet": adapters}, {}, concept(("a", 0, "positive"), alpha=1.0))
    assert update_of(adapters, index=0).abs().max() == 0
    assert torch.equal(update_of(adapters, index=1), UP @ DOWN)


def test_what_acts_on_both_goes_to_a_shared_group_or_to_one_of_each() -> None:
    start = concept(("a", 0, "shared"), alpha=1.0)
    shared = stack(spec("positive"), spec("shared", 1), spec("negative", 2))
    assert load_initial_values({"unet": shared}, {}, start) == {"unet.1.shared": 1}
    split = stack(spec("positive"), spec("negative", 1))
    assert load_initial_values({"unet": split}, {}, start) == {"unet.1.negative": 1, "unet.0.positive": 1}
    assert torch.equal(update_of(split, index=0), UP @ DOWN)
    assert torch.equal(update_of(split, index=1), UP @ DOWN)


def test_a_training_without_a_negative_branch_begins_with_a_shared_adapter() -> None:
    adapters = stack(spec("shared"), num_branches=1)
    assert load_initial_values({"unet": adapters}, {}, concept(("a", 0, "shared"))) == {"unet.0.shared": 1}


def test_it_works_on_the_meta_device() -> None:
    adapters = stack(spec(), device="meta")
    assert load_initial_values({"unet": adapters}, {}, concept(("a", 0, "positive"))) == {"unet.0.positive": 1}


@pytest.mark.parametrize(
    ("specs", "update", "missing"),
    [
        ([spec()], ("b", 0, "positive"), "unet.b (positive)"),
        ([spec()], ("a", 0, "negative"), "unet.a (negative)"),
        ([spec("shared")], ("a", 0, "positive"), "unet.a (positive)"),
        ([spec()], ("a", 0, "shared"), "unet.a (shared)"),
    ],
)
def test_a_layer_without_a_group_is_refused(
    specs: list[ResolvedGroup], update: tuple[str, int, str], missing: str
) -> None:
    with pytest.raises(InputError, check=says(got=f"1: {missing}", remedy="groups")):
        load_initial_values({"unet": stack(*specs)}, {}, concept(update))


def test_without_branches_the_groups_of_one_need_a_guidance_scale_above_1() -> None:
    for branch in ("positive", "negative"):
        with pytest.raises(
            InputError, check=says(got=f"1: unet.a ({branch})", remedy="training.guidance_scale above 1")
        ):
            load_initial_values({"unet": stack(spec("shared"), num_branches=1)}, {}, concept(("a", 0, branch)))
    with pytest.raises(InputError, check=says(got="unet.b (shared)")) as error:
        load_initial_values({"unet": stack(spec("shared"), num_branches=1)}, {}, concept(("b", 0, "shared")))
    assert "guidance_scale" not in error.value.remedy


def test_a_network_without_groups_is_refused() -> None:
    with pytest.raises(InputError, check=says(got="2: unet.a (positive), unet.b (positive)")):
        load_initial_values({}, {}, concept(("a", 0, "positive"), ("b", 0, "positive")))


def test_layers_that_differ_in_their_numbers_are_named_once() -> None:
    layers = [
        (f"blocks.{i}.conv{j}", group, branch)
        for i in (0, 11)
        for j in (1, 2)
        for group, branch in enumerate(("positive", "negative"))
    ]
    missing = "8: unet.blocks.*.conv1 (negative, positive), unet.blocks.*.conv2 (negative, positive)"
    with pytest.raises(InputError, check=says(got=missing)):
        load_initial_values({}, {}, concept(*layers))


def test_too_small_a_rank_is_refused_with_the_one_to_set() -> None:
    adapters = stack(spec(rank=1))
    start = concept(("a", 0, "positive"), ("a", 1, "positive"))
    with pytest.raises(
        InputError, check=says(expected="2 in unet.a", got="1", remedy="training.lora_unet.0.rank to 2")
    ):
        load_initial_values({"unet": adapters}, {}, start)
    assert update_of(adapters).abs().max() == 0  # nothing has been changed


def test_ranks_that_change_with_the_timestep_have_to_be_the_same() -> None:
    changing = {"timestep_min_rank": 1}
    start = concept(("a", 0, "positive"), group=changing)
    assert load_initial_values({"unet": stack(spec(rank=1, **changing))}, {}, start) == {"unet.0.positive": 1}
    for other in (spec(rank=1), spec(rank=3, **changing)):
        with pytest.raises(InputError, check=says(expected="unet.a, rank 1 with 1", remedy="timestep_min_rank")):
            load_initial_values({"unet": stack(other)}, {}, start)
    with pytest.raises(InputError, check=says(expected="rank 1 with None", got="rank 1 with 1")):
        load_initial_values({"unet": stack(spec(rank=1, **changing))}, {}, concept(("a", 0, "positive")))


def test_ranks_by_timestep_of_an_orthogonal_start_are_no_start() -> None:
    start = concept(("a", 0, "positive"), group={"timestep_min_rank": 1, "orthogonal_init": "random"})
    with pytest.raises(InputError, check=says(expected="plain LoRA", got="orthogonal_init with timestep_min_rank=1")):
        load_initial_values({"unet": stack(spec(rank=2, timestep_min_rank=1))}, {}, start)


@pytest.mark.parametrize("factors", [{"down": torch.zeros(1, 4)}, {"up": torch.zeros(3, 1)}])
def test_factors_of_another_layer_are_refused(factors: dict[str, torch.Tensor]) -> None:
    start = concept(("a", 0, "positive"))
    tensors = start.tensors | {f"unet.a.0.positive.{name}": tensor for name, tensor in factors.items()}
    with pytest.raises(InputError, check=says(expected="[rank, 3] and up of 2 outputs for unet.a", got="(1, ")):
        load_initial_values({"unet": stack(spec())}, {}, Concept(tensors, start.metadata))


def test_vectors_of_another_width_are_refused() -> None:
    vectors = VECTORS | {"positive.pt1": torch.zeros(1, 3)}
    with pytest.raises(
        InputError, check=says(expected="{'text_encoder': 2}", got="{'text_encoder': 3} for positive.pt1")
    ):
        load_initial_values({}, {"text_encoder": embedding()}, concept(words=vectors))


def test_incomplete_factors_are_refused() -> None:
    start = concept(("a", 0, "positive"))
    half = Concept({"unet.a.0.positive.up": UP}, start.metadata)
    with pytest.raises(InputError, check=says(expected="for a", got="{'up'")):
        load_initial_values({"unet": stack(spec())}, {}, half)


# --------------------------------------------------------------------------------------------- words

VECTORS = {"positive.pt1": torch.tensor([[1.0, 2.0]]), "negative.pt1": torch.tensor([[3.0, 4.0], [5.0, 6.0]])}


def embedding(
    names: tuple[str, str] = ("my-x", "my-x-neg"), counts: tuple[int, int] = (1, 2), slot: str = "pt1", nb: int = 2
) -> WordEmbedding:
    vocabulary = Vocabulary.build({slot: names}, counts, 7, nb)
    return WordEmbedding(nn.Embedding(7, 2), vocabulary, [torch.zeros(w.num_vectors, 2) for w in vocabulary.words])


def test_words_begin_with_the_concepts_vectors() -> None:
    words = embedding()
    taken = load_initial_values({}, {"text_encoder": words}, concept(words=VECTORS))
    assert taken == {"words.negative.pt1": 2, "words.positive.pt1": 1}
    assert {key: vectors.tolist() for key, vectors in words.tensors().items()} == {
        key: vectors.tolist() for key, vectors in VECTORS.items()
    }


def test_a_word_that_the_concept_has_not_starts_fresh() -> None:
    words = embedding()
    start = concept(words={"positive.pt1": VECTORS["positive.pt1"]}, num_branches=1)
    taken = load_initial_values({}, {"text_encoder": words}, start)
    assert taken == {"words.positive.pt1": 1}
    assert words.tensors()["negative.pt1"].abs().max() == 0


@pytest.mark.parametrize(
    "words",
    [
        None,
        embedding(names=("my-y", "my-x-neg")),
        embedding(counts=(1, 3)),
        embedding(slot="pt2"),
        embedding(nb=1),
    ],
)
def test_other_words_are_refused_with_the_values_to_set(words: WordEmbedding | None) -> None:
    settings = 'training.words.names={"pt1":["my-x","my-x-neg"]} and training.words.num_vectors=[1,2]'
    with pytest.raises(InputError, check=says(got="pt1", remedy=settings)):
        load_initial_values({}, {"text_encoder": words} if words else {}, concept(words=VECTORS))


def test_words_that_no_training_can_have_are_refused_with_the_reason() -> None:
    vectors = VECTORS | {"positive.other": torch.zeros(5, 2)}
    names = {"pt1": ["my-x", "my-x-neg"], "other": ["bad-x", ""]}
    with pytest.raises(InputError, check=says(got="positive.other", remedy="one slot")):
        load_initial_values(
            {}, {"text_encoder": embedding()}, concept(words=vectors, names=names, num_vectors=[None, 2])
        )


def test_a_word_by_itself_needs_a_partner_in_a_training() -> None:
    vectors = VECTORS | {"positive.other": torch.zeros(1, 2)}
    names = {"pt1": ["my-x", "my-x-neg"], "other": ["bad-x", ""]}
    with pytest.raises(InputError, check=says(remedy='"other":["bad-x","bad-x-neg"]')):
        load_initial_values({}, {"text_encoder": embedding()}, concept(words=vectors, names=names))
