"""What stands between the network and the application: names, keys, CORS, probes, log, metrics."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import signal
import threading
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from helpers import tiny
from helpers.asgi_client import call
from vlduet.errors import ConfigError
from vlduet.serve import server as server_module
from vlduet.serve.hosts import check_host_name, check_origin, split_host
from vlduet.serve.limits import ServerLimits
from vlduet.serve.server import AccessRules, Backend, build_server, protect_app, warm_up
from vlduet.serve.statistics import WorkerStatistics
from vlduet.serve.worker import Worker

ORIGIN = "https://photos.example.org"
ID = re.compile(r"[0-9a-f]{32}")


async def echo(request: Request) -> Response:
    """Respond with the number in the path and the id of the request."""
    number = request.path_params["number"]
    if number == "13":
        raise RuntimeError("a mistake")
    return JSONResponse({"number": number, "id": request.state.request_id})


APP = Starlette(routes=[Route("/echo/{number}", echo, methods=["GET", "POST"])])


def protect(rules: AccessRules | None = None, app: Any = APP) -> Any:
    return protect_app(Backend(app), rules or AccessRules(), ServerLimits())


# ------------------------------------------------------------------ host names


@pytest.mark.parametrize(
    ("value", "host"),
    [
        ("Localhost", "localhost"), ("localhost:8000", "localhost"), ("localhost:", "localhost"),
        ("photos.example.org.", "photos.example.org"), ("a.example.:1", "a.example"),
        ("[::1]", "::1"), ("[::1]:8000", "::1"), ("127.0.0.1:1", "127.0.0.1"),
        ("::1", ""), ("a b", ""), ("a:b", ""), ("user@a", ""), ("a/b", ""), ("", ""), ("[::1", ""),
        ("a:1:2", ""),
    ],
)  # fmt: skip
def test_a_host_header_is_split(value, host):
    assert split_host(value) == host


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("photos.example.org", 200), ("PHOTOS.example.org:8443", 200), ("localhost:80", 200),
        ("[::1]:8000", 200), ("sub.photos.example.org", 400), ("photos.example.org.evil", 400),
        ("evil.example", 400), ("", 400), (None, 400), ("localhost\x1b[31m", 400),
    ],
)  # fmt: skip
def test_only_known_host_names_are_served(host, status):
    app = protect(AccessRules(allowed_hosts=["localhost", "::1", "photos.example.org"]))
    response = call(app, "/echo/1", headers={} if host is None else {"Host": host})
    assert response.status == status
    if status == 400:
        error = response.json()["error"]
        assert "--allow-host" in error["message"] and error["type"] == "invalid_request_error"
        assert error["param"] == "Host" and "\x1b" not in error["message"]
        assert response.headers["content-type"] == "application/json"


@pytest.mark.parametrize("name", ["photos.example.org", "::1", "10.0.0.1", "NAS"])
def test_names_of_the_option_are_hosts_alone(name):
    assert check_host_name(name, option="--x") == name.lower()


@pytest.mark.parametrize(
    "name", ["", "https://a.b", "a.b:80", "*.a.b", "a b", "a/b", "[::1]", "a.b."]
)
def test_other_names_of_the_option_are_refused(name):
    with pytest.raises(ConfigError, match=r"--x: .* is not the name of a host"):
        check_host_name(name, option="--x")


# ------------------------------------------------------------------ web pages


def preflight(app: Any, origin: str) -> Any:
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, content-type",
    }
    return call(app, "/echo/1", method="OPTIONS", headers=headers)


def test_a_page_of_an_allowed_origin_may_send_its_key():
    app = protect(AccessRules(api_keys=["mine"], cors_origins=[ORIGIN]))
    response = preflight(app, ORIGIN)
    assert response.status == 200
    assert response.headers["access-control-allow-origin"] == ORIGIN
    assert "authorization" in response.headers["access-control-allow-headers"]
    for key, status in (("mine", 200), ("theirs", 401)):
        headers = {"Origin": ORIGIN, "Authorization": f"Bearer {key}"}
        response = call(app, "/echo/1", headers=headers)
        assert response.status == status
        assert response.headers["access-control-allow-origin"] == ORIGIN, "its error is readable"


def test_a_page_of_another_origin_gets_no_permission():
    app = protect(AccessRules(cors_origins=[ORIGIN]))
    assert preflight(app, "https://evil.example").status == 400
    response = call(app, "/echo/1", headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in response.headers
    without = call(protect(), "/echo/1", headers={"Origin": ORIGIN})
    assert "access-control-allow-origin" not in without.headers


@pytest.mark.parametrize("origin", ["*", ORIGIN, "http://localhost:3000", "http://[::1]:3000"])
def test_origins_of_the_option(origin):
    assert check_origin(origin, option="--x") == origin


@pytest.mark.parametrize(
    "origin",
    [
        "",
        "photos.example.org",
        "null",
        "https://a.b/c",
        "ftp://a.b",
        "https://u@a.b",
        "https://a:b",
    ],
)
def test_other_origins_of_the_option_are_refused(origin):
    with pytest.raises(ConfigError, match=r"--x: .* is not the origin of a web page"):
        check_origin(origin, option="--x")


# ------------------------------------------------------------------ probes


def test_probes_tell_whether_requests_are_served():
    backend = Backend()
    app = protect_app(backend, AccessRules(api_keys=["mine"]), ServerLimits())
    key = {"Authorization": "Bearer mine"}

    def statuses() -> tuple[int, int, int]:
        paths = (("/livez", {}), ("/readyz", {}), ("/echo/1", key))
        live, ready, other = (call(app, path, headers=headers).status for path, headers in paths)
        return live, ready, other

    assert statuses() == (200, 503, 503)
    response = call(app, "/echo/1", headers=key)
    assert response.headers["retry-after"] == "5"
    assert "loads its model" in response.json()["error"]["message"]
    backend.app = APP
    assert statuses() == (200, 200, 200)
    backend.is_ending = True
    assert statuses() == (200, 503, 200), "running connections may send their last requests"
    assert call(app, "/livez", method="POST").status == 405


def test_metrics_need_a_key_where_requests_do():
    app = protect(AccessRules(api_keys=["mine"]))
    assert call(app, "/metrics").status == 401
    assert call(app, "/metrics", headers={"Authorization": "Bearer mine"}).status == 200


# ------------------------------------------------------------------ log and metrics


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, logger="vlduet.requests")
    return caplog


def test_a_request_is_one_line_with_its_id(log):
    response = call(protect(), "/echo/1?key=secret", headers={"Authorization": "Bearer secret"})
    request_id = response.headers["x-request-id"]
    assert ID.fullmatch(request_id) and response.json()["id"] == request_id
    (line,) = log.messages
    size = len(response.body)
    now = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"
    assert re.fullmatch(
        rf"{now} {request_id} 1.2.3.4 GET /echo/1 200 {size} bytes 0\.\d\d\d s", line
    )


@pytest.mark.parametrize("request_id", ["abc-123", "A" * 100, "a.b_c:d/e+f="])
def test_the_id_of_a_client_is_used(log, request_id):
    response = call(protect(), "/echo/1", headers={"X-Request-Id": request_id})
    assert response.headers["x-request-id"] == request_id
    assert log.messages[0].split()[1] == request_id


@pytest.mark.parametrize("request_id", ["", "a b", "A" * 101, "a\n", "\x1b[31m", "<a>", "é"])
def test_an_unsafe_id_of_a_client_is_replaced(log, request_id):
    response = call(protect(), "/echo/1", headers={"X-Request-Id": request_id})
    assert ID.fullmatch(response.headers["x-request-id"])
    assert ID.fullmatch(log.messages[0].split()[1])


def test_a_path_cannot_forge_a_line_of_the_log(log):
    call(protect(), "/a\nb \x1b[31m\u2028é" + "x" * 1000)
    (line,) = log.messages
    assert line.isprintable() and line.isascii() and len(line) < 350
    assert " GET /a%0Ab%20%1B%5B31m%E2%80%A8%C3%A9xxx" in line and " 404 " in line


def test_refused_requests_are_logged_too(log):
    rules = AccessRules(allowed_hosts=["localhost"], api_keys=["mine"])
    app = protect(rules)
    assert call(app, "/echo/1", headers={"Host": "evil.example"}).headers["x-request-id"]
    call(app, "/echo/1", headers={"Host": "localhost"})
    assert [" 400 " in log.messages[0], " 401 " in log.messages[1]] == [True, True]


def test_errors_and_disconnected_clients_have_a_status(log):
    with pytest.raises(RuntimeError, match="a mistake"):
        call(protect(), "/echo/13")
    assert " 500 " in log.messages[0]

    async def leave(scope: Any, receive: Any, send: Any) -> None:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        call(protect(app=leave), "/echo/1")
    assert " 499 " in log.messages[1]


def read_metrics(app: Any) -> dict[str, float]:
    """Return the values of all measurements by name and labels."""
    lines = call(app, "/metrics").body.decode().splitlines()
    pairs = [line.rpartition(" ") for line in lines if not line.startswith("#")]
    return {name: float(value) for name, _, value in pairs}


def test_requests_are_counted_by_route_and_status():
    app, other = protect(), protect()
    for path in ("/echo/1", "/echo/2", "/no-such-path", "/another", "/livez"):
        call(app, path)
    values = read_metrics(app)
    name = "vlduet_requests_total"
    assert values[f'{name}{{route="/echo/{{number}}",status="200"}}'] == 2
    assert values[f'{name}{{route="other",status="404"}}'] == 2, "paths of clients are no labels"
    assert values[f'{name}{{route="/livez",status="200"}}'] == 1
    assert values['vlduet_request_seconds_count{route="/echo/{number}"}'] == 2
    assert values['vlduet_first_byte_seconds_count{route="/echo/{number}"}'] == 2
    assert values["vlduet_requests_in_progress"] == 1, "the request for the measurements"
    assert f'{name}{{route="/livez",status="200"}}' not in read_metrics(other), "nothing is shared"


def test_the_state_of_the_worker_is_reported_as_it_is_now():
    backend = Backend(APP)
    statistics = WorkerStatistics(running_chats=1, generated_tokens=2)
    backend.metrics.add_worker(lambda: statistics, lambda: 7)
    app = protect_app(backend, AccessRules(), ServerLimits())
    assert read_metrics(app)["vlduet_generated_tokens_total"] == 2
    statistics = WorkerStatistics(
        running_chats=3,
        waiting_chats=4,
        waiting_embedding_items=5,
        generated_tokens=6,
        retrieved_images=10,
        embedded_items=8,
        refused_requests=9,
    )
    values = read_metrics(app)
    expected = {
        'vlduet_chats{state="running"}': 3,
        'vlduet_chats{state="waiting"}': 4,
        "vlduet_waiting_embedding_items": 5,
        "vlduet_generated_tokens_total": 6,
        "vlduet_retrieved_images_total": 10,
        "vlduet_embedded_items_total": 8,
        "vlduet_refused_requests_total": 9,
        "vlduet_index_documents": 7,
    }
    assert {name: values[name] for name in expected} == expected


# ------------------------------------------------------------------ start and end


@pytest.fixture(scope="module")
def duet(tmp_path_factory):
    return tiny.build_duet_model(tmp_path_factory.mktemp("model") / "base")


def test_a_worker_counts_its_warm_up(duet):
    worker = Worker(duet)
    assert worker.read_statistics() == WorkerStatistics()
    warm_up(worker)
    worker.close()
    assert worker.read_statistics() == WorkerStatistics(generated_tokens=1, embedded_items=1)


def test_a_model_that_fails_to_warm_up_is_an_error(duet, monkeypatch):
    worker = Worker(duet)
    broken = RuntimeError("broken weights")

    def fail(*_: object, **__: object) -> None:
        raise broken

    monkeypatch.setattr(duet, "embed_sequences", fail)
    with pytest.raises(RuntimeError, match="broken weights"):
        warm_up(worker)
    worker.close()


def test_connections_leave_half_of_the_files_to_the_process(monkeypatch):
    monkeypatch.setattr(server_module, "_count_files", lambda: 100)
    assert build_server(APP).config.limits.max_connections == 50
    monkeypatch.setattr(server_module, "_count_files", lambda: 100_000)
    assert build_server(APP).config.limits.max_connections == ServerLimits().max_connections


@pytest.mark.skipif(
    threading.current_thread() is not threading.main_thread(), reason="signals need the main thread"
)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_ends_the_server_and_the_second_the_process(number):
    backend = Backend(APP)
    server = build_server(backend)
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        with server.capture_signals():
            signal.raise_signal(number)
            assert server.should_exit and backend.is_ending
            assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


def test_errors_of_loading_end_the_server(tmp_path):
    import socket

    def fail() -> Any:
        raise ConfigError("no such model")

    server = build_server(Backend())
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    with pytest.raises(ConfigError, match="no such model"):
        server_module.run_server(server, fail, socket.create_server(("127.0.0.1", 0)))
    assert before == {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}


def test_error_bodies_are_json():
    response = call(protect(AccessRules(api_keys=["a"])), "/echo/1")
    assert json.loads(response.body)["error"]["param"] == "Authorization"
