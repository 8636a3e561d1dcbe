"""Concepts on a tiny base model: gradients by branch, exact predictions, saving, and an unchanged base model."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

from dreamartist_pipeline.backbones import concepts
from dreamartist_pipeline.backbones.base_model import BaseModelFiles, load_backbone
from dreamartist_pipeline.backbones.concepts import (
    LoadedConcept,
    NewConcept,
    attach,
    concept_metadata,
    draw_latents,
    generate,
    start_concept,
)
from dreamartist_pipeline.backbones.families import Backbone
from dreamartist_pipeline.core.adapters import LowRankUpdate
from dreamartist_pipeline.core.batches import Batch, BatchSource, LatentImages, TrainingData
from dreamartist_pipeline.core.branches import BRANCH_NAMES, NEGATIVE, POSITIVE, branches
from dreamartist_pipeline.core.concept import Concept
from dreamartist_pipeline.core.course import StepRecord
from dreamartist_pipeline.core.parameter_groups import parameter_groups
from dreamartist_pipeline.core.prompt_tokens import PromptTokens, by_branch
from dreamartist_pipeline.core.training import fit
from dreamartist_pipeline.core.training_step import Execution, TrainableModel, combined_prediction, row_losses
from dreamartist_pipeline.datasets.concept import ConceptDataset
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.interop.concept_file import read_concept
from dreamartist_pipeline.params import DeviceParams, LossParams, SamplerParams, StrengthParams, TrainingParams
from refusals import says

MakeParams = Callable[..., TrainingParams]
FULL = StrengthParams()
SAMPLER = SamplerParams(num_inference_steps=2, guidance_scale=3.0)


@pytest.fixture(scope="module")
def backbone(tiny_base_model: Path) -> Backbone:
    return load_backbone(BaseModelFiles(tiny_base_model), DeviceParams(device="cpu"))


def make_data(new: NewConcept, params: TrainingParams) -> TrainingData:
    """Random latents with the real prompts of both branches."""
    generator = torch.Generator().manual_seed(3)
    pairs = [("a photo of a my-fox-neg", "a photo of a my-fox"), ("the my-fox-neg", "the my-fox")]
    plain = [("a red cat", "a red cat"), ("a blue dog", "a blue dog")]

    def tokens(prompts: list[tuple[str, str]]) -> PromptTokens:
        return by_branch([new.prompts.tokenize([p[b] for p in prompts]) for b in branches(params.num_branches)])

    reference = LatentImages(
        torch.randn(1, 4, 8, 8, generator=generator), torch.full((1, 4, 8, 8), 0.1), tokens(pairs), False
    )
    means = torch.randn(2, 4, 8, 8, generator=generator)
    regularization = LatentImages(means, torch.full_like(means, 0.1), tokens(plain), True)
    mask = torch.rand(1, 1, 8, 8, generator=generator) * 2
    return TrainingData(reference, regularization, mask)


def make_trainable(new: NewConcept, params: TrainingParams) -> TrainableModel:
    groups = parameter_groups(new.stacks, new.words, params.words.lr)
    half = new.backbone.dtype == torch.float16
    return TrainableModel(
        new.backbone.denoise, new.prompts.encode, new.backbone.objective, groups, new.num_branches, half
    )


def train(backbone: Backbone, params: TrainingParams) -> tuple[Concept, NewConcept]:
    new = start_concept(backbone, params, 1, params.seed)
    fit(make_trainable(new, params), make_data(new, params), params)
    return new.snapshot(concept_metadata(backbone, params, 1)), new


@pytest.fixture(scope="module")
def concept(backbone: Backbone, make_training_params: MakeParams) -> Concept:
    """A concept trained for three steps; do not change it."""
    return train(backbone, make_training_params())[0]


@pytest.fixture(scope="module")
def untrained(backbone: Backbone, make_training_params: MakeParams) -> Concept:
    """A concept of zero steps; do not change it."""
    return train(backbone, make_training_params(num_steps=0))[0]


def stir(new: NewConcept) -> None:
    """Move every trained parameter away from its start, so that no product is zero."""
    generator = torch.Generator().manual_seed(1)
    for group in parameter_groups(new.stacks, new.words, 1.0):
        for parameter in group.parameters:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)


def draw(
    backbone: Backbone, concept: Concept | None, prompt: str = "a red cat", strength: StrengthParams = FULL
) -> bytes:
    loaded = attach(backbone, concept, strength)
    images = generate(backbone, loaded, [prompt, "a blue dog"], "background", [1, 2], SAMPLER)
    return b"".join(image.tobytes() for image in images)


# --------------------------------------------------------------------------------------------- the step, independently


def updates_of(new: NewConcept, network: str) -> Iterator[tuple[str, LowRankUpdate]]:
    for name, layer in new.stacks[network].layers.items():
        for update in layer.updates:
            yield name, update


def merged_weights(backbone: Backbone, new: NewConcept, network: str, branch: int) -> dict[str, torch.Tensor]:
    """Return the base network's parameters with one branch's W + (alpha / rank) · up · down merged in."""
    module = backbone.unet if network == "unet" else backbone.text_encoder
    weights = dict(module.named_parameters())
    for layer, update in updates_of(new, network):
        if update.group.branch == BRANCH_NAMES[branch]:
            delta = update.up @ update.down.flatten(1) * (update.group.alpha / update.down.shape[0])
            weights[f"{layer}.weight"] = weights[f"{layer}.weight"] + delta.view_as(weights[f"{layer}.weight"])
    return weights


def one_branch(backbone: Backbone, new: NewConcept, batch: Batch, branch: int) -> torch.Tensor:
    """Run one branch through the plain base model: merged weights, words looked up by hand."""
    text = merged_weights(backbone, new, "text_encoder", branch)
    table = torch.cat([text.pop("embeddings.token_embedding.weight"), *new.words["text_encoder"].vectors])
    text["embeddings.token_embedding.weight"] = table
    ids = batch.tokens.ids[batch.prompt_of_row, branch]
    hidden = functional_call(backbone.text_encoder, text, (ids,)).last_hidden_state
    alpha = backbone.objective.alphas_cumprod[batch.timesteps].view(-1, 1, 1, 1)
    noisy = alpha.sqrt() * batch.latents + (1 - alpha).sqrt() * batch.noise
    unet = merged_weights(backbone, new, "unet", branch)
    return functional_call(backbone.unet, unet, (noisy, batch.timesteps, hidden)).sample


def independent_loss(batch: Batch, prediction: torch.Tensor, schedule: torch.Tensor) -> torch.Tensor:
    """v-prediction, min-SNR with γ = 2, the mask, and the rows' weights, written out."""
    alpha = schedule[batch.timesteps]
    sqrt_alpha, sqrt_rest = (level.sqrt().view(-1, 1, 1, 1) for level in (alpha, 1 - alpha))
    target = sqrt_alpha * batch.noise - sqrt_rest * batch.latents
    snr = alpha / (1 - alpha)
    weight = torch.minimum(snr, torch.tensor(2.0)) / (snr + 1)
    assert batch.mask is not None
    rows = weight * ((prediction - target) ** 2 * batch.mask).mean((1, 2, 3))
    return (batch.row_weight * rows).sum()


