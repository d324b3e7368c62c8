"""Size of the memory of a device: what does not fit into all of it is refused beforehand."""

from __future__ import annotations

import os
from pathlib import Path

import torch

CGROUP_FILES = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
"""Files with the limit of a container, of both versions of control groups."""
UNKNOWN_MEMORY = 1 << 62
"""Size of a memory that the system does not tell, in bytes: everything fits."""


def measure_memory(device: torch.device) -> int:
    """Return the size of a GPU's memory, or of the machine's or container's, in bytes.

    It counts what is in use, too. `UNKNOWN_MEMORY` if the system does not tell.
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    sizes = [_read_limit(path) for path in CGROUP_FILES]
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):  # not on Windows
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(sizes)


def _read_limit(path: Path) -> int:
    """Return the number in a file of `CGROUP_FILES`; `UNKNOWN_MEMORY` without file or limit."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # "max"
        return UNKNOWN_MEMORY
