"""Configurations of the reference toolkit: what they become here, and what is named as left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from dreamartist_pipeline.core.errors import InputError
from dreamartist_pipeline.interop.toolkit_config import ImportedConfig, read_toolkit_config
from dreamartist_pipeline.params import DeviceParams, IngestionParams, TrainingParams
from dreamartist_pipeline.pipelines.training.plan import check_templates

BASE = """
exp_dir: exps/${hcp.time:}
mixed_precision: 'fp16'
seed: 7
train:
  train_steps: 1000
  max_grad_norm: 1.0
  optimizer: {_target_: torch.optim.AdamW, _partial_: True, weight_decay: 1e-3}
  optimizer_pt: {_target_: torch.optim.AdamW, _partial_: True, weight_decay: 5e-4}
  scale_lr: True
  scale_lr_pt: False
  scheduler: {name: one_cycle, num_warmup_steps: 200, num_training_steps: 1000}
  scheduler_pt: ${.scheduler}
"""

CONFIG = r"""
_base_: [cfgs/train/train_base.yaml]
unet: null
lora_unet:
  - {lr: 1e-4, rank: 0.01875, branch: p, layers: ['re:.*\.attn.?$'], dropout: 0.1}
  - {lr: 4e-5, rank: 3, branch: n, alpha: 2.0, layers: ['re:.*\.attn.?$']}
lora_text_encoder:
  - {lr: 1e-5, rank: 1, type: p, layers: ['text_model.encoder.layers.0.mlp']}
tokenizer_pt:
  train:
    - {name: pt-dog, lr: 0.003}
    - {name: pt-dog-neg, lr: 0.003}
train:
  save_step: 100
  cfg_scale: '1.0-3.0:cos'
  loss: {criterion: {_target_: hcpdiff.loss.MinSNRLoss, gamma: 2.0}}
  scheduler: {name: constant_with_warmup, num_warmup_steps: 50, num_training_steps: 1000}
model: {pretrained_model_name_or_path: 'owner/model', enable_xformers: True}
data:
  dataset1:
    batch_size: 4
    loss_weight: 2.0
    source:
      data_source1:
        img_root: 'imgs/'
        prompt_template: 'templates/object.txt'
        tag_transforms:
          transforms:
            - _target_: hcpdiff.utils.caption_tools.TemplateFill
              word_names: {dog: [pt-dog, pt-dog-neg]}
    bucket:
      _target_: hcpdiff.data.bucket.RatioBucket.from_files
      target_area: {_target_: "builtins.eval", _args_: ['512*512']}
  dataset_class:
    batch_size: 1
    loss_weight: 1.0
    source:
      data_source1:
        caption_file: 'imgs/captions.json'
        tag_transforms:
          transforms:
            - _target_: hcpdiff.utils.caption_tools.TemplateFill
              word_names: {dog: ['', '']}
