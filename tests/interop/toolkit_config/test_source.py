"""Base files, references and resolvers, and the report of what is not carried over."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.interop.toolkit_config import ImportedConfig
from refusals import says

Import = Callable[..., ImportedConfig]
TUTORIAL = Path(__file__).with_name("tutorial.yaml").read_text(encoding="utf-8")
PAIR = Path(__file__).with_name("pair.yaml").read_text(encoding="utf-8")
FULL = Path(__file__).with_name("full.yaml").read_text(encoding="utf-8")


def test_every_other_key_is_named(imported: ImportedConfig) -> None:
    assert set(imported.left_out) == {
        "exp_dir",
        "train.save_step",
        "model.enable_xformers",
        "data.dataset1.source.data_source1.img_root",
        "data.dataset_class.source.data_source1.caption_file",
    }
    assert "preview" in imported.left_out["train.save_step"]


def test_an_unknown_key_is_named(read_full: Import) -> None:
    left_out = read_full(f"{FULL}\nbells: whistles\n").left_out
    assert left_out["bells"] == "'whistles': not supported"


def test_a_missing_base_file_and_references_into_it_are_named(imported_from: Import) -> None:
    text = FULL.replace("cfg_scale", "workers: ${train.nothing}\n  cfg_scale")
    imported = imported_from(text)
    assert "_base_ cfgs/train/train_base.yaml" in imported.left_out
    assert "${train.nothing}" in imported.left_out["train.workers"]
    assert "num_steps" not in imported.parameters["training"]
    assert "templates" not in imported.parameters["training"]


def test_eval_is_not_run(read_full: Import) -> None:
    text = FULL.replace("'512*512'", "'__import__(\"os\").getpid()'")
    imported = read_full(text)
    assert "ingestion" not in imported.parameters or "bucket" not in imported.parameters["ingestion"]
    assert "data.dataset1.bucket.target_area._args_.0" in imported.left_out


def test_a_checkpoint_to_resume_from_is_named_with_start_from(imported_from: Import) -> None:
    resume = "\n  resume: {ckpt_path: {unet: [ckpts/unet-100.safetensors]}, start_step: 100}"
    left_out = imported_from(FULL.replace("\n  save_step: 100", resume)).left_out
    assert "kedro run --pipeline import" in left_out["train.resume.ckpt_path.unet.0"]
    assert "training.start_from" in left_out["train.resume.start_step"]


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("bells: 0\n", "bells"),
        ("bells: False\n", "bells"),
        ("bells: {whistles: [0.0]}\n", "bells.whistles.0"),
        ("train: {set_grads_to_none: False}\n", "train.set_grads_to_none"),
        ("_base_x: 1\n", "_base_x"),
    ],
)
def test_zero_and_false_are_named(imported_from: Import, text: str, key: str) -> None:
    assert key in imported_from(TUTORIAL + text).left_out


@pytest.mark.parametrize(
    "text",
    ["allow_tf32: False\n", "model: {ema_unet: 0, clip_final_norm: True}\n", "bells: null\n", "bells: []\n"],
)
def test_values_without_effect_are_not_named(imported_from: Import, text: str) -> None:
    assert set(imported_from(TUTORIAL + text).left_out) == set(imported_from(TUTORIAL).left_out)


@pytest.mark.parametrize(
    ("text", "key", "given"),
    [
        ("model: {clip_skip: '${x.y}'}\n", "model.clip_skip", "${x.y}"),
        ("seed: ${seed}\n", "seed", "${seed}"),
        ("seed: ???\n", "seed", "???"),
        ("seed: '${oc.env:HOME}'\n", "seed", "${oc.env:HOME}"),
        ("bells: [1, '${x.y}']\n", "bells.1", "${x.y}"),
    ],
)
def test_an_unresolved_reference_is_named(imported_from: Import, text: str, key: str, given: str) -> None:
    imported = imported_from(TUTORIAL + text)
    assert given in imported.left_out[key]
    assert not {"seed", "clip_skip"} & set(imported.parameters["training"])


def test_an_unresolved_value_keeps_the_reason_for_its_key(imported_from: Import) -> None:
    assert "subject" in imported_from(TUTORIAL + "exp_dir: 'exps/${hcp.time:}'\n").left_out["exp_dir"]


@pytest.mark.parametrize(
    "call",
    [
        "${oc.env:SECRET}",
        "${ oc.env:SECRET}",
        "${oc.env:SECRET,{a:1}}",
        "${oc.env:UNSET,${bells}}",
        "${oc.env:${name}}",
        "${${resolver}:SECRET}",
        r"\\${oc.env:SECRET}",
        "x${bells}${oc.env:SECRET}",
    ],
)
@pytest.mark.parametrize("key", ["exp_dir", "_base_", "exp_dir_copy"])
def test_resolvers_are_not_run(imported_from: Import, monkeypatch: pytest.MonkeyPatch, call: str, key: str) -> None:
    monkeypatch.setenv("SECRET", "hidden value")
    config = {"resolver": "oc.env", "name": "SECRET", "bells": "whistles", "exp_dir": "here"}
    text = yaml.safe_dump(config | {key: call} | ({"bells": "${exp_dir_copy}"} if key == "exp_dir_copy" else {}))
    imported = imported_from(TUTORIAL + text)
    assert "hidden value" not in str(imported)
    assert any("${" in name + why for name, why in imported.left_out.items())


def test_resolvers_are_not_run_when_a_file_is_merged_over_its_base(imported_from: Import) -> None:
    base = "model: '${oc.create:{clip_skip: 1}}'\n"
    imported = imported_from(f"_base_: base.yaml\n{TUTORIAL}model: {{enable_xformers: true}}\n", base_yaml=base)
    assert "clip_skip" not in imported.parameters["training"]


def test_a_resolver_of_a_product_is_that_product(imported_from: Import) -> None:
    bucket = "bucket: {target_area: '${times:512*512}'}"
    imported = imported_from(f"{PAIR}data: {{batch_size: 4, {bucket}}}\n")
    assert imported.parameters["ingestion"]["bucket"]["side_px"] == 512


def test_a_reference_inside_a_reference_is_resolved(imported_from: Import) -> None:
    imported = imported_from(TUTORIAL + "seed: '${seeds.${which}}'\nwhich: b\nseeds: {a: 1, b: 2}\n")
    assert imported.parameters["training"]["seed"] == 2


def test_a_value_of_a_base_file_is_overridden(imported_from: Import) -> None:
    bases = {"first_yaml": "seed: 1\ntrain: {noise_offset: 0.1}", "second_yaml": "seed: '${oc.env:HOME}'"}
    imported = imported_from("_base_: [first.yaml, second.yaml]\nseed: 3\n" + TUTORIAL, **bases)
    assert imported.parameters["training"]["seed"] == 3
    assert imported.parameters["training"]["noise_offset"] == 0.1
    assert "seed" not in imported.left_out


@pytest.mark.parametrize("text", ["5", "1.5", "true"])
def test_a_single_value_is_no_configuration(imported_from: Import, text: str) -> None:
    with pytest.raises(InputError, check=says(expected="mapping", got=text)):
        imported_from(f"{text}\n")


def test_a_list_is_no_configuration(imported_from: Import) -> None:
    with pytest.raises(InputError, check=says(expected="mapping", got="list")):
        imported_from("- 1\n")


@pytest.mark.parametrize("bases", ["5", "[5]", "true", "{a: b}", "[[a.yaml]]"])
def test_base_files_are_named_by_texts(imported_from: Import, bases: str) -> None:
    with pytest.raises(InputError, check=says(expected="_base_")):
        imported_from(f"_base_: {bases}\n{TUTORIAL}")


@pytest.mark.parametrize("value", ["[" * 1000 + "]" * 1000, "{b: " * 1000 + "1" + "}" * 1000, "[" * 150 + "]" * 150])
def test_nesting_that_is_too_deep_is_refused(imported_from: Import, value: str) -> None:
    with pytest.raises(InputError, check=says(got="too deeply")):
        imported_from(f"bells: {value}\n{TUTORIAL}")


def test_a_chain_of_base_files_that_is_too_long_is_refused(imported_from: Import) -> None:
    chain = {f"b{i}_yaml": f"_base_: b{i + 1}.yaml\n" for i in range(1500)}
    with pytest.raises(InputError, check=says(got="base files")):
        imported_from(f"_base_: b0.yaml\n{TUTORIAL}", **chain)


def test_a_cycle_of_base_files_is_refused(imported_from: Import) -> None:
    with pytest.raises(InputError, check=says(expected="cycle", got="a.yaml")):
        imported_from(f"_base_: a.yaml\n{TUTORIAL}", a_yaml="_base_: b.yaml\n", b_yaml="_base_: [a.yaml]\n")


def test_a_base_file_is_read_once_however_often_it_is_named(imported_from: Import) -> None:
    """Read anew each time, these 60 files would be 2⁶⁰."""
    doubled = {f"b{i}_yaml": f"_base_: [b{i + 1}.yaml, b{i + 1}.yaml]\n" for i in range(60)}
    imported = imported_from(f"_base_: b0.yaml\n{TUTORIAL}", **doubled, b60_yaml="seed: 7\n")
    assert imported.parameters["training"]["seed"] == 7


def test_references_that_multiply_the_values_are_refused(imported_from: Import) -> None:
    lines = ["r0: [x, x, x, x, x, x, x, x]", *(f"r{i}: [{', '.join([f'${{r{i - 1}}}'] * 8)}]" for i in range(1, 40))]
    text = "\n".join(line.replace("${", "'${").replace("}", "}'") for line in lines)
    with pytest.raises(InputError, check=says(expected="values", got="more than")):
        imported_from(f"{text}\n{TUTORIAL}")


def test_references_that_multiply_a_text_are_refused(imported_from: Import) -> None:
    lines = ["r0: x", *(f"r{i}: '{f'${{r{i - 1}}}' * 10}'" for i in range(1, 12))]
    with pytest.raises(InputError, check=says(expected="characters")):
        imported_from("\n".join(lines) + "\n" + TUTORIAL)


@pytest.mark.parametrize(
    "text",
    [
        "seed: '" + "${" * 5000 + "q" + "}" * 5000 + "'",
        "\n".join(f"c{i}: ${{c{i + 1}}}" for i in range(3000)),
        "a: " + "[" * 100_000,
        "".join(f"{' ' * depth}a:\n" for depth in range(200)),
    ],
)
def test_deep_references_and_values_are_refused_before_they_are_built(imported_from: Import, text: str) -> None:
    with pytest.raises(InputError, check=says(got="too deeply")):
        imported_from(f"{TUTORIAL}{text}\n")


@pytest.mark.parametrize("number", ["9" * 5000, "1:" * 5000 + "1"])
def test_a_number_of_thousands_of_digits_is_refused(imported_from: Import, number: str) -> None:
    with pytest.raises(InputError, check=says(expected="numbers")):
        imported_from(f"{TUTORIAL}bells: {number}\n")


def test_a_file_of_megabytes_is_refused(imported_from: Import) -> None:
    with pytest.raises(InputError, check=says(expected="characters")):
        imported_from(TUTORIAL + "".join(f"k{i}: {i}\n" for i in range(50_000)))


@pytest.mark.parametrize("size", ["'9999999999*9999999999'", "'" + "*".join(["9" * 4000] * 5) + "'"])
def test_a_product_of_huge_numbers_is_not_computed(imported_from: Import, size: str) -> None:
    imported = imported_from(f"{PAIR}data: {{batch_size: 4, bucket: {{target_area: {size}}}}}\n")
    assert "ingestion" not in imported.parameters


def test_keys_that_are_no_text_are_named_as_text(imported_from: Import) -> None:
    left_out = imported_from(f"{TUTORIAL}1: a\nfalse: b\n2.5: c\n").left_out
    assert {"1", "False", "2.5"} <= set(left_out)


@pytest.mark.parametrize(
    ("reference", "value"), [("${seeds[1]}", 8), ("${.seeds.0}", 7), ("${ seeds[0] }", 7), ("${both}", 7)]
)
def test_references_into_lists_and_to_references_are_resolved(
    imported_from: Import, reference: str, value: int
) -> None:
    imported = imported_from(f"{TUTORIAL}seed: '{reference}'\nseeds: [7, 8]\nboth: '${{seeds[0]}}'\n")
    assert imported.parameters["training"]["seed"] == value
