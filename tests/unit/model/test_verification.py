"""Model folders whose files were damaged: each is refused, and the damaged file is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from helpers import tiny
from helpers.restored_folders import restore_folder
from vlduet.cli.main import app
from vlduet.errors import ConfigError, ModelError
from vlduet.model.backbone import load_backbone
from vlduet.model.checkpoint import find_damage, read_checkpoint
from vlduet.model.duet import DuetModel
from vlduet.model.fingerprints import (
    FINGERPRINT_DIGITS,
    SAMPLED_DIGITS,
    fingerprint_checkpoint,
)

LISTED_FILES = ("duet.safetensors", "golden.safetensors", "vlduet.json")
BASE_FILES = ("config.json", "model.safetensors", "tokenizer.json")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its base and a merged model; tests restore what they change."""
    root = tmp_path_factory.mktemp("models")
    tiny.build_qwen2_vl(root / "base")
    DuetModel.from_pretrained(root / "base").save_pretrained(root / "model")
    DuetModel.from_pretrained(root / "model").save_merged(root / "merged")
    return root


@pytest.fixture
def damaged(folders: Path) -> Iterator[Path]:
    """The folders, which are restored at the end."""
    with restore_folder(folders):
        yield folders


def flip(path: Path, position: int) -> bytes:
    """Change one bit of a file, and return its former content."""
    content = path.read_bytes()
    changed = bytearray(content)
    changed[position % len(content)] ^= 1
    path.write_bytes(changed)
    return content


@pytest.mark.parametrize("name", [f"model/{name}" for name in LISTED_FILES])
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(position=st.integers(0, 1 << 20))
@example(position=-1)
def test_a_changed_bit_of_a_model_folder_is_refused(
    name: str, folders: Path, position: int
) -> None:
    path = folders / name
    original = json.loads((folders / "model" / "vlduet.json").read_text())
    content = flip(path, position)
    try:
        with pytest.raises((ModelError, ConfigError)):
            read_checkpoint(folders / "model")
            if json.loads((folders / "model" / "vlduet.json").read_text()) == original:
                raise ModelError("white space of the manifest has no meaning")
    finally:
        path.write_bytes(content)
    read_checkpoint(folders / "model")


@pytest.mark.parametrize("name", BASE_FILES)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(position=st.integers(0, 1 << 20))
def test_a_changed_bit_of_a_base_is_refused_and_changes_its_fingerprint(
    name: str, folders: Path, position: int
) -> None:
    fingerprint = fingerprint_checkpoint(folders / "base")
    content = flip(folders / "base" / name, position)
    try:
        with pytest.raises(ModelError, match=rf"(base' has changed: {name} has|safetensors)"):
            read_checkpoint(folders / "model")
        if not (name == "model.safetensors" and position % len(content) < 8192):
            assert fingerprint_checkpoint(folders / "base") != fingerprint
    finally:
        (folders / "base" / name).write_bytes(content)
    assert fingerprint_checkpoint(folders / "base") == fingerprint