@pytest.fixture
def stirred(backbone: Backbone, make_training_params: MakeParams) -> tuple[NewConcept, TrainingParams, Batch]:
    params = make_training_params()
    new = start_concept(backbone, params, 1, 0)
    stir(new)
    return new, params, BatchSource(make_data(new, params), params, new.backbone.objective).draw(0)


def test_a_step_equals_plain_diffusers_with_merged_weights(
    backbone: Backbone, stirred: tuple[NewConcept, TrainingParams, Batch]
) -> None:
    new, params, batch = stirred
    guidance = torch.tensor([3.0, 2.0, 4.0])
    negative, positive = (one_branch(backbone, new, batch, branch) for branch in (NEGATIVE, POSITIVE))
    expected = negative + guidance.view(-1, 1, 1, 1) * (positive - negative)
    ours = combined_prediction(make_trainable(new, params), batch, guidance)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    losses = row_losses(ours, batch, backbone.objective, LossParams(weighting="min_snr", snr_gamma=2.0))
    loss = (batch.row_weight * losses).sum()
    torch.testing.assert_close(
        loss, independent_loss(batch, expected, backbone.objective.alphas_cumprod), rtol=1e-5, atol=0
    )


def plain_groups(new: NewConcept, params: TrainingParams) -> list[dict[str, Any]]:
    """Return torch's parameter groups of all adapters and words, as configured."""
    groups = [
        {"params": [tensor], "lr": update.group.lr, "weight_decay": params.weight_decay}
        for network in new.stacks
        for _, update in updates_of(new, network)
        for tensor in (update.down, update.up)
    ]
    return groups + [
        {"params": [v], "lr": params.words.lr, "weight_decay": 0.0}
        for words in new.words.values()
        for v in words.vectors
    ]


def train_plainly(backbone: Backbone, new: NewConcept, params: TrainingParams, num_steps: int) -> list[float]:
    """Take the first steps of a training with torch alone, parameter by parameter; return the joint gradient norms."""
    groups = plain_groups(new, params)
    parameters = [parameter for group in groups for parameter in group["params"]]
    optimizer = torch.optim.AdamW(groups)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=[group["lr"] for group in groups],
        total_steps=params.num_steps,
        pct_start=params.schedule.warmup_steps / params.num_steps,
        cycle_momentum=True,
    )
    source, norms = BatchSource(make_data(new, params), params, backbone.objective), []
    for step in range(num_steps):
        batch = source.draw(step)
        negative, positive = (one_branch(backbone, new, batch, branch) for branch in (NEGATIVE, POSITIVE))
        loss = independent_loss(batch, negative + 3.0 * (positive - negative), backbone.objective.alphas_cumprod)
        optimizer.zero_grad()
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(parameters, params.max_grad_norm).item())
        optimizer.step()
        scheduler.step()
    return norms


