"""What frozen encoders see, on disk: computed once a content and encoder, whoever asks.

One `.npy` file an image or text, named by the hash of its content and of everything that decides the features, so a stale
feature cannot be read and several processes can share one folder.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

MEMORY = 256 << 20
"""Bytes that are kept without a folder: enough to see an image twice, not enough to hurt who indexes a million."""


class FeatureCache:
    """float32 tensors by key: [tokens, Dv] of a vision tower, [D] of a slice's encoder.

    Args:
        folder: where they are kept; None keeps the newest `memory` bytes of them in memory.
    """

    def __init__(self, folder: Path | None, *, memory: int = MEMORY):
        self.folder, self.memory = folder, memory
        self._memory: dict[str, Tensor] = {}
        self._bytes = 0
        self._lock = threading.Lock()  # the thread that lays out the next batch asks encoders too

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / key[:2] / f"{key}.npy"

    def get(self, key: str) -> Tensor | None:
        """The features, or None. A file that a killed process left broken counts as missing."""
        if self.folder is None:
            return self._memory.get(key)
        try:
            # Copy on write: pages are read when they are used, and the file is never written.
            return torch.from_numpy(np.load(self._path(key), mmap_mode="c"))
        except (FileNotFoundError, ValueError, EOFError):
            return None

    def put(self, key: str, features: Tensor) -> None:
        """Keep them; atomic on disk."""
        kept = features.detach().cpu().float().contiguous()
        if self.folder is None:
            with self._lock:
                self._bytes += kept.nbytes - (self._memory[key].nbytes if key in self._memory else 0)
                self._memory[key] = kept
                while self._bytes > self.memory:
                    self._bytes -= self._memory.pop(next(iter(self._memory))).nbytes
            return
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        with temporary.open("wb") as file:
            np.save(file, kept.numpy())
        temporary.replace(path)
