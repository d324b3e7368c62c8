"""Packages of the default model whose files are damaged are named."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch
from torch import nn

from vlduet.errors import PackageError
from vlduet.model import nano

GGUF_START = b"GGUF" + struct.pack("<IQQ", 3, 2**40, 2**40)
"""Header that promises more tensors and keys than there are bytes."""


@pytest.mark.parametrize(
    "content", [None, b"", b"GGUF", GGUF_START, GGUF_START + bytes(500), bytes(4096)]
)
def test_a_damaged_language_model_is_named(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / nano.GGUF_NAME).write_bytes(content)
    with pytest.raises(PackageError, match="Delete that folder") as error_info:
        nano._load_language_model(tmp_path)
    assert str(error_info.value).startswith(str(tmp_path))
    assert len(str(error_info.value).splitlines()) == 1


@pytest.mark.parametrize("damage", ["missing", "empty", "half", "flipped", "other tensors"])
def test_a_damaged_vision_tower_is_named(tmp_path: Path, damage: str) -> None:
    (tmp_path / "models").mkdir()
    path = tmp_path / "models" / "lite0.pth"
    torch.save({"_fc.weight": torch.zeros(8, 8), "_fc.bias": torch.zeros(8)}, path)
    content = bytearray(path.read_bytes())
    path.unlink()
    if damage == "half":
        content = content[: len(content) // 2]
    elif damage == "flipped":
        content[-30] ^= 255
    if damage != "missing":
        path.write_bytes(b"" if damage == "empty" else content)
    with pytest.raises(PackageError, match="broken package"):
        nano._load_vision_tower(nn.Linear(2, 2), tmp_path)  # type: ignore[arg-type]
