"""Continue an interrupted training: what has to be equal, and what `training.resume` decides."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image

from dreamartist_pipeline.backbones.base_model import files_for
from dreamartist_pipeline.backbones.concepts import library_versions
from dreamartist_pipeline.checkpoint_files import CheckpointStore
from dreamartist_pipeline.core.checkpoints import CONCEPT, Checkpoint, Checkpoints
from dreamartist_pipeline.core.concept import to_json
from dreamartist_pipeline.core.course import CHECKPOINT_ENTRIES, Checkpointing
from dreamartist_pipeline.core.devices import pick_device
from dreamartist_pipeline.core.divergence import MOST_HALVINGS
from dreamartist_pipeline.core.image_set import images_sha256
from dreamartist_pipeline.core.model_location import ModelLocation
from dreamartist_pipeline.core.starting import Start
from dreamartist_pipeline.core.tracking import Tracker
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import DeviceParams, TrainingParams
from dreamartist_pipeline.pipelines.training.ranks import num_training_processes
from dreamartist_pipeline.pipelines.training.reporting import PREVIEWS

_OPTIMIZERS = {"training.optimizer", "training.words.optimizer"}
_MACHINE = ("device", "processes")  # of the entries about the device
_START_ANEW = "set training.resume=never to start anew"
_ENTRIES = frozenset({*CHECKPOINT_ENTRIES, PREVIEWS, "identity", "run_id"})
_QUOTED_CHARACTERS, _QUOTED_DIGITS = 60, 12  # of a value in a message, and of a SHA-256
_SHA256 = re.compile(r"[0-9a-f]{64}")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kept:
    """The checkpoints of a subject.

    Attributes:
        checkpoints: where they are.
        latest: the state of an interrupted training; None without one.
    """

    checkpoints: Checkpoints
    latest: Checkpoint | None


def load_kept(params: TrainingParams) -> Kept | None:
    """Return the checkpoints, after removing them with `training.resume=never`; None if none are kept.

    Raises:
        InputError: the latest is of another version of the project.
    """
    if params.checkpoints is None:
        return None
    checkpoints = CheckpointStore(Path(params.checkpoints))
    if params.resume == "never":
        checkpoints.discard(CONCEPT)
    latest = checkpoints.load(CONCEPT)
    if latest is not None and (missing := _ENTRIES - latest.keys()):
        raise InputError(
            expected=f"a checkpoint of this version of the project in {params.checkpoints}",
            got=f"one without {', '.join(sorted(missing))}",
            remedy=f"{_START_ANEW}, or continue with the version that has saved it",
        )
    return Kept(checkpoints, latest)


def check_continues(
    base_model: ModelLocation,
    params: TrainingParams,
    caption: str,
    device: DeviceParams,
    start: Start | None,
) -> None:
    """Check that the settings are those of the interrupted training, if there is one, before any picture is prepared.

    Raises:
        InputError: see `checkpointing_of`.
    """
    if params.resume == "never" or (kept := load_kept(params)) is None or kept.latest is None:
        return
    _check_changes(kept.latest, settings_identity(base_model, params, caption, device, start), params)


def settings_identity(
    base_model: ModelLocation, params: TrainingParams, caption: str, device: DeviceParams, start: Start | None
) -> dict[str, Any]:
    """Return what determines the result of a training, without its pictures, as JSON types; no weights are loaded."""
    resolved = {"device": pick_device(device).type, "processes": num_training_processes(params, device)}
    return _as_json(
        {
            "training": params.result_values() | {"start_from": start.sha256 if start else None},
            "device": device.model_dump(mode="json") | resolved,
            "caption": caption,
            "base model": files_for(base_model, device).fingerprint(),
            "versions": library_versions(),
        }
    )


def pictures_identity(
    image: Image, mask: Image, framing: Mapping[str, Any] | None, regularization: Sequence[tuple[str, Image]]
) -> dict[str, Any]:
    """Return the rest of what determines the result, as JSON types.

    Args:
        image: the prepared image.
        mask: its mask.
        framing: which part of the picture it is.
        regularization: captioned images.
    """
    return _as_json(
        {
            "picture": images_sha256([("", image)]),
            "mask": images_sha256([("", mask)]),
            "framing": framing,
            "regularization set": images_sha256(regularization),
        }
    )


def concept_identity(identity: Mapping[str, Any]) -> dict[str, str]:
    """Return what a concept's metadata names of its picture, configuration and base model, on whatever machine.

    Args:
        identity: `settings_identity` and `pictures_identity`.
    """
    device = {name: value for name, value in identity["device"].items() if name not in _MACHINE}
    named = {name: value for name, value in identity.items() if name != "versions"} | {"device": device}
    return {
        "identity_sha256": hashlib.sha256(to_json(named).encode()).hexdigest(),
        "picture_sha256": identity["picture"],
    }


def _as_json(values: dict[str, Any]) -> dict[str, Any]:
    """Return values as they are read again from a checkpoint."""
    read: dict[str, Any] = json.loads(json.dumps(values))
    return read


def checkpointing_of(kept: Kept, identity: dict[str, Any], params: TrainingParams, tracker: Tracker) -> Checkpointing:
    """Return how this training is saved, and where it continues.

    Args:
        kept: from `load_kept`.
        identity: `settings_identity` and `pictures_identity`.
        params: of the training.
        tracker: its run is tagged with the run that it continues.

    Raises:
        InputError: the interrupted training had another configuration, and `training.resume` is not `force`; or
            another optimizer.
    """
    run_id = tracker.run_id()

    def save(checkpoint: Checkpoint) -> None:
        kept.checkpoints.save(CONCEPT, {**checkpoint, "identity": identity, "run_id": run_id})

    if (latest := kept.latest) is not None:
        if changes := _check_changes(latest, identity, params):
            log.warning("Continuing with changes: %s. No uninterrupted training gives this concept.", changes)
        step = latest["state"]["step"]
        log.info("Continuing the interrupted training after step %d of %d.", step, params.num_steps)
        tracker.set_tag("resumed_at_step", str(step))
        if latest["run_id"] is not None:
            tracker.set_tag("resumed_from", latest["run_id"])
    return Checkpointing(
        save,
        params.checkpoint_minutes,
        params.max_minutes,
        latest,
        discard=lambda: kept.checkpoints.discard(CONCEPT),
    )


def _check_changes(latest: Checkpoint, identity: dict[str, Any], params: TrainingParams) -> str:
    """Return the changes of this part of the identity, which `training.resume=force` allows; "" without any.

    Raises:
        InputError: see `checkpointing_of`.
    """
    changes = dict(_changes({name: latest["identity"].get(name) for name in identity}, identity))
    described = ", ".join(changes.values())
    interrupted = f"the configuration of the training that was interrupted after step {latest['state']['step']}"
    if changes and params.resume != "force":
        raise InputError(
            expected=interrupted,
            got=described,
            remedy=f"{_START_ANEW}, or training.resume=force to continue with these changes",
        )
    if _OPTIMIZERS & changes.keys():
        raise InputError(expected=f"{interrupted}: its optimizers", got=described, remedy=_START_ANEW)
    if not changes:
        _check_diverged(latest, params)
    return described


def _check_diverged(latest: Checkpoint, params: TrainingParams) -> None:
    """Check that a training that has diverged is not repeated with the same configuration.

    Raises:
        InputError: it would diverge again.
    """
    can_halve = params.on_divergence == "halve_lr" and len(latest["halvings"]) < MOST_HALVINGS
    if latest["diverged_at"] is None or can_halve or params.resume == "force":
        return
    halve = "" if latest["halvings"] else ", or with training.on_divergence=halve_lr"
    raise InputError(
        expected=f"another configuration than that of the training that diverged at step {latest['diverged_at']}",
        got=f"the same; its last good state, of step {latest['state']['step']}, is kept",
        remedy=f"continue with lower rates and training.resume=force{halve}; or {_START_ANEW}",
    )


def _changes(before: Any, now: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted name, description) of each difference between two JSON values."""
    if before == now:
        return
    before_items, now_items = _items(before), _items(now)
    if before_items is None or now_items is None:
        yield name, f"{name} {_quoted(before)} → {_quoted(now)}"
        return
    for key in {**before_items, **now_items}:
        yield from _changes(before_items.get(key), now_items.get(key), f"{name}.{key}" if name else key)


def _items(value: Any) -> dict[str, Any] | None:
    """Return a mapping, or a list of mappings by index; None for a plain value."""
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return {str(index): item for index, item in enumerate(value)}
    return value if isinstance(value, dict) else None


def _quoted(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if _SHA256.fullmatch(text):
        return text[:_QUOTED_DIGITS]
    return text if len(text) <= _QUOTED_CHARACTERS else f"{text[: _QUOTED_CHARACTERS - 1]}…"