def test_three_steps_equal_torchs_adamw_one_cycle_and_joint_clipping(
    backbone: Backbone, make_training_params: MakeParams
) -> None:
    schedule = {"kind": "one_cycle", "warmup_steps": 2}
    layers = (r"re:.*\.attn.?$",)
    lora = [{"lr": lr, "rank": 2, "branch": branch, "layers": layers} for branch, lr in (("p", 3e-4), ("n", 2e-4))]
    params = make_training_params(
        num_steps=5, schedule=schedule, words_schedule=schedule, max_grad_norm=0.02, lora_unet=lora
    )
    ours, plain = (start_concept(backbone, params, 1, 0) for _ in range(2))
    start = ours.snapshot({})
    seen: list[Concept] = []

    def keep(record: StepRecord) -> None:
        seen.append(ours.snapshot({}))

    fit(make_trainable(ours, params), make_data(ours, params), params, keep, execution=Execution(read_every=1))
    norms = train_plainly(backbone, plain, params, num_steps=3)
    assert all(norm > 2 * params.max_grad_norm for norm in norms)
    for name, tensor in plain.snapshot({}).tensors.items():
        assert (tensor - start.tensors[name]).abs().max() > 5e-5, name
        torch.testing.assert_close(seen[2].tensors[name], tensor, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_each_branch_gets_exactly_its_own_gradient(
    backbone: Backbone, stirred: tuple[NewConcept, TrainingParams, Batch]
) -> None:
    new, params, batch = stirred
    guidance = torch.full((3,), 3.0)
    groups = parameter_groups(new.stacks, new.words, 1.0)
    predictions = {b: one_branch(backbone, new, batch, b) for b in (NEGATIVE, POSITIVE)}
    ours = combined_prediction(make_trainable(new, params), batch, guidance)
    independent_loss(batch, ours, backbone.objective.alphas_cumprod).backward()
    for branch, name in ((NEGATIVE, "negative"), (POSITIVE, "positive")):
        own = [p for group in groups if group.branch == name for p in group.parameters]
        others = [p for group in groups if group.branch != name for p in group.parameters]
        fixed = {b: p if b == branch else p.detach() for b, p in predictions.items()}  # gradients of this branch only
        combined = fixed[NEGATIVE] + 3.0 * (fixed[POSITIVE] - fixed[NEGATIVE])
        loss = independent_loss(batch, combined, backbone.objective.alphas_cumprod)
        gradients = torch.autograd.grad(loss, own + others, allow_unused=True, retain_graph=True)
        for parameter, gradient in zip(own, gradients, strict=False):
            assert gradient is not None
            assert parameter.grad is not None
            scale = gradient.abs().max()
            assert scale > 0
            torch.testing.assert_close(parameter.grad / scale, gradient / scale, rtol=1e-3, atol=1e-4)
        assert all(g is None or not g.any() for g in gradients[len(own) :])


def test_guidance_one_equals_the_positive_branch(
    backbone: Backbone, stirred: tuple[NewConcept, TrainingParams, Batch]
) -> None:
    new, params, batch = stirred
    ours = combined_prediction(make_trainable(new, params), batch, torch.ones(3))
    torch.testing.assert_close(ours, one_branch(backbone, new, batch, POSITIVE), rtol=1e-5, atol=1e-5)


def test_training_lowers_the_loss_on_batches_it_did_not_see(
    backbone: Backbone, make_training_params: MakeParams
) -> None:
    groups = [{"lr": 1e-2, "rank": 4, "branch": branch, "layers": ("re:.*",)} for branch in "pn"]
    params = make_training_params(num_steps=12, lora_unet=groups, batch_size=4)
    new = start_concept(backbone, params, 1, 0)
    trainable, data = make_trainable(new, params), make_data(new, params)

    def loss() -> float:
        source = BatchSource(data, make_training_params(seed=99, batch_size=16), backbone.objective)
        batch = source.draw(0)
        with torch.no_grad():
            prediction = combined_prediction(trainable, batch, torch.full((17,), 3.0))
            losses = row_losses(prediction, batch, backbone.objective, LossParams(weighting="min_snr", snr_gamma=2.0))
        return float((batch.row_weight * losses).sum())

    before = loss()
    fit(trainable, data, params)
    assert loss() < 0.9 * before


# ------------------------------------------------------------------------------------------ the base model is unchanged


def test_a_new_concept_does_not_change_the_model_yet(backbone: Backbone, untrained: Concept) -> None:
    assert draw(backbone, untrained) == draw(backbone, None)


def test_training_and_attaching_leave_the_base_model_bit_equal(
    backbone: Backbone, make_training_params: MakeParams
) -> None:
    parts = (backbone.unet, backbone.text_encoder, backbone.autoencoder)
    before = [{name: value.clone() for name, value in part.state_dict().items()} for part in parts]
    images = draw(backbone, None)
    concept, new = train(backbone, make_training_params())
    draw(backbone, concept)
    for part, values in zip(parts, before, strict=True):
        assert part.state_dict().keys() == values.keys()  # no adapter in it
        assert all(torch.equal(value, values[name]) for name, value in part.state_dict().items())
    assert draw(backbone, None) == images
    shared = dict(new.backbone.unet.named_parameters())["conv_in.weight"]
    assert shared.data_ptr() == dict(backbone.unet.named_parameters())["conv_in.weight"].data_ptr()


def test_strength_zero_of_both_branches_is_the_base_model(backbone: Backbone, concept: Concept) -> None:
    assert draw(backbone, concept, strength=StrengthParams(positive=0, negative=0)) == draw(backbone, None)
    assert draw(backbone, concept) != draw(backbone, None)


def test_negative_rows_have_the_negative_prompt_and_no_trigger_word(
    backbone: Backbone, untrained: Concept, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = attach(backbone, untrained, FULL)
    encode, encoded = loaded.prompts.encode, []
    monkeypatch.setattr(loaded.prompts, "encode", lambda tokens: (encoded.append(tokens.ids), encode(tokens))[1])
    generate(backbone, loaded, ["a my-fox", "the my-fox"], "a red cat", [1, 2], SAMPLER)
    (ids,) = encoded
    plain = attach(backbone, None, FULL).prompts.tokenize(["a red cat"] * 2).ids
    assert torch.equal(ids[:2], plain)
    positive = next(word for word in loaded.prompts.words if word.branch == POSITIVE)
    assert all(set(positive.ids) <= set(row.tolist()) for row in ids[2:])


@pytest.mark.parametrize("weighted", ["a {my-fox:1.5}", "a {my-fox}", "{a:0.5} my-fox"])
def test_a_weighted_word_draws_another_image(backbone: Backbone, concept: Concept, weighted: str) -> None:
    assert draw(backbone, concept, weighted) != draw(backbone, concept, "a my-fox")


def test_a_weight_of_one_draws_the_same_image(backbone: Backbone, concept: Concept) -> None:
    assert draw(backbone, concept, "{a:1} my-fox") == draw(backbone, concept, "a my-fox")


def test_the_users_negative_prompt_is_weighted_too(backbone: Backbone, concept: Concept) -> None:
    loaded = attach(backbone, concept, FULL)
    plain, weighted = (
        generate(backbone, loaded, ["a my-fox"], negative, [1], SAMPLER)[0].tobytes()
        for negative in ("a red cat", "a {red:1.8} cat")
    )
    assert plain != weighted


# --------------------------------------------------------------------------------------------- concepts


def test_a_saved_concept_draws_the_same_images(backbone: Backbone, concept: Concept, tmp_path: Path) -> None:
    dataset = ConceptDataset(filepath=str(tmp_path / "concept.safetensors"))
    dataset.save(concept)
    assert draw(backbone, dataset.load(), "a my-fox") == draw(backbone, concept, "a my-fox")


def test_an_attached_concept_predicts_as_the_trained_one(backbone: Backbone, make_training_params: MakeParams) -> None:
    params = make_training_params()
    new = start_concept(backbone, params, 1, 0)
    stir(new)
    loaded = attach(backbone, new.snapshot(concept_metadata(backbone, params, 1)), FULL)
    prompts = ["the my-fox-neg", "the my-fox"]
    with torch.no_grad():
        trained, attached = (p.encode(p.tokenize(prompts)) for p in (new.prompts, loaded.prompts))
        torch.testing.assert_close(attached, trained, rtol=0, atol=1e-6)
        latents, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([500, 500])
        torch.testing.assert_close(
            loaded.backbone.denoise(latents, timesteps, attached),
            new.backbone.denoise(latents, timesteps, trained),
            rtol=0,
            atol=1e-5,
        )


@pytest.mark.parametrize("guidance_scale", ["3.0", "1.0"], ids=["two branches", "one branch"])
def test_a_concept_that_trains_draws_as_if_it_were_saved(
    backbone: Backbone, make_training_params: MakeParams, guidance_scale: str
) -> None:
    groups = [
        {"lr": 1e-3, "rank": 2, "dropout": 0.5, "svd_init": branch == "p", "branch": branch, "layers": ("re:.*attn.*",)}
        for branch in ("pn" if guidance_scale == "3.0" else "p")
    ]
    params = make_training_params(lora_unet=groups, lora_text_encoder=groups[:1], guidance_scale=guidance_scale)
    new = start_concept(backbone, params, 1, 0)
    stir(new)
    state = torch.get_rng_state()
    with new.drawing(params.words.names) as live:
        drawn = generate(new.backbone, live, ["a my-fox"], "a red cat", [3], SAMPLER)
    loaded = attach(backbone, new.snapshot(concept_metadata(backbone, params, 1)), FULL)
    (expected,) = generate(backbone, loaded, ["a my-fox"], "a red cat", [3], SAMPLER)
    assert np.abs(np.asarray(drawn[0], float) - np.asarray(expected, float)).max() <= 1
    assert torch.equal(torch.get_rng_state(), state)
    assert all(layer.training for adapters in new.stacks.values() for layer in adapters.layers.values())


@pytest.mark.parametrize(("trained_at", "drawn_at"), [("3.0", 4.0), ("3.0", 1.0), ("1.0", 4.0)])
@pytest.mark.parametrize("strength", [FULL, StrengthParams(positive=0.8, negative=0.3)])
def test_merged_adapters_draw_the_latents_of_adapters_apart(
    backbone: Backbone,
    make_training_params: MakeParams,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    trained_at: str,
    drawn_at: float,
    strength: StrengthParams,
) -> None:
    by_timestep = {"lr": 1e-3, "rank": 4, "timestep_min_rank": 1, "layers": (r"re:.*attn2$",)}
    everywhere = {"lr": 1e-3, "rank": 2, "branch": "p", "bias": True, "layers": (r"re:.*(attn.?|resnets\.\d+)$",)}
    groups = {"lora_unet": [by_timestep, everywhere], "lora_text_encoder": ()}
    params = make_training_params(**groups, guidance_scale=trained_at)
    new = start_concept(backbone, params, 1, 0)
    stir(new)
    loaded = attach(backbone, new.snapshot(concept_metadata(backbone, params, 1)), strength)
    sampler = SAMPLER.model_copy(update={"guidance_scale": drawn_at})

    def drawn() -> torch.Tensor:
        return torch.cat(list(draw_latents(backbone, loaded, ["a my-fox", "a red cat"], "", [1, 2], sampler)))

    merged = drawn()
    layers = loaded.backbone.adapters["unet"].layers.values()
    assert all(layer.merged is None and layer.packed is None for layer in layers)
    monkeypatch.setattr(concepts, "free_memory_bytes", lambda device: loaded.backbone.adapters["unet"].merged_bytes)
    with caplog.at_level("WARNING"):
        apart = drawn()
    assert "not merged" in caplog.text
    torch.testing.assert_close(merged, apart, rtol=0, atol=1e-4)


def test_strengths_act_on_their_own_branch(backbone: Backbone, make_training_params: MakeParams) -> None:
    params = make_training_params()
    new = start_concept(backbone, params, 1, 0)
    stir(new)
    concept = new.snapshot(concept_metadata(backbone, params, 1))
    latents, hidden = torch.randn(2, 4, 8, 8), torch.randn(2, 24, 32)
    with torch.no_grad():
        base = backbone.denoise(latents, torch.tensor([500, 500]), hidden)
        positive_only = attach(backbone, concept, StrengthParams(positive=1, negative=0)).backbone
        prediction = positive_only.denoise(latents, torch.tensor([500, 500]), hidden)
    assert torch.equal(prediction[NEGATIVE], base[NEGATIVE])
    assert not torch.allclose(prediction[POSITIVE], base[POSITIVE])


def of_another_model(concept: Concept, fingerprint: str, **changes: Any) -> Concept:
    """Return the concept as one of another base model, some tensors (by dotted names) and metadata replaced."""
    tensors = {name: value for name, value in changes.items() if "." in name}
    own = {"base_model": "elsewhere", "base_model_fingerprint": fingerprint}
    own |= {name: value for name, value in changes.items() if "." not in name}
    return Concept(concept.tensors | tensors, concept.metadata.model_copy(update=own))


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"base_model_family": "toy"}, "family (stable-diffusion, not toy)"),
        ({"prediction_type": "epsilon"}, "prediction_type (v_prediction, not epsilon)"),
        ({"words.positive.pt1": torch.zeros(2, 48)}, "text_encoder (32, not 48)"),
        ({"unet.conv_in.0.positive.down": torch.zeros(2, 9, 3, 3)}, "unet (conv_in,"),
        ({"unet.far.0.positive.down": torch.zeros(2, 9)}, "unet (far,"),
    ],
)
@pytest.mark.parametrize("fingerprint", ["0123456789abcdef", "sha256:0"], ids=["earlier version", "present"])
def test_a_concept_of_another_layout_is_refused_with_what_differs(
    backbone: Backbone, untrained: Concept, changes: dict[str, Any], difference: str, fingerprint: str
) -> None:
    ups = {name.replace(".down", ".up"): torch.zeros(16, 2, 1, 1) for name in changes if name.endswith(".down")}
    other = of_another_model(untrained, fingerprint, **changes, **ups)
    with pytest.raises(InputError, check=says(expected="'elsewhere'", got=difference, remedy="base_model")) as error:
        attach(backbone, other, FULL)
    assert error.value.got.startswith("'tiny'") and ";" not in error.value.got


