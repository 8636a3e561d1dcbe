"""The training loop on a toy model: what is drawn, what is optimised, what is reported."""

from __future__ import annotations

import copy
import dataclasses
import io
import math
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dreamartist_pipeline.core.adapters import inject
from dreamartist_pipeline.core.batches import BatchSource, LatentImages, TrainingData, derived_seed
from dreamartist_pipeline.core.branches import BRANCH_NAMES, NEGATIVE, POSITIVE
from dreamartist_pipeline.core.course import Checkpointing, StepRecord
from dreamartist_pipeline.core.diffusion import NoiseSchedule
from dreamartist_pipeline.core.embeddings import Vocabulary, WordEmbedding
from dreamartist_pipeline.core.parameter_groups import ParameterGroup, branch_table, parameter_groups
from dreamartist_pipeline.core.processes import rank, run_on_processes
from dreamartist_pipeline.core.prompt_tokens import PromptTokens
from dreamartist_pipeline.core.trainer import train, whole_batch
from dreamartist_pipeline.core.training import Scoring, fit
from dreamartist_pipeline.core.training_step import (
    Execution,
    Steps,
    TrainableModel,
    reconstruction_loss,
    training_state,
)
from dreamartist_pipeline.errors import StoppedEarly, TrainingError
from dreamartist_pipeline.params import LossParams, PreviewParams, ResolvedGroup, ScheduleParams, TrainingParams
from refusals import says

MakeParams = Callable[..., TrainingParams]
_VOCABULARY = 10
AT_ONCE = Execution(read_every=1)  # calls on_step after every step
_SCHEDULE = NoiseSchedule(torch.linspace(0.99, 0.01, 20), "epsilon")


