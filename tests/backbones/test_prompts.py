"""Prompts become tokens: as the tokenizer does it, with trigger words expanded to their vectors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import CLIPTokenizer

from dreamartist_pipeline.backbones.base_model import Backbone, BaseModelFiles, load_backbone
from dreamartist_pipeline.backbones.prompts import (
    PromptEncoder,
    PromptTokenizer,
    check_trigger_word,
    initial_word_vectors,
)
from dreamartist_pipeline.core.embeddings import Vocabulary
from dreamartist_pipeline.core.errors import InputError
from dreamartist_pipeline.params import DeviceParams, WordsParams


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
    assert PromptTokenizer(tokenizer, 24).token_ids([prompt]).tolist() == [expected]


def test_without_trigger_words_a_vocabulary_changes_nothing(tokenizer: CLIPTokenizer, vocabulary: Vocabulary) -> None:
    prompts = ["a photo of a green bird, blue background", "fox"]
    plain = PromptTokenizer(tokenizer, 24).token_ids(prompts)
    assert torch.equal(PromptTokenizer(tokenizer, 24, vocabulary).token_ids(prompts), plain)


def test_a_trigger_word_becomes_its_vectors(tokenizer: CLIPTokenizer, vocabulary: Vocabulary) -> None:
    first = vocabulary.words[0].first_id
    by_word = {word.name: list(word.ids) for word in vocabulary.words}
    ids = PromptTokenizer(tokenizer, 24, vocabulary).token_ids(["a red my-fox, blue", "My-Fox-neg"]).tolist()
    a, red, comma, blue = (tokenizer(w, add_special_tokens=False).input_ids[0] for w in ("a", "red", ",", "blue"))
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert ids[0][:8] == [start, a, red, *by_word["my-fox"], comma, blue, end]
    assert ids[1][:5] == [start, *by_word["my-fox-neg"], end]
    assert min(by_word["my-fox"] + by_word["my-fox-neg"]) >= first


def test_a_long_prompt_keeps_its_end_token(tokenizer: CLIPTokenizer, vocabulary: Vocabulary) -> None:
    ids = PromptTokenizer(tokenizer, 24, vocabulary).token_ids(["my-fox " * 30])
    assert ids.shape == (1, 24)
    assert ids[0, -1] == tokenizer.eos_token_id


def test_words_beyond_the_context_are_refused(tokenizer: CLIPTokenizer, vocabulary: Vocabulary) -> None:
    prompts = PromptTokenizer(tokenizer, 24, vocabulary)
    prompts.check_fits("my-fox " + "cat " * 50)  # plain text may be cut
    with pytest.raises(InputError, match=r"trigger words within the first 22 tokens .* is 23 tokens long"):
        prompts.check_fits("cat " * 21 + "my-fox")


def test_a_word_that_grows_together_with_its_neighbour_is_refused(
    tokenizer: CLIPTokenizer, vocabulary: Vocabulary
) -> None:
    with pytest.raises(InputError, match="expected a trigger word that stands by itself in every prompt; got 'two my"):
        PromptTokenizer(tokenizer, 24, vocabulary).check_fits("two my-foxes")


def test_states_are_those_of_the_text_encoder(backbone: Backbone, tokenizer: CLIPTokenizer) -> None:
    encoder = PromptEncoder(backbone)
    ids = tokenizer(["a red cat"], padding="max_length", max_length=24, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = backbone.text_encoder(ids).last_hidden_state
        assert torch.equal(encoder.encode(encoder.token_ids(["a red cat"])), expected)


def test_skipping_the_last_layer_gives_the_normed_states_of_the_one_before(backbone: Backbone) -> None:
    whole, skipped = PromptEncoder(backbone), PromptEncoder(backbone, clip_skip=1)
    ids = whole.token_ids(["a red cat"])
    seen: list[torch.Tensor] = []
    text_model = getattr(backbone.text_encoder, "text_model", backbone.text_encoder)
    last = text_model.encoder.layers[-1]
    handle = last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        states = whole.encode(ids)
        handle.remove()
        assert torch.equal(skipped.encode(ids), text_model.final_layer_norm(seen[0]))
        assert not torch.allclose(skipped.encode(ids), states)


def test_skipping_every_layer_is_refused(backbone: Backbone) -> None:
    with pytest.raises(InputError, match="clip_skip below the text encoder's 2 layers; got 2"):
        PromptEncoder(backbone, clip_skip=2)


@pytest.mark.parametrize("word", ["cat", "Cat", "a"])
def test_a_word_that_is_a_token_already_is_refused(tokenizer: CLIPTokenizer, word: str) -> None:
    with pytest.raises(InputError, match=rf"'{word}' is already a single token .* such as 'my-{word}'"):
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
