"""A served index that is updated while it is searched: every search sees what is there."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from helpers import tiny
from helpers.serving import RunningServer
from vlduet.model.duet import DuetModel
from vlduet.retrieval.build import build_index
from vlduet.retrieval.index import Index
from vlduet.serve.app import Service
from vlduet.serve.worker import Worker

NUM_UPDATES = 4


@pytest.fixture
def duet(tmp_path: Path) -> DuetModel:
    return tiny.build_duet_model(tmp_path / "base")


def write_records(path: Path, count: int) -> None:
    """Write records, each with a metadata key that no other one has."""
    rows = [
        {"id": str(i), "parts": [{"text": f"text {i}"}], "metadata": {f"key{i}": i}}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_searches_find_each_update_while_others_search(tmp_path: Path, duet: DuetModel) -> None:
    source, target = tmp_path / "records.jsonl", tmp_path / "index"
    write_records(source, 1)
    build_index(duet, source, to=target, side="record")
    other = tiny.build_duet_model(tmp_path / "copy")  # the same weights, as of `vlduet index`
    with Index.open(target, duet) as opened:
        service = Service(Worker(duet), name="tiny", index=opened)
        with RunningServer(service) as server:
            responses: list[tuple[int, int]] = []
            ends = threading.Event()

            def search_again_and_again() -> None:
                while not ends.is_set():
                    status, body = server.request("/v1/search", {"query": "text", "k": 100})
                    responses.append((status, len(body.get("data", []))))

            searches = [threading.Thread(target=search_again_and_again) for _ in range(2)]
            for thread in searches:
                thread.start()
            try:
                for count in range(2, 2 + NUM_UPDATES):
                    write_records(source, count)
                    build_index(other, source, to=target, side="record")
                    where = {f"key{count - 1}": count - 1}
                    body = {"query": "text", "k": 100, "where": where}
                    status, found = server.request("/v1/search", body)
                    assert status == 200, found
                    assert [hit["id"] for hit in found["data"]] == [str(count - 1)]
            finally:
                ends.set()
                for thread in searches:
                    thread.join(60)
    assert {status for status, _ in responses} == {200}
    assert {count for _, count in responses} <= set(range(1, 2 + NUM_UPDATES))


def test_index_that_another_model_made_anew_is_refused(tmp_path: Path, duet: DuetModel) -> None:
    source, target = tmp_path / "records.jsonl", tmp_path / "index"
    write_records(source, 2)
    build_index(duet, source, to=target, side="record")
    other = tiny.build_duet_model(tmp_path / "other", head="linear")
    with Index.open(target, duet) as opened:
        service = Service(Worker(duet), name="tiny", index=opened)
        with RunningServer(service) as server:
            assert server.request("/v1/search", {"query": "a"})[0] == 200
            target.rename(tmp_path / "old")
            build_index(other, source, to=target, side="record")
            status, body = server.request("/v1/search", {"query": "a"})
            assert status == 503 and "another model" in body["error"]["message"]
            assert "started again" in body["error"]["message"]
            retrieval = {"messages": [{"role": "user", "content": "a"}], "retrieval": {}}
            assert server.request("/v1/chat/completions", retrieval)[0] == 503
            assert server.request("/v1/embeddings", {"input": "a"})[0] == 200
