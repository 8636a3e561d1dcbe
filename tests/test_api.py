"""The calls for scripts, against a plain diffusers computation that shares no code with this project.

The independent side merges each branch's update into a copy of the weights (`torch.func.functional_call`), appends the
learned vectors to the token embedding, runs text encoder and UNet once per branch, and combines by hand.
"""

from __future__ import annotations

import dataclasses
import io
import math
import re
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save
from torch.func import functional_call
from transformers import CLIPTextModel, CLIPTokenizer

from dreamartist_pipeline.api import (
    draw_images,
    draw_with_attention,
    nearest_tokens,
    open_base_model,
    read_concept,
    read_toolkit_concept,
    sample_latents,
    step_values,
    token_vectors,
)
from dreamartist_pipeline.backbones.concepts import concept_metadata, start_concept
from dreamartist_pipeline.backbones.families import Backbone
from dreamartist_pipeline.backbones.families.sd import V1_NAMES
from dreamartist_pipeline.core.concept import FORMAT, Concept
from dreamartist_pipeline.datasets.concept import ConceptDataset
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.interop.branch_adapters import branch_adapter
from dreamartist_pipeline.interop.toolkit import write_toolkit
from dreamartist_pipeline.params import (
    DeviceParams,
    GenerateParams,
    LossParams,
    SamplerParams,
    StrengthParams,
    TrainingParams,
)
from dreamartist_pipeline.pipelines.generate.nodes import generate_images
from refusals import says

PROJECT = Path(__file__).resolve().parents[1]
PROMPTS = {"positive": "a my-fox, the background", "negative": "a my-fox-neg, the background"}
WEIGHTED = {"positive": "a {my-fox:1.4}, {the background}", "negative": "a {my-fox-neg:0.6}, the background"}
WEIGHT_OF = {"positive": {"my-fox": 1.4, "the": 1.1, "background": 1.1}, "negative": {"my-fox-neg": 0.6}}
DDIM = SamplerParams(scheduler="ddim", num_inference_steps=2)
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
MIXED = [  # several groups on one layer, other ranks and alphas, convolutions, biases, one group for both branches
    {"lr": 1e-3, "rank": 2, "branch": "p", "alpha": 3.0, "layers": [r"re:.*\.attn.?$", r"re:.*resnets\.0$"]},
    {"lr": 1e-3, "rank": 1, "branch": "p", "alpha": 0.5, "layers": [r"re:.*attn2$"]},
    {"lr": 1e-3, "rank": 0.1, "branch": "n", "layers": [r"re:.*\.attn.?$", r"re:.*resnets\.1$"]},
    {"lr": 1e-3, "rank": 1, "alpha": 2.0, "layers": [r"re:.*\.ff$"], "bias": True},
    {"lr": 1e-3, "rank": 2, "branch": "n", "layers": [r"re:.*resnets\.0$"], "bias": True},
]


@pytest.fixture(scope="module")
def backbone(tiny_base_model: Path) -> Backbone:
    return open_base_model(tiny_base_model)


@pytest.fixture(scope="module")
def concept(backbone: Backbone, make_training_params: Callable[..., TrainingParams]) -> Concept:
    params = make_training_params(lora_unet=MIXED)
    concept = start_concept(backbone, params, 1, seed=0).snapshot(concept_metadata(backbone, params, 1))
    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: torch.randn(tensor.shape, generator=generator) * (0.3 if name.startswith("words") else 0.2)
        for name, tensor in concept.tensors.items()
    }
    return Concept(tensors, concept.metadata)


@pytest.fixture(scope="module")
def given() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        "latents": torch.randn(3, 4, 8, 8, generator=generator),
        "noise": torch.randn(3, 4, 8, 8, generator=generator),
        "timesteps": torch.tensor([40, 500, 999]),
    }


# ------------------------------------------------------------------------------------------------- the other side