class ToyNetworks(nn.Module):
    """Two Linears that predict latents `[N, 2, 2, 2]` from themselves and a text of 3 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_VOCABULARY, 4)
        self.image, self.text = nn.Linear(8, 8), nn.Linear(4, 8)
        self.requires_grad_(False)

    def encode(self, tokens: PromptTokens) -> torch.Tensor:
        return self.embedding(tokens.ids)

    def denoise(
        self, latents: torch.Tensor, timesteps: torch.Tensor, hidden: torch.Tensor, framing: torch.Tensor | None
    ) -> torch.Tensor:
        return (self.image(latents.flatten(1)) + self.text(hidden.mean(1))).view_as(latents)


def make_model(num_branches: int = 2, untrained: int | None = None, dropout: float = 0.0) -> TrainableModel:
    """Return toy networks with LoRA and a word in every branch, but no LoRA gradient in branch `untrained`."""
    torch.manual_seed(0)
    networks = ToyNetworks()
    groups = [
        ResolvedGroup(
            name=f"toy.{branch}",
            rank=2,
            layers=("image", "text"),
            lr=1e-2,
            branch=BRANCH_NAMES[branch],
            dropout=dropout,
        )
        for branch in (NEGATIVE, POSITIVE)[-num_branches:]
    ]
    stack = inject(networks, groups, num_branches, torch.Generator().manual_seed(0))
    if untrained is not None:
        for layer in stack.layers.values():
            for update in layer.updates:
                if update.group.branch == BRANCH_NAMES[untrained]:
                    update.down.data.zero_()
    vocabulary = Vocabulary.build({"pt1": ("pos", "neg")}, (1, 1), _VOCABULARY, num_branches)
    words = WordEmbedding(networks.embedding, vocabulary, [torch.full((1, 4), 0.1) for _ in vocabulary.words])
    networks.embedding = words  # type: ignore[assignment]
    stack.train()
    groups = parameter_groups({"toy": stack}, {"text_encoder": words}, 1e-2)
    return TrainableModel(networks.denoise, networks.encode, _SCHEDULE, groups, num_branches, latent_adapters=(stack,))


def make_data(num_branches: int = 2, mask: torch.Tensor | None = None) -> TrainingData:
    """One reference image with one prompt, three regularization images with their own."""
    learned = [[1, _VOCABULARY, 2], [1, _VOCABULARY + 1, 2]][-num_branches:]
    if num_branches == 1:
        learned = [[1, _VOCABULARY, 2]]
    reference = LatentImages(
        torch.ones(1, 2, 2, 2), torch.full((1, 2, 2, 2), 0.1), PromptTokens(torch.tensor([learned])), False
    )
    plain = torch.tensor([[[3, 4, 5]] * num_branches, [[4, 5, 6]] * num_branches, [[5, 6, 7]] * num_branches])
    means = torch.tensor([10.0, 20.0, 30.0]).view(3, 1, 1, 1).expand(3, 2, 2, 2)
    return TrainingData(reference, LatentImages(means, torch.zeros(3, 2, 2, 2), PromptTokens(plain), True), mask)


def trained_values(model: TrainableModel) -> list[torch.Tensor]:
    return [parameter.detach().clone() for group in model.groups for parameter in group.parameters]


# --------------------------------------------------------------------------------------------- batches


def test_a_regularization_image_meets_only_its_own_prompt(make_training_params: MakeParams) -> None:
    source = BatchSource(make_data(), make_training_params(regularization_batch_size=2), _SCHEDULE)
    for step in range(10):
        batch = source.draw(step)
        first_tokens = batch.tokens.ids[batch.prompt_of_row[2:], 0, 0]  # 3, 4, 5 for the means 10, 20, 30
        assert torch.equal(batch.latents[2:, 0, 0, 0], (first_tokens - 2) * 10.0)


def test_reference_latents_are_sampled_afresh_from_the_posterior(make_training_params: MakeParams) -> None:
    source = BatchSource(make_data(), make_training_params(batch_size=1000), _SCHEDULE)
    first, second = source.draw(0).latents[:1000], source.draw(1).latents[:1000]
    assert not torch.equal(first, second)
    assert first.mean().item() == pytest.approx(1, abs=0.01)
    assert first.std().item() == pytest.approx(0.1, abs=0.01)


def test_row_weights_are_a_mean_over_the_reference_plus_a_weighted_mean_over_the_regularization(
    make_training_params: MakeParams,
) -> None:
    params = make_training_params(batch_size=4, regularization_batch_size=2, loss=LossParams(regularization_weight=0.5))
    weights = BatchSource(make_data(), params, _SCHEDULE).draw(0).row_weight
    assert weights.tolist() == [0.25, 0.25, 0.25, 0.25, 0.25, 0.25]


def test_the_mask_holds_for_reference_rows_only(make_training_params: MakeParams) -> None:
    mask = torch.tensor([[0.0, 1.0], [2.0, 5.0]]).view(1, 1, 2, 2)
    batch = BatchSource(make_data(mask=mask), make_training_params(batch_size=1), _SCHEDULE).draw(0)
    assert batch.mask is not None
    assert batch.mask[0, 0].tolist() == [[0.0, 1.0], [2.0, 5.0]]
    assert batch.mask[1, 0].tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_each_distinct_prompt_of_a_batch_is_encoded_once(make_training_params: MakeParams) -> None:
    batch = BatchSource(make_data(), make_training_params(batch_size=6), _SCHEDULE).draw(0)
    assert len(batch.tokens) == 2  # the one template, one caption
    assert batch.prompt_of_row.tolist() == [0] * 6 + [1]


def test_tokens_keep_their_weights_in_a_batch(make_training_params: MakeParams) -> None:
    data = make_data()
    assert data.regularization is not None
    weights = torch.tensor([[[1.0, 1.0, 1.5], [1.0, 1.2, 1.0]]])
    weighted = dataclasses.replace(data.reference, tokens=PromptTokens(data.reference.tokens.ids, weights))
    params = make_training_params(batch_size=2)
    batch = BatchSource(dataclasses.replace(data, reference=weighted), params, _SCHEDULE).draw(0)
    assert batch.tokens.weights is not None
    assert batch.tokens.weights[batch.prompt_of_row].tolist() == [*weights.tolist() * 2, [[1.0] * 3] * 2]
    assert BatchSource(data, params, _SCHEDULE).draw(0).tokens.weights is None


def test_a_batch_depends_on_the_seed_and_the_step_alone(make_training_params: MakeParams) -> None:
    params = make_training_params(noise_offset=0.1, timesteps=(0.0, 1.0))
    in_order, alone, other = (
        BatchSource(make_data(), p, _SCHEDULE) for p in (params, params, make_training_params(seed=1))
    )
    for step in range(3):
        expected = in_order.draw(step)
    drawn = alone.draw(2)
    for name in ("latents", "noise", "timesteps", "prompt_of_row"):
        assert torch.equal(getattr(drawn, name), getattr(expected, name)), name
    assert not torch.equal(drawn.latents, other.draw(2).latents)


# --------------------------------------------------------------------------------------------- optimisation


def test_flat_updates_equal_adamw_on_single_tensors_with_clipping(make_training_params: MakeParams) -> None:
    torch.manual_seed(0)
    shapes = [(3, 2), (4,), (2, 2, 1)]
    flat = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    plain = [nn.Parameter(p.detach().clone()) for p in flat]
    groups = (
        ParameterGroup("a", "adapters", "negative", 1e-2, (flat[0], flat[1])),
        ParameterGroup("b", "adapters", "positive", 3e-2, (flat[2],)),
    )
    model = dataclasses.replace(make_model(), groups=groups)
    state = training_state(model, make_training_params(weight_decay=0.1))
    reference = torch.optim.AdamW(
        [{"params": plain[:2], "lr": 1e-2}, {"params": plain[2:], "lr": 3e-2}], weight_decay=0.1
    )
    totals: list[float] = []

    def clip(norms: torch.Tensor) -> None:
        totals.append(norms.norm().item())
        nn.utils.clip_grads_with_norm_(state.parameters, 0.5, norms.norm())

    def loss_of(step: int) -> tuple[torch.Tensor, None]:
        return sum((p**3).sum() for p in flat), None  # type: ignore[return-value]

    for _ in train(state, 3, set_rates=lambda step: None, gradients_of=whole_batch(state, loss_of), clip=clip):
        reference.zero_grad()
        sum((p**3).sum() for p in plain).backward()  # type: ignore[union-attr]
        assert totals[-1] == pytest.approx(nn.utils.clip_grad_norm_(plain, 0.5).item(), rel=1e-5)
        reference.step()
        for ours, theirs in zip(flat, plain, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["adamw", "prodigy"])
def test_one_cycle_sets_beta1_of_its_parameters_alone(make_training_params: MakeParams, name: str) -> None:
    params = make_training_params(
        optimizer=name,
        lora_unet=[{"lr": 1.0, "rank": 1, "layers": ("image",)}],
        lora_text_encoder=(),
        schedule={"kind": "one_cycle", "warmup_steps": 2},
        words_schedule=CONSTANT,
    )
    model = make_model()
    state = training_state(model, params)
    seen: list[list[float]] = []

    def beta1s(record: StepRecord) -> None:
        groups = [group for optimizer in state.optimizers for group in optimizer.param_groups]
        assert all(group["betas"][1] == 0.999 for group in groups)
        seen.append([group["betas"][0] for group in groups])

    fit(model, make_data(), params, beta1s, state=state, execution=AT_ONCE)
    # two groups of adapters, two words
    assert seen == [[0.95, 0.95, 0.9, 0.9], [0.85, 0.85, 0.9, 0.9], [pytest.approx(0.95)] * 2 + [0.9, 0.9]]


def test_purposes_and_steps_have_seeds_of_their_own() -> None:
    steps = (None, 0, 1, 98)  # 98 is the letter b: "a" and step 98 are not "ab"
    seeds = {derived_seed(seed, purpose, step) for seed in range(3) for purpose in ("a", "ab") for step in steps}
    assert len(seeds) == 24
    assert max(seeds) < 2**63
    assert derived_seed(5, "noises", 7) == derived_seed(5, "noises", 7)


# --------------------------------------------------------------------------------------------- the loop


def test_training_lowers_the_loss(make_training_params: MakeParams) -> None:
    params = make_training_params(num_steps=150, batch_size=8, regularization_batch_size=0)
    history = fit(make_model(), make_data(), params)
    losses = [row["loss"] for row in history]
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])


def test_the_same_seed_trains_the_same_bits_and_another_seed_others(make_training_params: MakeParams) -> None:
    results = []
    for seed in (3, 3, 4):
        model = make_model()
        fit(model, make_data(), make_training_params(num_steps=4, seed=seed))
        results.append(trained_values(model))
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(results[0], results[2], strict=True))


def test_training_neither_uses_nor_changes_the_global_random_state(make_training_params: MakeParams) -> None:
    results = []
    for seed in (0, 1):
        model = make_model(dropout=0.5)
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        fit(model, make_data(), make_training_params(noise_offset=0.1))
        assert torch.equal(torch.get_rng_state(), before)
        results.append(trained_values(model))
    assert all(map(torch.equal, *results))


def test_every_step_drops_other_activations(make_training_params: MakeParams) -> None:
    model = make_model(dropout=0.5)
    layers = [layer for layer in model.latent_adapters[0].layers.values() if layer.has_dropout]
    seen: list[list[torch.Tensor]] = []
    params = make_training_params(batch_size=8)

    def keep(record: StepRecord) -> None:
        seen.append([layer.mask.clone() for layer in layers])  # type: ignore[union-attr]

    fit(model, make_data(), params, keep, execution=AT_ONCE)
    assert [mask.shape for mask in seen[0]] == [(2, 9, 2), (2, 9, 2)]  # branches, rows, ranks
    assert not torch.equal(seen[0][0], seen[0][1])
    assert not torch.equal(seen[0][0], seen[1][0])


# --------------------------------------------------------------------------------------------- continuing


def states_of_a_whole_training(
    model: TrainableModel, params: TrainingParams
) -> tuple[dict[int, dict[str, Any]], list[Any]]:
    """Train to the end; return the state after every step, 0 included, and the history."""
    state = training_state(model, params)
    states = {0: state.state_dict()}

    def keep(record: StepRecord) -> None:
        states[record.step] = state.state_dict()

    history = fit(model, make_data(), params, keep, state=state, execution=AT_ONCE)
    return states, history


CONSTANT = {"kind": "constant"}
SCHEDULE_FREE = {"names": {"pt1": ("my-fox", "my-fox-neg")}, "optimizer": "schedule_free"}
CONTINUED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "ema_decay": ({"ema_decay": 0.9}, {}),
    "prodigy": ({"optimizer": "prodigy", "lora_unet": [{"lr": 1.0, "rank": 1, "layers": ("image",)}]}, {}),
    "schedule_free": ({"words": SCHEDULE_FREE, "words_schedule": CONSTANT}, {}),
    "float16": ({"ema_decay": 0.9}, {"dtype": torch.float16}),
    "dropout": ({"noise_offset": 0.1}, {"dropout": 0.5}),
}


def model_of(options: dict[str, Any]) -> TrainableModel:
    toy = make_model(dropout=options.get("dropout", 0.0))
    return dataclasses.replace(toy, dtype=options.get("dtype", torch.float32))


@pytest.mark.parametrize("name", CONTINUED)
@pytest.mark.parametrize("taken_after", [0, 1, 3, 6])
def test_a_continued_training_ends_in_the_same_bytes(
    make_training_params: MakeParams, name: str, taken_after: int
) -> None:
    changes, of_model = CONTINUED[name]
    params = make_training_params(num_steps=6, lora_text_encoder=(), **changes)
    whole, continued = model_of(of_model), model_of(of_model)
    states, history = states_of_a_whole_training(whole, params)
    state = training_state(continued, params)
    for parameter in state.parameters:
        parameter.data.fill_(7.0)  # nothing of the fresh values may remain
    state.load_state_dict(states[taken_after])
    rest = fit(continued, make_data(), params, state=state)
    assert all(map(torch.equal, trained_values(continued), trained_values(whole)))
    assert [without_time(row) for row in rest] == [without_time(row) for row in history[taken_after:]]


def checkpoints_of(
    params: TrainingParams, model: TrainableModel, stop_at: int | None = None, **options: Any
) -> tuple[list[dict[str, Any]], Any]:
    """Train with a checkpoint after every step, and SIGTERM in step `stop_at`; return them, and history or error."""
    saved: list[dict[str, Any]] = []
    denoise = model.denoise

    def stopping(*args: Any) -> torch.Tensor:
        if len(saved) == (stop_at or 0):  # the first is saved before the first step
            signal.raise_signal(signal.SIGTERM)
        return denoise(*args)

    if stop_at is not None:
        model = dataclasses.replace(model, denoise=stopping)
    checkpointing = Checkpointing(lambda each: saved.append(copy.deepcopy(each)), **{"minutes": 0.0, **options})
    try:
        return saved, fit(model, make_data(), params, checkpointing=checkpointing)
    except StoppedEarly as stop:
        return saved, stop


@pytest.mark.parametrize("name", CONTINUED)
@pytest.mark.parametrize("num_done", [0, 1, 3, 6])
def test_a_training_continued_from_a_checkpoint_has_the_bytes_and_the_history_of_one(
    make_training_params: MakeParams, name: str, num_done: int
) -> None:
    changes, of_model = CONTINUED[name]
    params = make_training_params(num_steps=6, lora_text_encoder=(), **changes)
    whole, continued, records = model_of(of_model), model_of(of_model), []
    saved, history = checkpoints_of(params, whole)
    assert [checkpoint["state"]["step"] for checkpoint in saved] == list(range(7))
    file = io.BytesIO()
    torch.save(saved[num_done], file)
    file.seek(0)
    resumed = torch.load(file, weights_only=True)
    checkpointing = Checkpointing(lambda checkpoint: None, 1.0, resumed=resumed)
    again = fit(continued, make_data(), params, records.append, checkpointing=checkpointing)
    assert all(map(torch.equal, trained_values(continued), trained_values(whole)))
    assert [without_time(row) for row in again] == [without_time(row) for row in history]
    assert [list(row) for row in again] == [list(row) for row in history]
    assert again[:num_done] == history[:num_done]
    assert [record.row() for record in records] == list(again)  # the steps before the checkpoint, too


@pytest.mark.parametrize("stop_at", [1, 3, 6])
def test_a_signal_stops_after_the_step_and_keeps_it(make_training_params: MakeParams, stop_at: int) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    saved, stop = checkpoints_of(make_training_params(num_steps=6), make_model(), stop_at)
    assert isinstance(stop, StoppedEarly) and stop.exit_code == 130
    assert f"after step {stop_at} of 6" in str(stop)
    assert [checkpoint["state"]["step"] for checkpoint in saved] == list(range(stop_at + 1))
    assert len(saved[-1]["history"]["values"]) == stop_at
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_a_training_stops_at_the_end_of_its_minutes(make_training_params: MakeParams) -> None:
    saved, stop = checkpoints_of(make_training_params(num_steps=6), make_model(), minutes=60.0, max_minutes=1e-9)
    assert isinstance(stop, StoppedEarly) and stop.exit_code == 75
    assert "training.max_minutes" in str(stop)
    assert [checkpoint["state"]["step"] for checkpoint in saved] == [0]


def test_a_finished_training_leaves_a_checkpoint_of_its_last_step(make_training_params: MakeParams) -> None:
    saved, history = checkpoints_of(make_training_params(num_steps=6), make_model(), minutes=60.0, max_minutes=60.0)
    assert len(history) == 6
    assert [checkpoint["state"]["step"] for checkpoint in saved] == [6]


def test_previews_are_not_repeated(make_training_params: MakeParams) -> None:
    params = make_training_params(num_steps=4, preview=PreviewParams(every=2))
    saved, _ = checkpoints_of(params, make_model())
    steps: list[int] = []
    checkpointing = Checkpointing(lambda checkpoint: None, 1.0, resumed=saved[2])
    fit(make_model(), make_data(), params, on_preview=steps.append, checkpointing=checkpointing)
    assert steps == [4]


def without_time(row: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in row.items() if key != "seconds"}


def test_zero_steps_change_nothing(make_training_params: MakeParams) -> None:
    model = make_model()
    before = trained_values(model)
    assert not fit(model, make_data(), make_training_params(num_steps=0))
    assert all(torch.equal(a, b) for a, b in zip(before, trained_values(model), strict=True))


def test_one_branch_trains_too(make_training_params: MakeParams) -> None:
    groups = [{"lr": 1e-3, "rank": 1, "branch": "p", "layers": ("image",)}]
    params = make_training_params(guidance_scale="1.0", lora_unet=groups, lora_text_encoder=())
    history = fit(make_model(num_branches=1), make_data(num_branches=1), params)
    assert history[0].keys() >= {"grad_norm/positive/adapters", "grad_norm/positive/words"}
    assert not any("negative" in name for name in history[0])


def test_a_branch_without_gradient_is_refused_by_name(make_training_params: MakeParams) -> None:
    model = make_model(untrained=NEGATIVE)  # down and up are zero, and so are their gradients
    with pytest.raises(TrainingError, check=says(expected="negative/adapters")):
        fit(model, make_data(), make_training_params())


def test_a_loss_that_is_not_finite_stops_the_training(make_training_params: MakeParams) -> None:
    data = make_data()
    assert data.regularization is not None
    broken = TrainingData(data.reference, LatentImages(*_infinite(data.regularization)))
    with pytest.raises(TrainingError, check=says(expected="loss", got="step 1")):
        fit(make_model(), broken, make_training_params())


def test_an_update_that_leaves_no_finite_numbers_stops_the_training_even_after_the_last_loss(
    make_training_params: MakeParams,
) -> None:
    model = make_model()
    groups = [dataclasses.replace(group, lr=1e39) if group.kind == "words" else group for group in model.groups]
    params = make_training_params(num_steps=1, words_schedule=CONSTANT)
    with pytest.raises(TrainingError, check=says(expected="words.negative.pt1")):
        fit(dataclasses.replace(model, groups=groups), make_data(), params)


def _infinite(images: LatentImages) -> tuple[torch.Tensor, torch.Tensor, PromptTokens, bool]:
    return torch.full_like(images.mean, math.inf), images.std, images.tokens, images.paired


def test_every_step_is_reported_with_rates_and_norms(make_training_params: MakeParams) -> None:
    records: list[StepRecord] = []
    params = make_training_params(
        guidance_scale="2.0-4.0:ln",
        schedule=ScheduleParams(kind="constant"),
        words_schedule=ScheduleParams(kind="cosine"),
    )
    history = fit(make_model(), make_data(), params, records.append)
    assert [record.step for record in records] == [1, 2, 3]
    assert [record.row() for record in records] == list(history)
    parts = records[0].parts
    assert records[0].loss == pytest.approx(parts["loss_reference"] + parts["loss_regularization"], rel=1e-5)
    assert all(2 <= record.parts["guidance_scale"] <= 4 for record in records)
    assert [record.lr["toy.0"] for record in records] == [1e-2] * 3
    assert records[-1].lr["words.positive.pt1"] == 0
    norms = {"negative/adapters", "positive/adapters", "negative/words", "positive/words"}
    assert records[0].grad_norm.keys() == norms


def test_previews_come_at_their_steps_with_the_weights_of_that_step(make_training_params: MakeParams) -> None:
    model = make_model()
    seen: dict[int, list[torch.Tensor]] = {}
    params = make_training_params(num_steps=5, preview=PreviewParams(every=2))
    fit(model, make_data(), params, on_preview=lambda step: seen.update({step: trained_values(model)}))
    assert list(seen) == [0, 2, 4, 5]
    assert all(torch.equal(a, b) for a, b in zip(seen[0], trained_values(make_model()), strict=True))
    shorter = make_model()
    constant = {"schedule": ScheduleParams(kind="constant"), "words_schedule": ScheduleParams(kind="constant")}
    longer = make_model()
    by_step: dict[int, list[torch.Tensor]] = {}
    fit(shorter, make_data(), make_training_params(num_steps=2, **constant))
    params = make_training_params(num_steps=4, preview=PreviewParams(every=2), **constant)
    fit(longer, make_data(), params, on_preview=lambda step: by_step.update({step: trained_values(longer)}))
    assert all(torch.equal(a, b) for a, b in zip(by_step[2], trained_values(shorter), strict=True))


def test_without_previews_and_in_a_resumed_training_nothing_is_drawn_at_the_start(
    make_training_params: MakeParams,
) -> None:
    steps: list[int] = []
    fit(make_model(), make_data(), make_training_params(num_steps=2), on_preview=steps.append)
    assert steps == []
    model, params = make_model(), make_training_params(num_steps=2, preview=PreviewParams(every=1))
    state = training_state(model, params)
    state.step = 1
    fit(model, make_data(), params, on_preview=steps.append, state=state)
    assert steps == [2]


def test_the_table_lists_the_groups_of_each_branch() -> None:
    lines = branch_table(make_model().groups).splitlines()
    by_group = {line.split()[1]: line.split() for line in lines[2:]}
    # image 8 -> 8 and text 4 -> 8 at rank 2: 2·(8 + 8) + 2·(4 + 8) = 56
    assert by_group["toy.0"] == ["negative", "toy.0", "2", "56", "-", "1.00e-02"]
    assert by_group["words.positive.pt1"] == ["positive", "words.positive.pt1", "-", "4", "1", "1.00e-02"]


# --------------------------------------------------------------------------------------------- execution


def gradients(model: TrainableModel, data: TrainingData, params: TrainingParams, execution: Execution) -> Any:
    """Return loss, parts and the gradients of all groups of the first step."""
    steps = Steps(model, data, params, training_state(model, params), execution)
    loss, parts = steps.gradients(0)
    return loss, parts, [parameter.grad for parameter in steps.state.parameters]


@pytest.mark.parametrize("micro_batch", [1, 2, 4, 7])
def test_micro_batches_have_the_gradients_of_the_whole_step(make_training_params: MakeParams, micro_batch: int) -> None:
    data = dataclasses.replace(
        make_data(mask=torch.tensor([[[[1.0, 0.5], [0.0, 2.0]]]])), pixels=torch.ones(1, 3, 4, 2)
    )
    loss = LossParams(regularization_weight=0.5, reconstruction_weight=0.1)
    params = make_training_params(batch_size=3, regularization_batch_size=2, guidance_scale="1.5-3.0", loss=loss)
    plain, parted = (
        gradients(with_decoder(make_model(dropout=0.5)), data, params, Execution(size)) for size in (None, micro_batch)
    )
    assert all(gradient.any() for gradient in plain[2])
    torch.testing.assert_close(parted, plain, rtol=1e-5, atol=1e-7)


def _gradients_on_ranks(params: TrainingParams) -> list[Any]:
    """Return the results of the first step for all rows of a rank in one pass, and in micro-batches."""
    data = dataclasses.replace(
        make_data(mask=torch.tensor([[[[1.0, 0.5], [0.0, 2.0]]]])), pixels=torch.ones(1, 3, 4, 2)
    )
    return [gradients(with_decoder(make_model(dropout=0.5)), data, params, Execution(size)) for size in (None, 1)]


@pytest.mark.usefixtures("warm_ranks")
def test_two_processes_have_loss_and_gradients_of_one(make_training_params: MakeParams) -> None:
    loss = LossParams(regularization_weight=0.5, reconstruction_weight=0.1)
    params = make_training_params(batch_size=3, regularization_batch_size=2, guidance_scale="1.5-3.0", loss=loss)
    shared, alone = run_on_processes(_gradients_on_ranks, 2, params), _gradients_on_ranks(params)[0]
    for ours_loss, ours_parts, ours in shared:
        torch.testing.assert_close((ours_loss, ours_parts), alone[:2], rtol=1e-6, atol=0)
        for gradient, expected in zip(ours, alone[2], strict=True):
            assert (gradient - expected).norm() <= 1e-6 * expected.norm()


def test_micro_batches_pass_through_the_text_encoder_once(make_training_params: MakeParams) -> None:
    calls: list[int] = []
    model = make_model()

    def encode(tokens: PromptTokens) -> torch.Tensor:
        calls.append(len(tokens))
        return model.encode(tokens)  # type: ignore[return-value]

    params = make_training_params(batch_size=3)
    gradients(dataclasses.replace(model, encode=encode), make_data(), params, Execution(1))
    assert calls == [4]  # two prompts in two branches


@pytest.mark.parametrize("micro_batch", [None, 1])
def test_constant_prompts_are_encoded_before_the_first_step(
    make_training_params: MakeParams, micro_batch: int | None
) -> None:
    params = make_training_params(num_steps=3, words={"names": {}}, templates=("a {class}",))
    results, calls = [], []
    for is_constant in (False, True):
        model = make_model()

        def encode(tokens: PromptTokens, model: TrainableModel = model) -> torch.Tensor:
            calls.append(len(tokens))
            return model.encode(tokens).detach()  # type: ignore[attr-defined]

        groups = tuple(group for group in model.groups if group.kind == "adapters")
        changed = dataclasses.replace(model, encode=encode, groups=groups, has_constant_prompts=is_constant)
        results.append(gradients(changed, make_data(), params, Execution(micro_batch)))
        fit(changed, make_data(), params, execution=Execution(micro_batch))
    assert calls == [4, 4, 4, 4, 8, 8]  # 2 distinct prompts in every step; all 4, in two branches
    torch.testing.assert_close(results[0], results[1])


def test_losses_are_read_for_several_steps_at_a_time(make_training_params: MakeParams) -> None:
    model, params = make_model(), make_training_params(num_steps=7)
    state = training_state(model, params)
    seen: list[tuple[int, int]] = []
    fit(
        model,
        make_data(),
        params,
        lambda record: seen.append((record.step, state.step)),
        state=state,
        execution=Execution(read_every=3),
    )
    assert seen == [(1, 3), (2, 3), (3, 3), (4, 6), (5, 6), (6, 6), (7, 7)]


def test_the_number_of_prompts_is_the_same_in_every_step(make_training_params: MakeParams) -> None:
    source = BatchSource(make_data(), make_training_params(batch_size=2, regularization_batch_size=3), _SCHEDULE)
    batches = [source.draw(step) for step in range(70)]
    assert {batch.tokens.ids.shape for batch in batches} == {(4, 2, 3)}  # one reference prompt, three others at most
    assert len({len(batch.prompt_of_row.unique()) for batch in batches}) > 1
    for batch in batches:
        reference = batch.tokens.ids[batch.prompt_of_row[0]]
        assert torch.equal(reference, make_data().reference.tokens.ids[0])


# --------------------------------------------------------------------------------------------- options


def test_a_noise_offset_shifts_whole_channels_and_nothing_else(make_training_params: MakeParams) -> None:
    plain, shifted = (
        BatchSource(make_data(), make_training_params(batch_size=500, noise_offset=offset), _SCHEDULE).draw(0)
        for offset in (0.0, 0.5)
    )
    shift = shifted.noise - plain.noise  # [501, 2, 2, 2]
    torch.testing.assert_close(shift, shift[:, :, :1, :1].expand_as(shift), atol=1e-6, rtol=0)
    assert shift[:, :, 0, 0].std().item() == pytest.approx(0.5, rel=0.1)
    assert torch.equal(shifted.latents, plain.latents)
    assert torch.equal(shifted.timesteps, plain.timesteps)


def test_timesteps_stay_within_their_limits(make_training_params: MakeParams) -> None:
    batch = BatchSource(make_data(), make_training_params(batch_size=500, timesteps=(0.25, 0.5)), _SCHEDULE).draw(0)
    assert set(batch.timesteps.tolist()) == set(range(5, 10))


def test_the_huber_loss_is_what_trains_when_asked_for(make_training_params: MakeParams) -> None:
    losses = [
        fit(make_model(), make_data(), make_training_params(num_steps=1, loss=loss))[0]["loss"]
        for loss in (LossParams(), LossParams(kind="huber", huber_delta=1e6), LossParams(kind="huber"))
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)  # a huge δ is the squared error
    assert losses[2] < 0.9 * losses[0]


def with_decoder(model: TrainableModel, factor: float = 2.0) -> TrainableModel:
    """Let the decoder multiply, and repeat pixels of the first channel."""
    return dataclasses.replace(
        model, decode=lambda latents: factor * latents[:, :1].repeat(1, 3, 1, 1).repeat_interleave(2, 2)
    )


def test_the_reconstruction_compares_decoded_latents_with_the_image(make_training_params: MakeParams) -> None:
    model, data = with_decoder(make_model()), make_data(mask=torch.tensor([[1.0, 0.0], [0.0, 0.0]])[None, None])
    batch = BatchSource(data, make_training_params(), _SCHEDULE).draw(0)
    pixels = torch.zeros(1, 3, 4, 2)
    loss = reconstruction_loss(model, batch.noise[:2], batch, pixels, "l1")  # a perfect prediction: ẑ₀ is z₀
    assert loss.item() == pytest.approx(2 * batch.latents[:2, 0, 0, 0].abs().mean().item() / 4, rel=1e-4)


def test_the_reconstruction_adds_its_weighted_part_of_the_reference_rows(make_training_params: MakeParams) -> None:
    data = dataclasses.replace(make_data(), pixels=torch.zeros(1, 3, 4, 2))
    rows, trained = {}, {}
    for weight in (0.0, 0.5):
        model = with_decoder(make_model())
        params = make_training_params(num_steps=1, loss=LossParams(reconstruction_weight=weight))
        (rows[weight],) = fit(model, data, params)
        trained[weight] = trained_values(model)
    assert "loss_reconstruction" not in rows[0.0]
    assert rows[0.5]["loss"] == pytest.approx(rows[0.0]["loss"] + 0.5 * rows[0.5]["loss_reconstruction"], rel=1e-5)
    assert rows[0.5]["grad_norm/positive/words"] != rows[0.0]["grad_norm/positive/words"]


def test_a_reconstruction_without_decoder_or_image_is_refused(make_training_params: MakeParams) -> None:
    params = make_training_params(loss=LossParams(reconstruction_weight=1.0))
    with pytest.raises(ValueError, match="TrainableModel.decode"):
        fit(make_model(), make_data(), params)


def test_previews_and_the_end_hold_averages_where_they_are_asked_for(make_training_params: MakeParams) -> None:
    constant = {"schedule": ScheduleParams(kind="constant"), "words_schedule": ScheduleParams(kind="constant")}
    plain: dict[int, list[torch.Tensor]] = {}
    model = make_model()
    params = make_training_params(num_steps=2, preview=PreviewParams(every=1), **constant)
    fit(model, make_data(), params, on_preview=lambda step: plain.update({step: trained_values(model)}))
    averaged: dict[int, list[torch.Tensor]] = {}
    other = make_model()
    params = make_training_params(num_steps=2, preview=PreviewParams(every=1), ema_decay=0.5, **constant)
    fit(other, make_data(), params, on_preview=lambda step: averaged.update({step: trained_values(other)}))
    for first, second, kept, preview in zip(plain[1], plain[2], trained_values(other), averaged[2], strict=True):
        torch.testing.assert_close(kept, (first + 2 * second) / 3)
        assert torch.equal(kept, preview)


@pytest.mark.parametrize("name", ["prodigy", "schedule_free"])
def test_adapters_and_words_have_optimizers_of_their_own(make_training_params: MakeParams, name: str) -> None:
    constant = {"schedule": ScheduleParams(kind="constant"), "words_schedule": ScheduleParams(kind="constant")}
    words = {"names": {"pt1": ("my-fox", "my-fox-neg")}, "num_vectors": (2, 3), "lr": 1.0}
    group = {"lr": 1.0, "rank": 1, "layers": ("image",)}
    results = {}
    for adapters_name, words_name in (("adamw", "adamw"), (name, "adamw"), ("adamw", name)):
        model = make_model()
        params = make_training_params(
            lora_unet=[group],
            lora_text_encoder=(),
            optimizer=adapters_name,
            words=words | {"optimizer": words_name},
            **constant,
        )
        fit(model, make_data(), params, None)
        results[adapters_name, words_name] = trained_values(model)
    plain = results["adamw", "adamw"]
    adapters_only, words_only = results[name, "adamw"], results["adamw", name]
    num_adapters = len(plain) - 2
    assert not any(torch.equal(a, b) for a, b in zip(plain[:num_adapters], adapters_only[:num_adapters], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(plain[num_adapters:], words_only[num_adapters:], strict=True))


def test_a_first_step_at_a_scale_of_one_is_no_missing_gradient(make_training_params: MakeParams) -> None:
    wide = {"guidance_scale": "1.0-3.0", "batch_size": 1, "regularization_batch_size": 0, "num_steps": 40}
    first_at_zero = next(
        seed
        for seed in range(200)
        if BatchSource(make_data(), make_training_params(seed=seed, **wide), _SCHEDULE).draw(0).timesteps.item() == 0
    )
    history = fit(make_model(), make_data(), make_training_params(seed=first_at_zero, **wide))
    assert history[0]["guidance_scale"] == 1
    assert history[0]["grad_norm/negative/adapters"] == 0


def test_a_negative_branch_that_only_ever_meets_a_scale_of_one_is_refused(make_training_params: MakeParams) -> None:
    params = make_training_params(guidance_scale="1.0-3.0", timesteps=(0.0, 0.05))  # timestep 0 alone
    with pytest.raises(TrainingError, check=says(expected="negative/adapters")):
        fit(make_model(), make_data(), params)


# --------------------------------------------------------------------------------------------- scores


def test_a_training_is_scored_between_steps_and_changed_by_none(make_training_params: MakeParams) -> None:
    params = make_training_params(num_steps=5, ema_decay=0.9)
    plain, scored, seen = make_model(), make_model(), {}

    def score(step: int) -> bool:
        seen[step] = trained_values(scored)
        return False

    fit(plain, make_data(), params)
    history = fit(scored, make_data(), params, scoring=Scoring((2, 5), score))
    assert [row["step"] for row in history] == [1, 2, 3, 4, 5] and list(seen) == [2, 5]
    assert all(map(torch.equal, trained_values(scored), trained_values(plain)))
    assert all(map(torch.equal, seen[5], trained_values(plain)))  # the averages, as at the end


def test_scores_stop_a_training_and_its_checkpoint_stays_stopped(make_training_params: MakeParams) -> None:
    params, saved = make_training_params(num_steps=6), []
    checkpointing = Checkpointing(lambda each: saved.append(copy.deepcopy(each)), 60.0)
    stopped, again = make_model(), make_model()
    scoring = Scoring((2, 4, 6), lambda step: step == 4)
    history = fit(stopped, make_data(), params, checkpointing=checkpointing, scoring=scoring)
    assert len(history) == 4 and [each["state"]["step"] for each in saved] == [4]
    resumed = Checkpointing(lambda each: None, 60.0, resumed=saved[-1])
    over = dataclasses.replace(scoring, score=pytest.fail, is_over=True)
    assert len(fit(again, make_data(), params, checkpointing=resumed, scoring=over)) == 4
    assert all(map(torch.equal, trained_values(again), trained_values(stopped)))


def _stopped_by_the_first_rank(params: TrainingParams) -> int:
    scoring = Scoring((2, 4), lambda step: rank() == 0 and step == 2)
    return len(fit(make_model(), make_data(), params, scoring=scoring))


@pytest.mark.usefixtures("warm_ranks")
def test_all_ranks_stop_after_the_same_step(make_training_params: MakeParams) -> None:
    assert run_on_processes(_stopped_by_the_first_rank, 2, make_training_params(num_steps=4)) == 2
