"""Configurations of other tools, parameters, values of --params, and layer selectors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import yaml
from omegaconf import OmegaConf

from dreamartist_pipeline.cli.params import parse_params
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.hooks import build_parameters
from dreamartist_pipeline.hooks.parameters import as_texts, flatten, number_lists, plain_sections
from dreamartist_pipeline.interop.toolkit_config import read_toolkit_config
from dreamartist_pipeline.layer_selectors import parse_selector
from dreamartist_pipeline.params import SECTIONS
from dreamartist_pipeline.yaml_texts import parse_mapping
from fuzz.fuzzing import Target
from fuzz.mutations import mutated_tree

_TOOLKIT = Path(__file__).parents[2] / "interop" / "toolkit_config"
_SELECTORS = (r"re:.*\.attn.?$", r"cls(Linear):re:.*resnets\.\d+$", "down_blocks.0", "re:(([a-z_0-9.]+)+)+!")
_NAMES = [
    f"{block}.{i}.attentions.{j}.attn{k}.to_q" for block in ("down", "up") for i in "012" for j in "01" for k in "12"
]
_GIVEN = (
    "subject=cat,image=cat.jpg,training.num_steps=5",
    "generate.prompts=['a my-cat, asleep', 'a {pt1:1.2}'],device=cpu",
    "training.lora_unet=[{lr: 1e-4, rank: 4, branch: p, layers: ['re:.*attn']}]",
)


def _toolkit_files() -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in _TOOLKIT.glob("*.yaml")}


def _read_text(path: str) -> str | None:
    file = _TOOLKIT / Path(path).name.replace("train_base", "full_base")
    try:
        return file.read_text(encoding="utf-8") if file.is_file() else None
    except (OSError, ValueError):
        return None


def _toolkit(file: Path) -> object:
    try:
        text = file.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise InputError("UTF-8", str(error), "") from error  # as import-config does
    imported = read_toolkit_config(text, _read_text)
    OmegaConf.to_yaml(OmegaConf.create(imported.settings)).encode()
    return imported


def _parameters() -> dict[str, Any]:
    """Return the parameters of conf/test as they are checked, without variables."""
    group = {"lr": 1e-3, "rank": 2, "branch": "p", "layers": ["re:.*attn"]}
    return {
        "training": {
            "num_steps": 2,
            "guidance_scale": "1.0-3.0:cos",
            "lora_unet": [group, {**group, "branch": "n"}],
            "words": {"names": {"pt1": ["my-fox", "my-fox-neg"]}, "num_vectors": [3, 6]},
            "templates": ["a {pt1}, {caption}"],
            "caption_transforms": ["tag_shuffle", {"tag_dropout": 0.1}],
            "preview": {"every": 1, "prompts": ["a {pt1}"], "sampler": {"scheduler": "dpmsolver++"}},
        },
        "ingestion": {"bucket": {"side_px": 64, "multiple_px": 8}},
        "prompts": {"num_prompts": 2},
        "generate": {"prompts": "a {pt1}", "sampler": {"guidance_scale": 4.0}, "strength": "reference"},
        "evaluation": {"prompts": ["a {pt1}"], "prior_prompts": ["a cat"], "evaluators": ["efficientnet-lite0"]},
        "export": {"title": "fox", "formats": ["kohya"]},
        "import": {"words": {"pt1": ["a.safetensors"]}, "names": {"pt1": ["my-fox"]}},
    }


def _check_tree(parameters: dict[Any, Any]) -> object:
    built = build_parameters(parameters)
    sections = {name: built[name] for name in SECTIONS.keys() & built.keys()}
    return as_texts(flatten(number_lists(plain_sections(sections))))


def _tree(file: Path) -> object:
    """Mutate the parameters themselves, by the seed in the file: also to keys and values that no YAML file gives."""
    return _check_tree(mutated_tree(_parameters(), int.from_bytes(file.read_bytes()[:8])))


def _seed(data: bytes, seed: int) -> bytes:
    return seed.to_bytes(8)


def _file_of_parameters(file: Path) -> object:
    try:
        text = file.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise InputError("UTF-8", str(error), "") from error  # as the configuration loader does
    return _check_tree(parse_mapping(text, file.name))


def _option(file: Path) -> object:
    command, option = click.Command("run"), click.Option(["--params"])
    try:
        return parse_params(click.Context(command), option, file.read_bytes().decode(errors="surrogateescape"))
    except click.BadParameter as error:
        raise InputError("key=value", ascii(str(error)), "") from error


def _selector(file: Path) -> object:
    selector = parse_selector(file.read_bytes().decode(errors="surrogateescape"))
    return [name for name in _NAMES if selector.matches(name, "Linear")]


TARGETS = [
    Target("import-config", _toolkit_files, _toolkit),
    Target("parameters", lambda: {"a.seed": bytes(8)}, _tree, mutate=_seed),
    Target(
        "file of parameters",
        lambda: {"a.yml": yaml.safe_dump(_parameters()).encode(), "a.json": json.dumps(_parameters()).encode()},
        _file_of_parameters,
    ),
    Target("value of params", lambda: {f"{n}.txt": text.encode() for n, text in enumerate(_GIVEN)}, _option),
    Target(
        "selector",
        lambda: {f"{n}.txt": text.encode() for n, text in enumerate(_SELECTORS)},
        _selector,
        errors=(ValueError,),
    ),
]
