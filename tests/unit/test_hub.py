"""Names on a hub in place of paths, against a hub on this machine (`helpers.fake_hub`)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from helpers import tiny
from helpers.fake_hub import FakeHub, run_fake_hub
from helpers.runs import write_image
from vlduet import hub
from vlduet.cli.main import app
from vlduet.data import images
from vlduet.data.sources import RecordSource
from vlduet.encoders.dual import open_embedder, open_frozen_encoder
from vlduet.errors import DataError, ModelError
from vlduet.hub import HubName
from vlduet.model.duet import DuetModel
from vlduet.model.feature_cache import FeatureCache

CAPTIONS = ["a red circle", "a blue square", "a green star", "a grey line"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny checkpoint, with files beside it that must not be downloaded."""
    folder = tiny.FAMILY_BUILDERS["fast_vlm"](tmp_path_factory.mktemp("hub") / "base")
    for name in ("pytorch_model.bin", "modeling_tiny.py", "README.md", "onnx/config.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"never read")
    return folder


@pytest.fixture
def fake_hub(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FakeHub]:
    """A hub with the model ``acme/tiny``; the current folder is empty."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with run_fake_hub(tmp_path / "cache") as server:
        server.add("acme/tiny", checkpoint)
        yield server


# --------------------------------------------------------------------- names


PART = st.from_regex(r"[A-Za-z0-9_](-?[A-Za-z0-9_]|\.[A-Za-z0-9_]){0,12}", fullmatch=True)


@given(organisation=PART, name=PART, revision=st.none() | st.sampled_from(["main", "refs/pr/3"]))
def test_a_name_is_parsed_into_its_parts(
    organisation: str, name: str, revision: str | None
) -> None:
    expected = HubName(f"{organisation}/{name}", revision)
    assert HubName.parse(str(expected)) in (expected, None if "." in name else expected)


@pytest.mark.parametrize(
    "text",
    ["base", "a/b/c", "/a/b", "../b", "./a", "a/b@", "a/..", "a--b/c", "a b/c", "a/b.safetensors"],
)
def test_other_texts_are_paths(text: str) -> None:
    assert HubName.parse(text) is None


def test_names_that_end_as_files_of_data_are_paths() -> None:
    assert HubName.parse("photos/train.csv", "dataset") is None
    assert HubName.parse("photos/Train.TAR.GZ", "dataset") is None
    assert HubName.parse("acme/photos-v1.5", "dataset") == HubName("acme/photos-v1.5")


# --------------------------------------------------------------------- models


def test_a_model_is_downloaded_without_pickled_weights_and_code(fake_hub: FakeHub) -> None:
    folder = hub.resolve_model("acme/tiny")
    commit = fake_hub.repositories["models", "acme/tiny"].commit
    assert hub.describe_snapshot(folder) == f"acme/tiny@{commit}"
    names = {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert names <= {path.name for path in folder.iterdir()}
    unsafe = ("pytorch_model.bin", "modeling_tiny.py", "README.md", "onnx/config.json")
    assert fake_hub.fetched_files().isdisjoint(unsafe)
    assert fake_hub.fetched_files() >= names


def test_a_snapshot_in_the_cache_is_used_without_network(
    fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = hub.resolve_model("acme/tiny")
    fake_hub.requests.clear()
    assert hub.resolve_model("acme/tiny") == folder
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    assert hub.resolve_model("acme/tiny") == folder
    assert not fake_hub.requests
    with pytest.raises(ModelError, match=r"HF_HUB_OFFLINE is set.*hf download acme/other"):
        hub.resolve_model("acme/other")
    assert not fake_hub.requests


def test_pull_fetches_a_new_commit_and_names_keep_to_the_cache(
    fake_hub: FakeHub, checkpoint: Path
) -> None:
    old = hub.resolve_model("acme/tiny@main")
    files = fake_hub.repositories["models", "acme/tiny"].files
    files["generation_config.json"] += b"\n"
    assert hub.resolve_model("acme/tiny@main") == old
    new = hub.pull_model("acme/tiny@main")
    assert new.name == fake_hub.repositories["models", "acme/tiny"].commit != old.name
    assert hub.resolve_model("acme/tiny@main") == new
    assert hub.resolve_model(f"acme/tiny@{old.name}") == old


def test_an_existing_folder_has_priority(fake_hub: FakeHub) -> None:
    Path("acme/tiny").mkdir(parents=True)
    assert hub.resolve_model("acme/tiny") == Path("acme/tiny")
    with pytest.raises(ModelError, match="the folder is empty"):
        open_embedder(Path("acme/tiny"))
    assert not fake_hub.requests


def test_a_path_with_a_mistake_is_not_looked_up(fake_hub: FakeHub) -> None:
    Path("acme").mkdir()
    with pytest.raises(ModelError, match="vlduet model pull acme/tiny"):
        hub.resolve_model("acme/tiny")
    with pytest.raises(DataError, match="hf download acme/photos --repo-type dataset"):
        hub.resolve_dataset("acme/photos")
    assert not fake_hub.requests


def test_a_text_that_is_neither_explains_both(fake_hub: FakeHub) -> None:
    with pytest.raises(ModelError, match=r"no such folder, and no name .* ORG/NAME@REVISION"):
        open_embedder(Path("base"))
    with pytest.raises(ModelError, match="no name of a model on the hub"):
        hub.pull_model("base")
    assert not fake_hub.requests


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("acme/missing", "neither a path here nor a model on the hub"),
        ("acme/tiny@v9", "no revision 'v9'"),
        ("acme/gated", "give access on request"),
        ("acme/pickled", r"no \.safetensors weights on the hub"),
    ],
)
def test_what_cannot_be_downloaded_is_one_line(
    fake_hub: FakeHub, checkpoint: Path, name: str, message: str
) -> None:
    fake_hub.add("acme/gated", checkpoint).is_gated = True
    pickled = fake_hub.add("acme/pickled", checkpoint)
    del pickled.files["model.safetensors"]
    with pytest.raises(ModelError, match=message) as raised:
        hub.resolve_model(name)
    assert "\n" not in str(raised.value)
    assert "pytorch_model.bin" not in fake_hub.fetched_files()


def test_an_interrupted_download_is_no_model_and_continues(
    fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    fake_hub.cut_file = "model.safetensors"
    with pytest.raises(ModelError, match=r"interrupted .* Start the command again"):
        hub.resolve_model("acme/tiny")
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(ModelError, match="HF_HUB_OFFLINE"):
            hub.resolve_model("acme/tiny")
    fake_hub.cut_file = ""
    folder = hub.resolve_model("acme/tiny")
    expected = fake_hub.repositories["models", "acme/tiny"].files["model.safetensors"]
    assert (folder / "model.safetensors").read_bytes() == expected


def test_a_snapshot_of_configs_alone_is_completed(fake_hub: FakeHub) -> None:
    huggingface_hub.hf_hub_download("acme/tiny", "config.json")
    assert (hub.resolve_model("acme/tiny") / "model.safetensors").is_file()


def test_the_token_of_the_user_is_sent(fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.resolve_model("acme/tiny")
    assert "Bearer hf_secret" in fake_hub.authorizations


def test_a_model_keeps_the_commit_of_its_base(fake_hub: FakeHub, tmp_path: Path) -> None:
    model = DuetModel.from_pretrained("acme/tiny")
    model.save_pretrained(tmp_path / "model")
    manifest = json.loads((tmp_path / "model" / "vlduet.json").read_text())
    commit = fake_hub.repositories["models", "acme/tiny"].commit
    assert manifest["base_name"] == f"acme/tiny@{commit}"
    fingerprint = model.fingerprint
    shutil.move(tmp_path / "cache", tmp_path / "elsewhere")
    fake_hub.requests.clear()
    with pytest.raises(ModelError, match=f"is gone.*vlduet model pull acme/tiny@{commit}"):
        DuetModel.from_pretrained(tmp_path / "model")
    assert not fake_hub.requests, "the user has not named the model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "elsewhere"))
        assert DuetModel.from_pretrained(tmp_path / "model").fingerprint == fingerprint


def test_encoders_have_names_too(fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.add("acme/words", tiny.build_text_encoder(tmp_path / "words"))
    encoder = open_frozen_encoder(Path("acme/words"), cache=FeatureCache(None))
    assert encoder.modalities == ("text",)
    assert hub.describe_snapshot(encoder.folder) is not None


# --------------------------------------------------------------------- data sets and commands


def write_photos(folder: Path, num_photos: int = 8) -> Path:
    """Write random images, and photos.csv with a caption for each; return the folder."""
    folder.mkdir(parents=True)
    lines = ["file_name,caption"]
    for i in range(num_photos):
        write_image(folder / f"{i}.png", i)
        lines.append(f"{i}.png,{CAPTIONS[i % 4]} number {i}")
    (folder / "photos.csv").write_text("\n".join(lines) + "\n")
    return folder


def run_command(*arguments: str) -> str:
    """Run a command of the command line and return what it prints, without its log."""
    return CliRunner().invoke(app, [*arguments], catch_exceptions=False).stdout


def test_a_data_set_is_read_by_its_name(fake_hub: FakeHub, tmp_path: Path) -> None:
    folder = write_photos(tmp_path / "photos")
    (folder / "load.py").write_text("raise SystemExit")
    fake_hub.add("acme/photos", folder, kind="datasets")
    records = list(RecordSource(Path("acme/photos")).read())
    assert len(records) == 8
    assert images.load_image(records[0].images()[0]).size == (24, 24)
    assert "load.py" not in fake_hub.fetched_files()
    with pytest.raises(DataError, match="nor a dataset on the hub"):
        RecordSource(Path("acme/none")).read()


def test_pull_prints_the_folder(fake_hub: FakeHub, tmp_path: Path) -> None:
    cached = Path(run_command("model", "pull", "acme/tiny").splitlines()[-1])
    assert (cached / "model.safetensors").is_file()
    run_command("model", "pull", "acme/tiny", "--to", str(tmp_path / "models" / "tiny"))
    assert DuetModel.from_pretrained(tmp_path / "models" / "tiny").fingerprint


def test_training_starts_from_names(fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.add("acme/photos", write_photos(tmp_path / "photos"), kind="datasets")
    for path in (tmp_path / "photos").iterdir():
        shutil.copy(path, Path.cwd())
    sources = ["data.train.0.path=photos.csv", "data.train.1.path=acme/photos"]
    run_command("train", "small", "model.path=acme/tiny", *sources, "out=run", "train.epochs=0.5")
    manifest = json.loads(Path("run/model/vlduet.json").read_text())
    model = fake_hub.repositories["models", "acme/tiny"]
    photos = fake_hub.repositories["datasets", "acme/photos"]
    commits = [f"acme/tiny@{model.commit}", f"acme/photos@{photos.commit}"]
    assert manifest["provenance"]["hub"] == commits
    assert manifest["base_name"] == commits[0]
    assert DuetModel.from_pretrained("run/model").fingerprint
