"""Tokens of prompts: those of the tokenizer, with trigger words expanded to their vectors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import CLIPTokenizer

from dreamartist_pipeline.backbones.base_model import BaseModelFiles, load_backbone
from dreamartist_pipeline.backbones.families import Backbone
from dreamartist_pipeline.backbones.prompts import (
    PromptEncoder,
    PromptTokenizer,
    check_trigger_word,
    initial_word_vectors,
)
from dreamartist_pipeline.core.embeddings import Vocabulary
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import DeviceParams, WordsParams
from refusals import says


@pytest.fixture(scope="module")
def backbone(tiny_base_model: Path) -> Backbone:
    return load_backbone(BaseModelFiles(tiny_base_model), DeviceParams(device="cpu"))


@pytest.fixture(scope="module")
def tokenizer(backbone: Backbone) -> CLIPTokenizer:
    return backbone.tokenizer


@pytest.fixture
def vocabulary(backbone: Backbone) -> Vocabulary:
    size = backbone.text_encoder.get_input_embeddings().num_embeddings
    return Vocabulary.build({"pt1": ("my-fox", "my-fox-neg")}, (2, 3), size)


@pytest.mark.parametrize("prompt", ["", "a red cat", "A Photo of the yellow house, background!", "cat " * 40])
def test_plain_prompts_are_tokenized_as_the_tokenizer_does(tokenizer: CLIPTokenizer, prompt: str) -> None:
    expected = tokenizer(prompt, padding="max_length", truncation=True, max_length=24).input_ids
    assert PromptTokenizer(tokenizer, 24).tokenize([prompt]).ids.tolist() == [expected]


def test_without_trigger_words_a_vocabulary_changes_nothing(tokenizer: CLIPTokenizer, vocabulary: Vocabulary) -> None:
    prompts = ["a photo of a green bird, blue background", "fox"]
    plain = PromptTokenizer(tokenizer, 24).tokenize(prompts).ids
    assert torch.equal(PromptTokenizer(tokenizer, 24, vocabulary).tokenize(prompts).ids, plain)


def test_a_trigger_word_becomes_its_vectors(tokenizer: CLIPTokenizer, vocabulary: Vocabulary) -> None:
    first = vocabulary.words[0].first_id
    by_word = {word.name: list(word.ids) for word in vocabulary.words}
    ids = PromptTokenizer(tokenizer, 24, vocabulary).tokenize(["a red my-fox, blue", "My-Fox-neg"]).ids.tolist()
    a, red, comma, blue = (tokenizer(w, add_special_tokens=False).input_ids[0] for w in ("a", "red", ",", "blue"))
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert ids[0][:8] == [start, a, red, *by_word["my-fox"], comma, blue, end]
    assert ids[1][:5] == [start, *by_word["my-fox-neg"], end]
    assert min(by_word["my-fox"] + by_word["my-fox-neg"]) >= first


def test_a_long_prompt_keeps_its_end_token(tokenizer: CLIPTokenizer, vocabulary: Vocabulary) -> None:
    ids = PromptTokenizer(tokenizer, 24, vocabulary).tokenize(["my-fox " * 30]).ids
    assert ids.shape == (1, 24)
    assert ids[0, -1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("prompt", "end"),
    [
        ("a red cat", ""),
        ("cat " * 22, ""),
        ("cat " * 22 + "blue dog", "blue dog"),
        ("cat " * 20 + "my-fox blue dog", "blue dog"),  # two vectors
        ("cat " * 21 + "my-fox blue dog", "my-fox blue dog"),
        ("{cat:1.5} " * 22 + "{blue:2} dog", "blue dog"),
        ("cat " * 60 + "dog", "cat " * 38 + "dog"),
    ],
    ids=["short", "fits", "cut", "word fits", "word cut", "weighted", "long"],
)
def test_what_is_cut_off_is_the_plain_text_behind_the_last_token_that_is_read(
    tokenizer: CLIPTokenizer, vocabulary: Vocabulary, prompt: str, end: str
) -> None:
    assert PromptTokenizer(tokenizer, 24, vocabulary).cut_off(prompt).strip() == end


@pytest.mark.parametrize(
    ("prompt", "plain", "weights"),
    [
        ("a {red:1.5} cat", "a red cat", {1: 1.0, 2: 1.5, 3: 1.0}),
        ("a {red cat:0.5}, blue", "a red cat, blue", {1: 1, 2: 0.5, 3: 0.5, 4: 1, 5: 1}),
        ("a {my-fox:1.5} cat", "a my-fox cat", {1: 1, 2: 1.5, 3: 1.5, 4: 1}),  # both of its vectors
        ("{my-fox-neg, {red}:2}", "my-fox-neg, red", {1: 2, 2: 2, 3: 2, 4: 2, 5: 2.2, 6: 1}),
        ("a (red:1.5) cat", "a (red:1.5) cat", {}),  # A1111's form is plain text
        ("a {red:1} cat", "a red cat", {}),
    ],
)
def test_weights_go_with_the_tokens_of_the_plain_text(
    tokenizer: CLIPTokenizer, vocabulary: Vocabulary, prompt: str, plain: str, weights: dict[int, float]
) -> None:
    prompts = PromptTokenizer(tokenizer, 24, vocabulary)
    tokens = prompts.tokenize([prompt, "a"])
    assert torch.equal(tokens.ids, prompts.tokenize([plain, "a"]).ids)
    if not weights:
        assert tokens.weights is None
        return
    expected = torch.ones(2, 24)
    for position, weight in weights.items():
        expected[0, position] = weight
    assert tokens.weights is not None
    torch.testing.assert_close(tokens.weights, expected)


def test_weights_of_what_is_cut_off_are_cut_off_too(tokenizer: CLIPTokenizer) -> None:
    tokens = PromptTokenizer(tokenizer, 24).tokenize(["{" + "cat " * 40 + ":2}"])
    assert tokens.weights is not None
    assert tokens.weights.tolist() == [[1.0, *[2.0] * 22, 1.0]]


def test_invalid_braces_are_refused(tokenizer: CLIPTokenizer) -> None:
    with pytest.raises(InputError, check=says(expected="{cat:1.2}", got="'big'")):
        PromptTokenizer(tokenizer, 24).tokenize(["a {cat:big}"])


def test_trigger_words_are_found_within_braces(tokenizer: CLIPTokenizer, vocabulary: Vocabulary) -> None:
    prompts = PromptTokenizer(tokenizer, 24, vocabulary)
    prompts.check_fits("a {my-fox:1.2}")
    with pytest.raises(InputError, check=says(expected="22", got="my-fox:1.2")):
        prompts.check_fits("cat " * 21 + "{my-fox:1.2}")


def test_words_beyond_the_context_are_refused(tokenizer: CLIPTokenizer, vocabulary: Vocabulary) -> None:
    prompts = PromptTokenizer(tokenizer, 24, vocabulary)
    prompts.check_fits("my-fox " + "cat " * 50)  # plain text may be cut
    with pytest.raises(InputError, check=says(expected="22", got="23")):
        prompts.check_fits("cat " * 21 + "my-fox")


def test_a_prompt_whose_trigger_word_is_part_of_another_word_is_refused(
    tokenizer: CLIPTokenizer, vocabulary: Vocabulary
) -> None:
    with pytest.raises(InputError, check=says(expected="trigger word", got="'two my-foxes'", remedy="slot")):
        PromptTokenizer(tokenizer, 24, vocabulary).check_fits("two my-foxes")


def test_states_are_those_of_the_text_encoder(backbone: Backbone, tokenizer: CLIPTokenizer) -> None:
    encoder = PromptEncoder(backbone)
    ids = tokenizer(["a red cat"], padding="max_length", max_length=24, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = backbone.text_encoder(ids).last_hidden_state
        assert torch.equal(encoder.encode(encoder.tokenize(["a red cat"])), expected)


def test_skipping_the_last_layer_gives_the_normed_states_of_the_one_before(backbone: Backbone) -> None:
    whole, skipped = PromptEncoder(backbone), PromptEncoder(backbone, clip_skip=1)
    ids = whole.tokenize(["a red cat"])
    seen: list[torch.Tensor] = []
    text_model = getattr(backbone.text_encoder, "text_model", backbone.text_encoder)
    last = text_model.encoder.layers[-1]
    handle = last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        states = whole.encode(ids)
        handle.remove()
        assert torch.equal(skipped.encode(ids), text_model.final_layer_norm(seen[0]))
        assert not torch.allclose(skipped.encode(ids), states)


@pytest.mark.parametrize("clip_skip", [0, 1])
def test_weighted_states_are_the_plain_ones_times_weights_with_the_mean_restored(
    tiny_base_model: Path, clip_skip: int
) -> None:
    backbone = load_backbone(BaseModelFiles(tiny_base_model), DeviceParams(device="cpu"))
    text_model = getattr(backbone.text_encoder, "text_model", backbone.text_encoder)
    torch.nn.init.normal_(text_model.final_layer_norm.bias, mean=-0.2, std=0.1)  # Stable Diffusion's has a mean, too
    encoder = PromptEncoder(backbone, clip_skip=clip_skip)
    with torch.no_grad():
        plain = encoder.encode(encoder.tokenize(["a red cat", "a blue dog"]))
        weighted = encoder.encode(encoder.tokenize(["a {red {cat}:1.5}", "a blue dog"]))
    expected = plain[0].clone()
    expected[2] *= 1.5
    expected[3] *= 1.5 * 1.1
    expected *= plain[0].mean() / expected.mean()
    torch.testing.assert_close(weighted[0], expected)
    assert not torch.allclose(weighted[0], plain[0])
    assert torch.equal(weighted[1], plain[1])  # bit-equal in a batch with a weighted prompt


def test_skipping_every_layer_is_refused(backbone: Backbone) -> None:
    with pytest.raises(InputError, check=says(expected="clip_skip", got="2")):
        PromptEncoder(backbone, clip_skip=2)


@pytest.mark.parametrize("word", ["cat", "Cat", "a"])
def test_a_word_that_is_a_token_already_is_refused(tokenizer: CLIPTokenizer, word: str) -> None:
    with pytest.raises(InputError, check=says(got=f"'{word}', which is already a single token", remedy=f"'my-{word}'")):
        check_trigger_word(tokenizer, word)


def test_a_word_of_several_tokens_may_be_a_trigger_word(tokenizer: CLIPTokenizer) -> None:
    check_trigger_word(tokenizer, "my-fox")


def test_words_start_from_a_text_or_from_noise(backbone: Backbone, vocabulary: Vocabulary) -> None:
    embedding = backbone.text_encoder.get_input_embeddings()
    words = WordsParams(names={"pt1": ("my-fox", "my-fox-neg")}, num_vectors=(2, 3), init_text=("fox", "*[0.5]"))
    generator = torch.Generator().manual_seed(0)
    negative, positive = initial_word_vectors(words, vocabulary, backbone.tokenizer, embedding, generator)
    (fox,) = backbone.tokenizer("fox", add_special_tokens=False).input_ids
    assert torch.equal(positive, embedding.weight[[fox, fox]])
    assert negative.shape == (3, 32)
    assert negative.std().item() == pytest.approx(0.5, rel=0.2)