class Independent:
    """Each branch computed alone, with merged weights, in plain diffusers and transformers."""

    def __init__(
        self,
        folder: Path,
        concept: Concept,
        strength: tuple[float, float] = (1.0, 1.0),
        weight_of: dict[str, dict[str, float]] | None = None,
    ) -> None:
        """`weight_of`: branch -> word -> its attention weight."""
        self.weight_of = weight_of or {}
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        self.text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()
        self.unet = UNet2DConditionModel.from_pretrained(folder / "unet").eval()
        self.scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
        self.concept = concept
        self.strength = dict(zip(("positive", "negative"), strength, strict=True))
        self.learned = {name: tensor.clone().requires_grad_() for name, tensor in concept.tensors.items()}

    def merged(self, network: str, module: torch.nn.Module, branch: str) -> dict[str, torch.Tensor]:
        weights = {name: parameter.detach() for name, parameter in module.named_parameters()}
        alphas = [group.alpha for group in self.concept.metadata.lora[network]]
        for name in [n for n in self.learned if n.startswith(f"{network}.") and n.endswith(".down")]:
            layer, group, of_branch, _ = name.removeprefix(f"{network}.").rsplit(".", 3)
            if of_branch not in (branch, "shared"):
                continue
            down, up = self.learned[name], self.learned[name.removesuffix("down") + "up"]
            scale = alphas[int(group)] / len(down) * self.strength[branch]
            update = scale * (up.flatten(1) @ down.flatten(1))
            weight = weights[f"{layer}.weight"]
            weights[f"{layer}.weight"] = weight + update.reshape(weight.shape)
            if (bias := self.learned.get(name.removesuffix("down") + "bias")) is not None:
                weights[f"{layer}.bias"] = weights[f"{layer}.bias"] + scale * bias
        return weights

    def text_states(self, prompt: str, branch: str) -> torch.Tensor:
        weights = self.merged("text_encoder", self.text_encoder, branch)
        (table,) = [name for name in weights if name.endswith("token_embedding.weight")]
        first_id = len(weights[table])
        weights[table] = torch.cat(
            [weights[table], self.learned["words.positive.pt1"], self.learned["words.negative.pt1"]]
        )
        positive, negative = (len(self.learned[f"words.{b}.pt1"]) for b in ("positive", "negative"))
        by_word = {"my-fox": range(first_id, first_id + positive)}
        by_word["my-fox-neg"] = range(first_id + positive, first_id + positive + negative)
        ids, factors = [self.tokenizer.bos_token_id], [1.0]
        for part in prompt.replace(",", " ,").split():
            ids += by_word.get(part) or self.tokenizer(part, add_special_tokens=False).input_ids
            factors += [self.weight_of.get(branch, {}).get(part, 1.0)] * (len(ids) - len(factors))
        ids += [self.tokenizer.eos_token_id]
        ids += [self.tokenizer.pad_token_id] * (self.tokenizer.model_max_length - len(ids))
        factors += [1.0] * (len(ids) - len(factors))
        states = functional_call(self.text_encoder, weights, (torch.tensor([ids]),))[0]
        if branch not in self.weight_of:
            return states
        weighted = states * torch.tensor(factors)[None, :, None]
        return weighted * states.mean() / weighted.mean()

    def branch_prediction(self, branch: str, prompt: str, noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        states = self.text_states(prompt, branch).expand(len(noisy), -1, -1)
        weights = self.merged("unet", self.unet, branch)
        return functional_call(self.unet, weights, (noisy, timesteps, states)).sample


def guidance_by_hand(text: str, timestep: int) -> float:
    rate = timestep / 999
    return {
        "3.0": 3.0,
        "1.0-3.0": 1 + 2 * rate,
        "3.0-1.0:ln": 3 - 2 * rate,
        "1.0-4.0:cos": 1 + 3 * math.cos((rate - 1) * math.pi / 2),
        "2.0-4.0:cos2": 2 + 2 * (1 - math.cos(rate * math.pi / 2)),
    }[text]


# ------------------------------------------------------------------------------------------------- one step


@pytest.mark.parametrize("guidance_scale", ["3.0", "1.0-3.0", "3.0-1.0:ln", "1.0-4.0:cos", "2.0-4.0:cos2"])
def test_prediction_loss_and_gradients_are_those_of_merged_weights(
    backbone: Backbone,
    concept: Concept,
    tiny_base_model: Path,
    given: dict[str, torch.Tensor],
    guidance_scale: str,
) -> None:
    values = step_values(
        backbone,
        concept,
        PROMPTS["positive"],
        PROMPTS["negative"],
        **given,
        guidance_scale=guidance_scale,
        loss=LossParams(weighting="min_snr", snr_gamma=2.0),
    )
    plain = Independent(tiny_base_model, concept)
    latents, noise, timesteps = given["latents"], given["noise"], given["timesteps"]
    alpha = plain.scheduler.alphas_cumprod[timesteps]
    signal, noisiness = alpha.sqrt().view(-1, 1, 1, 1), (1 - alpha).sqrt().view(-1, 1, 1, 1)
    noisy = signal * latents + noisiness * noise
    by_branch = {b: plain.branch_prediction(b, prompt, noisy, timesteps) for b, prompt in PROMPTS.items()}
    scale = torch.tensor([guidance_by_hand(guidance_scale, int(t)) for t in timesteps]).view(-1, 1, 1, 1)
    combined = by_branch["negative"] + scale * (by_branch["positive"] - by_branch["negative"])
    target = signal * noise - noisiness * latents  # v
    snr = alpha / (1 - alpha)
    weight = torch.minimum(snr, torch.tensor(2.0)) / (snr + 1)
    row_losses = weight * ((combined - target) ** 2).mean((1, 2, 3))
    gradients = torch.autograd.grad(row_losses.mean(), list(plain.learned.values()))

    torch.testing.assert_close(values.prediction, combined.detach(), **TOLERANCE)
    torch.testing.assert_close(values.row_losses, row_losses.detach(), **TOLERANCE)
    torch.testing.assert_close(values.loss, row_losses.mean().detach(), **TOLERANCE)
    assert values.gradients.keys() == plain.learned.keys()
    for name, expected in zip(plain.learned, gradients, strict=True):
        difference = (values.gradients[name] - expected).abs().max()
        assert difference <= 1e-6, f"{name} differs by {difference:.1e}"
        assert difference <= 1e-4 * expected.abs().max(), f"{name} differs by {difference:.1e}"  # small ones too


@pytest.fixture
def shifted_base_model(tiny_base_model: Path, tmp_path: Path) -> Path:
    """Return a base model whose text states have a mean, as Stable Diffusion's have; random ones have none."""
    folder = tmp_path / "shifted"
    shutil.copytree(tiny_base_model, folder)
    text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
    (bias,) = [p for name, p in text_encoder.named_parameters() if name.endswith("final_layer_norm.bias")]
    torch.nn.init.normal_(bias, mean=-0.2, std=0.1, generator=torch.Generator().manual_seed(0))
    text_encoder.save_pretrained(folder / "text_encoder")
    return folder


def test_weighted_words_are_those_of_merged_weights_times_the_weights(
    concept: Concept, shifted_base_model: Path, given: dict[str, torch.Tensor]
) -> None:
    backbone = open_base_model(shifted_base_model)
    concept = Concept(
        concept.tensors, concept.metadata.model_copy(update={"base_model_fingerprint": backbone.fingerprint})
    )
    values = step_values(backbone, concept, WEIGHTED["positive"], WEIGHTED["negative"], **given)
    plain = Independent(shifted_base_model, concept, weight_of=WEIGHT_OF)
    latents, noise, timesteps = given["latents"], given["noise"], given["timesteps"]
    alpha = plain.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    by_branch = {b: plain.branch_prediction(b, prompt, noisy, timesteps) for b, prompt in PROMPTS.items()}
    combined = by_branch["negative"] + 3.0 * (by_branch["positive"] - by_branch["negative"])
    loss = ((combined - (alpha.sqrt() * noise - (1 - alpha).sqrt() * latents)) ** 2).mean()
    gradients = torch.autograd.grad(loss, list(plain.learned.values()))

    torch.testing.assert_close(values.prediction, combined.detach(), **TOLERANCE)
    for name, expected in zip(plain.learned, gradients, strict=True):
        torch.testing.assert_close(values.gradients[name], expected, rtol=1e-3, atol=1e-6)
    unweighted = step_values(backbone, concept, PROMPTS["positive"], PROMPTS["negative"], **given)
    assert (unweighted.prediction - values.prediction).abs().max() > 0.01


def test_weighted_words_are_sampled_by_both_prompts(
    backbone: Backbone, concept: Concept, given: dict[str, torch.Tensor]
) -> None:
    def sample(prompt: str, negative_prompt: str) -> torch.Tensor:
        return sample_latents(backbone, concept, prompt, negative_prompt, given["latents"])

    plain = sample("a my-fox", "a red cat")
    assert torch.equal(sample("a {my-fox:1}", "a {red:1} cat"), plain)
    assert not torch.allclose(sample("a {my-fox:1.4}", "a red cat"), plain)
    assert not torch.allclose(sample("a my-fox", "a {red:1.4} cat"), plain)


def test_a_mask_multiplies_the_error(backbone: Backbone, concept: Concept, given: dict[str, torch.Tensor]) -> None:
    prompts = PROMPTS["positive"], PROMPTS["negative"]
    mask = torch.full((3, 1, 8, 8), 2.0)
    whole = step_values(backbone, concept, *prompts, **given)
    masked = step_values(backbone, concept, *prompts, **given, mask=mask)
    torch.testing.assert_close(masked.row_losses, 2 * whole.row_losses)


def test_the_kind_of_error_is_the_one_asked_for(
    backbone: Backbone, concept: Concept, given: dict[str, torch.Tensor]
) -> None:
    prompts = PROMPTS["positive"], PROMPTS["negative"]
    squared = step_values(backbone, concept, *prompts, **given)
    huber = step_values(
        backbone, concept, *prompts, **given, loss=LossParams(weighting="none", kind="huber", huber_delta=1e-3)
    )
    assert huber.loss < squared.loss / 10  # about 2δ·|error|
    with pytest.raises(InputError, check=says(got="reconstruction_weight=1")):
        step_values(backbone, concept, *prompts, **given, loss=LossParams(reconstruction_weight=1.0))


def test_slots_are_the_words_of_their_branch(
    backbone: Backbone, concept: Concept, given: dict[str, torch.Tensor]
) -> None:
    named = step_values(backbone, concept, PROMPTS["positive"], PROMPTS["negative"], **given)
    slots = step_values(backbone, concept, "a {pt1}, the background", "a {pt1}, the background", **given)
    assert torch.equal(named.prediction, slots.prediction)

    def sampled(prompt: str, negative_prompt: str) -> torch.Tensor:
        return sample_latents(backbone, concept, prompt, negative_prompt, given["latents"], sampler=DDIM)

    assert torch.equal(sampled("a {pt1}", "{pt1}, {red}"), sampled("a my-fox", "my-fox-neg, {red}"))
    assert not torch.equal(sampled("a {pt1}", "{pt1}, {red}"), sampled("a my-fox", "my-fox-neg, red"))


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        ({"latents": torch.zeros(3, 5, 8, 8)}, {"expected": "latents [B, 4, h, w]", "got": "[3, 5, 8, 8]"}),
        ({"latents": torch.zeros(0, 4, 8, 8)}, {"expected": "latents [B, 4, h, w]", "got": "[0, 4, 8, 8]"}),
        ({"latents": torch.full((1, 4, 8, 8), torch.nan)}, {"expected": "finite latents", "got": "NaN"}),
        ({"noise": torch.zeros(1, 4, 8, 8)}, {"expected": "noise [3, 4, 8, 8]", "got": "[1, 4, 8, 8]"}),
        ({"timesteps": torch.tensor(5)}, {"expected": "timesteps [3]", "got": "[]"}),
        ({"timesteps": torch.tensor([0, 1000, 3])}, {"expected": "999", "got": "[0, 1000, 3]"}),
        ({"timesteps": torch.tensor([-1, 1, 3])}, {"expected": "999", "got": "[-1, 1, 3]"}),
        ({"timesteps": torch.tensor([0.0, 1.0, 2.0])}, {"expected": "999", "got": "[0.0, 1.0, 2.0]"}),
        ({"mask": torch.ones(3, 8, 8)}, {"expected": "mask [3, 1, 8, 8]", "got": "[3, 8, 8]"}),
        ({"prompt": "cat " * 80 + "{pt1}"}, {"expected": "trigger words", "got": "tokens"}),
    ],
)
def test_inconsistent_arguments_are_refused(
    backbone: Backbone, concept: Concept, given: dict[str, torch.Tensor], changed: dict[str, Any], parts: dict[str, str]
) -> None:
    arguments: dict[str, Any] = {"prompt": "a {pt1}", "negative_prompt": "a {pt1}", **given}
    with pytest.raises(InputError, check=says(**parts)):
        step_values(backbone, concept, **(arguments | changed))


