"""Memory of the models whose golden vectors this machine has reproduced with its libraries.

A command that opens a model for one query spends a third of a second on embedding the golden inputs
again. What decides them are the files of the model, which are compared at every opening, and the
libraries and the machine, which are the name of a file in the cache folder.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from vlduet import __version__
from vlduet.integrity import cache_dir

DECISIVE_LIBRARIES = ("torch", "transformers", "tokenizers", "pillow", "numpy")
"""Libraries whose version may change an embedding."""


def find_memory(manifest: Mapping[str, Any], *, dtype: torch.dtype, device: str) -> Path | None:
    """Return the file that says that a model was compared in these circumstances, and matched.

    It need not exist. None for a model of an earlier version, whose manifest has no hash.

    Args:
        manifest: content of vlduet.json.
        dtype: dtype of the model's weights.
        device: name of the device that computes.
    """
    sealed = manifest.get("manifest_sha256")
    if sealed is None:
        return None
    machine = [platform.node(), platform.machine(), torch.backends.cpu.get_cpu_capability()]
    versions = [__version__, *map(version, DECISIVE_LIBRARIES)]
    facts = [sealed, manifest["base_fingerprint"], str(dtype), device, machine, versions]
    name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
    return cache_dir() / "golden" / name


def is_remembered(path: Path) -> bool:
    """Return whether the file exists that `find_memory` names; False if the cache is unreadable."""
    with suppress(OSError):
        return path.exists()
    return False


def remember(path: Path) -> None:
    """Create the file that `find_memory` names; a cache that cannot be written stays as it is."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
