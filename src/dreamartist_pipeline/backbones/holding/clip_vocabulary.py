"""CLIP's vocabulary, which Stable Diffusion 1.x, 2.x and XL share, for models that come without one."""

from __future__ import annotations

import functools
import gzip
from collections.abc import Mapping
from importlib import resources
from typing import Any

from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

_FILE = "bpe_simple_vocab_16e6.txt.gz"  # of openai/CLIP; see NOTICE
_END_OF_WORD, _START, _END = "</w>", "<|startoftext|>", "<|endoftext|>"
_SIZE = 49408


def clip_tokenizer(config: Mapping[str, Any]) -> CLIPTokenizer:
    """Return CLIP's tokenizer with the options of a tokenizer_config.json that lies without a vocabulary.

    OpenCLIP's tokenizer differs in its `pad_token`, `!`, only.
    """
    vocabulary, merges = _vocabulary()
    options = {name: config[name] for name in ("pad_token", "model_max_length") if name in config}
    return CLIPTokenizer(vocab=dict(vocabulary), merges=list(merges), **options)


@functools.cache
def _vocabulary() -> tuple[Mapping[str, int], tuple[tuple[str, str], ...]]:
    """Return token -> id, and the merges in their order; see `SimpleTokenizer` of openai/CLIP."""
    packed = resources.files(__package__).joinpath("configs", _FILE).read_bytes()
    letters = list(bytes_to_unicode().values())
    singles = [*letters, *(letter + _END_OF_WORD for letter in letters)]
    lines = gzip.decompress(packed).decode("utf-8").split("\n")[1:]  # after a line with the version
    merges = tuple((first, second) for first, second in map(str.split, lines[: _SIZE - len(singles) - 2]))
    tokens = [*singles, *(first + second for first, second in merges), _START, _END]
    return {token: number for number, token in enumerate(tokens)}, merges