@pytest.mark.parametrize(
    "name", ["duet.safetensors", "golden.safetensors", "chat_template.jinja", "model.safetensors"]
)
@pytest.mark.parametrize("damage", ["missing", "empty", "half", "zeros"])
def test_a_damaged_file_of_a_merged_folder_is_named(name: str, damage: str, damaged: Path) -> None:
    folder = damaged / "merged"
    path = next(folder.rglob(name), folder / name)
    if not path.exists():
        pytest.skip("this model has no such file")
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        half = content[: len(content) // 2]
        path.write_bytes({"empty": b"", "half": half, "zeros": bytes(len(content))}[damage])
    with pytest.raises(ModelError, match=name.replace(".", r"\.")) as error_info:
        DuetModel.from_pretrained(folder)
    assert error_info.value.fix == "Copy the folder again"
    lines, num_files = find_damage(folder)
    assert len(lines) == 1 and name in lines[0] and num_files > 5


def test_exchanged_weights_of_the_same_size_are_refused(damaged: Path) -> None:
    """Both files are valid; only their hashes tell them apart."""
    tiny.build_qwen2_vl(damaged / "other", seed=1)
    weights = damaged / "other" / "model.safetensors"
    assert weights.stat().st_size == (damaged / "base" / "model.safetensors").stat().st_size
    weights.replace(damaged / "base" / "model.safetensors")
    with pytest.raises(ModelError, match=r"changed: model\.safetensors has another content"):
        DuetModel.from_pretrained(damaged / "model")


def test_a_file_that_was_added_to_the_base_is_noticed(damaged: Path) -> None:
    weights = damaged / "base" / "model.safetensors"
    shutil.copy(weights, weights.with_name("model-00002-of-00002.safetensors"))
    with pytest.raises(ModelError, match="has changed: its fingerprint is"):
        read_checkpoint(damaged / "model")
    lines, _ = find_damage(damaged / "model")
    assert lines == [f"{damaged / 'base'}: is not the base that the model was trained from"]


def test_a_base_at_another_path_may_be_named_in_the_manifest(damaged: Path) -> None:
    (damaged / "base").rename(damaged / "elsewhere")
    path = damaged / "model" / "vlduet.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base": "../elsewhere"}))
    assert read_checkpoint(damaged / "model").base_folder == damaged / "elsewhere"


def test_an_index_finds_out_that_its_plain_checkpoint_is_damaged(folders: Path) -> None:
    """Between the samples of earlier fingerprints, too."""
    path = folders / "base" / "model.safetensors"
    model = DuetModel.from_pretrained(folders / "base")
    sampled = fingerprint_checkpoint(folders / "base", like="0" * SAMPLED_DIGITS)
    before = model.fingerprint
    assert len(before) == FINGERPRINT_DIGITS and len(sampled) == SAMPLED_DIGITS
    content = flip(path, path.stat().st_size - 2)
    try:
        assert model.fingerprint != before
    finally:
        path.write_bytes(content)
    assert model.fingerprint == before


def test_check_prints_damaged_files_and_fails(damaged: Path) -> None:
    runner = CliRunner()
    intact = runner.invoke(app, ["model", "check", str(damaged / "model")])
    assert intact.exit_code == 0 and intact.stdout == ""
    for name in ("duet.safetensors", "golden.safetensors"):
        flip(damaged / "model" / name, -1)
    flip(damaged / "base" / "model.safetensors", -1)
    result = runner.invoke(app, ["model", "check", str(damaged / "model")])
    paths = ["model/duet.safetensors", "model/golden.safetensors", "base/model.safetensors"]
    reason = "has another content than the one that was written"
    assert result.stdout.splitlines() == [f"{damaged / path}: {reason}" for path in paths]
    assert isinstance(result.exception, ModelError)
    assert "3 of " in str(result.exception) and "files are damaged" in str(result.exception)


def test_check_of_a_plain_checkpoint_has_nothing_to_compare(folders: Path) -> None:
    assert find_damage(folders / "base") == ([], 0)
    with pytest.raises(ModelError):
        find_damage(folders / "nothing")


def test_the_fingerprint_of_an_opened_early_model_stays_that_of_its_version(
    damaged: Path,
) -> None:
    path = damaged / "model" / "vlduet.json"
    sampled = fingerprint_checkpoint(damaged / "base", like="0" * SAMPLED_DIGITS)
    manifest = json.loads(path.read_text()) | {"base_fingerprint": sampled}
    for key in ("files", "base_files", "manifest_sha256"):
        del manifest[key]
    path.write_text(json.dumps(manifest))
    early = DuetModel.from_pretrained(damaged / "model")
    assert len(early.fingerprint) == SAMPLED_DIGITS
    early.save_pretrained(damaged / "again")
    again = DuetModel.from_pretrained(damaged / "again")
    assert len(again.fingerprint) == FINGERPRINT_DIGITS
    assert load_backbone(damaged / "base").saved_fingerprint is None
