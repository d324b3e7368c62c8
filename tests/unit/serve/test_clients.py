"""Requests in the form of well-known clients, and the fields that these read from the responses.

Each file of `clients` has the requests of one client as it sends them, with small numbers of
tokens, and the paths of the fields that it reads: keys and positions with dots between them, and *
for all items of a list. A streamed response is the list of its events.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers import tiny
from helpers.serving import RunningServer
from vlduet.serve.app import Service
from vlduet.serve.worker import Worker

FOLDER = Path(__file__).parent / "clients"
CLIENTS = sorted(path.stem for path in FOLDER.glob("*.json"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    model = tiny.build_duet_model(tmp_path_factory.mktemp("model") / "base")
    # One token more than the first: a stream then has an event with text.
    model.renderer.eos_token_ids = []
    with RunningServer(Service(Worker(model), name="tiny")) as running:
        yield running


def read_field(value: Any, path: str) -> list[Any]:
    """Return the values at a path; a missing one is a KeyError or an IndexError."""
    values = [value]
    for key in path.split("."):
        if key == "*":
            assert all(values), f"an empty list in {path}"
            values = [item for group in values for item in group]
        else:
            is_position = key.lstrip("-").isdigit()
            values = [item[int(key)] if is_position else item[key] for item in values]
    return values


def send(server: RunningServer, path: str, body: Any) -> Any:
    """Return the response to a request: an object, or the list of the events of a stream."""
    response = server.send(path, body)
    content = response.read().decode()
    assert response.status == 200, content
    if not (body and body.get("stream")):
        return json.loads(content)
    events = [event.removeprefix("data: ") for event in content.split("\n\n") if event]
    assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]


@pytest.mark.parametrize("client", CLIENTS)
def test_responses_have_the_fields_that_a_client_reads(server: RunningServer, client: str) -> None:
    requests = json.loads((FOLDER / f"{client}.json").read_text())["requests"]
    assert requests
    for request in requests:
        response = send(server, request["path"], request["body"])
        for path in request["reads"]:
            for value in read_field(response, path):
                is_usage_event = path == "-1.choices"
                assert value == [] if is_usage_event else value is not None, f"{path}: {value}"


def test_usage_is_in_one_event_only(server: RunningServer) -> None:
    """Clients such as LangChain add up the usage of all events."""
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "stream": True}
    for options in ({}, {"stream_options": {"include_usage": True}}):
        events = send(server, "/v1/chat/completions", body | options)
        assert ["usage" in event for event in events].count(True) == 1
        assert "usage" in events[-1]