"""

FILES = {"cfgs/train/train_base.yaml": BASE, "templates/object.txt": "a photo of a {dog}\n\na {dog}, {caption}\n"}


@pytest.fixture
def imported() -> ImportedConfig:
    return read_toolkit_config(CONFIG, FILES.get)


def test_the_result_is_valid_here(imported: ImportedConfig) -> None:
    TrainingParams.model_validate({**imported.parameters["training"]})
    IngestionParams.model_validate(imported.parameters["ingestion"])
    DeviceParams.model_validate(imported.parameters["device"])


def test_lora_groups_keep_their_numbers_and_branches(imported: ImportedConfig) -> None:
    positive, negative = imported.parameters["training"]["lora_unet"]
    assert positive == {"lr": 1e-4, "rank": 0.01875, "branch": "p", "dropout": 0.1, "layers": [r"re:.*\.attn.?$"]}
    assert negative == {"lr": 4e-5, "rank": 3, "branch": "n", "alpha": 2.0, "layers": [r"re:.*\.attn.?$"]}


def test_the_older_type_is_a_branch_and_text_encoder_names_lose_their_prefix(imported: ImportedConfig) -> None:
    (group,) = imported.parameters["training"]["lora_text_encoder"]
    assert group == {"lr": 1e-5, "rank": 1, "branch": "p", "layers": ["encoder.layers.0.mlp"]}


def test_the_only_slot_takes_this_projects_name_in_words_and_templates(imported: ImportedConfig) -> None:
    training = imported.parameters["training"]
    assert training["words"]["names"] == {"pt1": ["pt-dog", "pt-dog-neg"]}
    assert training["templates"] == ["a photo of a {pt1}", "a {pt1}, {caption}"]


def test_a_word_rate_that_is_not_scaled_is_divided_by_the_batch(imported: ImportedConfig) -> None:
    assert imported.parameters["training"]["scale_lr"] is True
    assert imported.parameters["training"]["words"]["lr"] == pytest.approx(0.003 / 5)


def test_schedules_come_from_base_files_and_references(imported: ImportedConfig) -> None:
    training = imported.parameters["training"]
    assert training["schedule"] == {"kind": "constant", "warmup_steps": 50}
    assert training["words_schedule"] == {"kind": "constant", "warmup_steps": 50}  # ${.scheduler}
    assert (training["num_steps"], training["seed"], training["weight_decay"]) == (1000, 7, 1e-3)


def test_objective_and_data_sets_are_carried_over(imported: ImportedConfig) -> None:
    training = imported.parameters["training"]
    assert training["guidance_scale"] == "1.0-3.0:cos"
    assert training["loss"] == {"weighting": "min_snr", "snr_gamma": 2.0, "regularization_weight": 0.5}
    assert (training["batch_size"], training["regularization_batch_size"]) == (4, 1)
    assert imported.parameters["ingestion"]["bucket"] == {"side_px": 512, "multiple_px": 64, "keep_aspect": True}
    assert imported.parameters["device"] == {"dtype": "float16"}
    assert imported.settings == {"method": "toolkit", "base_model": "hub:owner/model"}


def test_every_other_key_is_named_with_a_reason(imported: ImportedConfig) -> None:
    assert set(imported.left_out) == {
        "exp_dir",
        "train.save_step",
        "model.enable_xformers",
        "data.dataset1.source.data_source1.img_root",
        "data.dataset_class.source.data_source1.caption_file",
    }
    assert "preview" in imported.left_out["train.save_step"]


def test_transforms_of_the_pictures_caption_keep_their_order() -> None:
    text = CONFIG.replace(
        """          transforms:
            - _target_: hcpdiff.utils.caption_tools.TemplateFill
              word_names: {dog: [pt-dog, pt-dog-neg]}""",
        """          transforms:
            - {_target_: hcpdiff.utils.caption_tools.TagDropout, p: 0.2}
            - _target_: hcpdiff.utils.caption_tools.TagShuffle
            - _target_: hcpdiff.utils.caption_tools.TemplateFill
              word_names: {dog: [pt-dog, pt-dog-neg]}""",
    ).replace("model: {", "model: {clip_skip: 1, ")
    training = read_toolkit_config(text, FILES.get).parameters["training"]
    assert training["caption_transforms"] == [{"tag_dropout": 0.2}, "tag_shuffle"]
    assert training["clip_skip"] == 1
    TrainingParams.model_validate(training)


def test_bias_and_start_by_svd_are_carried_over() -> None:
    text = CONFIG.replace("dropout: 0.1", "dropout: 0.1, svd_init: true, bias: true")
    imported = read_toolkit_config(text, FILES.get)
    assert not [key for key in imported.left_out if key.endswith(("svd_init", "bias"))]
    group = TrainingParams.model_validate(imported.parameters["training"]).lora_unet[0]
    assert (group.svd_init, group.bias) == (True, True)


def test_a_group_option_that_there_is_not_here_is_named() -> None:
    imported = read_toolkit_config(CONFIG.replace("dropout: 0.1", "dropout: 0.1, rank_groups: 2"), FILES.get)
    assert imported.left_out["lora_unet.0.rank_groups"] == "2: no counterpart here"
    TrainingParams.model_validate(imported.parameters["training"])


def test_a_key_nobody_knows_is_named() -> None:
    left_out = read_toolkit_config(f"{CONFIG}\nbells: whistles\n", FILES.get).left_out
    assert left_out["bells"] == "'whistles': no counterpart here"


def test_a_base_file_that_is_not_at_hand_is_named_and_references_to_it_do_no_harm() -> None:
    text = CONFIG.replace("cfg_scale", "workers: ${train.nothing}\n  cfg_scale")
    imported = read_toolkit_config(text, lambda _: None)
    assert "_base_ cfgs/train/train_base.yaml" in imported.left_out
    assert "${train.nothing}" in imported.left_out["train.workers"]
    assert "num_steps" not in imported.parameters["training"]
    assert "templates" not in imported.parameters["training"]


def test_an_older_layout_with_data_class_is_read() -> None:
    config = OmegaConf.create(CONFIG)
    config.data_class, config.data = config.data.dataset_class, config.data.dataset1
    training = read_toolkit_config(OmegaConf.to_yaml(config), FILES.get).parameters["training"]
    assert (training["batch_size"], training["regularization_batch_size"]) == (4, 1)
    assert training["words"]["names"] == {"pt1": ["pt-dog", "pt-dog-neg"]}


def test_one_word_for_both_branches_gets_a_negative_partner_and_is_named() -> None:
    imported = read_toolkit_config(CONFIG.replace("{dog: [pt-dog, pt-dog-neg]}", "{dog: pt-dog}"), FILES.get)
    assert imported.parameters["training"]["words"]["names"] == {"pt1": ["pt-dog", "pt-dog-neg"]}
    assert any("pt-dog-neg" in why for key, why in imported.left_out.items() if key.endswith("word_names.dog"))


def test_nothing_is_evaluated() -> None:
    text = CONFIG.replace("'512*512'", "'__import__(\"os\").getpid()'")
    imported = read_toolkit_config(text, FILES.get)
    assert "ingestion" not in imported.parameters or "bucket" not in imported.parameters["ingestion"]
    assert "data.dataset1.bucket.target_area._args_.0" in imported.left_out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "cannot be read"),
        ("- 1", "keys and values"),
        ("data: {batch_size: 4}\nunet: [{lr: 1e-6}]", "expected LoRA groups"),
        ("lora_unet: []", "expected a data set"),
        ("lora_unet: [{layers: [a]}]\ndata: {batch_size: many}", "expected a whole number as data.batch_size"),
        ("data: {batch_size: 4}\ntokenizer_pt: {train: [{name: a}]}\nword_names: {}", "expected LoRA groups"),
        (CONFIG.replace("lr: 0.003", "name2: x"), "expected a learning rate"),
        ("_base_: me.yaml", "expected base files that lead to an end"),
    ],
)
def test_what_is_no_training_configuration_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_toolkit_config(text, {"me.yaml": "_base_: me.yaml"}.get)


def test_a_checkpoint_to_resume_from_is_named_with_the_way_to_start_from_it() -> None:
    resume = "\n  resume: {ckpt_path: {unet: [ckpts/unet-100.safetensors]}, start_step: 100}"
    left_out = read_toolkit_config(CONFIG.replace("\n  save_step: 100", resume), lambda _: None).left_out
    assert "kedro run --pipeline import" in left_out["train.resume.ckpt_path.unet.0"]
    assert "training.start_from" in left_out["train.resume.start_step"]


# ------------------------------------------------------------------------------------ what the tutorial leaves open

PAIR = r"""
lora_unet:
  - {lr: 1e-4, rank: 3, branch: p, layers: ['re:.*\.attn.?$']}
  - {lr: 2e-5, rank: 3, branch: n, layers: ['re:.*\.attn.?$']}
