"""Training within a limit of memory: the same gradients, decided before the first step."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pandas import DataFrame
from PIL import Image
from torch import nn

from core.test_step_graph import recorded_on_the_cpu
from core.test_synchronization import NoWaiting
from dreamartist_pipeline.backbones.base_model import BaseModelFiles, load_outline, open_base_model
from dreamartist_pipeline.backbones.concepts import NewConcept, start_concept
from dreamartist_pipeline.backbones.placement import off_device, on_device
from dreamartist_pipeline.core import step_graph
from dreamartist_pipeline.core.batches import TrainingData
from dreamartist_pipeline.core.concept import Concept
from dreamartist_pipeline.core.parameter_groups import parameter_groups
from dreamartist_pipeline.core.trainer import train
from dreamartist_pipeline.core.training import fit
from dreamartist_pipeline.core.training_step import Execution, Steps, training_state
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import DeviceParams, MemoryParams, TrainingParams
from dreamartist_pipeline.pipelines.training import memory, nodes
from dreamartist_pipeline.pipelines.training.data import training_data
from dreamartist_pipeline.pipelines.training.memory import (
    MemoryPlan,
    estimate_memory,
    first_that_fits,
    memory_plan,
    out_of_memory_explained,
    possible_plans,
    step_shape,
)
from dreamartist_pipeline.pipelines.training.nodes import check_training, train_concept
from dreamartist_pipeline.pipelines.training.trainable import idle_modules, trainable_model
from refusals import says

MakeParams = Callable[..., TrainingParams]
CPU = DeviceParams(device="cpu")
CAPTION = "white background"
ATTENTION, TEXT = (r"re:.*\.attn.?$",), (r"re:.*self_attn$", r"re:.*mlp$")
DEMANDING = {  # dropout, ranks by timestep and convolutions
    "lora_unet": [
        {"lr": 1e-3, "rank": 2, "branch": "p", "dropout": 0.3, "layers": (*ATTENTION, r"re:.*resnets\.0$")},
        {"lr": 4e-4, "rank": 3, "branch": "n", "timestep_min_rank": 1, "layers": ATTENTION},
    ],
    "lora_text_encoder": [{"lr": 1e-3, "rank": 1, "dropout": 0.3, "layers": TEXT}],
}


@pytest.fixture(autouse=True, scope="module")
def steps_are_counted() -> bool:
    """Count steps, as trainings do."""
    return True


class Tracker:
    def log_metrics(self, metrics: dict[str, float], step: int) -> None: ...

    def log_image(self, image: Image.Image, key: str, step: int) -> None: ...

    def log_image_file(self, image: Image.Image, file: str) -> None: ...


def picture() -> Image.Image:
    image = Image.new("RGB", (32, 32), "orange")
    image.paste("purple", (8, 0, 16, 32))
    return image


REGULARIZATION = [("a red cat", functools.partial(Image.new, "RGB", (32, 32), "red"))]
MASK = Image.new("L", (32, 32), 127)


def new_training(folder: Path, params: TrainingParams, checkpointing: bool = False) -> tuple[NewConcept, TrainingData]:
    new = start_concept(open_base_model(folder, CPU), params, 1, 0)
    if checkpointing:
        new.backbone.checkpoint_gradients()
    images = [(caption, read()) for caption, read in REGULARIZATION]
    return new, training_data(new.backbone, new.prompts, picture(), MASK, images, params, CAPTION)


def new_steps(folder: Path, params: TrainingParams, plan: MemoryPlan) -> Steps:
    new, data = new_training(folder, params, plan.checkpointing)
    model = trainable_model(new, parameter_groups(new.stacks, new.words, params.words.lr))
    return Steps(model, data, params, training_state(model, params), Execution(plan.micro_batch))


def gradients(folder: Path, params: TrainingParams, plan: MemoryPlan) -> list[torch.Tensor]:
    steps = new_steps(folder, params, plan)
    steps.gradients(0)
    return [parameter.grad for parameter in steps.state.parameters if parameter.grad is not None]


# --------------------------------------------------------------------------------------------- the same gradients


@pytest.mark.parametrize("plan", possible_plans(MemoryParams(), num_rows=3)[1:], ids=str)
def test_every_plan_has_the_gradients_of_the_plain_step(
    tiny_base_model: Path, make_training_params: MakeParams, plan: MemoryPlan
) -> None:
    params = make_training_params(**DEMANDING)
    plain, planned = (gradients(tiny_base_model, params, each) for each in (MemoryPlan(), plan))
    for ours, theirs in zip(planned, plain, strict=True):
        assert theirs.any()
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("plan", [MemoryPlan(), MemoryPlan(checkpointing=True, micro_batch=1)], ids=str)
def test_a_step_of_a_base_model_waits_for_nothing(
    tiny_base_model: Path, make_training_params: MakeParams, plan: MemoryPlan
) -> None:
    params = make_training_params(num_steps=3, optimizer="adamw", **DEMANDING)
    steps = new_steps(tiny_base_model, params, plan)
    loop = train(steps.state, 3, set_rates=steps.set_rates, gradients_of=steps.gradients, clip=steps.clip)
    next(loop)
    with NoWaiting():
        next(loop)


def test_checkpointing_runs_layers_twice_and_leaves_the_shared_base_model_alone(
    tiny_base_model: Path, make_training_params: MakeParams
) -> None:
    new, _ = new_training(tiny_base_model, make_training_params(), checkpointing=True)
    shared = open_base_model(tiny_base_model, CPU)
    for name in ("unet", "text_encoder"):
        assert new.backbone.networks[name].is_gradient_checkpointing
        assert not shared.networks[name].is_gradient_checkpointing
    calls: list[str] = []
    layers = {
        "unet": new.backbone.networks["unet"].up_blocks[1].resnets[0],
        "text": new.backbone.networks["text_encoder"].encoder.layers[0].mlp,
    }
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
        assert not any(module.training for module in layer.modules() if not hasattr(module, "updates"))
    params = make_training_params()
    _, data = new_training(tiny_base_model, params)
    model = trainable_model(new, parameter_groups(new.stacks, new.words, params.words.lr))
    steps = Steps(model, data, params, training_state(model, params), Execution())
    steps.gradients(0)
    assert sorted(calls) == ["text", "text", "unet", "unet"]


def test_prompts_are_constant_without_words_and_adapters_of_text_encoders(
    tiny_base_model: Path, make_training_params: MakeParams
) -> None:
    without_text = {"lora_text_encoder": (), "words": {"names": {}}, "templates": ("a {class}",)}
    for changes, is_constant in (({}, False), ({"lora_text_encoder": ()}, False), (without_text, True)):
        params = make_training_params(guidance_scale="3.0", **changes)
        new, data = new_training(tiny_base_model, params)
        model = trainable_model(new, parameter_groups(new.stacks, new.words, params.words.lr))
        assert model.has_constant_prompts == is_constant
        assert len(idle_modules(new, params)) == (2 if is_constant else 1)
        assert len(fit(model, data, params)) == params.num_steps


# --------------------------------------------------------------------------------------------- the decision


def test_plans_go_from_the_fastest_to_the_one_with_the_least_memory() -> None:
    plans = possible_plans(MemoryParams(), num_rows=5)
    sizes = [None, 3, 1]
    assert plans == [MemoryPlan(checkpointing, size) for checkpointing in (False, True) for size in sizes]
    assert possible_plans(MemoryParams(), num_rows=1) == [MemoryPlan(False), MemoryPlan(True)]
    assert possible_plans(MemoryParams(checkpointing=True, micro_batch=2), 5) == [MemoryPlan(True, 2)]
    assert possible_plans(MemoryParams(micro_batch=0), 5) == [MemoryPlan(False), MemoryPlan(True)]
    assert possible_plans(MemoryParams(micro_batch=9), 5) == [MemoryPlan(False), MemoryPlan(True)]


def test_each_plan_needs_less_memory_than_the_one_before(
    tiny_base_model: Path, make_training_params: MakeParams
) -> None:
    params = make_training_params(batch_size=4)
    outline = load_outline(BaseModelFiles(tiny_base_model))
    planned = start_concept(outline, params, 1, 0)
    shape = step_shape(planned, params, CAPTION, side_px=256)
    assert shape.latents == (4, 64, 64)
    assert (shape.num_rows, shape.num_prompts, shape.num_tokens) == (5, 3, 24)
    plans = possible_plans(MemoryParams(), shape.num_rows)
    estimates = [estimate_memory(planned, params, shape, plan) for plan in plans]
    activations = [estimate.activations for estimate in estimates]
    assert activations[:3] == sorted(activations[:3], reverse=True)
    assert activations[3:] == sorted(activations[3:], reverse=True)
    assert all(checkpointed < plain for plain, checkpointed in zip(activations[:3], activations[3:], strict=True))
    networks = outline.networks.values()
    assert estimates[0].weights == 4 * sum(p.numel() for module in networks for p in module.parameters())
    with_decoder = params.model_copy(update={"loss": params.loss.model_copy(update={"reconstruction_weight": 1.0})})
    assert estimate_memory(planned, with_decoder, shape, plans[0]).weights > estimates[0].weights


def test_the_estimate_is_what_the_step_takes(tiny_base_model: Path, make_training_params: MakeParams) -> None:
    """Compare the counted activations with those of the real step, counted in the same way on the CPU."""
    from dreamartist_pipeline.core.memory import _Counter

    params = make_training_params(regularization_batch_size=0, templates=("a {pt1}",))
    outline = load_outline(BaseModelFiles(tiny_base_model))
    planned = start_concept(outline, params, 1, 0)
    shape = step_shape(planned, params, CAPTION, None)
    estimated = estimate_memory(planned, params, shape, MemoryPlan()).activations
    steps = new_steps(tiny_base_model, params, MemoryPlan())
    steps.gradients(0)
    with _Counter() as counter:
        steps.gradients(1)
    assert estimated == pytest.approx(counter.most_bytes, rel=0.1)


@pytest.mark.parametrize(("limit_gib", "is_plain"), [(1.0, True), (1e-4, False)])
def test_the_decision_is_made_by_the_limit_said_and_kept_in_the_plan(
    tiny_base_model: Path,
    make_training_params: MakeParams,
    limit_gib: float,
    is_plain: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    params = make_training_params(memory=MemoryParams(limit_gib=limit_gib))
    with caplog.at_level(logging.INFO):
        plan = check_training(str(tiny_base_model), params, CAPTION, CPU)
    least = {"checkpointing": True, "micro_batch": 1}
    assert plan["memory"] == ({"checkpointing": False, "micro_batch": None} if is_plain else least)
    assert plan["memory_estimate"]["optimizer"] == 16 * sum(group["num_parameters"] for group in plan["groups"])
    assert "weights" in caplog.text
    assert "3 steps" in caplog.text
    assert ("device.dtype=bfloat16" in caplog.text) is not is_plain


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_halves_weights_and_activations(
    tiny_base_model: Path, make_training_params: MakeParams, dtype: str
) -> None:
    params = make_training_params(**DEMANDING)
    whole, half = (
        check_training(str(tiny_base_model), params, CAPTION, DeviceParams(device="cpu", dtype=each))["memory_estimate"]
        for each in ("float32", dtype)
    )
    assert half["weights"] == whole["weights"] / 2
    assert half["activations"] < 0.7 * whole["activations"]
    assert half["optimizer"] == whole["optimizer"]


def test_given_options_are_taken_also_with_the_plan_of_another_run() -> None:
    plan = {"memory": {"checkpointing": False, "micro_batch": 2}}
    base = {"num_steps": 1, "words": {"names": {"pt1": ("a-b", "a-b-neg")}}}
    for given, expected in (
        ("auto", MemoryPlan(False, 2)),
        ({"checkpointing": True}, MemoryPlan(True, 2)),
        ({"micro_batch": 1}, MemoryPlan(False, 1)),
        ({"checkpointing": True, "micro_batch": 0}, MemoryPlan(True, None)),
    ):
        assert memory_plan(plan, TrainingParams(memory=given, **base)) == expected


def run(folder: Path, params: TrainingParams, **changes: Any) -> tuple[Concept, DataFrame]:
    return train_concept(
        base_model=str(folder),
        prepared_image=picture(),
        prepared_mask=MASK,
        regularization_set=REGULARIZATION,
        training_plan=changes.get("plan") or check_training(str(folder), params, CAPTION, CPU),
        params=params,
        caption=CAPTION,
        device=CPU,
        tracker=Tracker(),
    )[:2]


def test_a_training_computes_its_steps_by_the_plan(
    tiny_base_model: Path, make_training_params: MakeParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def recorded(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(fit).bind(*args, **kwargs).arguments
        unet = given["model"].denoise.__self__.networks["unet"]
        seen.append((unet.is_gradient_checkpointing, given["execution"].micro_batch))
        return fit(*args, **kwargs)

    monkeypatch.setattr("dreamartist_pipeline.pipelines.training.rank_training.fit", recorded)
    results = [
        run(tiny_base_model, make_training_params(memory=given))[0]
        for given in ("auto", {"checkpointing": True}, {"micro_batch": 1}, {"limit_gib": 1e-4})
    ]
    assert seen == [(False, None), (True, None), (False, 1), (True, 1)]
    for other in results[1:]:
        assert other.metadata == results[0].metadata  # config_sha256 among them
        for name, tensor in other.tensors.items():
            torch.testing.assert_close(tensor, results[0].tensors[name], rtol=1e-3, atol=1e-5)


def test_a_backend_reaches_the_loop_and_the_denoiser(
    tiny_base_model: Path, make_training_params: MakeParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **options: compiled.append(type(module).__name__))
    monkeypatch.setattr("dreamartist_pipeline.pipelines.training.plan.check_backend", lambda backend, device: None)
    monkeypatch.setattr(step_graph, "record", recorded_on_the_cpu)
    graphs: list[str] = []
    init = step_graph.GraphedPasses.__init__
    monkeypatch.setattr(step_graph.GraphedPasses, "__init__", lambda *args: graphs.append("graph") or init(*args))
    results = {}
    for backend in ("eager", "compile", "cudagraph"):
        results[backend] = run(tiny_base_model, make_training_params(backend=backend))[0]
        assert compiled == ([] if backend == "eager" else ["UNet2DConditionModel"])
        assert graphs == (["graph"] if backend == "cudagraph" else [])
    for name, tensor in results["eager"].tensors.items():
        assert torch.equal(results["cudagraph"].tensors[name], tensor)


def test_a_backend_without_its_device_is_refused_in_the_plan(
    tiny_base_model: Path, make_training_params: MakeParams
) -> None:
    with pytest.raises(InputError, check=says(expected="training.backend=cudagraph", got="cpu")):
        check_training("no/such/folder", make_training_params(backend="cudagraph"), CAPTION, CPU)


# --------------------------------------------------------------------------------------------- out of memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_exhausted_memory_is_one_message_with_what_to_lower(error: Exception) -> None:
    check = says(expected="cpu", got="all rows in one pass", remedy="training.memory.micro_batch=1")
    with pytest.raises(InputError, check=check) as raised, out_of_memory_explained(torch.device("cpu"), MemoryPlan()):
        raise error
    assert "\n" not in raised.value.got
    assert "training.memory.checkpointing=true" in raised.value.remedy
    smallest = MemoryPlan(checkpointing=True, micro_batch=1)
    check = says(remedy="ingestion.bucket.side_px")
    with pytest.raises(InputError, check=check) as raised, out_of_memory_explained(torch.device("cpu"), smallest):
        raise error
    assert "training.memory" not in raised.value.remedy


def test_other_errors_are_not_explained_as_a_lack_of_memory() -> None:
    with pytest.raises(RuntimeError, match="shapes"), out_of_memory_explained(torch.device("cpu"), MemoryPlan()):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_a_training_that_runs_out_of_memory_ends_in_that_message(
    tiny_base_model: Path, make_training_params: MakeParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("dreamartist_pipeline.core.training_step.combined_prediction", exhausted)
    with pytest.raises(InputError, check=says(got="CUDA out of memory", remedy="training.memory")):
        run(tiny_base_model, make_training_params())


# --------------------------------------------------------------------------------------------- measured plans


@pytest.mark.parametrize("reason", ["exhausted", "above the limit"])
def test_of_measured_plans_the_first_that_fits_is_taken(
    tiny_base_model: Path, make_training_params: MakeParams, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    tried: list[MemoryPlan] = []
    really = memory._run_step

    def measured(backbone: Any, params: Any, shape: Any, plan: MemoryPlan) -> tuple[float, int | None]:
        tried.append(plan)
        if len(tried) < 3 and reason == "exhausted":
            raise torch.OutOfMemoryError("CUDA out of memory")
        seconds, _ = really(backbone, params, shape, plan)
        return seconds, 100 if len(tried) < 3 else 1

    monkeypatch.setattr(memory, "_run_step", measured)
    params, backbone = make_training_params(), open_base_model(tiny_base_model, CPU)
    plans = possible_plans(MemoryParams(), 3)
    shape = step_shape(start_concept(backbone, params, 1, 0), params, CAPTION, None)
    plan, seconds = first_that_fits(plans, backbone, params, shape, limit=10)
    assert tried == plans[:3]
    assert plan == plans[2]
    assert 0 < seconds < 60
    tried.clear()
    if reason == "exhausted":
        with pytest.raises(InputError, check=says(got="CUDA out of memory")):
            first_that_fits(plans[:2], backbone, params, shape, limit=10)
    else:
        assert first_that_fits(plans[:2], backbone, params, shape, limit=10)[0] == plans[1]


# --------------------------------------------------------------------------------------------- idle modules


class Movable(nn.Linear):
    """Records the devices that it is moved to."""

    def __init__(self) -> None:
        super().__init__(1, 1)
        self.moves: list[str] = []

    def to(self, *args: Any, **kwargs: Any) -> Any:
        self.moves.append(str(args[0]))
        return self


def test_idle_modules_are_off_the_device_and_return_when_needed() -> None:
    module, device = Movable(), torch.device("cuda", 1)
    with off_device([module], device):
        assert module.moves == ["cpu"]
        with on_device([module], device):
            assert module.moves[1:] == ["cuda:1"]
        assert module.moves[2:] == ["cpu"]
    assert module.moves[3:] == ["cuda:1"]


def test_the_check_plans_for_the_size_of_the_reference_image(
    tiny_base_model: Path, make_training_params: MakeParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dreamartist_pipeline.params import IngestionParams

    sizes: list[tuple[int, int, int]] = []

    def recorded(planned: Any, params: Any, shape: Any, plan: Any) -> Any:
        sizes.append(shape.latents)
        return estimate_memory(planned, params, shape, plan)

    monkeypatch.setattr(memory, "estimate_memory", recorded)
    ingestion = IngestionParams.model_validate({"bucket": {"side_px": 64, "multiple_px": 8}})
    for given in (None, ingestion):
        nodes.check_training(str(tiny_base_model), make_training_params(), CAPTION, CPU, ingestion=given)
    assert sizes == [(4, 8, 8), (4, 16, 16)]
