"""Over a real socket: OpenAI's forms in and out, and every wrong request gets its own line."""

from __future__ import annotations

import base64
import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from helpers import tiny
from vlduet.data.records import ImageRef, Message
from vlduet.errors import ConfigError
from vlduet.retrieval.build import build_index
from vlduet.retrieval.index import Index
from vlduet.retrieval.rag import ask
from vlduet.retrieval.search import search
from vlduet.serve import app as module
from vlduet.serve.app import Service
from vlduet.serve.auth import read_api_keys
from vlduet.serve.worker import Worker

NAMES = ["a red boat", "a dog in the snow", "three apples"]


class Server:
    """A service, served."""

    def __init__(self, service: Service, keys: list[str] | None = None):
        self.service = service
        listening = socket.create_server(("127.0.0.1", 0))
        self.port = listening.getsockname()[1]
        self.uvicorn = module.build_server(
            service.build_app(allowed_hosts=["127.0.0.1"], api_keys=keys)
        )
        self.thread = threading.Thread(
            target=self.uvicorn.run, kwargs={"sockets": [listening]}, daemon=True
        )
        self.thread.start()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.uvicorn.should_exit = True
        self.thread.join(30)
        self.service.worker.close()

    def send(self, path: str, body: object = None, *, headers: dict[str, str] | None = None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        given = {"Content-Type": "application/json"} | (headers or {})
        connection.request("GET" if body is None else "POST", path, data, given)
        return connection.getresponse()

    def ask(self, path: str, body: object = None, **options) -> tuple[int, dict]:
        answer = self.send(path, body, **options)
        return answer.status, json.loads(answer.read())


@pytest.fixture(scope="module")
def duet(tmp_path_factory):
    return tiny.build_duet_model(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def index(duet, tmp_path_factory):
    folder = tmp_path_factory.mktemp("index")
    told = {"odd": float("nan")}  # as Python's JSON spells it
    rows = [
        {"id": f"n{i}", "parts": [{"text": name}], "metadata": {"i": i} | told}
        for i, name in enumerate(NAMES)
    ]
    (folder / "names.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build_index(duet, folder / "names.jsonl", to=folder / "index", side="record", store="flat")
    with Index.open(folder / "index", duet) as opened:
        yield opened


@pytest.fixture(scope="module")
def server(duet, index):
    with Server(Service(Worker(duet), name="tiny", index=index)) as found:
        yield found


def url(image: ImageRef) -> str:
    return "data:image/png;base64," + base64.b64encode(image.data or b"").decode()


def shown(image: ImageRef) -> dict:
    return {"type": "image_url", "image_url": {"url": url(image)}}


def said(text: str) -> dict:
    return {"type": "text", "text": text}


def chat(*parts, **more) -> dict:
    content = parts[0] if parts and isinstance(parts[0], str) else list(parts)
    return {
        "model": "tiny",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 8,
    } | more


def events(answer) -> list[dict]:
    lines = [line.removeprefix("data: ") for line in answer.read().decode().split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


# ------------------------------------------------------------------ what is right


def test_health_and_models(server):
    assert server.ask("/health") == (200, {"status": "ok"})
    status, told = server.ask("/v1/models")
    assert status == 200 and [one["id"] for one in told["data"]] == ["tiny"]
    assert (
        server.ask("/v1/models/tiny") == (200, told["data"][0])
        and server.ask("/v1/models/other")[0] == 404
    )


def test_embeddings_of_texts_images_and_mixtures(server, duet):
    picture = tiny.random_image(1)
    content = ["a dog", [shown(picture)], [shown(picture), said("at night")]]
    status, told = server.ask("/v1/embeddings", {"model": "tiny", "input": content})
    assert status == 200 and [one["index"] for one in told["data"]] == [0, 1, 2]
    vectors = np.array([one["embedding"] for one in told["data"]], np.float32)
    np.testing.assert_allclose(
        vectors, duet.encode_document(["a dog", picture, (picture, "at night")]), atol=1e-5
    )
    one = server.ask(
        "/v1/embeddings", {"input": "a dog", "encoding_format": "base64", "input_type": "query"}
    )[1]
    packed = np.frombuffer(base64.b64decode(one["data"][0]["embedding"]), "<f4")
    np.testing.assert_allclose(packed[None], duet.encode_query(["a dog"]), atol=1e-5)


def test_a_chat_whole_and_streamed(server, duet):
    picture = tiny.random_image(2)
    wanted = duet.generate([Message("user", (picture, "what is it?"))], max_new_tokens=8)
    status, told = server.ask("/v1/chat/completions", chat(shown(picture), said("what is it?")))
    choice = told["choices"][0]
    assert status == 200 and choice["message"] == {"role": "assistant", "content": wanted}
    streamed = events(
        server.send("/v1/chat/completions", chat(shown(picture), said("what is it?"), stream=True))
    )
    assert (
        "".join(each["choices"][0]["delta"].get("content", "") for each in streamed).strip()
        == wanted
    )
    assert [each["choices"][0]["finish_reason"] for each in streamed][-1] == choice["finish_reason"]
    assert streamed[-1]["usage"] == told["usage"] and told["usage"]["completion_tokens"] <= 8


def test_a_conversation_has_turns_and_an_instruction(server, duet):
    roles = [("developer", "be short"), ("user", "hi"), ("assistant", "hello"), ("user", "who?")]
    body = chat() | {"messages": [{"role": role, "content": text} for role, text in roles]}
    turns = [Message("system" if role == "developer" else role, (text,)) for role, text in roles]
    told = server.ask("/v1/chat/completions", body)[1]
    assert told["choices"][0]["message"]["content"] == duet.generate(turns, max_new_tokens=8)


def test_a_seed_gives_the_same_answer(server):
    def content(**sampling):
        told = server.ask("/v1/chat/completions", chat("say something", temperature=2, **sampling))[
            1
        ]
        return told["choices"][0]["message"]["content"]

    first = content(seed=5, top_p=0.9)
    assert first == content(seed=5, top_p=0.9) != content(seed=6, top_p=0.9)
    assert content(seed=5, top_p=1e-6) == content(seed=7, top_p=1e-6), (
        "the likeliest token, whatever the seed"
    )


def test_a_search_is_the_library_s(server, duet, index):
    for query, parts in (
        ("a boat", ("a boat",)),
        ([shown(tiny.random_image()), said("x")], (tiny.random_image(), "x")),
    ):
        status, told = server.ask("/v1/search", {"query": query, "k": 2, "where": ["i<2"]})
        hits = search(index, duet, parts, k=2, where=["i<2"])
        assert (
            status == 200
            and [hit["id"] for hit in told["data"]] == [hit.id for hit in hits]
            and len(hits) == 2
        )
        assert all(hit["metadata"]["odd"] is None for hit in told["data"])
        assert [hit["score"] for hit in told["data"]] == pytest.approx(
            [hit.score for hit in hits], abs=1e-5
        )


def test_a_chat_from_the_index_is_ask_with_its_sources(server, duet, index):
    wanted = ask(index, duet, "which boat?", k=2, max_new_tokens=8)
    body = chat("which boat?", retrieval={"k": 2})
    status, told = server.ask("/v1/chat/completions", body)
    assert status == 200 and told["choices"][0]["message"]["content"] == wanted.text
    assert [source["id"] for source in told["sources"]] == [hit.id for hit in wanted.sources]
    streamed = events(server.send("/v1/chat/completions", body | {"stream": True}))
    assert streamed[0]["sources"] == told["sources"] and "sources" not in streamed[-1]
    assert (
        "".join(each["choices"][0]["delta"].get("content", "") for each in streamed).strip()
        == wanted.text
    )


def test_what_asks_for_nothing_else_is_taken(server):
    harmless = {
        "n": 1,
        "top_p": 1.0,
        "tools": [],
        "user": "me",
        "seed": None,
        "response_format": {"type": "text"},
    }
    assert server.ask("/v1/chat/completions", chat("hi", **harmless))[0] == 200
    nothing = dict.fromkeys(("temperature", "stream", "stop", "tools", "max_completion_tokens"))
    assert server.ask("/v1/chat/completions", chat("hi", **nothing))[0] == 200
    assert (
        server.ask("/v1/embeddings", {"input": "a", "encoding_format": None, "dimensions": None})[0]
        == 200
    )


def test_empty_turns_that_clients_send_are_taken(server, duet):
    """An instruction that nobody wrote, and an answer that this server gave: it can be empty."""
    turns = [("system", ""), ("user", "hi"), ("assistant", ""), ("user", "who?")]
    body = chat() | {"messages": [{"role": role, "content": text} for role, text in turns]}
    status, told = server.ask("/v1/chat/completions", body)
    kept = [Message("user", ("hi",)), Message("assistant", (" ",)), Message("user", ("who?",))]
    assert status == 200 and told["choices"][0]["message"]["content"] == duet.generate(
        kept, max_new_tokens=8
    )


def sent(server, path, body):
    """A connection whose request has been sent, and nothing read."""
    raw = json.dumps(body).encode()
    told = [
        f"POST {path} HTTP/1.1",
        "Host: 127.0.0.1",
        "Content-Type: application/json",
        f"Content-Length: {len(raw)}",
    ]
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall("\r\n".join([*told, "", ""]).encode() + raw)
    return connection


def soon(found):
    """Whether it comes true within half a minute."""
    until = time.monotonic() + 30
    while not found() and time.monotonic() < until:
        time.sleep(0.01)
    return found()


def test_a_client_that_goes_away_ends_its_answer(server, duet, monkeypatch):
    talks = []
    real = module.ChatRequest
    monkeypatch.setattr(
        module, "Talk", lambda *args, **options: talks.append(real(*args, **options)) or talks[-1]
    )
    monkeypatch.setattr(duet.renderer, "eos_ids", [])  # it would go on to the end of its window
    body = chat("go on", stream=True, max_tokens=duet.backbone.window // 2)
    with sent(server, "/v1/chat/completions", body) as connection:
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
    assert soon(lambda: talks[0].cancelled)


def test_what_a_client_no_longer_waits_for_is_not_begun(server, duet, monkeypatch):
    """It goes away while others are served: neither its words nor its vectors are made."""
    monkeypatch.setattr(module, "DISCONNECT_POLL_SECONDS", 0.05)
    talks, worker = [], server.service.worker
    real, encode = module.ChatRequest, duet.encode
    monkeypatch.setattr(
        module, "Talk", lambda *args, **options: talks.append(real(*args, **options)) or talks[-1]
    )
    embedded: list = []
    monkeypatch.setattr(
        duet, "encode", lambda items, **options: embedded.extend(items) or encode(items, **options)
    )
    read = []
    start = duet.start
    monkeypatch.setattr(duet, "start", lambda sequences: read.extend(sequences) or start(sequences))
    begin = threading.Event()
    busy = worker.call(begin.wait)
    with (
        sent(server, "/v1/chat/completions", chat("hi")),
        sent(server, "/v1/embeddings", {"input": ["gone"]}),
    ):
        assert soon(lambda: talks and worker._requests)
        waiting = worker._requests[0].future
    assert soon(lambda: talks[0].cancelled and waiting.cancelled())
    begin.set()
    assert busy.result(60)
    assert server.ask("/v1/embeddings", {"input": "here"})[0] == 200
    assert embedded == [("here",)] and not read


# ------------------------------------------------------------------ what is wrong

WRONG = [
    (
        "/v1/chat/completions",
        chat({"type": "image_url", "image_url": {"url": "/etc/passwd"}}),
        "data: URL",
    ),
    (
        "/v1/chat/completions",
        chat({"type": "image_url", "image_url": {"url": "https://a.b/c.png"}}),
        "data: URL",
    ),
    (
        "/v1/chat/completions",
        chat({"type": "image_url", "image_url": {"url": "data:;base64,?"}}),
        "broken base64",
    ),
    (
        "/v1/chat/completions",
        chat({"type": "image_url", "image_url": {"url": "data:,x"}}),
        "unknown kind of file",
    ),
    ("/v1/chat/completions", chat({"type": "input_audio"}), "messages[0].content[0]: not a part"),
    ("/v1/chat/completions", chat(" "), "messages[0].content: expected text"),
    ("/v1/chat/completions", chat("hi", n=2), "n: 2 is not served"),
    ("/v1/chat/completions", chat("hi", tools=[{"type": "function"}]), "tools: "),
    ("/v1/chat/completions", chat("hi", retreival={}), "Did you mean 'retrieval'?"),
    ("/v1/chat/completions", chat("hi", temperature=3), "temperature: "),
    ("/v1/chat/completions", chat("hi", top_p=0), "top_p: "),
    ("/v1/chat/completions", chat("hi", seed=1 << 63), "seed: "),
    ("/v1/chat/completions", chat("hi", max_tokens=0), "max_tokens: "),
    ("/v1/chat/completions", chat("hi", max_tokens=10**6), "window"),
    (
        "/v1/chat/completions",
        chat("hi", retrieval={"where": ["no=1"]}),
        "no document has metadata 'no'",
    ),
    ("/v1/chat/completions", chat("hi") | {"messages": []}, "the last turn is not a user's"),
    (
        "/v1/chat/completions",
        chat("hi") | {"messages": [{"role": "tool", "content": "x"}]},
        "role 'tool'",
    ),
    ("/v1/chat/completions", chat("hi", stop=["a"] * 17), "stop: 17 strings"),
    ("/v1/chat/completions", chat("hi", stop="a" * 300), "stop"),
    ("/v1/chat/completions", chat(*[said("a")] * 300), "300 parts"),
    ("/v1/chat/completions", chat(*[shown(tiny.random_image())] * 33), "33 images"),
    ("/v1/chat/completions", chat("a" * (2 << 20)), "a text of 2097152 letters"),
    (
        "/v1/chat/completions",
        chat({"type": "image_url", "image_url": {"url": "data:,\ud800"}}),
        "not UTF-8",
    ),
    ("/v1/chat/completions", chat("hi", **{"x" * 10**6: 1}), "unknown field"),
    ("/v1/embeddings", {"input": []}, "0 inputs"),
    ("/v1/embeddings", {"input": [[1, 2, 3]]}, "input[0][0]: not a part"),
    ("/v1/embeddings", {"input": ["a", ""]}, "input[1]: expected text"),
    (
        "/v1/embeddings",
        {"input": ["a", [{"type": "image_url", "image_url": "data:,x"}]]},
        "input[1]",
    ),
    ("/v1/embeddings", {"input": "a", "dimensions": 3}, "dimensions: "),
    ("/v1/embeddings", {"input": "a", "encoding_format": "hex"}, "encoding_format"),
    ("/v1/embeddings", {}, "input: Field required"),
    ("/v1/embeddings", b"{", "the body is no JSON"),
    ("/v1/embeddings", b"[" * 10**6, "the body is no JSON"),
    ("/v1/embeddings", [], "the body is no JSON object"),
    ("/v1/search", {"query": "a", "k": 0}, "k: "),
    ("/v1/search", {"query": [], "k": 1}, "query: neither text nor a list of parts"),
]


@pytest.mark.parametrize(
    ("path", "body", "told"), WRONG, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_wrong_request_is_told_what_is_wrong(server, path, body, told):
    status, answer = server.ask(path, body)
    assert status == 400 and told in answer["error"]["message"], answer
    assert answer["error"]["type"] == "invalid_request_error"
    assert server.ask("/health")[0] == 200


def test_what_is_refused_before_it_is_read(server, monkeypatch):
    for model in ("gpt", "\ud800"):
        assert server.ask("/v1/embeddings", {"model": model, "input": "a"})[0] == 404
    assert server.ask("/v1/embeddings", b"{}", headers={"Content-Type": "text/plain"})[0] == 415
    assert server.send("/health", headers={"Host": "evil.example"}).status == 400
    assert server.send("/nothing").status == 404
    assert server.send("/v1/embeddings").status == 405
    monkeypatch.setattr(module, "MAX_REQUEST_BYTES", 100)
    assert server.ask("/v1/embeddings", {"input": "a" * 200})[0] == 413


def test_a_server_that_is_busy_says_so(server, monkeypatch):
    monkeypatch.setattr("vlduet.serve.worker.MAX_WAITING", 0)
    answer = server.send("/v1/embeddings", {"input": "a"})
    assert answer.status == 503 and answer.headers["Retry-After"]


def test_our_own_mistake_is_a_500_and_the_server_lives_on(server, duet, monkeypatch):
    def broken(items):
        raise RuntimeError("secret")

    with monkeypatch.context() as patched:
        patched.setattr(duet, "encode_document", broken)
        status, told = server.ask("/v1/embeddings", {"input": "a"})
    assert status == 500 and "secret" not in json.dumps(told)
    assert server.ask("/v1/embeddings", {"input": "a"})[0] == 200


def test_without_an_index_nothing_is_searched(duet):
    with Server(Service(Worker(duet), name="tiny")) as server:
        assert server.ask("/v1/search", {"query": "a"})[0] == 400
        status, told = server.ask("/v1/chat/completions", chat("a", retrieval={}))
        assert status == 400 and "--index" in told["error"]["message"]


def test_a_dual_encoder_embeds_and_does_not_answer(tmp_path):
    from vlduet.encoders.dual import DualEncoder
    from vlduet.encoders.frozen import FrozenEncoders, open_encoder
    from vlduet.model.feature_cache import FeatureCache

    folders = tiny.build_frozen_encoders(tmp_path)
    frozen = {role: open_encoder(folders[role]) for role in ("vision", "text")}
    model = DualEncoder(FrozenEncoders(frozen, cache=FeatureCache(None)), dim=8)
    with Server(Service(Worker(model), name="towers")) as server:
        told = server.ask("/v1/embeddings", {"input": ["a", [shown(tiny.random_image())]]})[1]
        found = np.array([one["embedding"] for one in told["data"]])
        np.testing.assert_allclose(found, model.encode(["a", tiny.random_image()]), atol=1e-5)
        status, told = server.ask("/v1/chat/completions", chat("hi") | {"model": "towers"})
        assert status == 400 and "does not generate" in told["error"]["message"]


# ------------------------------------------------------------------ the verb


def test_the_verb_serves_and_ends(duet, tmp_path):
    duet.save_pretrained(tmp_path / "small")
    (tmp_path / "keys").write_text("mine\n")
    command = [sys.executable, "-W", "ignore", "-m", "vlduet.cli.main", "serve", tmp_path / "small"]
    command += ["--keys", tmp_path / "keys", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            line = next(line for line in process.stderr if "answers and embeds at" in line)
            port = int(line.partition("127.0.0.1:")[2].partition("/")[0])
            taken = subprocess.run(
                [*command[:-1], str(port)], capture_output=True, text=True, check=False
            )
            assert (
                taken.returncode == 1
                and "Address already in use. Choose another --port" in taken.stderr
            )
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            for key, status in (("theirs", 401), ("mine", 200)):
                connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {key}"})
                answer = connection.getresponse()
                told = json.loads(answer.read())
                assert answer.status == status
            assert told["data"][0]["id"] == "small"
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(30) in (0, 130)
        assert "Traceback" not in process.stderr.read()


def test_a_missing_extra_is_named():
    code = "import sys; sys.modules['starlette'] = None; sys.argv = ['vlduet', 'serve', 'x']; "
    done = subprocess.run(
        [sys.executable, "-c", code + "from vlduet.cli.main import main; main()"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "pip install 'vlduet[serve]'" in done.stderr


# ------------------------------------------------------------------ keys


def test_without_a_key_nothing_but_its_health_is_told(duet):
    with Server(Service(Worker(duet), name="tiny"), keys=["first-key", "second"]) as server:
        assert server.ask("/health") == (200, {"status": "ok"})
        right = ["Bearer first-key", "Bearer second", "bearer second"]
        wrong = [
            None,
            "",
            "Bearer",
            "Bearer ",
            "second",
            "Bearer secon",
            "Bearer secondd",
            "Basic second",
            "Bearer \xff",
        ]
        for given in right + wrong:
            headers = {} if given is None else {"Authorization": given}
            for path, body in (
                ("/v1/models", None),
                ("/v1/embeddings", {"input": "a"}),
                ("/v1/gone", None),
            ):
                answer = server.send(path, body, headers=headers)
                told = json.loads(answer.read())
                if given in right:
                    assert answer.status == (404 if path == "/v1/gone" else 200), (given, told)
                else:
                    assert (
                        answer.status == 401
                        and "Authorization: Bearer KEY" in told["error"]["message"]
                    ), given
                    assert answer.headers["WWW-Authenticate"] == "Bearer"


def test_two_headers_are_no_key(duet):
    with Server(Service(Worker(duet), name="tiny"), keys=["first"]) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        connection.putrequest("GET", "/v1/models")
        connection.putheader("Authorization", "Bearer wrong")
        connection.putheader("Authorization", "Bearer first")
        connection.endheaders()
        assert connection.getresponse().status == 401


def test_the_file_of_keys(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# ours\n\n  one \ntwo-2\n")
    assert read_api_keys(path) == ["one", "two-2"]
    for text, said_ in (
        ("", "no keys"),
        ("# none\n", "no keys"),
        ("one\nt wo\n", "keys:2: not a key"),
        ("é", "not a key"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match=said_):
            read_api_keys(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_api_keys(tmp_path / "gone")
