"""A worker, chats whose outputs are recorded, and a server with an index of images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import tiny
from helpers.interleaved import build_image_index, make_sentence_sampler
from helpers.serving import RunningServer
from vlduet.model.duet import DuetModel
from vlduet.model.generation.continuous import Request
from vlduet.retrieval.index import Index
from vlduet.serve.app import Service
from vlduet.serve.worker import Worker


@pytest.fixture
def worker(model):
    started = Worker(model)
    yield started
    started.close()


@pytest.fixture
def endless(model, monkeypatch):
    """A model that never ends an answer by itself."""
    monkeypatch.setattr(model.renderer, "eos_token_ids", [])
    return model


@pytest.fixture(scope="session")
def duet(tmp_path_factory: pytest.TempPathFactory) -> DuetModel:
    model = tiny.build_duet_model(tmp_path_factory.mktemp("model") / "base")
    return tiny.scale_up_weights(model)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, duet: DuetModel) -> Path:
    """A folder with the index of `build_image_index` and its images."""
    root = tmp_path_factory.mktemp("data")
    build_image_index(duet, root)
    return root


@pytest.fixture(scope="session")
def index(folder: Path, duet: DuetModel) -> Iterator[Index]:
    with Index.open(folder / "index", duet) as opened:
        yield opened


@pytest.fixture(scope="session")
def server(duet: DuetModel, index: Index) -> Iterator[RunningServer]:
    with RunningServer(Service(Worker(duet), name="tiny", index=index)) as running:
        yield running


@pytest.fixture
def write_sentences(duet: DuetModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the model write sentences."""
    monkeypatch.setattr(Request, "sample_token", make_sentence_sampler(duet))
