"""Make numbers from a name and a shape alone, and checkpoints whose weights are such numbers.

They come from SHAKE-256: no random generator of a library and no order of calls decides them.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from pathlib import Path

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

DATA = Path(__file__).parent
CHECKPOINTS = DATA / "checkpoints"
"""One folder a checkpoint: config, tokenizer and image processor, without weights."""
ENCODERS = ("encoder_vision", "encoder_text", "encoder_cross")
"""Checkpoints of the frozen encoders."""
FAMILIES = sorted({p.name for p in CHECKPOINTS.iterdir()} - set(ENCODERS))
"""Generative checkpoints."""
DTYPES = {torch.float32, torch.float64}


def numbers(name: str, *shape: int) -> NDArray[np.float64]:
    """Return float64[shape], uniform, of mean 0 and variance 1, decided by `name` and count."""
    count = math.prod(shape)
    drawn = np.frombuffer(hashlib.shake_256(name.encode()).digest(4 * count), dtype="<u4")
    return ((drawn + 0.5) / 2**31 - 1).reshape(shape) * math.sqrt(3)


def tensor(name: str, *shape: int) -> Tensor:
    """Return `numbers` as a float64 tensor."""
    return torch.from_numpy(np.array(numbers(name, *shape)))


def unit(name: str, *shape: int) -> Tensor:
    """Return rows of unit length, float64[shape], more alike than chance, as encoders' are."""
    rows = tensor(name, *shape) + 0.6
    return rows / rows.norm(dim=-1, keepdim=True)


def choice(name: str, count: int) -> int:
    """Return a number from 0 to count - 1, decided by `name`."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % count


def checkpoint(name: str, folder: Path) -> Path:
    """Write the checkpoint `name` to `folder`, with weights that its tensors' names decide.

    Returns:
        `folder`.
    """
    shutil.copytree(CHECKPOINTS / name, folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, config.architectures[0])
    kind(config).save_pretrained(folder)
    shutil.copytree(CHECKPOINTS / name, folder, dirs_exist_ok=True)
    path = folder / "model.safetensors"
    values = {key: _weight(key, value) for key, value in load_file(path).items()}
    save_file(values, path, metadata={"format": "pt"})
    return folder


def _weight(name: str, default: Tensor) -> Tensor:
    """Return the value of one tensor of a checkpoint; limits and counters stay as they are."""
    if default.dtype not in DTYPES or not bool(default.isfinite().all()):
        return default
    drawn = tensor(name, *default.shape)
    if default.ndim > 1:
        value = drawn * (1.5 / math.sqrt(math.prod(default.shape[1:])))
    elif name.endswith("bias") or "mean" in name:
        value = 0.1 * drawn
    else:
        value = 1 + 0.1 * drawn
    return value.to(default.dtype).contiguous()


def fill(tensors: dict[str, Tensor], *, scale: float) -> None:
    """Give tensors values that their names decide, `scale` times a usual initialisation."""
    with torch.no_grad():
        for name, value in tensors.items():
            fan = math.prod(value.shape[1:]) if value.ndim > 1 else 1
            size = scale / math.sqrt(fan) if value.ndim > 1 else 0.1 * scale
            value.copy_(tensor(name, *value.shape) * size)