def test_given_latents_and_words_are_checked_before_they_are_sampled(
    backbone: Backbone, concept: Concept, given: dict[str, torch.Tensor]
) -> None:
    with pytest.raises(InputError, check=says(expected="latents [B, 4, h, w]", got="[4, 8, 8]")):
        sample_latents(backbone, concept, "a {pt1}", "", given["latents"][0])
    with pytest.raises(InputError, check=says(expected="trigger words", got="27 tokens")):
        sample_latents(backbone, concept, "a {pt1}", "cat " * 80 + "my-fox-neg", given["latents"])
    too_many = SamplerParams(scheduler="ddim", num_inference_steps=1001)
    with pytest.raises(InputError, check=says(expected="a scheduler", got="ddim for 1001 steps")):
        sample_latents(backbone, concept, "", "", given["latents"], sampler=too_many)


def test_gradients_are_computed_inside_no_grad_and_a_scale_may_be_a_number(
    backbone: Backbone, concept: Concept, given: dict[str, torch.Tensor]
) -> None:
    values = step_values(backbone, concept, "a {pt1}", "a {pt1}", **given)
    with torch.no_grad():
        again = step_values(backbone, concept, "a {pt1}", "a {pt1}", **given, guidance_scale=3)
    assert all(torch.equal(values.gradients[name], gradient) for name, gradient in again.gradients.items())


