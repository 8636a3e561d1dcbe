"""Prompts to text states: tokens, trigger words as several learned vectors, the text encoders."""

from __future__ import annotations

import logging
import textwrap
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn
from transformers import CLIPTokenizer

from dreamartist_pipeline.backbones.families import Backbone
from dreamartist_pipeline.backbones.token_vectors import token_vectors
from dreamartist_pipeline.core.branches import POSITIVE
from dreamartist_pipeline.core.embeddings import Vocabulary, Word, initial_vectors, parse_init, word_pattern
from dreamartist_pipeline.core.prompt_tokens import Conditioning, PromptTokens, side_by_side
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import WordsParams
from dreamartist_pipeline.prompt_weights import parse_weights, quoted

_NO_WORDS = Vocabulary(())
_MAX_QUOTED = 3  # prompts in one warning
_QUOTED_CHARACTERS = 60

log = logging.getLogger(__name__)


class _Token(NamedTuple):
    """A token, its attention weight, and the character of the prompt's plain text that it begins with."""

    id: int
    weight: float
    start: int


class PromptTokenizer:
    """The tokenizer of one text encoder, extended by a vocabulary of trigger words.

    Attributes:
        max_tokens: the text encoder's context, start and end token included.
    """

    def __init__(self, tokenizer: CLIPTokenizer, max_positions: int, vocabulary: Vocabulary = _NO_WORDS) -> None:
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self.max_tokens = min(tokenizer.model_max_length, max_positions)

    def tokenize(self, prompts: Sequence[str]) -> PromptTokens:
        """Return `[N, L]` tokens on the CPU, padded as by the tokenizer.

        A trigger word becomes the ids of its vectors, which follow the base vocabulary. Long prompts are truncated
        before the end token. Braces of weighted words are removed before tokenization. A token has the weight of the
        part in which it begins; all vectors of a trigger word have the word's weight; start, end and padding have the
        weight 1. (The reference toolkit counts a trigger word as one token here, so that the weights after a word of
        several vectors are shifted.)

        Raises:
            InputError: invalid braces.
        """
        tokenizer = self._tokenizer
        ids, weights = [], []
        for prompt in prompts:
            inner = self._inner_tokens(prompt)[: self.max_tokens - 2]
            padding = self.max_tokens - 2 - len(inner)
            end = [tokenizer.eos_token_id, *[tokenizer.pad_token_id] * padding]
            ids.append([tokenizer.bos_token_id, *(token.id for token in inner), *end])
            weights.append([1.0, *(token.weight for token in inner), *[1.0] * len(end)])
        shape = (len(prompts), self.max_tokens)
        all_weights = torch.tensor(weights).reshape(shape)
        return PromptTokens(
            torch.tensor(ids, dtype=torch.long).reshape(shape), all_weights if (all_weights != 1).any() else None
        )

    def check_fits(self, prompt: str) -> None:
        """Check that the prompt has a trigger word, and that no vector of one is truncated.

        Raises:
            InputError: there is no separate trigger word, a vector is truncated, or braces are invalid.
        """
        if not self._learned_ids & {token.id for token in self._inner_tokens(prompt)}:
            raise InputError(
                expected="a trigger word as a separate word in every prompt",
                got=quoted(prompt),
                remedy="put spaces or commas around the template's slot",
            )
        self.check_not_cut(prompt)

    def check_not_cut(self, prompt: str) -> None:
        """Check that no vector of a trigger word is truncated.

        Raises:
            InputError: one is, or braces are invalid.
        """
        inner = [token.id for token in self._inner_tokens(prompt)]
        if self._learned_ids & set(inner[self.max_tokens - 2 :]):
            raise InputError(
                expected=f"the trigger words within the first {self.max_tokens - 2} tokens of every prompt",
                got=f"{quoted(prompt)}, which has {len(inner)} tokens",
                remedy="shorten it, or take fewer vectors",
            )

    def cut_off(self, prompt: str) -> str:
        """Return the end of the prompt's plain text that the text encoder does not read; "" where it reads all.

        Raises:
            InputError: braces that cannot be read.
        """
        inner = self._inner_tokens(prompt)
        if len(inner) <= self.max_tokens - 2:
            return ""
        return _plain_text(prompt)[inner[self.max_tokens - 2].start :]

    def positions(self, prompt: str, word: str) -> list[int]:
        """Return where `tokenize` puts the tokens of a word, of all its occurrences, in ascending order.

        Args:
            prompt: with the word, as a whole word.
            word: a trigger word or any other; case does not matter.

        Raises:
            InputError: the prompt does not have the word, the text encoder does not read all of it, or invalid braces.
        """
        spans = [match.span() for match in word_pattern([word]).finditer(_plain_text(prompt))] if word else []
        found = [
            index
            for index, token in enumerate(self._inner_tokens(prompt), start=1)  # after the start token
            if any(start <= token.start < end for start, end in spans)
        ]
        if not found or found[-1] > self.max_tokens - 2:
            raise InputError(
                expected=f"the word {word!r} within the first {self.max_tokens - 2} tokens of a prompt",
                got=quoted(prompt),
                remedy="name a word of the prompt, or shorten the prompt",
            )
        return found

    @property
    def _learned_ids(self) -> set[int]:
        return {token_id for word in self._vocabulary.words for token_id in word.ids}

    def _inner_tokens(self, prompt: str) -> list[_Token]:
        """Return all tokens between start and end, not truncated."""
        text = _plain_text(prompt)
        weights = [weight for part, weight in _weighted_parts(prompt) for _ in part]  # one per character
        tokens: list[_Token] = []
        start = 0
        for part in self._vocabulary.split_prompt(text):
            if isinstance(part, str):
                tokens += [
                    _Token(token_id, weights[start + offset], start + offset)
                    for token_id, offset in self._plain_tokens(part)
                ]
                start += len(part)
            else:
                tokens += [_Token(token_id, weights[start], start) for token_id in part.ids]
                start += len(unicodedata.normalize("NFC", part.name))
        return tokens

    def _plain_tokens(self, text: str) -> list[tuple[int, int]]:
        """Return (id, index of its first character) of the tokens of a plain text."""
        encoded = self._tokenizer(
            text, add_special_tokens=False, truncation=True, max_length=self.max_tokens, return_offsets_mapping=True
        )
        return [(i, start) for i, (start, _) in zip(encoded.input_ids, encoded.offset_mapping, strict=True)]


