"""CLIP's vocabulary, which Stable Diffusion 1.x, 2.x and XL share, for models that come without one."""

from __future__ import annotations

import functools
import gzip
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from dreamartist_pipeline.backbones.holding.configurations import MAX_TOKENS
from dreamartist_pipeline.decoding.json_text import MAX_BYTES, read_json_object
from dreamartist_pipeline.errors import InputError, is_out_of_memory

_FILE = "bpe_simple_vocab_16e6.txt.gz"  # of openai/CLIP; see NOTICE
_END_OF_WORD, _START, _END = "</w>", "<|startoftext|>", "<|endoftext|>"
_SIZE = 49408
_JSON_FILES = (
    *("vocab.json", "tokenizer.json", "added_tokens.json"),
    *("tokenizer_config.json", "special_tokens_map.json"),
)
_TEXT_FILES = ("merges.txt",)


def clip_tokenizer(config: Mapping[str, Any]) -> CLIPTokenizer:
    """Return CLIP's tokenizer with the options of a tokenizer_config.json that lies without a vocabulary.

    OpenCLIP's tokenizer differs in its `pad_token`, `!`, only.
    """
    vocabulary, merges = _vocabulary()
    options = {name: config[name] for name in ("pad_token", "model_max_length") if name in config}
    return CLIPTokenizer(vocab=dict(vocabulary), merges=list(merges), **options)


def read_tokenizer(folder: Path) -> CLIPTokenizer:
    """Return the tokenizer in a folder, whose files are checked first.

    Raises:
        InputError: a file is damaged or too large, a token has an id out of bounds, or a special token is missing.
    """
    expected, remedy = f"a tokenizer of CLIP in {folder}", "download the model again"
    contents = {
        name: read_json_object(folder / name, expected, name, remedy)
        for name in _JSON_FILES
        if (folder / name).is_file()
    }
    try:
        _check_ids(contents)
        if any((folder / name).stat().st_size > MAX_BYTES for name in _TEXT_FILES if (folder / name).is_file()):
            raise ValueError(f"merges of more than {MAX_BYTES:,} bytes")
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        if None in special or len(tokenizer("a b")["input_ids"]) < len("ab"):
            raise ValueError("no start, end or padding token")
    except Exception as error:  # of transformers and of its tokenizers, for whatever damage
        if is_out_of_memory(error):
            raise
        reason = f"files that transformers does not read ({type(error).__name__}: {error})"
        raise InputError(expected=expected, got=reason, remedy=remedy) from error
    return tokenizer


def read_token_file(folder: Path, num_tokens: int, length: int, pad_id: int) -> Tokenizer:
    """Return the tokenizer in the tokenizer.json of another model, such as SigLIP.

    Args:
        folder: of the model.
        num_tokens: of the model's vocabulary.
        length: of all token sequences; shorter ones are padded, longer ones truncated.
        pad_id: of the padding.

    Raises:
        InputError: there is no such file, it is damaged or too large, or it has more tokens than the model.
    """
    expected, remedy = f"a tokenizer.json of at most {num_tokens:,} tokens in {folder}", "download the model again"
    file = folder / "tokenizer.json"
    content = read_json_object(file, expected, file.name, remedy)
    try:
        if any(not 0 <= int(token["id"]) < num_tokens for token in content.get("added_tokens") or []):
            raise ValueError("an added token of a higher id")
        tokenizer = Tokenizer.from_str(json.dumps(content))
        if tokenizer.get_vocab_size() > num_tokens:
            raise ValueError(f"{tokenizer.get_vocab_size():,} tokens")
    except Exception as error:  # of tokenizers, for whatever damage
        raise InputError(expected=expected, got=f"{type(error).__name__}: {error}", remedy=remedy) from error
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=pad_id)
    return tokenizer


def _check_ids(contents: Mapping[str, Mapping[str, Any]]) -> None:
    """Check that ids of tokens are so low that no list of all tokens is too long.

    Raises:
        ValueError: one is not.
    """
    config, whole = contents.get("tokenizer_config.json", {}), contents.get("tokenizer.json", {})
    ids = [*contents.get("vocab.json", {}).values(), *contents.get("added_tokens.json", {}).values()]
    ids += map(int, config.get("added_tokens_decoder") or {})
    ids += [token["id"] for token in whole.get("added_tokens") or []]
    ids += dict(whole.get("model", {}).get("vocab", {})).values()
    if not all(type(each) is int and 0 <= each < MAX_TOKENS for each in ids):
        raise ValueError(f"an id of a token that is no integer below {MAX_TOKENS:,}")


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