def test_a_scheduler_that_draws_noise_is_refused(
    backbone: Backbone, concept: Concept, given: dict[str, torch.Tensor]
) -> None:
    with pytest.raises(InputError, check=says(expected="a scheduler", got="euler_a")):
        sample_latents(backbone, concept, "a", "", given["latents"], sampler=SamplerParams(scheduler="euler_a"))


def test_a_folder_that_is_not_there_is_named(backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(InputError, check=says(expected="/nowhere", got="none")):
        read_toolkit_concept(backbone, tmp_path / "nowhere")


def test_nothing_is_changed(backbone: Backbone, concept: Concept, given: dict[str, torch.Tensor]) -> None:
    before = {name: tensor.clone() for name, tensor in concept.tensors.items()}
    step_values(backbone, concept, PROMPTS["positive"], PROMPTS["negative"], **given)
    assert all(torch.equal(concept.tensors[name], tensor) for name, tensor in before.items())
    assert not any(parameter.requires_grad for parameter in backbone.unet.parameters())


# ------------------------------------------------------------------------------------------------- sampling


def test_five_ddim_steps_from_a_toolkit_folder_are_those_of_merged_weights(
    backbone: Backbone, concept: Concept, tiny_base_model: Path, given: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    adapters = {branch: branch_adapter(concept, branch) for branch in ("positive", "negative")}
    files = write_toolkit(adapters, concept.trigger_words(), 600, V1_NAMES)
    for name, file in files.items():
        (tmp_path / name).write_bytes(file)
    assert len(files) == 6

    sampled = sample_latents(
        backbone,
        read_toolkit_concept(backbone, tmp_path),
        PROMPTS["positive"],
        "a red cat",
        given["latents"],
        strength=StrengthParams(positive=0.8, negative=0.65),
        sampler=SamplerParams(scheduler="ddim", num_inference_steps=5, guidance_scale=3.0),
    )
    plain = Independent(tiny_base_model, concept, strength=(0.8, 0.65))
    plain.scheduler.set_timesteps(5)
    latents = given["latents"]
    with torch.no_grad():
        for timestep in plain.scheduler.timesteps:
            rows = timestep.expand(len(latents))
            positive = plain.branch_prediction("positive", PROMPTS["positive"], latents, rows)
            negative = plain.branch_prediction("negative", "a red cat", latents, rows)
            latents = plain.scheduler.step(negative + 3.0 * (positive - negative), timestep, latents).prev_sample
    torch.testing.assert_close(sampled, latents, **TOLERANCE)


def test_without_a_concept_the_base_model_samples(backbone: Backbone, given: dict[str, torch.Tensor]) -> None:
    plain = sample_latents(backbone, None, "a red cat", "", given["latents"])
    assert plain.shape == given["latents"].shape


def test_words_that_are_no_pair_have_to_be_named(backbone: Backbone, concept: Concept, tmp_path: Path) -> None:
    for name, file in write_toolkit({}, concept.trigger_words(), 1, V1_NAMES).items():
        (tmp_path / name.replace("my-fox-neg", "other")).write_bytes(file)
    with pytest.raises(InputError, check=says(got="my-fox, other", remedy="`words`")):
        read_toolkit_concept(backbone, tmp_path)
    named: Any = read_toolkit_concept(backbone, tmp_path, words=("my-fox", "other"))
    assert named.metadata.words == {"pt1": ("my-fox", "other")}


@pytest.mark.parametrize(
    ("gone", "warning"),
    [
        ("*-neg-1.safetensors", "no negative adapters"),
        ("my-fox-neg.pt", "no negative word"),
        ("none", None),
    ],
)
def test_the_missing_part_of_a_pair_is_logged(
    backbone: Backbone,
    concept: Concept,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    gone: str,
    warning: str | None,
) -> None:
    adapters = {branch: branch_adapter(concept, branch) for branch in ("positive", "negative")}
    for name, file in write_toolkit(adapters, concept.trigger_words(), 1, V1_NAMES).items():
        (tmp_path / name).write_bytes(file)
    for file in tmp_path.glob(gone):
        file.unlink()
    read_toolkit_concept(backbone, tmp_path)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == (warning is not None)
    assert all(str(tmp_path) in message and str(warning) in message for message in warnings)


def test_words_given_as_one_text_are_refused(backbone: Backbone, tmp_path: Path) -> None:
    text: Any = "my-fox"
    with pytest.raises(InputError, check=says(expected="`words`", got="'my-fox'")):
        read_toolkit_concept(backbone, tmp_path, words=text)


def test_a_toolkit_folder_is_checked_as_by_the_import(backbone: Backbone, concept: Concept, tmp_path: Path) -> None:
    adapters = {"positive": branch_adapter(concept, "positive")}
    words = [dataclasses.replace(w, vectors={"text_encoder": torch.ones(2, 7)}) for w in concept.trigger_words()]
    for name, file in write_toolkit(adapters, words, 1, V1_NAMES).items():
        (tmp_path / name).write_bytes(file)
    with pytest.raises(InputError, check=says(expected="32 for 'my-fox'", got="7")):
        read_toolkit_concept(backbone, tmp_path)
    for word in words:
        (tmp_path / f"{word.name}.pt").unlink()
    with pytest.raises(InputError, check=says(expected="['a-x', 'a-y']", got="[]", remedy="`words`")):
        read_toolkit_concept(backbone, tmp_path, words=("a-x", "a-y"))


# ------------------------------------------------------------------------------------------------- pictures

FAST = SamplerParams(num_inference_steps=2)


def test_pictures_are_those_of_the_generate_pipeline(
    backbone: Backbone, concept: Concept, tiny_base_model: Path
) -> None:
    params = GenerateParams(
        prompts=("a {pt1}", "a red cat"),
        negative_prompt="blurry",
        images_per_prompt=2,
        seed=3,
        sampler=FAST,
        strength=StrengthParams(positive=0.8, negative=0.65),
        width=40,
        height=24,
        denoise=0.6,
    )
    picture, mask = Image.new("RGB", (32, 32), "red"), Image.new("L", (32, 32), 255)
    expected, _ = generate_images(
        str(tiny_base_model), concept, params, DeviceParams(device="cpu"), as_png(picture), as_png(mask)
    )
    drawn = draw_images(
        backbone,
        concept,
        params.prompts,
        "blurry",
        (3, 4),
        strength="reference",
        sampler=FAST,
        size_px=(40, 24),
        image=picture,
        mask=mask,
        denoise=0.6,
    )
    assert [image.tobytes() for image in drawn] == [image.tobytes() for image in expected.values()]
    assert [image.info for image in drawn] == [image.info for image in expected.values()]


def as_png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def test_a_single_prompt_is_drawn_from_two_seeds_and_a_concept_matters(backbone: Backbone, concept: Concept) -> None:
    base, with_concept = (draw_images(backbone, c, "a red cat", sampler=FAST) for c in (None, concept))
    assert len(base) == len(with_concept) == 2
    assert base[0].tobytes() != with_concept[0].tobytes()
    assert base[0].info["parameters"].startswith("a red cat\nSteps: 2")


def test_pictures_with_attention_are_those_without_and_have_maps_of_the_trigger_words(
    backbone: Backbone, concept: Concept
) -> None:
    arguments: Any = (backbone, concept, "a {pt1}, the background", "{pt1}", [3, 4])
    options: Any = {"sampler": FAST, "strength": "reference", "size_px": (40, 24)}
    mapped = draw_with_attention(*arguments, **options)
    assert [one.image.tobytes() for one in mapped] == [one.tobytes() for one in draw_images(*arguments, **options)]
    assert {branch: list(maps) for branch, maps in mapped[0].maps.items()} == {
        "positive": ["my-fox"],
        "negative": ["my-fox-neg"],
    }
    assert mapped[0].share("positive").shape == (24, 40)
    assert mapped[0].share("negative").equal(mapped[0].maps["negative"]["my-fox-neg"])


def test_attention_of_named_words_is_added_up_also_of_the_base_model(backbone: Backbone) -> None:
    words = {"positive": ["red", "cat"]}
    (mapped,) = draw_with_attention(backbone, None, "a red cat", seeds=[0], sampler=FAST, words=words)
    maps = mapped.maps["positive"]
    assert mapped.share("positive").equal(maps["red"] + maps["cat"])
    with pytest.raises(InputError, check=says(expected="'dog'", got="a red cat")):
        draw_with_attention(backbone, None, "a red cat", seeds=[0], sampler=FAST, words={"positive": ["dog"]})


def test_the_token_nearest_to_a_tokens_vector_is_itself(backbone: Backbone) -> None:
    vectors = token_vectors(backbone, "cat red")
    near = nearest_tokens(backbone, 3 * vectors, count=2)
    assert [found[0].text.rstrip("…") for found in near] == [
        token.removesuffix("</w>") for token in backbone.tokenizer.tokenize("cat red")
    ]
    for vector, (first, second) in zip(vectors, near, strict=True):
        assert first.vector.equal(vector)
        assert first.similarity == pytest.approx(1)
        assert second.similarity < 1
        assert second.similarity == pytest.approx(float(torch.cosine_similarity(second.vector, vector, dim=0)))


def test_special_tokens_are_no_neighbours_and_parts_of_words_are_marked(backbone: Backbone) -> None:
    tokenizer, table = backbone.tokenizer, backbone.text_encoder.get_input_embeddings().weight
    (near,) = nearest_tokens(backbone, table[tokenizer.eos_token_id][None], count=len(table))
    assert len(near) == len(table) - len(set(tokenizer.all_special_ids))
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(table))))
    ends = sum(token.endswith("</w>") for token in tokens)
    assert sum(not found.text.endswith("…") for found in near) == ends


