"""Files of the reference toolkit: layouts of keys, steps in file names, pickled and empty files, words."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import save

from dreamartist_pipeline.core.concept import Concept
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.interop.branch_adapters import BranchAdapter, branch_adapter
from dreamartist_pipeline.interop.safetensors_bytes import read_tensors, write_tensors
from dreamartist_pipeline.interop.toolkit import files_of_step, read_toolkit, toolkit_words, write_toolkit
from refusals import says

from .conftest import ATTENTION, MODULES, NAMES, Files, expected_updates, newer, renamed_keys

BRANCHES = ("positive", "negative")
SIX = ("unet-7", "unet-neg-7", "text_encoder-7", "text_encoder-neg-7")


def written(concept: Concept, step: int = 7) -> Files:
    adapters = {branch: branch_adapter(concept, branch) for branch in BRANCHES}
    return write_toolkit(adapters, concept.trigger_words(), step, NAMES)


def first(files: Files) -> Files:
    return renamed_keys(files, (".___.", ".lora_block."), (".alpha", ".scale"))


def with_averages(files: Files) -> Files:
    """Files of a training with `model.ema`: averages in addition to the weights, here twice as large."""

    def both(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return tensors | {key.replace("lora:", "lora_ema:"): 2 * tensor for key, tensor in tensors.items()}

    return {
        name: file if name.endswith(".pt") else write_tensors(both(read_tensors(file, name)), {})
        for name, file in files.items()
    }


def pickled(files: Files) -> Files:
    """The toolkit's `ckpt_type: torch`: the same tensors in nested dictionaries."""
    changed = {}
    for name, file in files.items():
        if name.endswith(".pt"):
            changed[name] = file
            continue
        tensors = {key.removeprefix("lora:"): tensor for key, tensor in read_tensors(file, name).items()}
        buffer = io.BytesIO()
        torch.save({"base": {}, "lora": tensors}, buffer)
        changed[name.replace(".safetensors", ".ckpt")] = buffer.getvalue()
    return changed


def in_upper_case(files: Files) -> Files:
    return {
        f"{stem}.{suffix.upper()}": file for name, file in files.items() for stem, _, suffix in [name.rpartition(".")]
    }


def pickled_in_upper_case(files: Files) -> Files:
    return in_upper_case(pickled(files))


def of_a_training(files: Files) -> Files:
    return {name.replace(".pt", "-7.pt"): file for name, file in files.items()}


LAYOUTS = [newer, first, with_averages, pickled, in_upper_case, pickled_in_upper_case, of_a_training]