@pytest.mark.parametrize(("fingerprint", "num_logs"), [("0123456789abcdef", 0), ("sha256:1", 1), ("hub:a/b", 1)])
def test_other_weights_of_the_same_layout_are_logged_once_where_fingerprints_can_be_compared(
    backbone: Backbone,
    untrained: Concept,
    caplog: pytest.LogCaptureFixture,
    fingerprint: str,
    num_logs: int,
) -> None:
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            attach(backbone, of_another_model(untrained, fingerprint), FULL)
            attach(backbone, untrained, FULL)
    assert len([message for message in caplog.messages if "'elsewhere'" in message]) == num_logs


@pytest.mark.parametrize("name", ["first", "with_options", "imported"])
def test_concepts_that_earlier_versions_wrote_draw(base_model_of_earlier_concepts: Path, name: str) -> None:
    backbone = load_backbone(BaseModelFiles(base_model_of_earlier_concepts), DeviceParams(device="cpu"))
    file = Path(__file__).parents[1] / "core" / "concepts" / f"{name}.safetensors"
    old = read_concept(file.read_bytes(), file.name)
    metadata = old.metadata.model_copy(update={"base_model_fingerprint": backbone.fingerprint})
    concept = Concept(old.tensors, metadata)
    zero = Concept({key: torch.zeros_like(tensor) for key, tensor in old.tensors.items()}, metadata)
    assert draw(backbone, concept) != draw(backbone, zero)