def test_a_scheduler_that_cannot_be_set_up_is_refused(backbone: Backbone) -> None:
    with pytest.raises(InputError, check=says(expected="scheduler_options", got="'nonsense'")):
        draw_images(backbone, None, "a", sampler=SamplerParams(scheduler_options={"nonsense": 1}))


def test_a_trained_concept_is_read_from_its_file(concept: Concept, tmp_path: Path) -> None:
    ConceptDataset(filepath=str(tmp_path / "concept.safetensors")).save(concept)
    loaded = read_concept(tmp_path / "concept.safetensors")
    assert loaded.metadata == concept.metadata
    assert loaded.tensors.keys() == concept.tensors.keys()
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in concept.tensors.items())


def test_a_file_that_is_not_a_concept_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, check=says(expected="concept.safetensors", got="none")):
        read_concept(tmp_path / "concept.safetensors")
    (tmp_path / "text.safetensors").write_bytes(b"text")
    with pytest.raises(InputError, check=says(expected="a safetensors file")):
        read_concept(tmp_path / "text.safetensors")
    (tmp_path / "lora.safetensors").write_bytes(save({"lora_unet_x.alpha": torch.ones(1)}))
    with pytest.raises(InputError, check=says(expected="lora.safetensors", remedy="--pipeline import")):
        read_concept(tmp_path / "lora.safetensors")
    (tmp_path / "half.safetensors").write_bytes(save({}, {"format": FORMAT}))
    with pytest.raises(InputError, check=says(expected="half.safetensors", got="num_branches")):
        read_concept(tmp_path / "half.safetensors")


