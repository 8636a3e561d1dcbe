"""A step never waits for the device, and keeps nothing."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from core.test_training import make_data, make_model
from dreamartist_pipeline.core.trainer import train
from dreamartist_pipeline.core.training_step import Execution, Steps, training_state
from dreamartist_pipeline.params import LossParams, TrainingParams

MakeParams = Callable[..., TrainingParams]
aten = torch.ops.aten
WAITING = {  # on a GPU, these wait for it: their results or shapes are needed on the CPU
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.equal,
    aten.lift_fresh,  # torch.tensor(...): numbers of the CPU are copied to the device
}
OPTIMIZERS = ("adamw", "prodigy", "schedule_free")
GROUP = {"lr": 1.0, "rank": 1, "layers": ("image",)}
CONSTANT = {"kind": "constant"}
EVERYTHING = {
    "regularization_batch_size": 2,
    "guidance_scale": "1.0-3.0:cos",
    "noise_offset": 0.1,
    "lora_unet": [GROUP],
    "lora_text_encoder": (),
    "schedule": CONSTANT,
    "words_schedule": CONSTANT,
    "num_steps": 5,
    "clip": "apart",
}


class NoWaiting(TorchDispatchMode):
    """Fails on operators that wait for the device, and on copies between devices."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket not in WAITING, f"{func} waits for the device"
        if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_):
            masks = [index for index in args[1] if index is not None and index.dtype == torch.bool]
            assert not masks, f"{func} with a mask waits for the device"
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (aten._to_copy, aten.copy_):
            source = args[1] if func.overloadpacket is aten.copy_ else args[0]
            assert source.device == result.device, f"{func} copies from {source.device} to {result.device}"
        return result


def new_steps(params: TrainingParams, execution: Execution, **changes: Any) -> Steps:
    data = dataclasses.replace(make_data(mask=torch.ones(1, 1, 2, 2)), pixels=torch.zeros(1, 3, 4, 2))
    model = dataclasses.replace(make_model(dropout=0.5), decode=decode, **changes)
    return Steps(model, data, params, training_state(model, params), execution)


def decode(latents: torch.Tensor) -> torch.Tensor:
    return 2 * latents[:, :1].repeat(1, 3, 1, 1).repeat_interleave(2, 2)


@pytest.mark.parametrize("micro_batch", [None, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_waits_for_nothing(
    make_training_params: MakeParams, name: str, dtype: torch.dtype, micro_batch: int | None
) -> None:
    words = {"names": {"pt1": ("my-fox", "my-fox-neg")}, "lr": 1.0, "optimizer": name}
    averages = {"ema_decay": 0.0 if name == "schedule_free" else 0.9}
    loss = LossParams(kind="huber", weighting="soft_min_snr", reconstruction_weight=0.1)
    params = make_training_params(optimizer=name, words=words, loss=loss, **EVERYTHING, **averages)
    steps = new_steps(params, Execution(micro_batch), dtype=dtype)
    loop = train(
        steps.state, params.num_steps, set_rates=steps.set_rates, gradients_of=steps.gradients, clip=steps.clip
    )
    next(loop)  # draws the choices of many steps, and creates what optimizers keep
    with NoWaiting():
        for _ in range(3):
            next(loop)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.unique(),
        lambda x: torch.tensor(1.0),
        lambda x: x.to("meta"),
    ],
)
def test_what_waits_is_noticed(wait: Callable[[torch.Tensor], object]) -> None:
    with pytest.raises(AssertionError, match="waits|copies"), NoWaiting():
        wait(torch.arange(3.0))


def test_a_thousand_steps_take_no_more_memory_than_a_hundred(make_training_params: MakeParams) -> None:
    params = make_training_params(num_steps=1000, optimizer="prodigy", lora_unet=[GROUP], lora_text_encoder=())
    model, data = make_model(), make_data()
    steps = Steps(model, data, params, training_state(model, params), Execution())
    sizes = {}
    loop = train(
        steps.state, params.num_steps, set_rates=steps.set_rates, gradients_of=steps.gradients, clip=steps.clip
    )
    for done in loop:
        if done.step in (100, 1000):
            sizes[done.step] = tensors_alive()
    (num_before, bytes_before), (num_after, bytes_after) = sizes[100], sizes[1000]
    assert num_after <= num_before and bytes_after <= bytes_before  # less: tensors of other tests have been freed


def tensors_alive() -> tuple[int, int]:
    """Return the number and the bytes of all tensors."""
    gc.collect()
    found = [each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)]
    return len(found), sum(tensor.nbytes for tensor in found)
