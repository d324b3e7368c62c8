"""Names on a model hub, ``ORG/NAME`` or ``ORG/NAME@REVISION``, in place of a local path.

1. path       an existing file or folder has priority over a name
2. cache      a complete snapshot in the user's cache is used; the network is not asked
3. download   what is neither is downloaded: to name it is to ask for it

A name whose first part is an existing folder, such as ``models/x`` beside ``models``, is a path
with a mistake: only `pull_model` downloads it. Address, cache and token are those of
huggingface_hub, which also reads HF_HUB_OFFLINE. Pickled weights and code are never downloaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal, Self, TypeAlias

from vlduet.errors import DataError, ModelError
from vlduet.logs import logger
from vlduet.structured_files import list_indexed_weights

Kind: TypeAlias = Literal["model", "dataset"]
"""Kind of a repository, as huggingface_hub calls it."""

MODEL_PATTERNS = [
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.model",
    "merges.txt",
    "vocab.txt",
]
"""Files of a model that are downloaded: weights, configs, tokenizer, processor, chat templates."""
DATA_PATTERNS = [
    *("*.parquet", "*.arrow", "*.jsonl", "*.ndjson", "*.json", "*.csv", "*.tsv", "*.txt"),
    *("*.tar", "*.tar.gz", "*.tgz"),
    *("*.png", "*.jpg", "*.jpeg", "*.webp", "*.gif", "*.bmp", "*.tif", "*.tiff"),
]
"""Files of a data set that are downloaded: tables, archives and images."""
PATTERNS: dict[Kind, list[str]] = {"model": MODEL_PATTERNS, "dataset": DATA_PATTERNS}
IGNORED_PATTERNS = [
    # Second copies of the weights for other libraries.
    *("consolidated*.safetensors", "original/*", "onnx/*", "openvino/*"),
    "dataset_infos.json",
]
"""Files that are not downloaded although their names end as those of `PATTERNS`."""

_NAME = re.compile(
    r"(?P<repository>(?!.*(--|\.\.))\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\w[\w./-]*))?", re.ASCII
)
_SNAPSHOT = re.compile(r"(models|datasets)--(?P<repository>.+)")
_INTERPRETATIONS = "Name an existing folder, or ORG/NAME or ORG/NAME@REVISION on the hub"


@dataclass(frozen=True, slots=True)
class HubName:
    """Name of a repository on a hub."""

    repository: str
    """``ORG/NAME``."""
    revision: str | None = None
    """Branch, tag or commit; None: the main branch."""

    @classmethod
    def parse(cls, text: str, kind: Kind = "model") -> Self | None:
        """Return the name in a text, or None if it has another form or ends as a file does."""
        match = _NAME.fullmatch(text)
        is_file = any(fnmatch(text.lower(), pattern) for pattern in PATTERNS[kind])
        return None if match is None or is_file else cls(match["repository"], match["revision"])

    def __str__(self) -> str:
        """Return ``ORG/NAME`` or ``ORG/NAME@REVISION``."""
        return self.repository if self.revision is None else f"{self.repository}@{self.revision}"


def resolve_model(name: Path | str) -> Path:
    """Return the local path of a model: `name` itself, or the snapshot of the name on the hub.

    A snapshot that is not in the cache is downloaded (see the module), with a progress bar. A path
    that does not exist and is no name is returned as it is: the caller says what it misses there.

    Raises:
        ModelError: the name is in no cache, and cannot be downloaded or may not be (offline, or a
            path with a mistake), or has no weights in safetensors format.
    """
    return _resolve(name, "model")


def resolve_dataset(name: Path | str) -> Path:
    """Return the local path of a data set, as `resolve_model` does. Raises DataError."""
    return _resolve(name, "dataset")


def pull_model(name: str, *, folder: Path | None = None) -> Path:
    """Download the newest files of a model on the hub; return their folder.

    What is complete is not downloaded again, and an interrupted download continues.

    Args:
        name: ``ORG/NAME`` or ``ORG/NAME@REVISION``; local paths are not looked at.
        folder: gets the files; None: the user's cache.

    Raises:
        ModelError: `name` has another form, cannot be downloaded, or has no weights in safetensors
            format.
    """
    hub_name = HubName.parse(name)
    if hub_name is None:
        fix = "Write ORG/NAME or ORG/NAME@REVISION"
        raise ModelError(f"'{name}' is no name of a model on the hub", fix=fix)
    return _download(hub_name, "model", folder=folder)


def describe_missing_path(path: Path) -> ModelError:
    """Return, not raise, the error of a path that does not exist and is no name on the hub."""
    return ModelError(
        "no such folder, and no name of a model on the hub", place=path, fix=_INTERPRETATIONS
    )


def describe_snapshot(folder: Path) -> str | None:
    """Return ``ORG/NAME@COMMIT`` of a snapshot in a cache of huggingface_hub, else None.

    The path decides; the folder need not exist.
    """
    match = _SNAPSHOT.fullmatch(folder.parent.parent.name)
    if match is None or folder.parent.name != "snapshots":
        return None
    return f"{match['repository'].replace('--', '/', 1)}@{folder.name}"


def find_base(path: Path, name: object) -> Path:
    """Return a saved path, or if it is gone the snapshot of a saved name in the cache, if any.

    Nothing is downloaded, since the user has not written the name.

    Args:
        path: path of a base or encoder in a manifest; returned as it is if there is no snapshot.
        name: result of `describe_snapshot` in the same manifest; anything else has no snapshot.
    """
    hub_name = None if path.exists() or not isinstance(name, str) else HubName.parse(name)
    folder = None if hub_name is None else _find_in_cache(hub_name, "model")
    return path if folder is None else folder


def list_commits(names: Iterable[tuple[Path | None, Kind]]) -> list[str]:
    """Return ``ORG/NAME@COMMIT`` of every name that is, or is found, in a cache, in their order.

    Existing paths outside of a cache, and None, are left out. Nothing is downloaded.
    """
    commits = []
    for path, kind in names:
        if path is None:
            continue
        hub_name = HubName.parse(str(path), kind)
        is_name = hub_name is not None and not path.exists()
        folder = _find_in_cache(hub_name, kind) if hub_name and is_name else path
        commit = None if folder is None else describe_snapshot(folder)
        if commit is not None:
            commits.append(commit)
    return commits


def _resolve(name: Path | str, kind: Kind) -> Path:
    """Return the path of a model or a data set, as `resolve_model` does."""
    path = Path(name)
    hub_name = None if path.exists() else HubName.parse(str(name), kind)
    if hub_name is None:
        return path
    folder = _find_in_cache(hub_name, kind)
    if folder is not None:
        return folder
    if path.parent.exists():
        bring = f"vlduet model pull {name}"
        if kind == "dataset":
            bring = f"hf download {hub_name.repository} --repo-type dataset --local-dir FOLDER"
        message = f"no such file or folder; a name on the hub? '{path.parent}' is a folder here"
        raise _ERRORS[kind](message, place=path, fix=f"Check the path, or bring it: {bring}")
    return _download(hub_name, kind)


_ERRORS: dict[Kind, type[ModelError] | type[DataError]] = {
    "model": ModelError,
    "dataset": DataError,
}


def _find_in_cache(hub_name: HubName, kind: Kind) -> Path | None:
    """Return the folder of a complete snapshot in the cache, or None; the network is not asked.

    An incomplete snapshot is one whose list of files, stored with it by a download, has more; of a
    model also one without all weights, as other programs leave behind that read configs alone.
    """
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = _fetch_snapshot(hub_name, kind, local_files_only=True)
    except (HFValidationError, LocalEntryNotFoundError):
        return None
    is_complete = kind == "dataset" or _has_weights(folder)
    return folder if is_complete else None


def _fetch_snapshot(
    hub_name: HubName, kind: Kind, *, folder: Path | None = None, local_files_only: bool = False
) -> Path:
    """Return the folder of a snapshot, in `folder` or in the cache, after downloading its files.

    With `local_files_only` nothing is downloaded. Raises the errors of huggingface_hub.
    """
    from huggingface_hub import snapshot_download

    path = snapshot_download(
        hub_name.repository,
        repo_type=kind,
        revision=hub_name.revision,
        allow_patterns=PATTERNS[kind],
        ignore_patterns=IGNORED_PATTERNS,
        local_dir=folder,
        local_files_only=local_files_only,
    )
    return Path(path)


def _has_weights(folder: Path) -> bool:
    """Return whether a folder has weights, and every file that an index of weights names."""
    for index in folder.glob("*.safetensors.index.json"):
        files = list_indexed_weights(index)
        if files is None or not all((folder / file).is_file() for file in files):
            return False
    return any(folder.rglob("*.safetensors"))


def _download(hub_name: HubName, kind: Kind, *, folder: Path | None = None) -> Path:
    """Download a repository to a folder or the cache, with a progress bar; return the folder.

    Raises:
        ModelError, DataError: by kind, if it cannot be downloaded; a model also without weights.
    """
    logger.info(f"{hub_name}: downloading from the hub")
    with _translate_errors(hub_name, kind):
        path = _fetch_snapshot(hub_name, kind, folder=folder)
    if kind == "model" and not _has_weights(path):
        message = "no .safetensors weights on the hub (pickled and GGUF weights are never read)"
        fix = "Use a version of the model in safetensors format"
        raise ModelError(message, place=hub_name, fix=fix)
    if kind == "dataset" and not any(path.iterdir()):
        endings = ", ".join(pattern.removeprefix("*") for pattern in DATA_PATTERNS)
        raise DataError(f"no files that end with {endings}", place=hub_name)
    return path


@contextmanager
def _translate_errors(hub_name: HubName, kind: Kind) -> Iterator[None]:
    """Turn the errors of a download in the block into one of ours, by the kind.

    Errors of the disk (OSError with a number) propagate.
    """
    from huggingface_hub import errors

    bring = f"hf download {hub_name.repository} --local-dir FOLDER"
    if kind == "dataset":
        bring = f"{bring} --repo-type dataset"
    fix = "Start the command again: the download continues"
    # The class of errors of connections, whose package differs between versions of the library.
    connection_error: type[Exception] = errors.HfHubHTTPError.__bases__[0]
    try:
        yield
        return
    except errors.GatedRepoError:
        message = "its authors give access on request"
        fix = "Ask for it on its page, then: hf auth login"
    except errors.RepositoryNotFoundError:
        message = f"neither a path here nor a {kind} on the hub that you have access to"
        fix = "Check the name; for a private one: hf auth login"
    except errors.RevisionNotFoundError:
        message = f"the hub has no revision '{hub_name.revision}' of it"
        fix = "Check the name after @"
    except errors.LocalEntryNotFoundError as error:
        is_offline = isinstance(error.__cause__, errors.OfflineModeIsEnabled)
        reason = "HF_HUB_OFFLINE is set" if is_offline else "the hub does not answer"
        message = f"neither a path here nor in the cache of the hub, and {reason}"
        fix = f"Download it where there is a network: {bring}; then name that folder"
    except errors.HFValidationError:
        message, fix = "no such path, and no valid name on the hub", _INTERPRETATIONS
    except errors.HfHubHTTPError as error:
        message = f"the hub answers with status {error.response.status_code}"
    except (connection_error, OSError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        message = f"the download was interrupted ({type(error).__name__})"
    raise _ERRORS[kind](message, place=hub_name, fix=fix)
