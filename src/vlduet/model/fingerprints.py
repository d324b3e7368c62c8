"""Fingerprint of a checkpoint folder: a hash that reads little of its weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from vlduet.errors import ModelError

FINGERPRINT_SAMPLE_BYTES = 1 << 12
"""Number of bytes that a fingerprint reads from every stride of a tensor."""
FINGERPRINT_STRIDE_BYTES = 1 << 20
"""Distance between the samples of a fingerprint within a tensor."""


def fingerprint_checkpoint(folder: Path) -> str:
    """Return a hash of a checkpoint's config and weights, 16 hexadecimal digits.

    Names and sizes of the files model*.safetensors are part of it; without any, the config is all.
    Only some kilobytes of every megabyte of each tensor are read: training a tensor changes nearly
    all of its numbers, and merging adapters leaves the other tensors as they were.

    Raises:
        FileNotFoundError: the folder has no config.json.
        ModelError: a weights file is not in safetensors format.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("model*.safetensors")):
        file_size = path.stat().st_size
        with path.open("rb") as file:
            digest.update(f"{path.name}:{file_size}".encode())
            header_size = file.read(8)
            header = file.read(min(int.from_bytes(header_size, "little"), file_size))
            digest.update(header)
            data_start = len(header_size) + len(header)
            try:
                tensors = json.loads(header)
                tensors.pop("__metadata__", None)
                spans = sorted(tensor["data_offsets"] for tensor in tensors.values())
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise ModelError(
                    "not a safetensors file", place=path, fix="Copy the checkpoint again"
                ) from error
            for begin, end in spans:
                for offset in range(begin, end, FINGERPRINT_STRIDE_BYTES):
                    file.seek(data_start + offset)
                    digest.update(file.read(min(end - offset, FINGERPRINT_SAMPLE_BYTES)))
    return digest.hexdigest()[:16]
