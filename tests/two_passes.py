"""Stable Diffusion and SDXL with a concept, computed without the code of this project.

Each branch runs alone in plain diffusers and transformers, with its updates merged into a copy of the weights
(`torch.func.functional_call`) and its learned vectors appended to the token embeddings.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from torch.func import functional_call

from dreamartist_pipeline.core.concept import Concept

WORDS = {"my-fox": "positive.pt1", "my-fox-neg": "negative.pt1"}
_PARTS = {"text_encoder": "words", "text_encoder_2": "words_text_encoder_2"}


@functools.cache
def _opened(folder: Path) -> Any:
    return DiffusionPipeline.from_pretrained(folder)


class TwoPasses:
    """A base model with a concept of WORDS.

    Attributes:
        learned: the concept's tensors, which gradients can be taken of.
    """

    def __init__(self, folder: Path, concept: Concept) -> None:
        self.pipe = _opened(folder)
        self.alphas_cumprod = DDPMScheduler.from_config(self.pipe.scheduler.config).alphas_cumprod
        self.predicts_v = self.pipe.scheduler.config.prediction_type == "v_prediction"
        self.concept = concept
        self.encoders = [name for name in _PARTS if hasattr(self.pipe, name)]
        self.learned = {name: tensor.clone().requires_grad_() for name, tensor in concept.tensors.items()}

    @functools.cache  # noqa: B019  # lives as long as its test
    def merged(self, network: str, branch: str) -> dict[str, torch.Tensor]:
        weights = {name: weight.detach() for name, weight in getattr(self.pipe, network).named_parameters()}
        groups = self.concept.metadata.lora[network]
        for name in [n for n in self.learned if n.startswith(f"{network}.") and n.endswith(f".{branch}.down")]:
            layer, group, *_ = name.removeprefix(f"{network}.").rsplit(".", 3)
            down, up = self.learned[name], self.learned[name.removesuffix("down") + "up"]
            weight = weights[f"{layer}.weight"]
            update = groups[int(group)].alpha / len(down) * up.flatten(1) @ down.flatten(1)
            weights[f"{layer}.weight"] = weight + update.reshape(weight.shape)
        return weights

    @functools.cache  # noqa: B019
    def encode(self, prompt: str, branch: str) -> dict[str, torch.Tensor]:
        states, pooled = [], None
        for encoder in self.encoders:
            module = getattr(self.pipe, encoder)
            tokenizer = getattr(self.pipe, encoder.replace("text_encoder", "tokenizer"))
            weights = dict(self.merged(encoder, branch))
            (table,) = [name for name in weights if name.endswith("token_embedding.weight")]
            ids_of: dict[str, list[int]] = {}
            for word, key in WORDS.items():
                vectors = self.learned[f"{_PARTS[encoder]}.{key}"]
                ids_of[word] = list(range(len(weights[table]), len(weights[table]) + len(vectors)))
                weights[table] = torch.cat([weights[table], vectors])
            ids = [tokenizer.bos_token_id]
            for part in prompt.replace(",", " ,").split():
                ids += ids_of.get(part) or tokenizer(part, add_special_tokens=False).input_ids
            end = len(ids)
            ids += [tokenizer.eos_token_id] + [tokenizer.pad_token_id] * (tokenizer.model_max_length - len(ids) - 1)
            out = functional_call(module, weights, (torch.tensor([ids]),), {"output_hidden_states": True})
            states.append(out.hidden_states[-2] if self.is_xl else out.last_hidden_state)
            if encoder == "text_encoder_2":
                pooled = out.last_hidden_state[:, end] @ weights["text_projection.weight"].T
        encoded = {"states": torch.cat(states, dim=-1)}
        if pooled is not None:
            encoded["pooled"] = pooled
            if not prompt:  # force_zeros_for_empty_prompt
                encoded = {name: torch.zeros_like(rows) for name, rows in encoded.items()}
        return encoded

    @property
    def is_xl(self) -> bool:
        return len(self.encoders) == 2

    def noised(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        signal, noisiness = self.levels(timesteps)
        return signal * latents + noisiness * noise

    def levels(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        alphas = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        return alphas.sqrt(), (1 - alphas).sqrt()

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        signal, noisiness = self.levels(timesteps)
        return signal * noise - noisiness * latents if self.predicts_v else noise

    def prediction(
        self,
        branch: str,
        prompt: str,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        time_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        encoded = {name: rows.expand(len(noisy), *rows.shape[1:]) for name, rows in self.encode(prompt, branch).items()}
        options: dict[str, Any] = {}
        if self.is_xl:
            side = noisy.shape[-1] * 8
            whole = torch.tensor([[side, side, 0, 0, side, side]]).expand(len(noisy), -1)
            time_ids = whole if time_ids is None else time_ids
            options["added_cond_kwargs"] = {"text_embeds": encoded["pooled"], "time_ids": time_ids}
        arguments = (noisy, timesteps, encoded["states"])
        predicted: torch.Tensor = functional_call(
            self.pipe.unet, self.merged("unet", branch), arguments, options
        ).sample
        return predicted

    def combined(
        self, prompts: Mapping[str, str], scale: float, noisy: torch.Tensor, timesteps: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        by_branch = {
            branch: self.prediction(branch, prompts[branch], noisy, timesteps, **options) for branch in prompts
        }
        return by_branch["negative"] + scale * (by_branch["positive"] - by_branch["negative"])