def _plain_text(prompt: str) -> str:
    """Return the prompt without the braces and numbers of weighted words, in Unicode's form NFC."""
    return "".join(part for part, _ in _weighted_parts(prompt))


def _weighted_parts(prompt: str) -> list[tuple[str, float]]:
    """Return the (text, weight) parts of a prompt in form NFC, in which trigger words are found."""
    return parse_weights(unicodedata.normalize("NFC", prompt))


class PromptEncoder:
    """Tokenizers and text encoders of one base model, with the trigger words of at most one concept.

    Attributes:
        vocabularies: text encoder -> the trigger words, with ids after its own vocabulary; empty without words.

    Raises:
        InputError: clip_skip leaves no layer.
    """

    def __init__(
        self, backbone: Backbone, vocabularies: Mapping[str, Vocabulary] | None = None, clip_skip: int = 0
    ) -> None:
        self._backbone, self._clip_skip = backbone, clip_skip
        self.vocabularies = vocabularies or {}
        self._tokenizers = {}
        backbone.check_clip_skip(clip_skip)
        for name, tokenizer in backbone.tokenizers.items():
            config = backbone.networks[name].config
            vocabulary = self.vocabularies.get(name, _NO_WORDS)
            self._tokenizers[name] = PromptTokenizer(tokenizer, config.max_position_embeddings, vocabulary)

    @property
    def words(self) -> tuple[Word, ...]:
        """The trigger words, the same for every text encoder."""
        return next((vocabulary.words for vocabulary in self.vocabularies.values()), ())

    def check_fits(self, prompt: str) -> None:
        """Check a prompt for every text encoder; see `PromptTokenizer.check_fits`."""
        for tokenizer in self._tokenizers.values():
            tokenizer.check_fits(prompt)

    def warn_without_word(self, prompts: Sequence[str]) -> None:
        """Log one warning for all prompts without a positive trigger word, unless the concept has none."""
        positive = [word for word in self.words if word.branch == POSITIVE]
        vocabulary = Vocabulary(tuple(positive))
        without = [prompt for prompt in prompts if not _has_word(vocabulary, prompt)]
        if not positive or not without:
            return
        quoted = [repr(textwrap.shorten(prompt, _QUOTED_CHARACTERS, placeholder="…")) for prompt in without]
        log.warning(
            "No trigger word in %d of %d prompts (%s): write %s as a separate word, or %s.",
            len(without),
            len(prompts),
            ", ".join([*quoted[:_MAX_QUOTED], *(["…"] if len(quoted) > _MAX_QUOTED else [])]),
            " or ".join(word.name for word in positive),
            " or ".join(f"{{{word.slot}}}" for word in positive),
        )

    def check_not_cut(self, prompts: Iterable[str]) -> None:
        """Check prompts for every text encoder; see `PromptTokenizer.check_not_cut`."""
        for prompt in prompts:
            for tokenizer in self._tokenizers.values():
                tokenizer.check_not_cut(prompt)

    def cut_off(self, prompt: str) -> str:
        """Return the end of a prompt that some text encoder does not read, the longest; "" where all read all."""
        return max((tokenizer.cut_off(prompt) for tokenizer in self._tokenizers.values()), key=len)

    def positions(self, prompt: str, word: str) -> list[int]:
        """Return the positions of a word in the text states, which those of all text encoders share.

        Raises:
            InputError: see `PromptTokenizer.positions`.
        """
        found = [tokenizer.positions(prompt, word) for tokenizer in self._tokenizers.values()]
        return sorted(set().union(*found))

    def tokenize(self, prompts: Sequence[str]) -> PromptTokens:
        """Return `[N, L]` tokens on the backbone's device, concatenated over the text encoders."""
        tokens = [tokenizer.tokenize(prompts) for tokenizer in self._tokenizers.values()]
        return side_by_side(tokens).to(self._backbone.device)

    def encode(self, tokens: PromptTokens) -> Conditioning:
        """Return the conditioning of N prompts.

        Args:
            tokens: `[N, L]`; with adapters in a text encoder, branches stacked, negative rows first.
        """
        lengths = [tokenizer.max_tokens for tokenizer in self._tokenizers.values()]
        parts = dict(zip(self._tokenizers, tokens.split(lengths), strict=True))
        return self._backbone.encode(parts, self._clip_skip)