def test_a_concept_without_a_words_vectors_is_refused(backbone: Backbone, untrained: Concept) -> None:
    tensors = {name: t for name, t in untrained.tensors.items() if name != "words.negative.pt1"}
    with pytest.raises(InputError, check=says(got="negative.pt1")):
        attach(backbone, dataclasses.replace(untrained, tensors=tensors), FULL)


def test_the_metadata_holds_neither_paths_nor_times(
    backbone: Backbone, tiny_base_model: Path, make_training_params: MakeParams
) -> None:
    metadata = concept_metadata(backbone, make_training_params(), 1)
    assert str(tiny_base_model.parent) not in "".join(metadata.write().values())
    assert metadata == concept_metadata(backbone, make_training_params(), 1)
    assert metadata.base_model_fingerprint == backbone.fingerprint


# --------------------------------------------------------------------------------------------- other methods


def test_a_single_branch_concept_acts_on_all_rows_as_other_tools_apply_a_plain_lora(
    backbone: Backbone, make_training_params: MakeParams
) -> None:
    groups = [{"lr": 1e-2, "rank": 2, "layers": (r"re:.*\.attn.?$",)}]
    params = make_training_params(guidance_scale="1.0", lora_unet=groups, lora_text_encoder=())
    concept, new = train(backbone, params)
    assert {name.split(".")[-2] for name in concept.part("unet")} == {"shared"}
    assert list(concept.part("words")) == ["positive.pt1"]
    loaded = attach(backbone, concept, FULL)
    latents, hidden = torch.randn(2, 4, 8, 8), torch.randn(2, 24, 32)
    with torch.no_grad():
        prediction = loaded.backbone.denoise(latents, torch.tensor([500, 500]), hidden)
        base = backbone.denoise(latents, torch.tensor([500, 500]), hidden)
        trained = new.backbone.denoise(latents, torch.tensor([500, 500]), hidden)
    torch.testing.assert_close(prediction, trained, rtol=1e-5, atol=1e-5)
    for branch in (NEGATIVE, POSITIVE):
        assert not torch.allclose(prediction[branch], base[branch], atol=1e-4)


