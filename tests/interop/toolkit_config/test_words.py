"""Trigger words and templates of a toolkit configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.interop.toolkit_config import ImportedConfig
from dreamartist_pipeline.params import TrainingParams
from refusals import says

Import = Callable[..., ImportedConfig]
AsRun = Callable[[ImportedConfig], TrainingParams]
PAIR = Path(__file__).with_name("pair.yaml").read_text(encoding="utf-8")
TUTORIAL = Path(__file__).with_name("tutorial.yaml").read_text(encoding="utf-8")
FULL = Path(__file__).with_name("full.yaml").read_text(encoding="utf-8")
PLAIN_GROUP = "lora_unet: [{lr: 1e-4, rank: 2, layers: [conv_in]}]\n"
ONE_SET = "data: {batch_size: 4, word_names: {pt1: [my-cat, my-cat-neg]}}\n"
TRAINED = "tokenizer_pt: {train: [{name: my-cat, lr: 0.003}, {name: my-cat-neg, lr: 0.003}]}\n"
TWO_PAIRS = (
    PAIR
    + "data: {batch_size: 4, prompt_template: t.txt,"
    + " word_names: {cat: [my-cat, my-cat-neg], hat: [my-hat, my-hat-neg]}}\n"
)
NAMES = {"pt1": ("my-cat", "my-cat-neg"), "pt2": ("my-hat", "my-hat-neg")}


def test_the_only_slot_is_renamed_in_words_and_templates(imported: ImportedConfig) -> None:
    training = imported.parameters["training"]
    assert training["words"]["names"] == {"pt1": ["pt-dog", "pt-dog-neg"]}
    assert training["templates"] == ["a photo of a {pt1}", "a {pt1}, {caption}"]


def test_an_unscaled_lr_of_words_is_divided_by_the_batch_size(imported: ImportedConfig) -> None:
    assert imported.parameters["training"]["scale_lr"] is True
    assert imported.parameters["training"]["words"]["lr"] == pytest.approx(0.003 / 5)


def test_one_word_for_both_branches_gets_a_negative_word(read_full: Import) -> None:
    imported = read_full(FULL.replace("{dog: [pt-dog, pt-dog-neg]}", "{dog: pt-dog}"))
    assert imported.parameters["training"]["words"]["names"] == {"pt1": ["pt-dog", "pt-dog-neg"]}
    assert any("pt-dog-neg" in why for key, why in imported.left_out.items() if key.endswith("word_names.dog"))


def test_previews_without_a_template_file_contain_the_words(imported_from: Import, as_run: AsRun) -> None:
    assert all("{pt1}" in prompt for prompt in as_run(imported_from(TUTORIAL)).preview.prompts)


def test_trained_names_without_a_trigger_word_are_refused(imported_from: Import) -> None:
    text = PAIR + ONE_SET + TRAINED.replace("my-cat", "my-cta")
    with pytest.raises(InputError, check=says(expected="my-cat, my-cat-neg", got="my-cta")):
        imported_from(text)


def test_a_trained_name_beside_the_trigger_words_is_named(imported_from: Import) -> None:
    text = PAIR + ONE_SET + TRAINED.replace("{train: [", "{train: [{name: other, lr: 0.5}, ")
    imported = imported_from(text)
    assert "'other'" in imported.left_out["tokenizer_pt.train.0.name"]
    assert "tokenizer_pt.train.0.lr" in imported.left_out
    assert imported.parameters["training"]["words"]["lr"] == 0.003


def test_untrained_words_become_text_in_templates_or_are_named(imported_from: Import, as_run: AsRun) -> None:
    data = "data: {batch_size: 4, prompt_template: t.txt, word_names: {pt1: sks, class: dog}}\n"
    imported = imported_from(PLAIN_GROUP + data, t_txt="a photo of a {pt1} {class}")
    assert imported.settings == {"method": "lora", "class_word": "dog"}
    assert as_run(imported).templates == ("a photo of a sks {class}",)
    assert "data.word_names.pt1" not in imported.left_out
    assert "training.templates" in imported_from(PLAIN_GROUP + data).left_out["data.word_names.pt1"]


def test_two_pairs_of_words_become_two_slots(imported_from: Import, as_run: AsRun) -> None:
    params = as_run(imported_from(TWO_PAIRS, t_txt="a {cat} with a {hat}, {caption}\na {cat}\na tree"))
    assert params.words.names == NAMES
    assert params.templates == ("a {pt1} with a {pt2}, {caption}", "a {pt1}")


@pytest.mark.parametrize("files", [{}, {"t_txt": "a {cat}"}], ids=["no templates", "templates of one slot"])
def test_two_pairs_without_templates_for_both_get_a_template(
    imported_from: Import, as_run: AsRun, files: dict[str, str]
) -> None:
    imported = imported_from(TWO_PAIRS, **files)
    params = as_run(imported)
    assert params.words.names == NAMES
    assert params.templates[-1] == "a {pt1} and a {pt2}, {caption}"
    assert imported.left_out["data.prompt_template"].startswith("'t.txt': ")
    assert "a {pt1} and a {pt2}" in imported.left_out["data.prompt_template"]


def test_the_untrained_one_of_two_pairs_is_text(imported_from: Import, as_run: AsRun) -> None:
    params = as_run(imported_from(TWO_PAIRS + TRAINED, t_txt="a {hat} on a {cat}"))
    assert params.words.names == {"pt1": ("my-cat", "my-cat-neg")}
    assert params.templates == ("a my-hat on a {pt1}",)


def test_templates_without_a_trigger_word_are_left_out(imported_from: Import, as_run: AsRun) -> None:
    text = PAIR + ONE_SET.replace("word_names", "prompt_template: t.txt, word_names")
    imported = imported_from(text, t_txt="a {pt1}\n{caption}")
    assert as_run(imported).templates == ("a {pt1}",)
    assert "1 templates" in imported.left_out["data.prompt_template"]


@pytest.mark.parametrize("words", ["[my-cat, my-cat]", "[my-cat, '']", "[my-cat]"])
def test_an_incomplete_pair_gets_a_negative_word(imported_from: Import, words: str) -> None:
    imported = imported_from(PAIR + ONE_SET.replace("[my-cat, my-cat-neg]", words))
    assert imported.parameters["training"]["words"]["names"] == {"pt1": ["my-cat", "my-cat-neg"]}
    assert any("my-cat-neg" in reason for key, reason in imported.left_out.items() if "word_names" in key)


def test_words_of_a_second_data_set_are_named(imported_from: Import) -> None:
    data = "data: {a: {batch_size: 4, word_names: {pt1: [x, y]}}, b: {batch_size: 2, word_names: {pt1: [u, v]}}}\n"
    left_out = imported_from(PAIR + data).left_out
    assert {"data.b.batch_size", "data.b.word_names.pt1.0", "data.b.word_names.pt1.1"} <= set(left_out)


def test_words_of_the_regularization_set_are_named(imported_from: Import) -> None:
    left_out = imported_from(TUTORIAL.replace("['', '']", "[cat, cat]")).left_out
    assert "prompt database" in left_out["data_class.text_transforms.transforms.0.word_names.pt1.0"]


def test_a_scaled_lr_of_words_is_not_scaled_twice(imported_from: Import) -> None:
    text = PAIR + ONE_SET + TRAINED + "train: {scale_lr_pt: True}\n"
    training = imported_from(text).parameters["training"]
    assert (training["scale_lr"], training["words"]["lr"]) == (True, 0.003)


def test_the_default_of_scale_lr_pt_is_named(imported_from: Import) -> None:
    text = PAIR + ONE_SET + TRAINED
    assert "multiplied" in imported_from(text + "train: {scale_lr: True}\n").left_out["train.scale_lr_pt"]
    assert "train.scale_lr_pt" not in imported_from(text + "train: {scale_lr: False}\n").left_out


def test_trained_names_without_any_slot_are_named(imported_from: Import) -> None:
    imported = imported_from(PAIR + "data: {batch_size: 4}\n" + TRAINED)
    assert {"tokenizer_pt.train.0.name", "tokenizer_pt.train.1.name"} <= set(imported.left_out)