"""
TUTORIAL = f"""{PAIR}
data:
  text_transforms:
    transforms:
      - _target_: hcpdiff.utils.caption_tools.TemplateFill
        word_names: {{pt1: [my-cat, my-cat-neg]}}
data_class:
  caption_file: dataset/image_captions.json
  text_transforms:
    transforms:
      - _target_: hcpdiff.utils.caption_tools.TemplateFill
        word_names: {{pt1: ['', '']}}
"""
TRAINED = "tokenizer_pt: {train: [{name: my-cat, lr: 0.003}, {name: my-cat-neg, lr: 0.003}]}\n"
ONE_SET = "data: {batch_size: 4, word_names: {pt1: [my-cat, my-cat-neg]}}\n"
PLAIN_GROUP = "lora_unet: [{lr: 1e-4, rank: 2, layers: [conv_in]}]\n"


def imported_from(text: str, **files: str) -> ImportedConfig:
    """Import a text; `t_txt` is the file t.txt."""
    at_hand = {name.replace("_", "."): file for name, file in files.items()}
    return read_toolkit_config(text, at_hand.get)


def as_run(imported: ImportedConfig) -> TrainingParams:
    """What a run gets: the method's values under the imported ones, checked as before a training."""
    methods = yaml.safe_load(Path("conf/base/parameters_training.yml").read_text(encoding="utf-8"))["_methods"]
    method: Any = OmegaConf.create(
        {"_subject": "fox", "_class_word": "fox", "training": methods[imported.settings["method"]]}
    )
    merged = OmegaConf.merge(method, {"training": imported.parameters["training"]})
    params = TrainingParams.model_validate(OmegaConf.to_container(merged, resolve=True)["training"])  # type: ignore[index,call-overload]
    check_templates(params)
    return params


