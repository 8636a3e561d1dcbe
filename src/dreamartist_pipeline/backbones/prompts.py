"""From prompts to text states: tokens, trigger words as several learned vectors, the text encoder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn
from transformers import CLIPTokenizer

from dreamartist_pipeline.backbones.families import Backbone
from dreamartist_pipeline.backbones.families.clip_text import check_clip_skip
from dreamartist_pipeline.core.embeddings import Vocabulary, Word, initial_vectors, parse_init
from dreamartist_pipeline.core.prompt_tokens import Conditioning, PromptTokens, side_by_side
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import WordsParams
from dreamartist_pipeline.prompt_weights import parse_weights


class PromptTokenizer:
    """The base model's tokenizer, to which a vocabulary of trigger words may be added.

    max_tokens: the text encoder's context, start and end included.
    """

    def __init__(self, tokenizer: CLIPTokenizer, max_positions: int, vocabulary: Vocabulary | None = None) -> None:
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self.max_tokens = min(tokenizer.model_max_length, max_positions)

    def tokenize(self, prompts: Sequence[str]) -> PromptTokens:
        """Return `[N, L]` tokens on the CPU, as the tokenizer pads them.

        A trigger word becomes the ids of its vectors, which are not below the size of the base vocabulary. What is too
        long is cut off before the end token. Braces of weighted words are no tokens: a prompt has the tokens of its
        plain text, each with the weight of the part that it begins in, and all vectors of a trigger word have the
        word's. (The reference toolkit counts a word as one token there, so that behind a word of several vectors its
        weights lie too far to the front.) Start, end and padding have the weight 1.

        Raises:
            InputError: braces that cannot be read.
        """
        tokenizer = self._tokenizer
        ids, weights = [], []
        for prompt in prompts:
            inner = self._inner_tokens(prompt)[: self.max_tokens - 2]
            padding = self.max_tokens - 2 - len(inner)
            end = [tokenizer.eos_token_id, *[tokenizer.pad_token_id] * padding]
            ids.append([tokenizer.bos_token_id, *(token_id for token_id, _ in inner), *end])
            weights.append([1.0, *(weight for _, weight in inner), *[1.0] * len(end)])
        shape = (len(prompts), self.max_tokens)
        all_weights = torch.tensor(weights).reshape(shape)
        return PromptTokens(
            torch.tensor(ids, dtype=torch.long).reshape(shape), all_weights if (all_weights != 1).any() else None
        )

    def check_fits(self, prompt: str) -> None:
        """Confirm that a trigger word is found in the prompt, and that no vector of one is cut off.

        Raises:
            InputError: no word stands by itself, the prompt with its words is longer than the text encoder's context,
                or it has braces that cannot be read.
        """
        if not self._learned_ids & {token_id for token_id, _ in self._inner_tokens(prompt)}:
            raise InputError(
                expected="a trigger word that stands by itself in every prompt",
                got=f"{prompt!r}",
                remedy="put spaces or commas around the template's slot",
            )
        self.check_not_cut(prompt)

    def check_not_cut(self, prompt: str) -> None:
        """Confirm that no vector of a trigger word is cut off.

        Raises:
            InputError: the prompt with its words is longer than the text encoder's context, or it has braces that
                cannot be read.
        """
        inner = [token_id for token_id, _ in self._inner_tokens(prompt)]
        if self._learned_ids & set(inner[self.max_tokens - 2 :]):
            raise InputError(
                expected=f"the trigger words within the first {self.max_tokens - 2} tokens of every prompt",
                got=f"{prompt!r}, which with its words is {len(inner)} tokens long",
                remedy="shorten it or take fewer vectors",
            )

    @property
    def _learned_ids(self) -> set[int]:
        return {i for word in (self._vocabulary.words if self._vocabulary else ()) for i in word.ids}

    def _inner_tokens(self, prompt: str) -> list[tuple[int, float]]:
        """Return (id, weight) of all tokens between start and end, however many there are."""
        parts = parse_weights(prompt)
        text = "".join(part for part, _ in parts)
        weights = [weight for part, weight in parts for _ in part]  # of every character
        tokens: list[tuple[int, float]] = []
        start = 0
        for part in self._split(text):
            if isinstance(part, str):
                tokens += [(token_id, weights[start + offset]) for token_id, offset in self._plain_tokens(part)]
                start += len(part)
            else:
                tokens += [(token_id, weights[start]) for token_id in part.ids]
                start += len(part.name)
        return tokens

    def _split(self, text: str) -> list[str | Word]:
        return [text] if self._vocabulary is None else self._vocabulary.split_prompt(text)

    def _plain_tokens(self, text: str) -> list[tuple[int, int]]:
        """Return (id, index of the character it begins with) of a text's tokens."""
        encoded = self._tokenizer(
            text, add_special_tokens=False, truncation=True, max_length=self.max_tokens, return_offsets_mapping=True
        )
        return [(i, start) for i, (start, _) in zip(encoded.input_ids, encoded.offset_mapping, strict=True)]


