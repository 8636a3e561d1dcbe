"""Models of the Hugging Face hub: from the cache without network, or downloaded once."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from dreamartist_pipeline.backbones.holding.folder import (
    CONFIG_SUFFIXES,
    SNAPSHOTS,
    FolderParts,
    missing_files,
    weight_files,
)
from dreamartist_pipeline.core.model_location import HUB, HubId
from dreamartist_pipeline.errors import InputError

_TIMEOUT_S = 10.0
_SNAPSHOT = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)/snapshots/(?P<commit>[0-9a-f]+)")

log = logging.getLogger(__name__)

NeededParts = Callable[[Path], tuple[FolderParts, Sequence[str]]]
"""Folder of a snapshot that has the marker -> the parts in it, and the names of those that are needed."""


def hub_folder(hub: HubId, marker: str, needed: NeededParts, *, half: bool) -> Path:
    """Return the snapshot of a repository in the cache, downloaded if a needed file is missing.

    A snapshot that is complete is not compared with the hub: another commit is taken by its revision.

    Args:
        hub: the repository.
        marker: the file in its root that tells what else is needed.
        needed: the parts to download.
        half: download weights in half precision, where there are such.

    Raises:
        InputError: it is not cached, and cannot be downloaded; or has no marker.
    """
    marked = try_to_load_from_cache(hub.repository, marker, revision=hub.revision)
    if isinstance(marked, str) and not missing_files(*needed(Path(marked).parent)):
        return Path(marked).parent
    with _named(hub):
        names = _names_in(hub)
        if marker not in names:
            raise _unmarked(hub, marker, names)
        marked = hf_hub_download(hub.repository, marker, revision=hub.revision, etag_timeout=_TIMEOUT_S)
        root = Path(marked).parent
        parts, names_of_parts = needed(root)
        files = [
            file for part in names_of_parts for file in _files_of(parts.part(part).relative_to(root), names, half=half)
        ]
        snapshot_download(
            hub.repository, revision=hub.revision, allow_patterns=[marker, *files], etag_timeout=_TIMEOUT_S
        )
    log.info("Downloaded %s, commit %s.", hub, root.name)
    return root


def hub_file(hub: HubId, file: str) -> Path:
    """Return a file of a repository in the cache, downloaded if it is missing.

    Raises:
        InputError: it is not cached, and cannot be downloaded.
    """
    cached = try_to_load_from_cache(hub.repository, file, revision=hub.revision)
    if isinstance(cached, str):
        return Path(cached)
    with _named(hub):
        _names_in(hub)  # fails at once without network
        return Path(hf_hub_download(hub.repository, file, revision=hub.revision, etag_timeout=_TIMEOUT_S))


def snapshot_in(folder: Path) -> Path:
    """Return the snapshot of the default branch, for the folder of a repository in the cache; others as they are.

    Raises:
        InputError: the cache has no snapshot of the default branch.
    """
    if not (folder / SNAPSHOTS).is_dir():
        return folder
    branch = folder / "refs" / constants.DEFAULT_REVISION
    commits = sorted(each.name for each in (folder / SNAPSHOTS).iterdir())
    commit = branch.read_text(encoding="utf-8").strip() if branch.is_file() else None
    if commit is None and len(commits) == 1:
        commit = commits[0]
    if commit not in commits:
        raise InputError(
            expected=f"a snapshot in {folder}",
            got=", ".join(commits) or "none",
            remedy=f"set base_model to one of them, {folder / SNAPSHOTS}/COMMIT",
        )
    return folder / SNAPSHOTS / str(commit)


def repository_of(path: Path) -> str | None:
    """Return `OWNER/NAME` for a folder or file in the cache of the hub, None for others."""
    match = _SNAPSHOT.search(path.as_posix())
    return f"{match['owner']}/{match['name']}" if match else None


def _names_in(hub: HubId) -> list[str]:
    """Return the names of all files of a repository."""
    siblings = HfApi().model_info(hub.repository, revision=hub.revision, timeout=_TIMEOUT_S).siblings
    return [sibling.rfilename for sibling in siblings or ()]


def _files_of(folder: Path, names: Sequence[str], *, half: bool) -> Iterator[str]:
    """Yield the files of a part: configurations, vocabulary, and the weights to be read."""
    own = {Path(name).name: name for name in names if Path(name).parent == folder}
    yield from (name for name in own.values() if name.endswith(CONFIG_SUFFIXES))
    yield from (own[name] for name in weight_files(own, half=half))


def _unmarked(hub: HubId, marker: str, names: Sequence[str]) -> InputError:
    files = [name for name in names if name.endswith((".safetensors", ".ckpt"))]
    return InputError(
        expected=f"a repository with {marker}",
        got=f"{hub} without it",
        remedy=f"choose one of its files, such as {HUB}{hub.repository}/{files[0]}" if files else "choose another one",
    )


@contextmanager
def _named(hub: HubId) -> Iterator[None]:
    """Convert what huggingface_hub raises on a model that it cannot give."""
    try:
        yield
    except InputError:
        raise
    except GatedRepoError as error:
        got, remedy = "a gated model", "accept its conditions"
        raise _unavailable(hub, got, remedy) from error
    except RepositoryNotFoundError as error:
        raise _unavailable(hub, "no such repository", "correct its name") from error
    except (RevisionNotFoundError, EntryNotFoundError) as error:
        raise _unavailable(hub, "no such revision or file", "choose one of the repository") from error
    except (HTTPError, OSError) as error:
        remedy = "connect to the network (HF_HUB_OFFLINE must not be set), or set base_model to a folder or file"
        raise _unavailable(hub, f"no connection ({type(error).__name__}: {error})", remedy) from error


def _unavailable(hub: HubId, got: str, remedy: str) -> InputError:
    page = f"{constants.ENDPOINT}/{hub.repository}"
    return InputError(
        expected=f"the model {hub} in the cache {constants.HF_HUB_CACHE} or from the Hugging Face hub",
        got=got,
        remedy=f"{remedy} (see {page}). HF_TOKEN is for private models, and for gated ones whose conditions were "
        "accepted there; HF_HUB_CACHE for another cache",
    )