def test_the_tutorials_text_trains_both_branches_and_says_what_it_leaves_open() -> None:
    imported = imported_from(TUTORIAL)
    params = as_run(imported)
    assert params.words.names == {"pt1": ("my-cat", "my-cat-neg")}
    assert (params.num_branches, str(params.guidance_scale)) == (2, "3.0")
    assert (params.batch_size, params.regularization_batch_size) == (4, 1)
    assert {
        "data.batch_size",
        "data_class.batch_size",
        "tokenizer_pt.train",
        "train.cfg_scale",
        "train.scale_lr",
    } <= set(imported.left_out)
    assert imported.left_out["data.batch_size"].startswith("not given: 4")


def test_previews_of_words_without_a_template_file_say_these_words() -> None:
    assert all("{pt1}" in prompt for prompt in as_run(imported_from(TUTORIAL)).preview.prompts)


def test_a_negative_branch_at_a_guidance_scale_of_1_is_refused() -> None:
    with pytest.raises(InputError, match=r"guidance_scale is 1, .*branch: n"):
        imported_from(TUTORIAL + "train: {cfg_scale: '1.0'}\n")


def test_one_branch_without_a_guidance_scale_gets_1() -> None:
    imported = imported_from(PLAIN_GROUP + "data: {batch_size: 4}\n")
    assert as_run(imported).num_branches == 1
    assert imported.left_out["train.cfg_scale"].startswith("not given: 1.0")


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
def test_0_and_false_are_values_that_are_named(text: str, key: str) -> None:
    assert key in imported_from(TUTORIAL + text).left_out


@pytest.mark.parametrize(
    "text",
    ["allow_tf32: False\n", "model: {ema_unet: 0, clip_final_norm: True}\n", "bells: null\n", "bells: []\n"],
)
def test_what_is_done_here_anyway_or_says_nothing_is_not_named(text: str) -> None:
    assert set(imported_from(TUTORIAL + text).left_out) == set(imported_from(TUTORIAL).left_out)


def test_alpha_that_is_not_divided_by_the_rank_is_multiplied_by_it() -> None:
    text = TUTORIAL.replace("branch: p,", "branch: p, alpha: 0.5, alpha_auto_scale: False,")
    imported = imported_from(text)
    assert imported.parameters["training"]["lora_unet"][0]["alpha"] == 1.5  # 0.5 · 3, of which a third is 0.5
    assert "lora_unet.0.alpha_auto_scale" not in imported.left_out


def test_alpha_without_division_is_named_where_ranks_are_relative() -> None:
    text = TUTORIAL.replace("rank: 3, branch: p,", "rank: 0.01, branch: p, alpha_auto_scale: False,")
    imported = imported_from(text)
    assert "alpha" not in imported.parameters["training"]["lora_unet"][0]
    assert "alpha / rank" in imported.left_out["lora_unet.0.alpha_auto_scale"]


def test_a_group_without_rate_and_rank_gets_the_toolkits_and_is_named() -> None:
    imported = imported_from(PLAIN_GROUP.replace("lr: 1e-4, rank: 2, ", "") + "data: {batch_size: 4}\n")
    assert imported.parameters["training"]["lora_unet"] == [{"lr": 1e-5, "rank": 1, "layers": ["conv_in"]}]
    assert {"lora_unet.0.lr", "lora_unet.0.rank"} <= set(imported.left_out)


def test_a_group_without_layers_is_left_out_and_named() -> None:
    imported = imported_from(TUTORIAL + "lora_text_encoder: [{lr: 1e-5, rank: 1, layers: []}]\n")
    assert imported.parameters["training"]["lora_text_encoder"] == []
    assert "lora_text_encoder.0.layers" in imported.left_out


def test_a_layer_that_leads_nowhere_is_no_selector() -> None:
    imported = imported_from(PLAIN_GROUP.replace("[conv_in]", "[conv_in, '${x.y}']") + "data: {batch_size: 4}\n")
    assert imported.parameters["training"]["lora_unet"][0]["layers"] == ["conv_in"]
    assert "lora_unet.0.layers.1" in imported.left_out


