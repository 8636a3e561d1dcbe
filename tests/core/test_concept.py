"""The metadata of a concept: files of all versions are read, and damaged files are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from concept_bytes import concept_bytes
from dreamartist_pipeline.core.concept import FORMAT, Concept, ConceptMetadata
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.interop.concept_file import read_concept
from dreamartist_pipeline.interop.safetensors_bytes import read_metadata, write_tensors
from refusals import says

OLD_FILES = Path(__file__).parent / "concepts"  # written by the project's own earlier versions


def old_file(name: str) -> bytes:
    return (OLD_FILES / f"{name}.safetensors").read_bytes()


def old_concept(name: str) -> Concept:
    return read_concept(old_file(name), name)


def test_a_first_file_has_the_schedule_and_the_last_layer_of_its_base_model_and_plain_groups() -> None:
    metadata = old_concept("first").metadata
    assert "clip_skip" not in read_metadata(old_file("first"))
    assert (metadata.clip_skip, metadata.zero_terminal_snr, metadata.num_branches) == (0, False, 2)
    groups = [*metadata.lora["unet"], *metadata.lora["text_encoder"]]
    assert [group.name for group in groups] == ["unet.0.positive", "unet.1.negative", "text_encoder.0.shared"]
    assert [(group.rank, group.alpha, group.lr) for group in groups] == [(2, 2.0, 1e-3), (1, 1.0, 4e-4), (1, 1.0, 1e-3)]
    assert {(group.bias, group.svd_init, group.timestep_min_rank) for group in groups} == {(False, False, None)}


def test_a_file_from_before_biases_keeps_the_options_it_has() -> None:
    metadata = old_concept("with_options").metadata
    assert "bias" not in read_metadata(old_file("with_options"))["lora_unet"]
    assert (metadata.clip_skip, metadata.zero_terminal_snr) == (1, True)
    assert [(group.timestep_min_rank, group.bias) for group in metadata.lora["unet"]] == [(1, False), (None, False)]


def test_an_imported_file_has_no_training_of_its_own() -> None:
    concept = old_concept("imported")
    assert concept.metadata.imported_from == (("fox.safetensors", "0f" * 32),)
    assert concept.metadata.config_sha256 is concept.metadata.seed is concept.metadata.guidance_scale is None
    assert [group.branch for group in concept.metadata.lora["unet"]] == ["shared"]
    assert [(word.name, word.branch) for word in concept.trigger_words()] == [("my-fox", "positive")]


@pytest.mark.parametrize("name", ["first", "with_options", "imported"])
def test_what_an_old_file_holds_is_written_and_read_again_unchanged(name: str) -> None:
    concept = old_concept(name)
    again = read_concept(concept_bytes(concept), name)
    assert again.metadata == concept.metadata
    assert all(torch.equal(again.tensors[key], tensor) for key, tensor in concept.tensors.items())
    assert concept_bytes(again) == concept_bytes(concept)
    kept = {key: text for key, text in read_metadata(old_file(name)).items() if not key.startswith("lora_")}
    assert kept.items() <= read_metadata(concept_bytes(concept)).items()


def test_the_updates_of_an_old_file_have_alpha_over_the_rank_of_their_tensors() -> None:
    updates = old_concept("first").updates("unet")
    assert [(u.index, u.group.branch, u.factors.rank, u.factors.scale) for u in updates] == [
        (0, "positive", 2, 1.0),
        (1, "negative", 1, 1.0),
    ]


def changed(**changes: str | None) -> bytes:
    """Return an old file with other texts in its metadata; None takes a key away."""
    metadata = {**read_metadata(old_file("first")), **changes}
    kept = {key: text for key, text in metadata.items() if text is not None}
    return write_tensors(old_concept("first").tensors, kept)


def groups(**changes: object) -> str:
    """Return the groups of the UNet with other fields in the first; None takes a field away."""
    first, *others = json.loads(read_metadata(old_file("first"))["lora_unet"])
    merged = {key: value for key, value in (first | changes).items() if value is not None}
    return json.dumps([merged, *others])


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        *(({key: None}, f"{key}: ") for key in ("base_model", "base_model_fingerprint", "num_branches", "num_steps")),
        *(({key: None}, f"{key}: ") for key in ("words", "num_vectors")),
        ({"words": "[null]"}, "words: "),
        ({"words": '{"pt1":["my-fox"]}'}, "words.pt1.1: "),
        ({"words": '{"pt1":["","my-fox-neg"]}'}, "words.pt1.0: "),
        ({"words": "{" * 40_000}, "words: "),
        ({"num_branches": "null"}, "num_branches: "),
        ({"num_branches": "3"}, "num_branches: "),
        ({"num_steps": "-1"}, "num_steps: "),
        ({"num_vectors": "[0,6]"}, "num_vectors.0: "),
        ({"clip_skip": '[{"name":1}]'}, "clip_skip: "),
        ({"clip_skip": "two"}, "clip_skip: "),
        ({"zero_terminal_snr": "3"}, "zero_terminal_snr: "),
        ({"guidance_scale": "high"}, "guidance_scale: "),
        ({"versions": "1"}, "versions: "),
        ({"lora_unet": '{"unet.lora_alpha":1e999}'}, "lora.unet: "),
        ({"lora_unet": "9" * 5000}, "lora.unet: "),
        ({"lora_unet": "[1]"}, "lora.unet.0: "),
        ({"lora_unet": "["}, "lora.unet: "),
        ({"lora_unet": groups(name=None)}, "lora.unet.0.name: "),
        ({"lora_unet": groups(layers=None, liyers=["x"])}, "lora.unet.0.layers: "),
        ({"lora_unet": groups(liyers=["x"])}, "lora.unet.0.liyers: "),
        ({"lora_unet": groups(alpha=0)}, "lora.unet.0.alpha: "),
        ({"lora_unet": groups(rank="two")}, "lora.unet.0.rank"),
        ({"lora_unet": groups(branch="both")}, "lora.unet.0.branch: "),
    ],
)
def test_damaged_metadata_end_in_an_error_that_names_the_file_and_the_key(
    changes: dict[str, str | None], key: str
) -> None:
    with pytest.raises(InputError, check=says(expected="metadata of a concept in fox.safetensors", got=key)):
        read_concept(changed(**changes), "fox.safetensors")


def test_a_file_of_another_kind_is_refused() -> None:
    with pytest.raises(InputError, check=says(expected="in x", remedy="--pipeline import")):
        read_concept(changed(format="another"), "x")


def test_keys_that_other_tools_add_are_ignored() -> None:
    assert read_concept(changed(title="a fox"), "x").metadata == old_concept("first").metadata


QUERY = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.0.positive"


@pytest.mark.parametrize(
    ("tensors", "check"),
    [
        ({f"{QUERY}.down": torch.tensor(1.0)}, says(got="{'down': (), 'up': (16, 2)}")),
        ({f"{QUERY}.down": torch.zeros(0, 16)}, says(got="{'down': (0, 16), 'up': (16, 2)}")),
        ({f"{QUERY}.down": torch.zeros(3, 16)}, says(got="{'down': (3, 16), 'up': (16, 2)}")),
        ({f"{QUERY}.down": None}, says(got="{'up': (16, 2)}")),
        ({f"{QUERY}.bias": torch.zeros(16)}, says(got="['bias', 'down', 'up'] of positive group 0")),
        ({f"{QUERY}.down": torch.zeros(2, 16).half()}, says(expected="float32", got="float16")),
        ({f"{QUERY}.down": torch.zeros(2, 16).to(torch.float8_e4m3fn)}, says(expected="float32", got="float8_e4m3fn")),
        ({f"{QUERY}.down": torch.full((2, 16), torch.nan)}, says(expected="finite", got=f"{QUERY}.down")),
        ({"unet.x.7.positive.up": torch.zeros(1, 1)}, says(got="positive group 7 in x")),
        ({"unet.x": torch.zeros(1, 1)}, says(expected="<layer>.<group>.<branch>", got="'x'")),
        ({"vae.x.0.positive.up": torch.zeros(1, 1)}, says(expected="text_encoder, unet, words", got="vae.x")),
        ({"words.positive.pt1": None}, says(got="positive.pt1")),
        ({"words.positive.pt1": torch.tensor(1.0)}, says(got="positive.pt1")),
        ({"words.positive.pt1": torch.zeros(0, 32)}, says(got="positive.pt1")),
        ({"words.positive.pt2": torch.zeros(1, 32)}, says(got="positive.pt2")),
    ],
)
def test_tensors_that_do_not_belong_or_are_no_numbers_are_refused(
    tensors: dict[str, torch.Tensor | None], check: Callable[[InputError], bool]
) -> None:
    merged = {name: t for name, t in {**old_concept("first").tensors, **tensors}.items() if t is not None}
    file = write_tensors(merged, read_metadata(old_file("first")))
    with pytest.raises(InputError, check=check):
        read_concept(file, "fox.safetensors")


def test_metadata_are_texts_with_sorted_keys_and_without_unknown_values() -> None:
    written = ConceptMetadata(
        base_model="tiny",
        base_model_fingerprint="0123",
        num_branches=1,
        num_steps=0,
        words={},
        num_vectors=(None, 3),
        lora={"unet": ()},
    ).write()
    assert written == {
        "base_model": "tiny",
        "base_model_fingerprint": "0123",
        "class_word": "",
        "clip_skip": "0",
        "format": FORMAT,
        "lora_unet": "[]",
        "num_branches": "1",
        "num_steps": "0",
        "num_vectors": "[null,3]",
        "base_model_family": "stable-diffusion",
        "words": "{}",
        "zero_terminal_snr": "false",
    }
    assert list(written) == sorted(written)
