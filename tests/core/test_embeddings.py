from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from dreamartist_pipeline.core.branches import NEGATIVE, POSITIVE
from dreamartist_pipeline.core.embeddings import InitText, Vocabulary, Word, WordEmbedding, initial_vectors, parse_init
from dreamartist_pipeline.errors import InputError
from refusals import says

NAMES = {"pt1": ("my-cat", "my-cat-neg")}


@pytest.fixture
def vocabulary() -> Vocabulary:
    return Vocabulary.build(NAMES, num_vectors=(2, 3), first_id=10)


@pytest.fixture
def embedding(vocabulary: Vocabulary) -> WordEmbedding:
    base = nn.Embedding(10, 4)
    by_branch = {NEGATIVE: -1.0, POSITIVE: 1.0}
    return WordEmbedding(
        base, vocabulary, [torch.full((word.num_vectors, 4), by_branch[word.branch]) for word in vocabulary.words]
    )


def test_words_are_numbered_from_the_end_of_the_vocabulary_negative_first(vocabulary: Vocabulary) -> None:
    assert vocabulary.words == (
        Word("my-cat-neg", "pt1", NEGATIVE, first_id=10, num_vectors=3),
        Word("my-cat", "pt1", POSITIVE, first_id=13, num_vectors=2),
    )
    assert [word.key for word in vocabulary.words] == ["negative.pt1", "positive.pt1"]


def test_one_branch_has_no_negative_words() -> None:
    assert Vocabulary.build(NAMES, (2, 3), 10, num_branches=1).words == (Word("my-cat", "pt1", POSITIVE, 10, 2),)


def test_words_may_have_numbers_of_vectors_of_their_own_and_no_partner() -> None:
    counts = {"negative.a": 3, "positive.a": 2, "positive.b": 5}
    assert Vocabulary.of_counts({"a": ("a-x", "a-neg"), "b": ("b-x", "")}, counts, 10).words == (
        Word("a-neg", "a", NEGATIVE, 10, 3),
        Word("a-x", "a", POSITIVE, 13, 2),
        Word("b-x", "b", POSITIVE, 15, 5),
    )


def test_a_prompt_is_cut_at_trigger_words_that_stand_alone(vocabulary: Vocabulary) -> None:
    negative, positive = vocabulary.words
    assert vocabulary.split_prompt("a My-Cat, my-cat-neg and my-cats") == [
        "a ",
        positive,
        ", ",
        negative,
        " and my-cats",
    ]
    assert vocabulary.split_prompt("my-cat") == [positive]
    assert Vocabulary(()).split_prompt("a my-cat") == ["a my-cat"]


def test_a_word_that_fills_two_places_is_refused() -> None:
    with pytest.raises(InputError, check=says(got="'Cat'", remedy="'pt2'")):
        Vocabulary.build({"pt1": ("cat", "cat-n"), "pt2": ("Cat", "dog-n")}, (1, 1), 10)


def test_ids_of_the_vocabulary_and_learned_ids_are_looked_up_side_by_side(embedding: WordEmbedding) -> None:
    vectors = embedding(torch.tensor([[3, 10, 12, 13, 14, 9]]))
    assert vectors.shape == (1, 6, 4)
    assert torch.equal(vectors[0, [0, 5]], embedding.base.weight[[3, 9]])
    assert vectors[0, 1:5, 0].tolist() == [-1.0, -1.0, 1.0, 1.0]


def test_prompts_without_trigger_words_are_those_of_the_base(embedding: WordEmbedding) -> None:
    ids = torch.arange(10).reshape(2, 5)
    assert torch.equal(embedding(ids), embedding.base(ids))


def test_each_branch_gets_its_own_gradient_and_the_base_none(embedding: WordEmbedding) -> None:
    embedding(torch.tensor([0, 13, 13, 14])).sum().backward()
    negative, positive = embedding.vectors
    assert torch.equal(negative.grad, torch.zeros(3, 4))
    assert positive.grad[:, 0].tolist() == [2.0, 1.0]
    assert embedding.base.weight.grad is None


def test_training_leaves_the_base_and_the_given_vectors_bit_equal(vocabulary: Vocabulary) -> None:
    base = nn.Embedding(10, 4)
    before, initial = base.weight.clone(), [torch.zeros(3, 4), torch.zeros(2, 4)]
    embedding = WordEmbedding(base, vocabulary, initial)
    optimizer = torch.optim.AdamW(embedding.parameters(), lr=0.1)
    embedding(torch.arange(15)).square().sum().backward()
    embedding(torch.arange(15)).sum().backward()
    optimizer.step()
    assert torch.equal(base.weight, before)
    assert all(torch.equal(vectors, torch.zeros_like(vectors)) for vectors in initial)
    assert all(parameter.abs().min() > 0 for parameter in embedding.vectors)