def test_a_branch_there_is_not_is_refused() -> None:
    with pytest.raises(InputError, match=r"training.lora_unet.0.branch: .*got 0"):
        imported_from(TUTORIAL.replace("branch: p", "branch: 0"))


@pytest.mark.parametrize(("given", "kept"), [("p: 0.0", 0.0), ("p: 0.3", 0.3), ("p: null", 0.1)])
def test_a_dropout_of_0_stays_0(given: str, kept: float) -> None:
    text = f"{PAIR}data: {{batch_size: 4, text_transforms: {{transforms: [{{_target_: x.TagDropout, {given}}}]}}}}\n"
    assert imported_from(text).parameters["training"]["caption_transforms"] == [{"tag_dropout": kept}]


@pytest.mark.parametrize(
    ("own", "other", "weight"), [(2.0, None, 0.5), (None, 3.0, 3.0), (2.0, 0, 0.0), (None, None, None)]
)
def test_a_loss_weight_counts_relative_to_the_others_which_is_1(own: Any, other: Any, weight: Any) -> None:
    config: Any = OmegaConf.create(TUTORIAL)
    if own is not None:
        config.data.loss_weight = own
    if other is not None:
        config.data_class.loss_weight = other
    training = imported_from(OmegaConf.to_yaml(config)).parameters["training"]
    assert training.get("loss", {}).get("regularization_weight") == weight


def test_a_loss_weight_of_0_for_the_picture_is_refused() -> None:
    config: Any = OmegaConf.create(TUTORIAL)
    config.data.loss_weight = 0
    with pytest.raises(InputError, match=r"numbers as loss_weight, above 0 for the picture; got 0"):
        imported_from(OmegaConf.to_yaml(config))


def test_a_loss_weight_without_a_regularization_set_is_named() -> None:
    imported = imported_from(PAIR + "data: {batch_size: 4, loss_weight: 2.0}\n")
    assert "relative" in imported.left_out["data.loss_weight"]


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
def test_a_reference_that_leads_nowhere_is_named(text: str, key: str, given: str) -> None:
    imported = imported_from(TUTORIAL + text)
    assert given in imported.left_out[key]
    assert not {"seed", "clip_skip"} & set(imported.parameters["training"])


def test_a_reference_that_leads_nowhere_keeps_the_advice_for_its_key() -> None:
    assert "by its subject" in imported_from(TUTORIAL + "exp_dir: 'exps/${hcp.time:}'\n").left_out["exp_dir"]


def test_a_number_of_rows_that_leads_nowhere_is_named_with_what_is_used() -> None:
    left_out = imported_from(PAIR + "data: {batch_size: '${x.y}'}\n").left_out
    assert "${x.y}" in left_out["data.batch_size"]
    assert "4, as in this project's methods" in left_out["data.batch_size"]


def test_trained_names_that_are_no_trigger_word_are_refused() -> None:
    text = PAIR + ONE_SET + TRAINED.replace("my-cat", "my-cta")
    with pytest.raises(InputError, match="expected words of word_names .*my-cat, my-cat-neg.*; got my-cta"):
        imported_from(text)


def test_a_trained_name_beside_the_trigger_words_is_named() -> None:
    text = PAIR + ONE_SET + TRAINED.replace("{train: [", "{train: [{name: other, lr: 0.5}, ")
    imported = imported_from(text)
    assert "'other'" in imported.left_out["tokenizer_pt.train.0.name"]
    assert "tokenizer_pt.train.0.lr" in imported.left_out
    assert imported.parameters["training"]["words"]["lr"] == 0.003


def test_trained_names_without_any_slot_are_named() -> None:
    imported = imported_from(PAIR + "data: {batch_size: 4}\n" + TRAINED)
    assert {"tokenizer_pt.train.0.name", "tokenizer_pt.train.1.name"} <= set(imported.left_out)


def test_words_that_are_not_trained_stand_as_texts_in_templates_or_are_named() -> None:
    data = "data: {batch_size: 4, prompt_template: t.txt, word_names: {pt1: sks, class: dog}}\n"
    imported = imported_from(PLAIN_GROUP + data, t_txt="a photo of a {pt1} {class}")
    assert imported.settings == {"method": "lora", "class_word": "dog"}
    assert as_run(imported).templates == ("a photo of a sks {class}",)
    assert "data.word_names.pt1" not in imported.left_out
    assert "as a text" in imported_from(PLAIN_GROUP + data).left_out["data.word_names.pt1"]


