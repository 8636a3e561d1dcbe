"""Loss, guidance, optimizers, schedules and precision."""

from __future__ import annotations

from typing import Any

from dreamartist_pipeline.interop.toolkit_config.source import ConfigReader
from dreamartist_pipeline.params import TrainingParams

_WEIGHTINGS = {"MSELoss": "none", "MinSNRLoss": "min_snr", "SoftMinSNRLoss": "soft_min_snr"}
_OPTIMIZERS = {"AdamW": "adamw", "AdamW8bit": "adamw8bit"}
_ADAMW_WEIGHT_DECAY = 0.01  # the default of both classes
_SCHEDULES = {"one_cycle": "one_cycle", "constant_with_warmup": "constant", "constant": "constant", "cosine": "cosine"}
_DTYPES = {"fp16": "float16", "bf16": "bfloat16", "no": "float32", "False": "float32"}  # YAML 1.1: no is False
_OPTIONS = {
    "train.train_steps": "num_steps",
    "train.max_grad_norm": "max_grad_norm",
    "train.scale_lr": "scale_lr",
    "seed": "seed",
    "model.clip_skip": "clip_skip",
    "train.noise_offset": "noise_offset",
}


def read_guidance_scale(reader: ConfigReader, has_two_branches: bool) -> str:
    """Return the guidance scale; by default this project's for two branches, and 1 for one."""
    default = TrainingParams.model_fields["guidance_scale"].default if has_two_branches else "1.0"
    source = f"because {'two branches are' if has_two_branches else 'one branch is'} trained"
    return str(reader.read_or("train.cfg_scale", default, source))


def read_loss(reader: ConfigReader, regularization_weight: float | None) -> dict[str, Any]:
    """Return `training.loss` with the weighting, if it is supported, and this weight of the regularization set."""
    loss: dict[str, Any] = {}
    criterion = "train.loss.criterion"
    if weighting := reader.read_choice(f"{criterion}._target_", _WEIGHTINGS):
        reader.use([f"{criterion}.reduction"])
        loss = {"weighting": weighting, **reader.read_set({f"{criterion}.gamma": "snr_gamma"})}
    if regularization_weight is not None:
        loss["regularization_weight"] = regularization_weight
    return {"loss": loss} if loss else {}


def read_optimization(reader: ConfigReader) -> dict[str, Any]:
    """Return the parameters of `training` for steps, optimizer and schedules."""
    values = reader.read_set(_OPTIONS) | read_optimizer(reader, "train.optimizer")
    for part, name in (("scheduler", "schedule"), ("scheduler_pt", "words_schedule")):
        if schedule := _schedule(reader, f"train.{part}", values.get("num_steps")):
            values[name] = schedule
    return values


def read_optimizer(reader: ConfigReader, prefix: str) -> dict[str, Any]:
    """Return an optimizer and its weight decay; AdamW is the default."""
    values: dict[str, Any] = {}
    if optimizer := reader.read_choice(f"{prefix}._target_", _OPTIMIZERS):
        values = {"weight_decay": _ADAMW_WEIGHT_DECAY} | ({"optimizer": optimizer} if optimizer != "adamw" else {})
    return values | reader.read_set({f"{prefix}.weight_decay": "weight_decay"})


def _schedule(reader: ConfigReader, prefix: str, num_steps: int | None) -> dict[str, Any]:
    if reader.is_null(prefix):
        return {"kind": "constant", "warmup_steps": 0}
    name = reader.values.get(f"{prefix}.name")
    kind = reader.read_choice(f"{prefix}.name", _SCHEDULES)
    if kind is None:
        return {}
    if reader.read(f"{prefix}.num_training_steps") not in (None, num_steps):
        reader.leave_out([f"{prefix}.num_training_steps"], "a schedule is as long as the training")
    warmup_steps = reader.read(f"{prefix}.num_warmup_steps") or 0
    if warmup_steps and name == "constant":
        reader.leave_out(
            [f"{prefix}.num_warmup_steps"], "'constant' has no warm-up in the toolkit; 'constant_with_warmup' has"
        )
        warmup_steps = 0
    return {"kind": kind, "warmup_steps": warmup_steps}


def read_device(reader: ConfigReader) -> dict[str, str]:
    """Return the `device` section: the dtype, if the file has one."""
    dtype = reader.read_choice("mixed_precision", _DTYPES)
    return {"dtype": dtype} if dtype else {}