def test_words_without_adapters_change_only_prompts_that_use_them(
    backbone: Backbone, make_training_params: MakeParams
) -> None:
    params = make_training_params(lora_unet=(), lora_text_encoder=(), guidance_scale="1.0")
    concept, new = train(backbone, params)
    assert concept.tensors.keys() == {"words.positive.pt1"}
    assert draw(backbone, concept) == draw(backbone, None)
    assert draw(backbone, concept, "a my-fox") != draw(backbone, None, "a my-fox")
    assert [word.name for word in new.prompts.words] == ["my-fox"]


def test_adapters_need_no_words(backbone: Backbone, make_training_params: MakeParams) -> None:
    groups = [{"lr": 1e-2, "rank": 2, "layers": (r"re:.*\.attn.?$", "conv_in")}]
    params = make_training_params(guidance_scale="1.0", words={}, lora_unet=groups, lora_text_encoder=())
    concept, _ = train(backbone, params)
    assert concept.part("words") == {}
    assert draw(backbone, concept) != draw(backbone, None)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_half_precision_base_trains_float32_adapters(
    tiny_base_model: Path, make_training_params: MakeParams, dtype: str
) -> None:
    device = DeviceParams(device="cpu", dtype=dtype)
    backbone = load_backbone(BaseModelFiles(tiny_base_model), device)
    params = make_training_params()
    concept, new = train(backbone, params)
    assert {tensor.dtype for tensor in concept.tensors.values()} == {torch.float32}
    ups = [tensor for name, tensor in concept.tensors.items() if name.endswith(".up")]
    assert all(up.any() for up in ups)
    assert new.backbone.unet.conv_in.weight.dtype == getattr(torch, dtype)
    assert len(draw(backbone, concept, "a my-fox")) == 2 * 32 * 32 * 3