@pytest.mark.parametrize(
    ("name", "part"), [("AdamW8bit", "adamw8bit"), ("AdamW", None)], ids=["in 8 bits", "the usual one"]
)
def test_optimizers_are_carried_over_with_their_decay(name: str, part: str | None) -> None:
    optimizer = f"{{_target_: some.{name}, _partial_: True}}"
    text = TUTORIAL + f"train: {{optimizer: {optimizer}, optimizer_pt: {optimizer}}}\n"
    imported = imported_from(text)
    training = imported.parameters["training"]
    assert (training.get("optimizer"), training["words"].get("optimizer")) == (part, part)
    assert (training["weight_decay"], training["words"]["weight_decay"]) == (0.01, 0.01)
    assert not [key for key in imported.left_out if "optimizer" in key]


def test_another_optimizer_is_named() -> None:
    left_out = imported_from(TUTORIAL + "train: {optimizer: {_target_: some.Lion, _partial_: True}}\n").left_out
    assert "training.optimizer" in left_out["train.optimizer._target_"]


@pytest.mark.parametrize("offset", [0.1, 0.0])
def test_the_noise_offset_is_carried_over(offset: float) -> None:
    imported = imported_from(TUTORIAL + f"train: {{noise_offset: {offset}}}\n")
    assert imported.parameters["training"]["noise_offset"] == offset
    assert "train.noise_offset" not in imported.left_out


TWO_PAIRS = (
    PAIR
    + "data: {batch_size: 4, prompt_template: t.txt,"
    + " word_names: {cat: [my-cat, my-cat-neg], hat: [my-hat, my-hat-neg]}}\n"
)
NAMES = {"pt1": ("my-cat", "my-cat-neg"), "pt2": ("my-hat", "my-hat-neg")}


def test_two_pairs_of_words_become_two_slots_of_a_run() -> None:
    params = as_run(imported_from(TWO_PAIRS, t_txt="a {cat} with a {hat}, {caption}\na {cat}\na tree"))
    assert params.words.names == NAMES
    assert params.templates == ("a {pt1} with a {pt2}, {caption}", "a {pt1}")


@pytest.mark.parametrize("files", [{}, {"t_txt": "a {cat}"}], ids=["no templates", "templates of one slot"])
def test_two_pairs_without_templates_for_both_get_one_and_it_is_named(files: dict[str, str]) -> None:
    imported = imported_from(TWO_PAIRS, **files)
    params = as_run(imported)
    assert params.words.names == NAMES
    assert params.templates[-1] == "a {pt1} and a {pt2}, {caption}"
    assert imported.left_out["data.prompt_template"].startswith("'t.txt': ")
    assert "a {pt1} and a {pt2}" in imported.left_out["data.prompt_template"]


def test_of_two_pairs_the_one_that_is_not_trained_is_a_text() -> None:
    params = as_run(imported_from(TWO_PAIRS + TRAINED, t_txt="a {hat} on a {cat}"))
    assert params.words.names == {"pt1": ("my-cat", "my-cat-neg")}
    assert params.templates == ("a my-hat on a {pt1}",)


def test_templates_without_the_words_slot_are_left_out_and_named() -> None:
    text = PAIR + ONE_SET.replace("word_names", "prompt_template: t.txt, word_names")
    imported = imported_from(text, t_txt="a {pt1}\n{caption}")
    assert as_run(imported).templates == ("a {pt1}",)
    assert "1 templates" in imported.left_out["data.prompt_template"]


@pytest.mark.parametrize("words", ["[my-cat, my-cat]", "[my-cat, '']", "[my-cat]"])
def test_a_pair_that_is_none_gets_a_negative_word_and_is_named(words: str) -> None:
    imported = imported_from(PAIR + ONE_SET.replace("[my-cat, my-cat-neg]", words))
    assert imported.parameters["training"]["words"]["names"] == {"pt1": ["my-cat", "my-cat-neg"]}
    assert any("my-cat-neg" in reason for key, reason in imported.left_out.items() if "word_names" in key)


def test_words_of_a_second_data_set_are_named() -> None:
    data = "data: {a: {batch_size: 4, word_names: {pt1: [x, y]}}, b: {batch_size: 2, word_names: {pt1: [u, v]}}}\n"
    left_out = imported_from(PAIR + data).left_out
    assert {"data.b.batch_size", "data.b.word_names.pt1.0", "data.b.word_names.pt1.1"} <= set(left_out)


