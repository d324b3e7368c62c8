"""API keys: their file, and requests with and without them."""

from __future__ import annotations

import asyncio
import http.client
import json

import pytest

from helpers import tiny
from helpers.serving import RunningServer
from vlduet.errors import ConfigError
from vlduet.serve.app import Service
from vlduet.serve.auth import ApiKeyMiddleware, read_api_keys
from vlduet.serve.worker import Worker


def test_keys_are_read_without_comments_and_blank_lines(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# ours\n\n  one \ntwo-2\n")
    assert read_api_keys(path) == ["one", "two-2"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no keys"),
        ("# none\n", "no keys"),
        ("one\nt wo\n", "keys:2: not a key"),
        ("é", "keys:1: not a key"),
    ],
)
def test_file_without_usable_keys_is_refused(tmp_path, text, message):
    path = tmp_path / "keys"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        read_api_keys(path)


def test_missing_file_of_keys_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_api_keys(tmp_path / "missing")


@pytest.fixture(scope="module")
def duet(tmp_path_factory):
    return tiny.build_duet_model(tmp_path_factory.mktemp("model") / "base")


def test_without_a_known_key_only_health_is_answered(duet):
    accepted = ["Bearer first-key", "Bearer second", "bearer second"]
    refused = [None, "", "Bearer", "Bearer ", "second", "Bearer secon", "Bearer secondd"]
    refused += ["Basic second", "Bearer \xff"]
    requests = [
        ("/v1/models", None, 200),
        ("/v1/embeddings", {"input": "a"}, 200),
        ("/v1/none", None, 404),
    ]
    service = Service(Worker(duet), name="tiny")
    with RunningServer(service, api_keys=["first-key", "second"]) as server:
        assert server.request("/health") == (200, {"status": "ok"})
        for authorization in accepted + refused:
            headers = {} if authorization is None else {"Authorization": authorization}
            for path, body, status in requests:
                response = server.send(path, body, headers=headers)
                data = response.read()
                if authorization in accepted:
                    assert response.status == status, (authorization, data)
                    continue
                assert response.status == 401, authorization
                assert response.headers["WWW-Authenticate"] == "Bearer"
                message = json.loads(data)["error"]["message"]
                assert "Authorization: Bearer KEY" in message


@pytest.mark.parametrize(
    ("keys", "is_accepted"),
    [
        (["first"], True),
        (["wrong"], False),
        ([], False),
        (["first", "wrong"], False),
        (["wrong", "first"], False),
        (["first", "first"], False),
    ],
)
def test_exactly_one_header_with_a_known_key_is_accepted(keys, is_accepted):
    served = []
    statuses = []

    async def app(scope, receive, send):
        served.append(scope["path"])

    async def send(message):
        statuses.append(message.get("status"))

    headers = [(b"authorization", f"Bearer {key}".encode()) for key in keys]
    scope = {"type": "http", "path": "/v1/models", "headers": headers}
    asyncio.run(ApiKeyMiddleware(app, ["first", "second"])(scope, None, send))
    assert served == (["/v1/models"] if is_accepted else [])
    assert statuses[:1] == ([] if is_accepted else [401])


def test_two_authorization_headers_are_refused(duet):
    service = Service(Worker(duet), name="tiny")
    with RunningServer(service, api_keys=["first"]) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        connection.putrequest("GET", "/v1/models")
        connection.putheader("Authorization", "Bearer wrong")
        connection.putheader("Authorization", "Bearer first")
        connection.endheaders()
        assert connection.getresponse().status == 401