def _has_word(vocabulary: Vocabulary, prompt: str) -> bool:
    return any(not isinstance(part, str) for part in vocabulary.split_prompt(_plain_text(prompt)))


def check_trigger_word(tokenizer: CLIPTokenizer, word: str) -> None:
    """Check that the base model does not know a trigger word.

    Raises:
        InputError: it is a single token of the vocabulary, or has no token.
    """
    ids = tokenizer(word, add_special_tokens=False).input_ids
    if len(ids) <= 1:
        raise InputError(
            expected="a trigger word that the base model does not know",
            got=f"{word!r}, which {'is already a single token' if ids else 'has no token'} in its vocabulary",
            remedy=f"choose another, such as 'my-{word}'",
        )


def initial_word_vectors(
    words: WordsParams,
    vocabulary: Vocabulary,
    tokenizer: CLIPTokenizer,
    embedding: nn.Embedding,
    generator: torch.Generator,
) -> list[torch.Tensor]:
    """Return the initial vectors `[n, D]` of every trigger word, in the vocabulary's order.

    With an embedding on the meta device, vectors of an init text are zeros.

    Raises:
        InputError: an init text is invalid, has no token, or does not match the number of vectors.
    """
    initial = []
    for word in vocabulary.words:
        init = parse_init(words.init_text[0] if word.key.startswith("positive") else words.init_text[1])
        of_text = None
        if init.text is not None:
            of_text = token_vectors(tokenizer, embedding, init.text)
            of_text = torch.zeros(of_text.shape) if of_text.is_meta else of_text
        initial.append(initial_vectors(init, word.num_vectors, of_text, embedding.embedding_dim, generator))
    return initial