def test_the_documented_pictures_are_drawn(
    concept: Concept, tiny_base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (PROJECT / "docs/python.md").read_text(encoding="utf-8")
    code = re.search(r"## Pictures\n\n```python\n(.*?)```", text, re.DOTALL)
    assert code is not None
    (tmp_path / "pictures.py").write_text(code[1], encoding="utf-8")
    (tmp_path / "data/01_raw").mkdir(parents=True)
    (tmp_path / "data/01_raw/base_model").symlink_to(tiny_base_model)
    ConceptDataset(filepath=str(tmp_path / "data/06_models/fox/concept.safetensors")).save(concept)
    monkeypatch.chdir(tmp_path)
    made = runpy.run_path("pictures.py")
    assert made["images"][3].info["parameters"].startswith("two my-fox, green background\nSteps: 20")
    assert [image.size for image in (made["wide"][0], made["redrawn"][0], made["varied"][1])] == [
        (96, 64),
        (32, 32),
        (32, 32),
    ]
    assert made["redrawn"][0].tobytes() != made["varied"][0].tobytes()
    assert made["share"].shape == (32, 32)
    assert len(made["near"]) == 5


@pytest.mark.parametrize("name", ["DDPMScheduler", "KDPM2AncestralDiscreteScheduler"])
def test_every_scheduler_that_draws_noise_is_refused_for_given_latents(
    backbone: Backbone, given: dict[str, torch.Tensor], name: str
) -> None:
    with pytest.raises(InputError, check=says(expected="a scheduler", got=name)):
        sample_latents(backbone, None, "a", "", given["latents"], sampler=SamplerParams(scheduler=name))
