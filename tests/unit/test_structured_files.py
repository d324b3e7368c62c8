"""Small files that are not trusted: every reader refuses the same ten corruptions by name."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlduet.config_files import read_yaml_mapping
from vlduet.corpora.catalog import find_corpus_damage
from vlduet.data.readers.folders import _list_saved_dataset_files
from vlduet.data.readers.image_folders import _read_sidecars
from vlduet.encoders.dual import read_manifest
from vlduet.encoders.loading import _read_max_tokens, _read_pooling
from vlduet.errors import ConfigError, ModelError, VLDuetError
from vlduet.eval.certify import load_targets
from vlduet.eval.comparison import read_run_scores
from vlduet.eval.run import _read_provenance
from vlduet.model import sentence_transformers_format as published
from vlduet.model.adapters import load_lora
from vlduet.model.chat_template import _read_key
from vlduet.model.checkpoint import read_checkpoint
from vlduet.model.config_limits import check_config_numbers
from vlduet.model.processing import read_config
from vlduet.retrieval.index import IndexManifest
from vlduet.structured_files import (
    MAX_JSON_DEPTH,
    check_fields,
    parse_json,
    read_safetensors_header,
    require_regular_file,
)
from vlduet.train.checkpointing import load_state

ReadFunction = Callable[[Path], object]


def read_training_state(path: Path) -> object:
    """Load the state that `path`, OUT/state/FILE, belongs to, into no run at all."""
    run = SimpleNamespace(config=SimpleNamespace(out=path.parent.parent))
    return load_state(cast(Any, run))


def read_adapter(path: Path) -> object:
    """Load the adapter that the config at `path` belongs to, into no model at all."""
    (path.parent / "adapter_model.safetensors").touch()
    return load_lora(cast(Any, None), path.parent)


def read_saved_dataset(path: Path) -> object:
    """List the files of the saved dataset whose state is at `path`."""
    (path.parent / "dataset_info.json").touch()
    return _list_saved_dataset_files(path.parent)


READERS: dict[str, tuple[str, ReadFunction]] = {
    "model": ("vlduet.json", lambda path: read_checkpoint(path.parent)),
    "checkpoint": ("config.json", lambda path: read_config(path.parent)),
    "adapter": ("adapter_config.json", read_adapter),
    "dual encoder": ("dual.json", lambda path: read_manifest(path.parent)),
    "index": ("manifest.json", lambda path: IndexManifest.read(path.parent)),
    "state": ("state/state.json", read_training_state),
    "saved dataset": ("state.json", read_saved_dataset),
    "predictions": ("run.json", lambda path: _read_provenance(path.parent)),
    "scores": ("x/scores.json", lambda path: read_run_scores(path.parent.parent)),
    "targets": ("targets.json", load_targets),
    "corpus": ("manifest.json", lambda path: find_corpus_damage(path.parent)),
    "published model": ("modules.json", lambda path: published.read_published_model(path.parent)),
    "published pooling": ("1_Pooling/config.json", published._read_pooling),
    "published head": ("2_Dense/config.json", lambda path: published._read_dense(path.parent)),
    # Their keys are all optional.
    "template": ("chat_template.json", _read_key),
    "pooling": ("1_Pooling/config.json", lambda path: _read_pooling(path.parent.parent)),
    "limit": ("sentence_bert_config.json", lambda path: _read_max_tokens(path.parent)),
    "modules": ("modules.json", lambda path: _read_max_tokens(path.parent)),
    "image processor": (
        "preprocessor_config.json",
        lambda path: check_config_numbers(path.parent, {}),
    ),
    "published prompts": (
        "config_sentence_transformers.json",
        lambda path: published._read_prompts(path, is_normalized=True),
    ),
    "sidecar": ("a.json", lambda path: _read_sidecars(path.with_suffix(".png"), [path.name])),
    "config": ("run.yaml", read_yaml_mapping),
}
OPTIONAL = {
    "checkpoint", "template", "pooling", "limit", "modules", "image processor", "sidecar", "config",
    "published pooling", "published prompts",
}  # fmt: skip
"""Readers whose keys may all be missing."""
FREE_TYPES = {"template", "modules"}
"""Readers that read a list as if there were no key, or expect one."""
SKIPPED_IF_IRREGULAR = {
    "checkpoint", "model", "saved dataset", "state", "template",
}  # fmt: skip
"""Readers of files whose kind another message tells, or which are passed over if they are none."""
CONTENTS: dict[str, bytes] = {
    "empty": b"",
    "cut": b'{"format": 1, "dim": [1, 2',
    "binary zeros": bytes(100),
    "another type": b"[[1]]",
    "deep nesting": b'{"format": ' + b"[" * 1500 + b"]" * 1500 + b"}",
    "huge integer": b'{"format": ' + b"9" * 5000 + b"}",
    "wrong UTF-8": b'{"format": "\xff\xfe"}',
    "missing key": b"{}",
}


@pytest.mark.parametrize("corruption", [*CONTENTS, "a folder", "a pipe"])
@pytest.mark.parametrize("reader", READERS)
def test_each_reader_names_the_corrupt_file(tmp_path: Path, reader: str, corruption: str) -> None:
    name, read = READERS[reader]
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    is_irregular = corruption not in CONTENTS
    if corruption == "a folder":
        path.mkdir()
    elif corruption == "a pipe":
        os.mkfifo(path)
    else:
        path.write_bytes(CONTENTS[corruption])
    is_valid = (corruption == "missing key" and reader in OPTIONAL - {"modules"}) or (
        (corruption == "another type" and reader in FREE_TYPES - {"modules"})
        or (is_irregular and reader in SKIPPED_IF_IRREGULAR)
    )
    if is_valid:
        try:
            read(path)
        except VLDuetError as error:
            assert str(tmp_path) in str(error)
        return
    with pytest.raises(VLDuetError) as caught:
        read(path)
    message = str(caught.value)
    assert str(path) in message and len(message.splitlines()) == 1
    assert len(message) < 700 + len(str(path))


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"base": 7}, "base"),
        ({"head": "mlp"}, "head"),
        ({"head": {"kind": "tower", "dim": 4}}, "tower"),
        ({"head": {"kind": "mlp", "dim": "16"}}, "head.dim"),
        ({"head": {"kind": "mlp", "dim": -1}}, "dim"),
        ({"prompts": {"audio": "x"}}, "audio"),
        ({"prompts": {"chat": 1}}, "chat"),
        ({"trained": []}, "trained"),
        ({"trained": {"x": {"sha256": 5}}}, "trained.x"),
        ({"limits": {"max_tokens": "many"}}, "max_tokens"),
    ],
)
def test_a_manifest_of_another_shape_is_refused_by_key(
    tmp_path: Path, changes: dict[str, Any], key: str
) -> None:
    manifest = {
        "format": 1,
        "base": ".",
        "base_fingerprint": "0",
        "image_backend": "x",
        "adapter": False,
        "trained": {},
        "prompts": {},
        "head": {"kind": "none", "dim": 4},
    }
    path = tmp_path / "vlduet.json"
    path.write_text(json.dumps(manifest | changes))
    with pytest.raises((ModelError, ConfigError)) as caught:
        read_checkpoint(tmp_path)
    assert str(path) in str(caught.value) and key in str(caught.value)


def nest(value: Any, levels: int) -> Any:
    for _ in range(levels):
        value = [value]
    return value


def test_the_depth_of_values_is_bounded() -> None:
    text = json.dumps(nest(1, MAX_JSON_DEPTH))
    assert parse_json(text, place="x", error_class=ConfigError, fix="") == json.loads(text)
    with pytest.raises(ConfigError, match="within each other"):
        parse_json(f"[{text}]", place="x", error_class=ConfigError, fix="")


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**62), 2**62)
    | st.floats(allow_nan=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(value=JSON_VALUES)
def test_valid_values_are_read_as_by_json(value: Any) -> None:
    text = json.dumps(value)
    assert parse_json(text.encode(), place="x", error_class=ConfigError, fix="") == value


@given(value=JSON_VALUES, kind=st.sampled_from([bool, dict, float, int, list, str, type(None)]))
def test_types_are_those_of_json(value: Any, kind: type) -> None:
    is_number = kind is float and type(value) is int
    if type(value) is kind or is_number:
        check_fields({"a": {"b": value}}, {"a.b": kind}, place="x", error_class=ConfigError, fix="")
    else:
        with pytest.raises(ConfigError, match=r"'a\.b' is"):
            check_fields(
                {"a": {"b": value}}, {"a.b": kind}, place="x", error_class=ConfigError, fix=""
            )


def test_a_device_is_no_regular_file_and_a_missing_path_is_not_checked(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match="not a regular file"):
        require_regular_file(link, error_class=ConfigError)
    require_regular_file(tmp_path / "missing", error_class=ConfigError)


def test_a_sparse_file_is_refused_by_its_size(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(50 << 30)
    with pytest.raises(ModelError, match="51200 MiB"):
        read_config(tmp_path)


# ------------------------------------------------------------------ safetensors


def write_header(path: Path, header: bytes, *, num_data_bytes: int = 16) -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(num_data_bytes))


def describe(offsets: Any, shape: Any = (4,)) -> bytes:
    tensor = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
    return json.dumps({"__metadata__": {"format": "pt"}, "w": tensor}).encode()


def read_header(path: Path) -> tuple[bytes, dict[str, dict[str, Any]]]:
    return read_safetensors_header(path, error_class=ModelError, fix="Copy it again")


def test_a_header_gives_the_tensors_without_metadata(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_header(path, describe([0, 16]))
    header, tensors = read_header(path)
    assert header == describe([0, 16]) and list(tensors) == ["w"]


@pytest.mark.parametrize(
    "header",
    [
        describe([0, 2**60]),
        describe([0, 17]),
        describe([-(2**40), 16]),
        describe([16, 0]),
        describe([0, 16, 16]),
        describe(["0", "16"]),
        describe([0, 16], (-4,)),
        describe([0.0, 16.0]),
        describe(7),
        b'{"w": 5}',
        b"[1]",
        b"[" * 3000,
    ],
)
def test_numbers_beyond_the_file_are_refused(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "model.safetensors"
    write_header(path, header)
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        read_header(path)


@pytest.mark.parametrize("content", [b"", b"123", struct.pack("<Q", 2**62) + b"{}", bytes(8)])
def test_a_header_size_beyond_the_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="not a safetensors file"):
        read_header(path)
