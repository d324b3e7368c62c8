"""`vlduet model check` reads every file of every kind of folder, and names the damaged ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from helpers import runs, tiny
from helpers.fake_embedder import FakeModel, write_pairs
from vlduet import config, integrity
from vlduet.cli.main import app
from vlduet.data.formats import read_records
from vlduet.data.jsonl_output import stream_to_jsonl
from vlduet.encoders.dual import DualEncoder
from vlduet.encoders.frozen import FrozenEncoders
from vlduet.encoders.loading import open_encoder
from vlduet.errors import ModelError, TrainingError, VLDuetError
from vlduet.model.feature_cache import FeatureCache
from vlduet.retrieval.build import build_index
from vlduet.train.loop import train
from vlduet.workflows.verification import find_folder_damage


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, an index, a dual encoder, and a corpus as `data fetch` writes it."""
    root = tmp_path_factory.mktemp("folders")
    train(config.load_run_config(runs.write_run_config(root, steps=1)))
    build_index(FakeModel(), write_pairs(root / "pairs"), to=root / "index")
    folders = tiny.build_frozen_encoders(root / "encoders")
    encoders = {role: open_encoder(Path(folders[role])) for role in ("vision", "text")}
    frozen = FrozenEncoders(encoders, cache=FeatureCache(None))
    DualEncoder(frozen, dim=8).save_pretrained(root / "dual")
    corpus = root / "stamps"
    corpus.mkdir()
    (corpus / "train.jsonl").write_text("{}\n")
    manifest = integrity.seal_manifest({"corpus": "stamps"}, corpus)
    (corpus / "manifest.json").write_text(json.dumps(manifest))
    return root


FOLDERS = ["run", "run/model", "run/state", "index", "dual", "stamps"]


@pytest.mark.parametrize("name", FOLDERS)
def test_an_intact_folder_has_no_damage(folders: Path, name: str) -> None:
    lines, num_files = find_folder_damage(folders / name)
    assert lines == [] and num_files >= 1
    result = CliRunner().invoke(app, ["model", "check", str(folders / name)])
    assert result.exit_code == 0 and result.stdout == ""


@pytest.mark.parametrize("name", FOLDERS)
def test_every_listed_file_is_read(folders: Path, name: str) -> None:
    for manifest_path in sorted((folders / name).rglob("*.json")):
        files = json.loads(manifest_path.read_text()).get("files", {})
        for file in files:
            path = manifest_path.parent / file
            content = path.read_bytes()
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
            lines, _ = find_folder_damage(folders / name)
            path.write_bytes(content)
            assert lines == [f"{path}: has another content than the one that was written"]


def test_a_run_that_was_killed_between_two_renames_is_checked(folders: Path) -> None:
    state = folders / "run" / "state"
    state.rename(state.with_name(".state.old"))
    assert find_folder_damage(state)[0] == [] and state.is_dir()


def test_another_frozen_encoder_is_damage_of_a_dual_encoder(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "dual", tmp_path / "dual")
    shutil.copytree(folders / "encoders", tmp_path / "encoders")
    assert find_folder_damage(tmp_path / "dual")[0] == []
    (weights,) = (tmp_path / "encoders" / "text").glob("*.safetensors")
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (line,) = find_folder_damage(tmp_path / "dual")[0]
    assert line.startswith(str(tmp_path / "encoders" / "text"))


def test_a_file_of_records_is_compared_with_its_list(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    list(stream_to_jsonl(read_records(write_pairs(tmp_path / "pairs")), path))
    assert find_folder_damage(path) == ([], 1)
    path.write_text(path.read_text().replace("red", "bed"))
    assert find_folder_damage(path)[0] == [
        f"{path} has another content than the one that was written"
    ]


@pytest.mark.parametrize(
    ("name", "error_class"), [("state.json", TrainingError), ("nothing", ModelError)]
)
def test_what_is_no_folder_of_ours_is_refused(
    tmp_path: Path, name: str, error_class: type[VLDuetError]
) -> None:
    (tmp_path / name).write_text("[")
    with pytest.raises(error_class):
        find_folder_damage(tmp_path)
