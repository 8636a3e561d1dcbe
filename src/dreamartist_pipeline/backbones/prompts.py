"""From prompts to text states: tokens, trigger words as several learned vectors, the text encoder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import CLIPTokenizer

from dreamartist_pipeline.core.embeddings import Vocabulary, Word, initial_vectors, parse_init
from dreamartist_pipeline.core.errors import InputError
from dreamartist_pipeline.core.prompt_tokens import PromptTokens, weight_states
from dreamartist_pipeline.params import WordsParams
from dreamartist_pipeline.prompt_weights import parse_weights

if TYPE_CHECKING:
    from dreamartist_pipeline.backbones.base_model import Backbone


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
                f"expected a trigger word that stands by itself in every prompt; got {prompt!r}; put spaces or commas "
                "around the template's slot"
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
                f"expected the trigger words within the first {self.max_tokens - 2} tokens of every prompt; "
                f"{prompt!r} with its words is {len(inner)} tokens long; shorten it or take fewer vectors"
            )

    @property
    def _learned_ids(self) -> set[int]:
        return {i for word in (self._vocabulary.words if self._vocabulary else ()) for i in word.ids}

    def _inner_tokens(self, prompt: str) -> list[tuple[int, float]]:
        """Return (id, weight) of all tokens between start and end, however many there are."""
        try:
            parts = parse_weights(prompt)
        except ValueError as error:
            raise InputError(str(error)) from error
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
    """Tokenizer and text encoder of one backbone, with the trigger words of one concept or none.

    clip_skip: how many of the text encoder's last layers are left out.
    """

    def __init__(self, backbone: Backbone, vocabulary: Vocabulary | None = None, clip_skip: int = 0) -> None:
        check_clip_skip(backbone.text_encoder.config.num_hidden_layers, clip_skip)
        self._backbone, self._clip_skip = backbone, clip_skip
        self.vocabulary = vocabulary
        max_positions = backbone.text_encoder.config.max_position_embeddings
        self._tokenizer = PromptTokenizer(backbone.tokenizer, max_positions, vocabulary)

    def check_not_cut(self, prompts: Iterable[str]) -> None:
        """Confirm that no trigger word of any prompt is cut off; see `PromptTokenizer.check_not_cut`."""
        for prompt in prompts:
            self._tokenizer.check_not_cut(prompt)

    def tokenize(self, prompts: Sequence[str]) -> PromptTokens:
        """Return `[N, L]` tokens on the backbone's device; see `PromptTokenizer.tokenize`."""
        return self._tokenizer.tokenize(prompts).to(self._backbone.device)

    def encode(self, tokens: PromptTokens) -> torch.Tensor:
        """Return text states `[N, L, D]` after the final norm: of the last layer, or of an earlier one by clip_skip.

        The final norm follows an earlier layer too, as in diffusers' `StableDiffusionPipeline.encode_prompt`. Weights
        of tokens, where there are any, act on these states; see `weight_states`.

        Args:
            tokens: `[N, L]`; with adapters in the text encoder, branches stacked (negative rows first).
        """
        states = self._states(tokens.ids)
        return states if tokens.weights is None else weight_states(states, tokens.weights)

    def _states(self, token_ids: torch.Tensor) -> torch.Tensor:
        with self._backbone.autocast():
            encoder = self._backbone.text_encoder
            if not self._clip_skip:
                states: torch.Tensor = encoder(token_ids)[0]
                return states
            layers = encoder(token_ids, output_hidden_states=True).hidden_states
            text_model = getattr(encoder, "text_model", encoder)  # transformers 5 has no module between
            normed: torch.Tensor = text_model.final_layer_norm(layers[-(self._clip_skip + 1)])
        return normed


def check_clip_skip(num_layers: int, clip_skip: int) -> None:
    """Confirm that a layer remains.

    Raises:
        InputError: as many layers are skipped as there are, or more.
    """
    if clip_skip >= num_layers:
        raise InputError(
            f"expected clip_skip below the text encoder's {num_layers} layers; got {clip_skip}; lower it (0: none)"
        )


def check_trigger_word(tokenizer: CLIPTokenizer, word: str) -> None:
    """Confirm that a trigger word means nothing yet.

    Raises:
        InputError: it is a single token of the base model's vocabulary, or nothing that can be tokenized.
    """
    ids = tokenizer(word, add_special_tokens=False).input_ids
    if len(ids) <= 1:
        raise InputError(
            f"expected a trigger word that the base model does not know; {word!r} is "
            f"{'already a single token' if ids else 'empty'} in its vocabulary; choose another, such as 'my-{word}'"
        )


def initial_word_vectors(
    words: WordsParams,
    vocabulary: Vocabulary,
    tokenizer: CLIPTokenizer,
    embedding: nn.Embedding,
    generator: torch.Generator,
) -> list[torch.Tensor]:
    """Return the vectors `[n, D]` that every trigger word of the vocabulary starts with, in its order.

    Raises:
        InputError: an init text cannot be read, has no token, or does not go with the number of vectors.
    """
    initial = []
    for word in vocabulary.words:
        init = parse_init(words.init_text[0] if word.key.startswith("positive") else words.init_text[1])
        token_vectors = None
        if init.text is not None:
            ids = tokenizer(init.text, add_special_tokens=False).input_ids
            token_vectors = embedding.weight.detach()[
                torch.tensor(ids, dtype=torch.long, device=embedding.weight.device)
            ]
        initial.append(initial_vectors(init, word.num_vectors, token_vectors, embedding.embedding_dim, generator))
    return initial