def test_a_concept_is_drawn_with_the_layers_it_was_trained_with(
    backbone: Backbone, make_training_params: MakeParams
) -> None:
    concept, _ = train(backbone, make_training_params(num_steps=1, clip_skip=1))
    assert concept.metadata.clip_skip == 1
    ignored = Concept(concept.tensors, concept.metadata.model_copy(update={"clip_skip": 0}))
    assert draw(backbone, concept) != draw(backbone, ignored)


def test_a_rank_by_timestep_is_kept_for_drawing(backbone: Backbone, make_training_params: MakeParams) -> None:
    group = {"lr": 1e-2, "rank": 4, "layers": [r"re:.*\.attn.?$"], "timestep_min_rank": 1}
    groups = [group | {"branch": branch} for branch in "pn"]
    params = make_training_params(lora_unet=groups)
    new = start_concept(backbone, params, 1, 0)
    stir(new)
    concept = new.snapshot(concept_metadata(backbone, params, 1))
    kept = concept.metadata.lora["unet"]
    assert [group.timestep_min_rank for group in kept] == [1, 1]
    ignored = {"unet": tuple(group.model_copy(update={"timestep_min_rank": None}) for group in kept)}
    metadata = concept.metadata.model_copy(update={"lora": concept.metadata.lora | ignored})
    assert draw(backbone, concept) != draw(backbone, Concept(concept.tensors, metadata))


def test_training_gives_no_gradient_to_ranks_that_no_row_used(
    backbone: Backbone, make_training_params: MakeParams
) -> None:
    group = {"lr": 1e-2, "rank": 4, "layers": [r"re:.*\.attn.?$"], "timestep_min_rank": 1}
    new = start_concept(backbone, make_training_params(lora_unet=[group]), 1, 0)
    stir(new)
    steps = torch.full((4,), backbone.objective.num_train_timesteps - 1)
    hidden = new.prompts.encode(new.prompts.tokenize(["a red cat"] * 4)).detach()
    new.backbone.denoise(
        torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0)), steps, hidden
    ).sum().backward()
    update = next(update for _, update in updates_of(new, "unet"))
    assert update.down.grad is not None
    assert update.down.grad[0].abs().sum() > 0
    assert not update.down.grad[1:].any()


# --------------------------------------------------------------------------------------------- clip_skip and adapters


def test_layers_that_clip_skip_leaves_out_get_no_adapters(backbone: Backbone, make_training_params: MakeParams) -> None:
    layers = start_concept(backbone, make_training_params(clip_skip=1), 1, 0).stacks["text_encoder"].layers
    assert {name.split("layers.")[1].split(".")[0] for name in layers} == {"0"}
    assert len(layers) == 6  # q, k, v, out, fc1, fc2


def test_a_group_of_skipped_layers_only_is_refused(backbone: Backbone, make_training_params: MakeParams) -> None:
    group = {"lr": 1e-3, "rank": 1, "branch": "p", "layers": [r"re:.*layers\.1\.mlp$"]}
    params = make_training_params(clip_skip=1, lora_text_encoder=[group])
    refused = says(expected="text_encoder.0.positive that are used with clip_skip=1", got="mlp.fc1")
    with pytest.raises(InputError, check=refused):
        start_concept(backbone, params, 1, 0)


# --------------------------------------------------------------------------------------------- bias, start by SVD


ATTENTION, CONVOLUTION, TEXT = r"re:.*\.attn.?$", r"re:.*resnets\.0\.conv1$", r"re:.*self_attn$"


