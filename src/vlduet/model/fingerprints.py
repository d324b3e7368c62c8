"""Fingerprint of a checkpoint folder: a hash of the files that its outputs depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from vlduet.errors import ModelError
from vlduet.integrity import FileDigest, hash_files
from vlduet.library_errors import COPY_AGAIN
from vlduet.structured_files import (
    MAX_JSON_BYTES,
    read_safetensors_header,
    require_regular_file,
)

FINGERPRINT_DIGITS = 32
"""Number of hexadecimal digits of a fingerprint."""
SAMPLED_DIGITS = 16
"""Number of hexadecimal digits of a fingerprint of earlier versions, which sampled the weights."""
SAMPLE_BYTES = 1 << 12
"""Number of bytes that a sampled fingerprint reads from every stride of a tensor."""
SAMPLE_STRIDE_BYTES = 1 << 20
"""Distance between the samples of a sampled fingerprint within a tensor."""
PROCESSING_FILES = (
    "added_tokens.json",
    "merges.txt",
    "model.safetensors.index.json",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
"""Files beside config and weights that decide how a checkpoint reads texts and images."""


def fingerprint_checkpoint(folder: Path, *, like: str | None = None) -> str:
    """Return a hash of a checkpoint's config, weights, tokenizer and processor files.

    Every byte counts; files that have not changed since an earlier call are not read again.

    Args:
        folder: folder of the checkpoint.
        like: fingerprint to compare the result with. If it has SAMPLED_DIGITS digits, an earlier
            version computed it, and the result is what that version computed.

    Returns:
        FINGERPRINT_DIGITS or, after `like`, SAMPLED_DIGITS hexadecimal digits.

    Raises:
        FileNotFoundError: the folder has no config.json.
        ModelError: config.json is no regular file, or a weights file is not in safetensors format:
            the numbers of its header do not fit its size, for example.
    """
    if like is not None and len(like) == SAMPLED_DIGITS:
        return _fingerprint_samples(folder)
    return fingerprint_files(hash_checkpoint(folder))


def hash_checkpoint(folder: Path) -> dict[str, FileDigest]:
    """Return size and SHA-256 of the files of a checkpoint that count for its fingerprint.

    These are config.json, the files model*.safetensors, and those of PROCESSING_FILES that exist.
    Raises as `fingerprint_checkpoint` does.
    """
    weights = sorted(folder.glob("model*.safetensors"))
    for path in weights:
        _read_header(path)
    names = [name for name in PROCESSING_FILES if (folder / name).is_file()]
    return hash_files(folder, ["config.json", *(path.name for path in weights), *names])


def fingerprint_files(files: Mapping[str, FileDigest]) -> str:
    """Return FINGERPRINT_DIGITS hexadecimal digits that identify names and contents of files."""
    content = json.dumps(files, sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()[:FINGERPRINT_DIGITS]


def _fingerprint_samples(folder: Path) -> str:
    """Return the fingerprint of earlier versions, which reads kilobytes of every megabyte.

    It covers config.json, and names, sizes, headers and samples of the files model*.safetensors.
    Raises as `fingerprint_checkpoint` does.
    """
    config = folder / "config.json"
    require_regular_file(config, error_class=ModelError, max_bytes=MAX_JSON_BYTES)
    digest = hashlib.sha256(config.read_bytes())
    for path in sorted(folder.glob("model*.safetensors")):
        digest.update(f"{path.name}:{path.stat().st_size}".encode())
        header, spans = _read_header(path)
        digest.update(header[8:])
        with path.open("rb") as file:
            for offset, size in _sample_spans(spans):
                file.seek(len(header) + offset)
                digest.update(file.read(size))
    return digest.hexdigest()[:SAMPLED_DIGITS]


def _read_header(path: Path) -> tuple[bytes, list[tuple[int, int]]]:
    """Return the header of a safetensors file, and begin and end of its tensors, sorted.

    The header begins with its size in 8 bytes. Positions count from the end of the header.

    Raises:
        ModelError: the file is not in safetensors format.
    """
    header, tensors = read_safetensors_header(path, error_class=ModelError, fix=COPY_AGAIN)
    spans = sorted((*tensor["data_offsets"],) for tensor in tensors.values())
    return len(header).to_bytes(8, "little") + header, spans


def _sample_spans(spans: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield position and size of the samples of tensors: the beginning of every stride."""
    for begin, end in spans:
        for offset in range(begin, end, SAMPLE_STRIDE_BYTES):
            yield offset, min(end - offset, SAMPLE_BYTES)