def test_learned_vectors_are_float32_and_appear_in_the_dtype_of_the_base(vocabulary: Vocabulary) -> None:
    base = nn.Embedding(10, 4).to(torch.bfloat16)
    embedding = WordEmbedding(base, vocabulary, [torch.zeros(3, 4), torch.zeros(2, 4)])
    assert {parameter.dtype for parameter in embedding.vectors} == {torch.float32}
    assert embedding(torch.tensor([1, 13])).dtype == torch.bfloat16


def test_saved_vectors_make_an_equal_embedding(embedding: WordEmbedding, vocabulary: Vocabulary) -> None:
    saved = embedding.tensors()
    assert list(saved) == ["negative.pt1", "positive.pt1"]
    again = WordEmbedding(embedding.base, vocabulary, [saved[word.key] for word in vocabulary.words])
    ids = torch.arange(15)
    assert torch.equal(again(ids), embedding(ids))
    saved["negative.pt1"].add_(1)  # a copy
    assert torch.equal(again(ids), embedding(ids))


def test_words_that_do_not_fit_the_base_are_refused(vocabulary: Vocabulary) -> None:
    initial = [torch.zeros(3, 4), torch.zeros(2, 4)]
    with pytest.raises(ValueError, match="ids from 11"):
        WordEmbedding(nn.Embedding(11, 4), vocabulary, initial)
    with pytest.raises(ValueError, match=r"shapes \[\(3, 4\), \(2, 4\)\], got \[\(2, 4\), \(3, 4\)\]"):
        WordEmbedding(nn.Embedding(10, 4), vocabulary, initial[::-1])


@pytest.mark.parametrize(
    ("text", "init"),
    [
        ("cat", InitText("cat", None)),
        ("fat cat, red", InitText("fat cat, red", None)),
        ("*[0.017]", InitText(None, 0.017)),
        ("*[0.017, 3]", InitText(None, 0.017, 3)),
        ("cat, *[1e-3,2]", InitText("cat", 0.001, 2)),
        (" cat, *[.5] ", InitText("cat", 0.5)),
    ],
)
def test_init_texts_are_read(text: str, init: InitText) -> None:
    assert parse_init(text) == init


@pytest.mark.parametrize("text", ["", "  ", "*[]", "*[big]", "*[0.1], cat", "*[0.1], *[0.2]", "cat, *[0.1, -2]"])
def test_other_init_texts_are_refused(text: str) -> None:
    with pytest.raises(InputError, check=says(got=repr(text), remedy="init_text")):
        parse_init(text)


TOKENS = torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])


def _start(text: str, num_vectors: int, tokens: torch.Tensor | None = None, seed: int = 0) -> torch.Tensor:
    return initial_vectors(parse_init(text), num_vectors, tokens, 2, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("num_vectors", "expected"), [(3, [1, 2, 3]), (2, [1, 2]), (6, [1, 1, 2, 2, 3, 3]), (1, [1])])
def test_a_text_is_spread_over_the_vectors(num_vectors: int, expected: list[int]) -> None:
    assert _start("a fat cat", num_vectors, TOKENS)[:, 0].tolist() == expected


def test_random_vectors_have_the_given_deviation() -> None:
    random = initial_vectors(InitText(None, 0.017), 100, None, 400, torch.Generator().manual_seed(0))
    assert random.shape == (100, 400)
    assert random.std().item() == pytest.approx(0.017, rel=0.02)


def test_random_vectors_fill_what_the_text_leaves() -> None:
    mixed = _start("a fat cat, *[0.017]", 5, TOKENS)
    assert torch.equal(mixed[:3], TOKENS)
    assert 0 < mixed[3:].abs().max() < 0.1
    assert _start("a fat cat, *[0.017, 4]", 5, TOKENS)[0].tolist() == [1.0, 1.0]


def test_the_same_seed_gives_the_same_vectors() -> None:
    assert torch.equal(_start("*[0.017]", 3), _start("*[0.017]", 3))
    assert not torch.equal(_start("*[0.017]", 3), _start("*[0.017]", 3, seed=1))


@pytest.mark.parametrize(
    ("text", "tokens", "check"),
    [
        ("qqq", TOKENS[:0], says(expected="one token", got="'qqq'")),
        ("*[0.017, 2]", None, says(expected="init_text to fill 3", got="2 random vectors and no text")),
        ("cat, *[0.017, 3]", TOKENS[:1], says(expected="init_text to fill 3", got="3 random vectors and a text")),
        ("cat, *[0.017, 4]", TOKENS[:1], says(expected="init_text to fill 3", got="4 random vectors and a text")),
    ],
)
def test_numbers_of_vectors_that_contradict_each_other_are_refused(
    text: str, tokens: torch.Tensor | None, check: Callable[[InputError], bool]
) -> None:
    with pytest.raises(InputError, check=check):
        _start(text, 3, tokens)
