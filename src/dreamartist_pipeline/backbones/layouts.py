"""The layout of a base model, from its modules on any device, the meta device included."""

from __future__ import annotations

from functools import partial

from torch import nn

from dreamartist_pipeline.backbones.base_model import Backbone, Outline
from dreamartist_pipeline.backbones.concepts import skipped_layers
from dreamartist_pipeline.backbones.prompts import check_clip_skip, check_trigger_word
from dreamartist_pipeline.core.layout import ModelLayout


def layout_of(model: Outline | Backbone, clip_skip: int = 0) -> ModelLayout:
    """Return what files have to fit in a base model that leaves out so many of the text encoder's last layers.

    Raises:
        InputError: as many layers are skipped as there are, or more.
    """
    config = model.text_encoder.config
    check_clip_skip(config.num_hidden_layers, clip_skip)
    networks: dict[str, nn.Module] = {"unet": model.unet, "text_encoder": model.text_encoder}
    shapes = {
        network: {
            name: tuple(layer.weight.shape)
            for name, layer in module.named_modules()
            if isinstance(layer, nn.Linear | nn.Conv2d)
        }
        for network, module in networks.items()
    }
    return ModelLayout(
        shapes=shapes,
        skipped=frozenset(skipped_layers(model.text_encoder, list(shapes["text_encoder"]), clip_skip)),
        text_width=config.hidden_size,
        max_vectors=config.max_position_embeddings - 2,  # beside start and end
        check_word=partial(check_trigger_word, model.tokenizer),
    )
