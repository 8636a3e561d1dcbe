"""The layout of a base model, from its modules on any device, the meta device included."""

from __future__ import annotations

from dreamartist_pipeline.backbones.concepts import skipped_layers
from dreamartist_pipeline.backbones.families import Backbone
from dreamartist_pipeline.backbones.families.clip_text import check_clip_skip
from dreamartist_pipeline.backbones.prompts import check_trigger_word
from dreamartist_pipeline.core.layout import ModelLayout


def layout_of(model: Backbone, clip_skip: int = 0) -> ModelLayout:
    """Return what files have to fit in a base model that leaves out so many of the text encoders' last layers.

    Raises:
        InputError: as many layers are skipped as there are, or more.
    """
    shapes = model.layer_shapes
    configs = {encoder: model.networks[encoder].config for encoder in model.tokenizers}
    for config in configs.values():
        check_clip_skip(config.num_hidden_layers, clip_skip)
    skipped = {encoder: skipped_layers(model, encoder, list(shapes[encoder]), clip_skip) for encoder in configs}

    def check_word(word: str) -> None:
        for tokenizer in model.tokenizers.values():
            check_trigger_word(tokenizer, word)

    return ModelLayout(
        shapes=shapes,
        skipped={encoder: frozenset(layers) for encoder, layers in skipped.items()},
        word_widths=model.word_widths,
        max_vectors=min(config.max_position_embeddings for config in configs.values()) - 2,  # beside start and end
        check_word=check_word,
        names=model.file_names,
    )
