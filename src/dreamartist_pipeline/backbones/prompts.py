"""From prompts to text states: tokens, trigger words as several learned vectors, the text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import CLIPTokenizer

from dreamartist_pipeline.core.embeddings import Vocabulary, initial_vectors, parse_init
from dreamartist_pipeline.core.errors import InputError
from dreamartist_pipeline.params import WordsParams

if TYPE_CHECKING:
    from dreamartist_pipeline.backbones.base_model import Backbone


class PromptTokenizer:
    """The base model's tokenizer, to which a vocabulary of trigger words may be added.

    max_tokens: the text encoder's context, start and end included.
    """

    def __init__(self, tokenizer: CLIPTokenizer, max_positions: int, vocabulary: Vocabulary | None = None) -> None:
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self.max_tokens = min(tokenizer.model_max_length, max_positions)

    def token_ids(self, prompts: Sequence[str]) -> torch.Tensor:
        """Return `[N, L]` token ids on the CPU, as the tokenizer pads them.

        A trigger word becomes the ids of its vectors, which are not below the size of the base vocabulary. What is too
        long is cut off before the end token.
        """
        tokenizer = self._tokenizer
        rows = []
        for prompt in prompts:
            inner = self._inner_ids(prompt)[: self.max_tokens - 2]
            row = [tokenizer.bos_token_id, *inner, tokenizer.eos_token_id]
            rows.append(row + [tokenizer.pad_token_id] * (self.max_tokens - len(row)))
        return torch.tensor(rows, dtype=torch.long).reshape(len(rows), self.max_tokens)

    def check_fits(self, prompt: str) -> None:
        """Confirm that a trigger word is found in the prompt, and that no vector of one is cut off.

        Raises:
            InputError: no word stands by itself, or the prompt with its words is longer than the text encoder's
                context.
        """
        inner = self._inner_ids(prompt)
        learned = {i for word in (self._vocabulary.words if self._vocabulary else ()) for i in word.ids}
        if not learned & set(inner):
            raise InputError(
                f"expected a trigger word that stands by itself in every prompt; got {prompt!r}; put spaces or commas "
                "around the template's slot"
            )
        if learned & set(inner[self.max_tokens - 2 :]):
            raise InputError(
                f"expected the trigger words within the first {self.max_tokens - 2} tokens of every prompt; "
                f"{prompt!r} with its words is {len(inner)} tokens long; shorten the template or take fewer vectors"
            )

    def _inner_ids(self, prompt: str) -> list[int]:
        if self._vocabulary is None:
            return self._plain_ids(prompt)
        ids: list[int] = []
        for part in self._vocabulary.split_prompt(prompt):
            ids += self._plain_ids(part) if isinstance(part, str) else [part.first_id]
        return self._vocabulary.expand(ids)

    def _plain_ids(self, text: str) -> list[int]:
        options = {"add_special_tokens": False, "truncation": True, "max_length": self.max_tokens}
        return list(self._tokenizer(text, **options).input_ids)


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

    def token_ids(self, prompts: Sequence[str]) -> torch.Tensor:
        """Return `[N, L]` token ids on the backbone's device; see `PromptTokenizer.token_ids`."""
        return self._tokenizer.token_ids(prompts).to(self._backbone.device)

    def encode(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Return text states `[N, L, D]` after the final norm: of the last layer, or of an earlier one by clip_skip.

        The final norm follows an earlier layer too, as in diffusers' `StableDiffusionPipeline.encode_prompt`.

        Args:
            token_ids: `[N, L]`; with adapters in the text encoder, branches stacked (negative rows first).
        """
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
