"""Trigger words: new vocabulary entries with learned vectors, a (positive, negative) pair per slot.

A trigger word expands to `num_vectors` learned vectors. Their ids follow the base vocabulary, so that the frozen token
embedding is neither copied nor resized.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import nn

from dreamartist_pipeline.core.branches import BRANCH_NAMES, NEGATIVE, POSITIVE, branches
from dreamartist_pipeline.errors import InputError

# ------------------------------------------------------------------------------------------------- vocabulary

_HYPHENS = "-\u2010\u2011\ufe63\uff0d"  # and its look-alikes: hyphen, non-breaking, small, full-width
_DASHES = "\u2012\u2013\u2212"  # figure dash, en dash, minus: typed for a hyphen, but also between two words
_PLAIN_HYPHENS = str.maketrans(dict.fromkeys(_HYPHENS + _DASHES, "-"))
# Thai, Lao, Burmese, Khmer; Hangul; Han and kana: scripts without spaces, or with endings on foreign words.
_UNSPACED = (
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
    r"\u1100-\u11ff\u3130-\u318f\uac00-\ud7ff"
    r"\u2e80-\u2fdf\u3005-\u3007\u3040-\u312f\u31a0-\u31ff\u3400-\u9fff\uf900-\ufaff\uff66-\uff9f"
    r"\U00020000-\U0003ffff]"
)
_ACCENTS = r"\u0300-\u036f"  # those that NFC leaves alone


@dataclass(frozen=True)
class Word:
    """One trigger word; the ids of its vectors are `first_id` to `first_id + num_vectors − 1`."""

    name: str
    slot: str
    branch: int  # NEGATIVE or POSITIVE
    first_id: int
    num_vectors: int

    @property
    def key(self) -> str:
        """The name of the word in a concept file, "<branch>.<slot>"."""
        return f"{BRANCH_NAMES[self.branch]}.{self.slot}"

    @property
    def ids(self) -> range:
        """The ids of its vectors."""
        return range(self.first_id, self.first_id + self.num_vectors)


@dataclass(frozen=True)
class Vocabulary:
    """All trigger words of a concept, with consecutive ids."""

    words: tuple[Word, ...]

    @classmethod
    def build(
        cls,
        names: Mapping[str, tuple[str, str]],
        num_vectors: tuple[int, int],
        first_id: int,
        num_branches: int = 2,
    ) -> Vocabulary:
        """Assign ids to the vectors of all trigger words.

        Args:
            names: slot -> (positive, negative) trigger word.
            num_vectors: number of vectors of a (positive, negative) word.
            first_id: size of the base vocabulary.
            num_branches: with 1, there are no negative words.

        Raises:
            InputError: a word occurs twice, ignoring case.
        """
        positive, negative = num_vectors
        counts = {
            f"{BRANCH_NAMES[branch]}.{slot}": negative if branch == NEGATIVE else positive
            for slot in names
            for branch in branches(num_branches)
        }
        return cls.of_counts(names, counts, first_id)

    @classmethod
    def of_counts(
        cls, names: Mapping[str, tuple[str, str]], num_vectors: Mapping[str, int], first_id: int
    ) -> Vocabulary:
        """Assign ids as `build`, with a separate number of vectors for each word.

        Args:
            names: slot -> (positive, negative) trigger word.
            num_vectors: "<branch>.<slot>" -> number of vectors; other words are skipped.
            first_id: size of the base vocabulary.

        Raises:
            InputError: a word occurs twice, ignoring case.
        """
        words: list[Word] = []
        for slot, (positive, negative) in names.items():
            for branch, name in ((NEGATIVE, negative), (POSITIVE, positive)):
                count = num_vectors.get(f"{BRANCH_NAMES[branch]}.{slot}")
                if count is None:
                    continue
                if any(plain_spelling(word.name) == plain_spelling(name) for word in words):
                    raise InputError(
                        expected="every trigger word once",
                        got=f"{name!r} twice",
                        remedy=f"choose another word for slot {slot!r}",
                    )
                words.append(Word(name, slot, branch, first_id, count))
                first_id += count
        return cls(tuple(words))

    def split_prompt(self, prompt: str) -> list[str | Word]:
        """Split a prompt, in Unicode's form NFC, into plain text and trigger words; see `word_pattern`."""
        by_name = {plain_spelling(word.name): word for word in self.words}
        parts = self._pattern.split(unicodedata.normalize("NFC", prompt))
        return [by_name.get(plain_spelling(part), part) for part in parts if part]

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return word_pattern(word.name for word in self.words)


