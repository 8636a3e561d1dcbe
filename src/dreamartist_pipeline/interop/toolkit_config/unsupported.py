"""Options of the reference toolkit without a counterpart in this project: reasons and alternatives."""

from __future__ import annotations

REASONS_BY_PREFIX = {
    "exp_dir": "output files are named after the subject",
    "ckpt_type": "all files are saved as safetensors",
    "logger": "every run is logged to MLflow",
    "mixed_precision": "supported are fp16, bf16 and no",
    "vis_info": "see training.preview for previews during training",
    "previewer": "see training.preview for previews during training",
    "allow_tf32": "PyTorch's default is kept",
    "unet": "the base model is frozen; train LoRA groups",
    "text_encoder": "the base model is frozen; train LoRA groups",
    "train.train_epochs": "a training on one image has no epochs; set training.num_steps",
    "train.gradient_accumulation_steps": "gradients are not accumulated; increase training.batch_size",
    "train.loss.criterion._target_": "see training.loss for the supported losses",
    "train.optimizer._target_": "see training.optimizer for the supported optimizers",
    "train.optimizer_pt._target_": "see training.words.optimizer for the supported optimizers",
    "train.scheduler.name": "supported are constant, constant_with_warmup, cosine and one_cycle",
    "train.scheduler_pt.name": "supported are constant, constant_with_warmup, cosine and one_cycle",
    "train.scale_lr_pt": "no words are trained",
    "train.save_step": "see training.preview.every for previews during training",
    "train.workers": "latents are encoded once; no data is loaded during training",
    "train.resume": "import the checkpoint (kedro run --pipeline import) and set training.start_from to the concept",
    "train.set_grads_to_none": "gradients are kept in one flat buffer",
    "model.ema": "see training.ema_decay",
    "model.ema_unet": "see training.ema_decay",
    "model.ema_text_encoder": "see training.ema_decay",
    "model.clip_final_norm": "the text encoder's final norm is always applied",
    "model.enable_xformers": "PyTorch's own attention is used",
    "model.gradient_checkpointing": "adapters of this size do not need it",
    "model.tokenizer_repeats": "a prompt is limited to one context of the text encoder",
    "tokenizer_pt.replace": "every concept has its own file",
    "tokenizer_pt.emb_dir": "words are initialised anew; set training.words.num_vectors and init_text to the values "
    "they were created with, or import their files (kedro run --pipeline import) and set training.start_from",
}
REASONS_BY_PART = {
    "img_root": "set the reference image: --params image=FILE",
    "caption_file": "put the caption next to the image, in FILE.txt, or set it: --params caption=TEXT",
    "att_mask": "set the mask: --params mask=FILE",
    "cache_latents": "latents are always cached, as mean and standard deviation",
    "image_transforms": "see ingestion",
    "num_bucket": "one image has one size",
}
NO_EFFECT = {  # key -> the value that has no effect in this project
    "allow_tf32": False,
    "train.gradient_accumulation_steps": 1,
    "train.loss.type": "eps",  # the base model defines its prediction type
    "model.tokenizer_repeats": 1,
    "model.clip_final_norm": True,
    "model.force_cast_precision": False,
    "model.ema_unet": 0,
    "model.ema_text_encoder": 0,
}
