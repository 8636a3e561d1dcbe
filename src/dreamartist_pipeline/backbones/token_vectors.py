"""Vectors of a text encoder's tokens: those of a text, and the tokens next to given vectors."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPTokenizer

_END_OF_WORD = "</w>"


@dataclass(frozen=True)
class NearToken:
    """A token near a vector.

    Attributes:
        text: the token; "…" follows one that does not end a word.
        similarity: cosine similarity to the vector, -1 to 1.
        vector: of the token, float32 `[D]`, on the CPU.
    """

    text: str
    similarity: float
    vector: torch.Tensor = field(repr=False)


def token_vectors(tokenizer: CLIPTokenizer, embedding: nn.Embedding, text: str) -> torch.Tensor:
    """Return the vectors `[k, D]` of a text's k tokens, without start and end, in the embedding's dtype."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    weight = embedding.weight.detach()
    return weight[torch.tensor(ids, dtype=torch.long, device=weight.device)]


def nearest_tokens(
    tokenizer: CLIPTokenizer, embedding: nn.Embedding, vectors: torch.Tensor, count: int
) -> list[list[NearToken]]:
    """Return the tokens nearest to each of the vectors `[n, D]` by cosine similarity, without special tokens.

    Args:
        tokenizer: of the text encoder.
        embedding: its token embedding.
        vectors: learned vectors or others.
        count: of tokens per vector; fewer if the vocabulary is smaller.
    """
    table = embedding.weight.detach().float().cpu()
    similarities = F.normalize(vectors.detach().float().cpu(), dim=-1) @ F.normalize(table, dim=-1).T  # [n, V]
    special = [each for each in tokenizer.all_special_ids if each < len(table)]
    similarities[:, special] = -torch.inf
    found = similarities.topk(min(count, len(table) - len(special)), dim=-1)
    return [
        [
            NearToken(_readable(tokenizer.convert_ids_to_tokens(token_id)), similarity, table[token_id])
            for token_id, similarity in zip(ids, values, strict=True)
        ]
        for ids, values in zip(found.indices.tolist(), found.values.tolist(), strict=True)
    ]


def _readable(token: str) -> str:
    return token.removesuffix(_END_OF_WORD) if token.endswith(_END_OF_WORD) else f"{token}…"