def word_pattern(names: Iterable[str]) -> re.Pattern[str]:
    """Return a regular expression, with one group, for trigger words in prompts in Unicode's form NFC.

    Case and the kind of hyphen do not matter. Only whole words match: "my-cat" is found in "my-cat, sitting", but not
    in "my-cat-neg". A word may touch a script without spaces, as in "一只my-cat", unless it is written in one itself.
    """
    longest_first = sorted((unicodedata.normalize("NFC", name) for name in names), key=len, reverse=True)
    return re.compile(f"({'|'.join(map(_whole_word, longest_first)) or '(?!)'})", re.IGNORECASE)


def with_plain_words(prompt: str, names: Iterable[str]) -> str:
    """Return a prompt, in Unicode's form NFC, with its trigger words spelt as they are named.

    >>> with_plain_words("a MY\u2011CAT, sitting", ["my-cat"])
    'a my-cat, sitting'
    """
    name_of = {plain_spelling(name): name for name in names}
    composed = unicodedata.normalize("NFC", prompt)
    return word_pattern(name_of.values()).sub(lambda match: name_of[plain_spelling(match[0])], composed)


def plain_spelling(name: str) -> str:
    """Return what all spellings of a trigger word have in common: composed (NFC), in lower case, with plain hyphens."""
    return unicodedata.normalize("NFC", name).lower().translate(_PLAIN_HYPHENS)


def _whole_word(name: str) -> str:
    """Return a regular expression for a word in form NFC that is not part of a longer one."""
    spelling = re.escape(name.translate(_PLAIN_HYPHENS)).replace(r"\-", f"[{_HYPHENS}{_DASHES}]")
    before, after = (r"\w" if re.match(_UNSPACED, end) else rf"[^\W{_UNSPACED[1:-1]}]" for end in (name[0], name[-1]))
    return f"(?<!{before})(?<![{_HYPHENS}]){spelling}(?!{after})(?![{_HYPHENS}{_ACCENTS}])"


# ------------------------------------------------------------------------------------------------- learned vectors


class WordEmbedding(nn.Module):
    """The frozen token embedding of a text encoder, extended by the learned vectors of all trigger words.

    The learned vectors are float32, and are cast to the dtype of the token embedding in `forward`.

    Attributes:
        base: the frozen token embedding.
        vocabulary: the trigger words.
        vectors: one Parameter `[num_vectors, dim]` per word, in the order of `vocabulary.words`.
    """

    def __init__(self, base: nn.Embedding, vocabulary: Vocabulary, initial: Sequence[torch.Tensor]) -> None:
        """Freeze `base` and copy the initial vectors, one tensor `[num_vectors, dim]` per word.

        Raises:
            ValueError: there are no words, their ids do not follow the base vocabulary, or a shape is wrong.
        """
        super().__init__()
        if not vocabulary.words or vocabulary.words[0].first_id != base.num_embeddings:
            raise ValueError(f"expected words with ids from {base.num_embeddings}, got {vocabulary.words}")
        expected = [(word.num_vectors, base.embedding_dim) for word in vocabulary.words]
        if (got := [tuple(vectors.shape) for vectors in initial]) != expected:
            raise ValueError(f"expected initial vectors of shapes {expected}, got {got}")
        self.base = base.requires_grad_(False)
        self.vocabulary = vocabulary
        device = base.weight.device
        self.vectors = nn.ParameterList(
            nn.Parameter(vectors.detach().to(device, torch.float32, copy=True)) for vectors in initial
        )

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Look up ids `[...]`, giving `[..., dim]`; ids after the base vocabulary are learned vectors."""
        vocab_size = self.base.num_embeddings
        is_learned = ids >= vocab_size
        tokens = self.base(torch.where(is_learned, 0, ids))
        learned = F.embedding(torch.where(is_learned, ids - vocab_size, 0), torch.cat(list(self.vectors)))
        return torch.where(is_learned[..., None], learned.to(tokens.dtype), tokens)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return copies of the learned vectors: "<branch>.<slot>" -> float32 on the CPU."""
        return {
            word.key: vectors.detach().to("cpu", torch.float32, copy=True).contiguous()
            for word, vectors in zip(self.vocabulary.words, self.vectors, strict=True)
        }