class PromptEncoder:
    """Tokenizers and text encoders of one base model, with the trigger words of one concept or none.

    Attributes:
        vocabularies: text encoder -> the words, numbered behind its own vocabulary; empty without words.

    Raises:
        InputError: clip_skip, how many of the last layers are left out, leaves none.
    """

    def __init__(
        self, backbone: Backbone, vocabularies: Mapping[str, Vocabulary] | None = None, clip_skip: int = 0
    ) -> None:
        self._backbone, self._clip_skip = backbone, clip_skip
        self.vocabularies = vocabularies or {}
        self._tokenizers = {}
        for name, tokenizer in backbone.tokenizers.items():
            config = backbone.networks[name].config
            check_clip_skip(config.num_hidden_layers, clip_skip)
            vocabulary = self.vocabularies.get(name)
            self._tokenizers[name] = PromptTokenizer(tokenizer, config.max_position_embeddings, vocabulary)

    @property
    def words(self) -> tuple[Word, ...]:
        """The trigger words; every text encoder has the same."""
        return next((vocabulary.words for vocabulary in self.vocabularies.values()), ())

    def check_fits(self, prompt: str) -> None:
        """Confirm that a trigger word is found and not cut off; see `PromptTokenizer.check_fits`."""
        for tokenizer in self._tokenizers.values():
            tokenizer.check_fits(prompt)

    def check_not_cut(self, prompts: Iterable[str]) -> None:
        """Confirm that no trigger word of any prompt is cut off; see `PromptTokenizer.check_not_cut`."""
        for prompt in prompts:
            for tokenizer in self._tokenizers.values():
                tokenizer.check_not_cut(prompt)

    def tokenize(self, prompts: Sequence[str]) -> PromptTokens:
        """Return `[N, L]` tokens on the backbone's device, those of all text encoders side by side."""
        tokens = [tokenizer.tokenize(prompts) for tokenizer in self._tokenizers.values()]
        return side_by_side(tokens).to(self._backbone.device)

    def encode(self, tokens: PromptTokens) -> Conditioning:
        """Return what the base model is told of N prompts.

        Args:
            tokens: `[N, L]`; with adapters in a text encoder, branches stacked (negative rows first).
        """
        lengths = [tokenizer.max_tokens for tokenizer in self._tokenizers.values()]
        parts = dict(zip(self._tokenizers, tokens.split(lengths), strict=True))
        return self._backbone.encode(parts, self._clip_skip)


def check_trigger_word(tokenizer: CLIPTokenizer, word: str) -> None:
    """Confirm that a trigger word means nothing yet.

    Raises:
        InputError: it is a single token of the base model's vocabulary, or nothing that can be tokenized.
    """
    ids = tokenizer(word, add_special_tokens=False).input_ids
    if len(ids) <= 1:
        raise InputError(
            expected="a trigger word that the base model does not know",
            got=f"{word!r}, which is {'already a single token' if ids else 'empty'} in its vocabulary",
            remedy=f"choose another, such as 'my-{word}'",
        )


def initial_word_vectors(
    words: WordsParams,
    vocabulary: Vocabulary,
    tokenizer: CLIPTokenizer,
    embedding: nn.Embedding,
    generator: torch.Generator,
) -> list[torch.Tensor]:
    """Return the vectors `[n, D]` that every trigger word of the vocabulary starts with, in its order.

    An embedding on the meta device stands for zeros.

    Raises:
        InputError: an init text cannot be read, has no token, or does not go with the number of vectors.
    """
    initial = []
    for word in vocabulary.words:
        init = parse_init(words.init_text[0] if word.key.startswith("positive") else words.init_text[1])
        token_vectors = None
        if init.text is not None:
            ids = tokenizer(init.text, add_special_tokens=False).input_ids
            weight = embedding.weight.detach()
            token_vectors = weight[torch.tensor(ids, dtype=torch.long, device=weight.device)]
            token_vectors = torch.zeros(token_vectors.shape) if weight.is_meta else token_vectors
        initial.append(initial_vectors(init, word.num_vectors, token_vectors, embedding.embedding_dim, generator))
    return initial