def test_words_of_the_regularization_set_are_named() -> None:
    left_out = imported_from(TUTORIAL.replace("['', '']", "[cat, cat]")).left_out
    assert "prompt database" in left_out["data_class.text_transforms.transforms.0.word_names.pt1.0"]


@pytest.mark.parametrize(
    ("data", "key"),
    [
        ("data: {batch_size: 7, source: {img_root: imgs}}", "data.source.img_root"),
        ("data: {one: {batch_size: 7, source: {s: {img_root: imgs}}}}", "data.one.source.s.img_root"),
        ("dataloader: {threads: 2}\ndata: {batch_size: 7}", "dataloader.threads"),
    ],
)
def test_the_data_set_is_found_in_every_layout(data: str, key: str) -> None:
    imported = imported_from(f"{PAIR}{data}\n")
    assert imported.parameters["training"]["batch_size"] == 7
    assert key in imported.left_out
    assert not [name for name in imported.left_out if name.endswith("batch_size")]


def test_a_picture_without_words_may_be_the_only_data_set() -> None:
    assert (
        imported_from(PLAIN_GROUP + "data: {batch_size: 3, word_names: {pt1: ''}}\n").parameters["training"][
            "batch_size"
        ]
        == 3
    )


def test_a_rate_of_words_alone_that_is_scaled_is_scaled_once() -> None:
    text = PAIR + ONE_SET + TRAINED + "train: {scale_lr_pt: True}\n"
    training = imported_from(text).parameters["training"]
    assert (training["scale_lr"], training["words"]["lr"]) == (True, 0.003)


def test_a_rate_of_words_that_is_scaled_as_the_others_is_named() -> None:
    text = PAIR + ONE_SET + TRAINED
    assert "multiplied" in imported_from(text + "train: {scale_lr: True}\n").left_out["train.scale_lr_pt"]
    assert "train.scale_lr_pt" not in imported_from(text + "train: {scale_lr: False}\n").left_out


def test_no_schedule_is_a_constant_rate() -> None:
    params = as_run(imported_from(TUTORIAL + "train: {scheduler: null, scheduler_pt: null}\n"))
    assert (params.schedule.kind, params.schedule.warmup_steps) == ("constant", 0)
    assert (params.words_schedule.kind, params.words_schedule.warmup_steps) == ("constant", 0)


def test_full_precision_is_read_where_yaml_turns_no_into_false() -> None:
    assert imported_from(TUTORIAL + "mixed_precision: no\n").parameters["device"] == {"dtype": "float32"}


@pytest.mark.parametrize(
    ("bucket", "side_px", "key"),
    [
        ("target_size: [500, 500]", 512, "data.bucket.target_size.0"),
        ("target_area: 250000", 512, "data.bucket.target_area"),
        ("target_area: 16*16", 64, "data.bucket.target_area"),
    ],
)
def test_a_side_that_is_rounded_is_named(bucket: str, side_px: int, key: str) -> None:
    imported = imported_from(PAIR + f"data: {{batch_size: 4, bucket: {{_target_: x.FixedBucket, {bucket}}}}}\n")
    assert imported.parameters["ingestion"]["bucket"]["side_px"] == side_px
    assert f"{side_px} is used" in imported.left_out[key]


@pytest.mark.parametrize("bucket", ["target_area: 512*512//2", "target_size: [big, big]", "target_size: 0"])
def test_a_size_that_cannot_be_read_is_named_with_its_bucket(bucket: str) -> None:
    imported = imported_from(PAIR + f"data: {{batch_size: 4, bucket: {{_target_: x.RatioBucket, {bucket}}}}}\n")
    assert "ingestion" not in imported.parameters
    assert len([key for key in imported.left_out if key.startswith("data.bucket.")]) >= 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: soon\n", r"training.seed: .*got 'soon'"),
        ("train: {max_grad_norm: 0}\n", r"training.max_grad_norm: .*got 0"),
        ("train: {cfg_scale: fast}\n", r"training.guidance_scale: .*got 'fast'"),
    ],
)
def test_what_every_run_would_refuse_is_refused_when_imported(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        imported_from(TUTORIAL + text)


def test_a_folder_beside_is_no_hub_id() -> None:
    text = TUTORIAL + "model: {pretrained_model_name_or_path: ./models}\n"
    assert imported_from(text).settings["base_model"] == "./models"