def test_the_files_are_those_six_with_alpha_divided_by_the_rank(concept: Concept) -> None:
    files = written(concept)
    assert set(files) == {*(f"{name}.safetensors" for name in SIX), "my-fox.pt", "my-fox-neg.pt"}
    tensors = read_tensors(files["text_encoder-neg-7.safetensors"], "x")
    assert float(tensors["lora:text_model.encoder.layers.0.mlp.fc1.___.alpha"]) == 3.0 / 2
    _, words = read_toolkit(files, MODULES, NAMES)
    assert {name: tuple(vectors.shape) for name, vectors in words.items()} == {"my-fox": (2, 4), "my-fox-neg": (3, 4)}
    assert torch.equal(words["my-fox"], concept.tensors["words.positive.pt1"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_the_toolkit_gives_the_same_adapters_and_words(
    concept: Concept, layout: Callable[[Files], Files]
) -> None:
    files = layout(written(concept))
    assert files != written(concept)
    adapters, words = read_toolkit(files, MODULES, NAMES)
    assert set(words) == {"my-fox", "my-fox-neg"}
    for branch in BRANCHES:
        updates, expected = adapters[branch].by_layer(), expected_updates(concept, branch)
        assert updates.keys() == expected.keys()
        for at, factors in updates.items():
            torch.testing.assert_close(factors.update(), expected[at], rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------- steps


def test_the_newest_step_is_read_unless_another_is_named() -> None:
    names = ["unet-90.safetensors", "unet-100.safetensors", "my-fox-90.pt", "my-fox-100.pt"]
    newest, older = files_of_step(names), files_of_step(names, 90)
    assert (newest.step, newest.adapters, newest.words) == (100, ("unet-100.safetensors",), {"my-fox": "my-fox-100.pt"})
    assert older.names == ["my-fox-90.pt", "unet-90.safetensors"]


def test_a_number_at_the_end_of_a_word_is_its_own_where_no_adapters_have_that_step() -> None:
    assert files_of_step(["unet-100.safetensors", "cat-3.pt"]).words == {"cat-3": "cat-3.pt"}
    assert files_of_step(["cat-3.pt"]).words == {"cat-3": "cat-3.pt"}
    assert files_of_step(["cat-3.pt", "cat-9.pt"], 3).words == {"cat": "cat-3.pt", "cat-9": "cat-9.pt"}


def test_a_word_of_the_step_takes_precedence_over_the_initial_one() -> None:
    assert files_of_step(["unet-5.ckpt", "cat.pt", "cat-5.pt"]).words == {"cat": "cat-5.pt"}


def test_a_step_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(InputError, check=says(expected="step 8", got="7, 9")):
        files_of_step(["unet-7.safetensors", "unet-9.safetensors"], 8)


def test_a_step_reaches_the_reader(concept: Concept) -> None:
    half = Concept({name: tensor / 2 for name, tensor in concept.tensors.items()}, concept.metadata)
    both = of_a_training(written(half)) | written(concept, 9)
    expected = expected_updates(half, "positive")["unet", ATTENTION]
    factors = read_toolkit(both, MODULES, NAMES, step=7)[0]["positive"].networks["unet"][ATTENTION]
    torch.testing.assert_close(factors.update(), expected, rtol=1e-5, atol=1e-5)


def test_a_file_of_another_name_is_refused() -> None:
    with pytest.raises(InputError, check=says(expected="WORD-STEP.pt", got="fox.safetensors")):
        read_toolkit({"fox.safetensors": b""}, MODULES, NAMES)


def test_files_without_weights_are_ignored() -> None:
    names = ["unet-7.safetensors", "README.md", "train.yaml", ".DS_Store", "._unet-7.safetensors", "grid.png"]
    assert files_of_step(names).names == ["unet-7.safetensors"]


@pytest.mark.parametrize(
    ("gone", "add"),
    [
        (["unet-7"], "unet-7,"),
        (["text_encoder-neg-7"], "text_encoder-neg-7,"),
        (["unet-neg-7", "text_encoder-neg-7"], None),
        (["text_encoder-7", "text_encoder-neg-7"], None),
    ],
)
def test_half_of_a_pair_of_adapters_is_refused(gone: list[str], add: str | None) -> None:
    names = [f"{name}.safetensors" for name in SIX if name not in gone]
    if add is None:
        assert files_of_step(names).names == sorted(names)
    else:
        with pytest.raises(InputError, check=says(expected="pair", remedy=f"add {add}")):
            files_of_step(names)


def test_negative_adapters_of_another_step_are_no_pair() -> None:
    names = ["unet-7.safetensors", "unet-neg-7.safetensors", "unet-9.safetensors"]
    with pytest.raises(InputError, check=says(expected="pair", got="unet-9.safetensors", remedy="add unet-neg-9,")):
        files_of_step(names)
    assert files_of_step(names, 7).names == ["unet-7.safetensors", "unet-neg-7.safetensors"]


def test_a_network_of_one_branch_has_an_empty_file_in_the_other(concept: Concept) -> None:
    positive, negative = (branch_adapter(concept, branch) for branch in BRANCHES)
    alone = BranchAdapter({"unet": negative.networks["unet"]})
    files = write_toolkit({"positive": positive, "negative": alone}, (), 7, NAMES)
    assert set(files) == {f"{name}.safetensors" for name in SIX}
    adapters, _ = read_toolkit(files, MODULES, NAMES)
    assert {branch: list(a.networks) for branch, a in adapters.items()} == {
        "negative": ["unet"],
        "positive": ["text_encoder", "unet"],
    }
    assert list(read_toolkit(write_toolkit({"negative": alone}, (), 7, NAMES), MODULES, NAMES)[0]) == ["negative"]


def test_a_word_of_other_steps_only_is_refused() -> None:
    names = ["unet-7.safetensors", "unet-9.safetensors", "my-fox-7.pt", "my-fox-9.pt", "my-fox-neg-7.pt"]
    with pytest.raises(InputError, check=says(expected="step 9", got="my-fox-neg-7.pt")):
        files_of_step(names)
    assert set(files_of_step(names, 7).words) == {"my-fox", "my-fox-neg"}


def test_two_files_for_one_network_are_refused(concept: Concept) -> None:
    files = written(concept)
    with pytest.raises(InputError, check=says(expected="network", got="text_encoder-7.safetensors")):
        read_toolkit(files | pickled(files), MODULES, NAMES)


# --------------------------------------------------------------------------------------------- single files


def test_a_training_of_words_only_writes_empty_files_and_has_no_adapters(concept: Concept) -> None:
    words = {name: file for name, file in written(concept).items() if name.endswith(".pt")}
    adapters, vectors = read_toolkit(words | {"unet-7.safetensors": save({})}, MODULES, NAMES)
    assert adapters == {} and set(vectors) == {"my-fox", "my-fox-neg"}


def test_a_tensor_in_two_spellings_is_refused() -> None:
    key = f"lora:{ATTENTION}.___."
    tensors = {f"{key}layer.W_down": torch.ones(2, 6), f"{key}layer.W_up": torch.ones(5, 2)}
    tensors |= {f"{key}alpha": torch.tensor(1.0), f"{key}scale": torch.tensor(2.0)}
    with pytest.raises(InputError, check=says(expected="unet-1.safetensors", got=f"alpha of unet.{ATTENTION}")):
        read_toolkit({"unet-1.safetensors": write_tensors(tensors, {})}, MODULES, NAMES)


def test_a_file_without_alpha_is_refused() -> None:
    key = f"lora:{ATTENTION}.___.layer"
    tensors = {f"{key}.W_down": torch.ones(2, 6), f"{key}.W_up": torch.ones(5, 2)}
    with pytest.raises(InputError, check=says(expected=f"alpha for unet.{ATTENTION}", got="none")):
        read_toolkit({"unet-1.safetensors": write_tensors(tensors, {})}, MODULES, NAMES)


def test_trained_weights_of_the_base_model_are_refused() -> None:
    tensors = {f"base:{ATTENTION}.weight": torch.ones(5, 6)}
    with pytest.raises(InputError, check=says(expected="unet-1.safetensors", got=f"base:{ATTENTION}.weight")):
        read_toolkit({"unet-1.safetensors": write_tensors(tensors, {})}, MODULES, NAMES)


def test_a_pickled_file_with_other_values_than_tensors_is_refused() -> None:
    recursive: dict[str, object] = {}
    recursive |= {"lora": recursive}
    for content, key, got in (
        ({"lora": {f"{ATTENTION}.___.alpha": "one"}}, f"'lora:{ATTENTION}.___.alpha'", "str"),
        ({"lora": 3}, "'lora'", "int"),
        (recursive, "'lora:lora'", "dict"),
        ({"lora": {"a": torch.zeros(1).expand(9, 9)}}, "'lora:a'", "(9, 9)"),
    ):
        buffer = io.BytesIO()
        torch.save(content, buffer)
        with pytest.raises(InputError, check=says(expected=f"{key} in unet-1.ckpt", got=got)):
            read_toolkit({"unet-1.ckpt": buffer.getvalue()}, MODULES, NAMES)


# --------------------------------------------------------------------------------------------- words


def test_words_are_paired_by_their_ending_or_by_name() -> None:
    vectors = {"a": torch.zeros(1, 4), "a-neg": torch.zeros(2, 4)}
    assert [(w.name, w.slot, w.branch) for w in toolkit_words(vectors, {}, "x")] == [
        ("a", "pt1", "positive"),
        ("a-neg", "pt1", "negative"),
    ]
    assert [(w.name, w.slot, w.branch) for w in toolkit_words(vectors, {"s": ("a-neg", "a")}, "x")] == [
        ("a-neg", "s", "positive"),
        ("a", "s", "negative"),
    ]


@pytest.mark.parametrize("names", [{"pt1": ("a", "c")}, {"pt1": ("a",)}])
def test_words_that_are_not_those_named_are_refused(names: dict[str, tuple[str, ...]]) -> None:
    with pytest.raises(InputError, check=says(expected="['a'", got="['a', 'b']", remedy="OPTION")):
        toolkit_words({"a": torch.zeros(1, 4), "b": torch.zeros(1, 4)}, names, "OPTION")


def test_words_that_are_no_pair_have_to_be_named() -> None:
    with pytest.raises(InputError, check=says(expected="'-neg'", got="a, b", remedy="OPTION")):
        toolkit_words({"a": torch.zeros(1, 4), "b": torch.zeros(1, 4)}, {}, "OPTION")


def test_an_invalid_word_has_to_be_renamed_by_its_file() -> None:
    with pytest.raises(InputError, check=says(got="my {fox}.pt", remedy="my-fox.pt")):
        toolkit_words({"my {fox}": torch.zeros(1, 4)}, {}, "OPTION")