# ------------------------------------------------------------------------------------------------- initial vectors

_MAX_STD = 100.0
_RANDOM = re.compile(r"\*\[\s*(?P<std>\d*\.?\d+(?:[eE][+-]?\d+)?)\s*(?:,\s*(?P<count>\d+)\s*)?\]$")


@dataclass(frozen=True)
class InitText:
    """The initial values of a word: the token embeddings of a text, normal noise, or the text followed by noise.

    Attributes:
        text: None for noise only.
        std: standard deviation of the noise; None for text only.
        num_random: number of noise vectors; None for those that the tokens of the text do not fill.
    """

    text: str | None
    std: float | None
    num_random: int | None = None


def parse_init(text: str) -> InitText:
    """Parse "cat", "*[0.017]", "*[0.017, 3]" or "cat, *[0.017, 2]".

    Raises:
        InputError: the text is empty, or its random part is malformed.
    """
    match = _RANDOM.search(text.strip())
    words = text.strip()[: match.start()].rstrip(" ,") if match else text.strip()
    if "*[" in words or not (words or match):
        raise InputError(
            expected="an init text like 'cat', '*[0.017]' or 'cat, *[0.017, 2]'",
            got=f"{text!r}",
            remedy="correct init_text",
        )
    if match is None:
        return InitText(words, None)
    if not float(match["std"]) <= _MAX_STD:
        raise InputError(
            expected=f"a standard deviation of at most {_MAX_STD:g} in init_text",
            got=f"{text!r}",
            remedy="give about that of the base model's vectors, such as 0.017",
        )
    return InitText(words or None, float(match["std"]), int(match["count"]) if match["count"] else None)


def initial_vectors(
    init: InitText,
    num_vectors: int,
    token_vectors: torch.Tensor | None,
    dim: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """Return the initial vectors of a word, float32 `[num_vectors, dim]`: those of the text, followed by noise.

    If the text has k tokens for n vectors, vector i is token ⌊i·k/n⌋, as in textual inversion tools.

    Args:
        init: the initial values.
        num_vectors: of the word.
        token_vectors: the token embeddings of `init.text`, `[k, dim]`; None without a text.
        dim: width of the text encoder.
        generator: CPU generator of the noise.

    Raises:
        InputError: the text has no token, or the numbers of vectors are inconsistent.
    """
    num_text = _num_text_vectors(init, num_vectors, 0 if token_vectors is None else len(token_vectors))
    random = torch.randn(num_vectors - num_text, dim, generator=generator) * (init.std or 0.0)
    if not num_text or token_vectors is None:
        return random
    tokens = [i * len(token_vectors) // num_text for i in range(num_text)]
    return torch.cat([token_vectors[tokens].detach().float().cpu(), random])


def _num_text_vectors(init: InitText, num_vectors: int, num_tokens: int) -> int:
    if init.text is not None and num_tokens == 0:
        raise InputError(
            expected="init_text with at least one token", got=f"{init.text!r}", remedy="choose another init_text"
        )
    if init.std is None:
        return num_vectors
    if init.num_random is None:
        return min(num_tokens, num_vectors)
    num_text = num_vectors - init.num_random
    if num_text < 0 or (num_text > 0) != (init.text is not None):
        raise InputError(
            expected=f"init_text to fill {num_vectors} vectors",
            got=f"{init.num_random} random vectors and {'a' if init.text else 'no'} text",
            remedy="correct init_text or num_vectors",
        )
    return num_text