def groups_with(**options: object) -> dict[str, list[dict[str, object]]]:
    """LoRA groups of both branches and networks, with convolutions, and these options in all of them."""
    group = {"lr": 1e-2, "rank": 2, "alpha": 3.0, **options}
    return {
        "lora_unet": [group | {"branch": branch, "layers": [ATTENTION, CONVOLUTION]} for branch in ("p", "n")],
        "lora_text_encoder": [group | {"branch": branch, "layers": [TEXT]} for branch in ("p", "n")],
    }


def predictions(concept: NewConcept | LoadedConcept, timestep: int = 300) -> torch.Tensor:
    """Predict one latent for both branches, from the text states of the concept's own text encoder."""
    inputs = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2)).repeat(2, 1, 1, 1)
    tokens = concept.prompts.tokenize(["a red cat", "a red cat"])
    with torch.no_grad():
        return concept.backbone.denoise(inputs, torch.full((2,), timestep), concept.prompts.encode(tokens))


OPTIONS = [{"bias": True}, {"svd_init": True}, {"bias": True, "svd_init": True}, {"orthogonal_init": "random"}]


@pytest.mark.parametrize("options", OPTIONS, ids=["bias", "svd_init", "both", "orthogonal"])
def test_bias_and_start_by_svd_leave_the_first_prediction_bit_equal(
    backbone: Backbone, make_training_params: MakeParams, options: dict[str, object]
) -> None:
    new = start_concept(backbone, make_training_params(**groups_with(**options)), 1, 0)
    assert torch.equal(predictions(new), predictions(attach(backbone, None, FULL)))


@pytest.mark.parametrize("options", OPTIONS, ids=["bias", "svd_init", "both", "orthogonal"])
def test_what_bias_and_start_by_svd_have_learned_is_attached_as_it_was_trained(
    backbone: Backbone, make_training_params: MakeParams, options: dict[str, object]
) -> None:
    params = make_training_params(**groups_with(**options), schedule={"kind": "constant"})
    concept, new = train(backbone, params)
    trained = predictions(new)
    torch.testing.assert_close(predictions(attach(backbone, concept, FULL)), trained, rtol=1e-5, atol=1e-5)
    base = predictions(attach(backbone, None, FULL))
    assert (trained - base).abs().amax(dim=(1, 2, 3)).min() > 1e-3  # in both branches
    plain, _ = train(backbone, make_training_params(**groups_with(), schedule={"kind": "constant"}))
    assert (predictions(attach(backbone, plain, FULL)) - trained).abs().max() > 1e-4


def test_every_bias_is_learned_and_acts(backbone: Backbone, make_training_params: MakeParams) -> None:
    concept, _ = train(backbone, make_training_params(**groups_with(bias=True)))
    biases = {name: tensor for name, tensor in concept.tensors.items() if name.endswith(".bias")}
    assert len(biases) == len([name for name in concept.tensors if name.endswith(".up")])
    still = [name for name, bias in biases.items() if not bias.any()]
    assert not [name for name in still if ".to_k." not in name and ".k_proj." not in name]  # softmax ignores a shift
    without = {n: torch.zeros_like(t) if n.endswith(".bias") else t for n, t in concept.tensors.items()}
    ignored = dataclasses.replace(concept, tensors=without)
    difference = predictions(attach(backbone, concept, FULL)) - predictions(attach(backbone, ignored, FULL))
    assert difference.abs().amax(dim=(1, 2, 3)).min() > 1e-4


def test_a_start_by_svd_trains_to_the_same_bytes_every_time(
    backbone: Backbone, make_training_params: MakeParams
) -> None:
    params = make_training_params(**groups_with(svd_init=True), ema_decay=0.5)
    first, second = (train(backbone, params)[0] for _ in range(2))
    assert all(torch.equal(tensor, second.tensors[name]) for name, tensor in first.tensors.items())
    assert all(group.svd_init for group in first.metadata.lora["unet"])


def test_t_lora_trains_to_the_same_bytes_every_time_and_draws_as_it_was_trained(
    backbone: Backbone, make_training_params: MakeParams
) -> None:
    groups = groups_with(orthogonal_init="random")
    groups["lora_unet"] = [group | {"timestep_min_rank": 1} for group in groups["lora_unet"]]
    first, second = (train(backbone, make_training_params(**groups, ema_decay=0.5))[0] for _ in range(2))
    assert all(torch.equal(tensor, second.tensors[name]) for name, tensor in first.tensors.items())
    assert {group.orthogonal_init for group in first.metadata.lora["unet"]} == {"random"}
    as_trained = predictions(attach(backbone, first, FULL), timestep=900)
    without = {"unet": tuple(g.model_copy(update={"timestep_min_rank": None}) for g in first.metadata.lora["unet"])}
    metadata = first.metadata.model_copy(update={"lora": first.metadata.lora | without})
    at_full_rank = predictions(attach(backbone, Concept(first.tensors, metadata), FULL), timestep=900)
    assert (at_full_rank - as_trained).abs().max() > 1e-5
