"""A worker, and chats whose outputs are recorded."""

from __future__ import annotations

import pytest

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
