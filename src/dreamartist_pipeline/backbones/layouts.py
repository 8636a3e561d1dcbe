"""The layout of a base model, read from its modules on any device, including the meta device."""

from __future__ import annotations

from dreamartist_pipeline.backbones.concepts import skipped_layers
from dreamartist_pipeline.backbones.families import Backbone
from dreamartist_pipeline.backbones.prompts import check_trigger_word
from dreamartist_pipeline.core.layout import ModelLayout


def layout_of(model: Backbone, clip_skip: int = 0) -> ModelLayout:
    """Return the layout of a base model whose text encoders are read without their last `clip_skip` layers.

    Raises:
        InputError: clip_skip leaves no layer.
    """
    shapes = model.layer_shapes
    configs = [model.networks[encoder].config for encoder in model.tokenizers]
    model.check_clip_skip(clip_skip)

    def check_word(word: str) -> None:
        for tokenizer in model.tokenizers.values():
            check_trigger_word(tokenizer, word)

    return ModelLayout(
        shapes=shapes,
        skipped={
            encoder: frozenset(skipped_layers(model, encoder, list(shapes[encoder]), clip_skip))
            for encoder in model.tokenizers
        },
        word_widths=model.word_widths,
        max_vectors=min(config.max_position_embeddings for config in configs) - 2,  # without start and end
        check_word=check_word,
        names=model.file_names,
    )
