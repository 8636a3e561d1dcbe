"""Configurations of the reference toolkit: what they become here, and what is named as left out."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from dreamartist_pipeline.core.errors import InputError
from dreamartist_pipeline.interop.toolkit_config import ImportedConfig, read_toolkit_config
from dreamartist_pipeline.params import DeviceParams, IngestionParams, TrainingParams

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
    imported = read_toolkit_config(CONFIG.replace("dropout: 0.1", "dropout: 0.1, alpha_auto_scale: true"), FILES.get)
    assert imported.left_out["lora_unet.0.alpha_auto_scale"] == "True: no counterpart here"
    TrainingParams.model_validate(imported.parameters["training"])


def test_a_key_nobody_knows_is_named() -> None:
    left_out = read_toolkit_config(f"{CONFIG}\nbells: whistles\n", FILES.get).left_out
    assert left_out["bells"] == "'whistles': no counterpart here"


def test_a_base_file_that_is_not_at_hand_is_named_and_references_to_it_do_no_harm() -> None:
    text = CONFIG.replace("cfg_scale", "workers: ${train.nothing}\n  cfg_scale")
    imported = read_toolkit_config(text, {}.get)
    assert "_base_ cfgs/train/train_base.yaml" in imported.left_out
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
        ("data: {batch_size: null}", "expected a whole number as data.batch_size"),
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
