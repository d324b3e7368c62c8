"""The HTTP server over a real socket: OpenAI's requests and responses, and wrong requests."""

from __future__ import annotations

import base64
import json
import socket
import struct
import threading

import numpy as np
import pytest

from helpers import tiny
from helpers.serving import RunningServer, becomes_true
from vlduet.data.records import ImageRef, Message
from vlduet.retrieval.build import build_index
from vlduet.retrieval.index import Index
from vlduet.retrieval.rag import ask
from vlduet.retrieval.search import search
from vlduet.serve import resources as resources_module
from vlduet.serve.app import Service
from vlduet.serve.routes import chat as chat_module
from vlduet.serve.routes.embeddings import format_vectors
from vlduet.serve.worker import Worker

TEXTS = ["a red boat", "a dog in the snow", "three apples"]
CHAT = "/v1/chat/completions"
EMBED = "/v1/embeddings"


@pytest.fixture(scope="module")
def duet(tmp_path_factory):
    return tiny.build_duet_model(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def index(duet, tmp_path_factory):
    folder = tmp_path_factory.mktemp("index")
    lines = []
    for i, text in enumerate(TEXTS):
        metadata = {"i": i, "odd": float("nan")}  # Python writes NaN, which is not JSON
        row = {"id": f"n{i}", "parts": [{"text": text}], "metadata": metadata}
        lines.append(json.dumps(row) + "\n")
    (folder / "texts.jsonl").write_text("".join(lines))
    build_index(duet, folder / "texts.jsonl", to=folder / "index", side="record")
    with Index.open(folder / "index", duet) as opened:
        yield opened


@pytest.fixture(scope="module")
def server(duet, index):
    with RunningServer(Service(Worker(duet), name="tiny", index=index)) as running:
        yield running


def image_part(image: ImageRef) -> dict:
    data = base64.b64encode(image.data or b"").decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def image_url_part(url: str) -> dict:
    return {"type": "image_url", "image_url": {"url": url}}


def text_part(text: str) -> dict:
    return {"type": "text", "text": text}


def chat_body(*parts, **fields) -> dict:
    """Return the body of a chat with one user message: a text, or content parts."""
    content = parts[0] if parts and isinstance(parts[0], str) else list(parts)
    messages = [{"role": "user", "content": content}]
    return {"model": "tiny", "messages": messages, "max_tokens": 8} | fields


def conversation_body(turns: list[tuple[str, str]]) -> dict:
    messages = [{"role": role, "content": text} for role, text in turns]
    return chat_body() | {"messages": messages}


def answer_of(body: dict) -> str:
    return body["choices"][0]["message"]["content"]


def read_events(response) -> list[dict]:
    """Return the chunks of a streamed answer."""
    events = [event for event in response.read().decode().split("\n\n") if event]
    values = [event.removeprefix("data: ") for event in events]
    assert values[-1] == "[DONE]"
    return [json.loads(value) for value in values[:-1]]


def streamed_text(chunks: list[dict]) -> str:
    texts = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    return "".join(texts).strip()


# ------------------------------------------------------------------ correct requests


def test_health_and_models(server):
    assert server.request("/health") == (200, {"status": "ok"})
    status, body = server.request("/v1/models")
    assert status == 200 and [model["id"] for model in body["data"]] == ["tiny"]
    assert server.request("/v1/models/tiny") == (200, body["data"][0])
    assert server.request("/v1/models/other")[0] == 404


def test_embeddings_of_texts_images_and_mixtures_equal_the_model_s(server, duet):
    image = tiny.random_image(1)
    inputs = ["a dog", [image_part(image)], [image_part(image), text_part("at night")]]
    status, body = server.request(EMBED, {"model": "tiny", "input": inputs})
    assert status == 200 and [item["index"] for item in body["data"]] == [0, 1, 2]
    vectors = np.array([item["embedding"] for item in body["data"]], np.float32)
    expected = duet.encode_document(["a dog", image, (image, "at night")])
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    options = {"encoding_format": "base64", "input_type": "query"}
    _, body = server.request(EMBED, {"input": "a dog", **options})
    vector = np.frombuffer(base64.b64decode(body["data"][0]["embedding"]), "<f4")
    np.testing.assert_allclose(vector[None], duet.encode_query(["a dog"]), atol=1e-5)


def test_vectors_in_base64_are_little_endian_float32():
    vectors = np.array([[1.0, -2.5], [0.5, 3.0]], np.float32)
    rows = format_vectors(vectors, as_base64=True)
    decoded = [struct.unpack("<2f", base64.b64decode(row["embedding"])) for row in rows]
    assert decoded == [(1.0, -2.5), (0.5, 3.0)]
    assert [row["index"] for row in rows] == [0, 1]


def test_whole_and_streamed_answers_equal_the_model_s(server, duet):
    image = tiny.random_image(2)
    expected = duet.generate([Message("user", (image, "what is it?"))], max_new_tokens=8)
    parts = image_part(image), text_part("what is it?")
    status, body = server.request(CHAT, chat_body(*parts))
    choice = body["choices"][0]
    assert status == 200 and choice["message"] == {"role": "assistant", "content": expected}
    chunks = read_events(server.send(CHAT, chat_body(*parts, stream=True)))
    assert streamed_text(chunks) == expected
    assert chunks[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]
    assert chunks[-1]["usage"] == body["usage"] and body["usage"]["completion_tokens"] <= 8


def test_conversation_may_have_several_turns_and_an_instruction(server, duet):
    turns = [("developer", "be short"), ("user", "hi"), ("assistant", "hello"), ("user", "who?")]
    messages = [Message(role, (text,)) for role, text in [("system", "be short"), *turns[1:]]]
    _, body = server.request(CHAT, conversation_body(turns))
    assert answer_of(body) == duet.generate(messages, max_new_tokens=8)


def test_same_seed_gives_the_same_answer(server):
    def sample(**sampling):
        body = chat_body("say something", temperature=2, **sampling)
        return answer_of(server.request(CHAT, body)[1])

    first = sample(seed=5, top_p=0.9)
    assert first == sample(seed=5, top_p=0.9) != sample(seed=6, top_p=0.9)
    assert sample(seed=5, top_p=1e-6) == sample(seed=7, top_p=1e-6), "only one token is sampled"


def test_search_equals_the_library_s(server, duet, index):
    image = tiny.random_image()
    mixed_query = [image_part(image), text_part("x")]
    for query, parts in (("a boat", ("a boat",)), (mixed_query, (image, "x"))):
        status, body = server.request("/v1/search", {"query": query, "k": 2, "where": ["i<2"]})
        hits = search(index, duet, parts, k=2, where=["i<2"])
        assert status == 200 and len(hits) == 2
        assert [hit["id"] for hit in body["data"]] == [hit.id for hit in hits]
        assert [hit["metadata"]["odd"] for hit in body["data"]] == [None, None]
        scores = [hit["score"] for hit in body["data"]]
        assert scores == pytest.approx([hit.score for hit in hits], abs=1e-5)


def test_chat_with_retrieval_equals_ask_and_names_the_sources(server, duet, index):
    expected = ask(index, duet, "which boat?", k=2, max_new_tokens=8)
    request = chat_body("which boat?", retrieval={"k": 2})
    status, body = server.request(CHAT, request)
    assert status == 200 and answer_of(body) == expected.text
    assert [source["id"] for source in body["sources"]] == [hit.id for hit in expected.sources]
    chunks = read_events(server.send(CHAT, request | {"stream": True}))
    assert chunks[0]["sources"] == body["sources"] and "sources" not in chunks[-1]
    assert streamed_text(chunks) == expected.text


def test_fields_that_request_nothing_are_accepted(server):
    harmless = {"n": 1, "top_p": 1.0, "tools": [], "user": "me", "seed": None}
    harmless["response_format"] = {"type": "text"}
    assert server.request(CHAT, chat_body("hi", **harmless))[0] == 200
    nulls = dict.fromkeys(("temperature", "stream", "stop", "tools", "max_completion_tokens"))
    assert server.request(CHAT, chat_body("hi", **nulls))[0] == 200
    embed_nulls = {"encoding_format": None, "dimensions": None}
    assert server.request(EMBED, {"input": "a", **embed_nulls})[0] == 200


def test_empty_instructions_and_answers_are_accepted(server, duet):
    """Clients send an instruction that nobody wrote, and an earlier answer that was empty."""
    turns = [("system", ""), ("user", "hi"), ("assistant", ""), ("user", "who?")]
    turns_of_parts = [("system", []), ("user", "hi"), ("assistant", []), ("user", "who?")]
    messages = [
        Message("user", ("hi",)),
        Message("assistant", (" ",)),
        Message("user", ("who?",)),
    ]
    expected = duet.generate(messages, max_new_tokens=8)
    for conversation in (turns, turns_of_parts):
        status, body = server.request(CHAT, conversation_body(conversation))
        assert status == 200 and answer_of(body) == expected


def open_request(server, path, body):
    """Return a connection whose request has been sent and whose response was not read."""
    data = json.dumps(body).encode()
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: 127.0.0.1",
        "Content-Type: application/json",
        f"Content-Length: {len(data)}",
        "",
        "",
    ]
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall("\r\n".join(lines).encode() + data)
    return connection


@pytest.fixture
def chats(monkeypatch):
    """All chats that the server creates."""
    created = []
    constructor = chat_module.ChatRequest

    def record(*args, **options):
        created.append(constructor(*args, **options))
        return created[-1]

    monkeypatch.setattr(chat_module, "ChatRequest", record)
    return created


def test_disconnected_client_ends_its_answer(server, duet, chats, monkeypatch):
    monkeypatch.setattr(duet.renderer, "eos_token_ids", [])  # the answer does not end by itself
    max_tokens = duet.backbone.context_length // 2
    body = chat_body("go on", stream=True, max_tokens=max_tokens)
    with open_request(server, CHAT, body) as connection:
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
    assert becomes_true(lambda: chats[0].cancelled)


def test_request_of_a_disconnected_client_is_not_started(server, duet, chats, monkeypatch):
    monkeypatch.setattr(resources_module, "DISCONNECT_POLL_SECONDS", 0.05)
    worker = server.service.worker
    embedded, prefilled = [], []
    embed_sequences, prefill_inputs = duet.embed_sequences, duet.prefill_inputs

    def record_embedding(sequences):
        embedded.extend(sequences)
        return embed_sequences(sequences)

    def record_prefill(sequences):
        prefilled.extend(sequences)
        return prefill_inputs(sequences)

    monkeypatch.setattr(duet, "embed_sequences", record_embedding)
    monkeypatch.setattr(duet, "prefill_inputs", record_prefill)
    release = threading.Event()
    blocking_call = worker.submit_call(release.wait)
    with (
        open_request(server, CHAT, chat_body("hi")),
        open_request(server, EMBED, {"input": ["cancelled"]}),
    ):
        assert becomes_true(lambda: chats and worker._embeddings.jobs)
        future = worker._embeddings.jobs[0].future
    assert becomes_true(lambda: chats[0].cancelled and future.cancelled())
    release.set()
    assert blocking_call.result(60)
    assert server.request(EMBED, {"input": "next"})[0] == 200
    assert len(embedded) == 1 and not prefilled


# ------------------------------------------------------------------ wrong requests

PNG_URL = image_part(tiny.random_image())["image_url"]["url"]
WRONG_CHATS = [
    (chat_body(image_url_part("/etc/passwd")), "messages[0].content[0].image_url: an image that"),
    (chat_body(image_url_part("https://a.b/c.png")), "data: URL"),
    (chat_body(image_url_part("data:;base64,?")), "broken base64"),
    (chat_body(text_part("a"), image_url_part("data:,x")), "messages[0].content[1].image_url: the"),
    (chat_body(image_url_part("data:,\ud800")), "not UTF-8"),
    (chat_body({"type": "input_audio"}), "messages[0].content[0].type: type 'input_audio' is not"),
    (chat_body({"type": "text"}), "messages[0].content[0].text: missing"),
    (chat_body({"type": "image_url"}), "messages[0].content[0].image_url: missing"),
    (chat_body({"type": "image_url", "image_url": {}}), "content[0].image_url.url: missing"),
    (chat_body({"type": "image_url", "image_url": 5}), "content[0].image_url: 5 is not an image"),
    (chat_body(text_part("a"), {"text": "b"}), "messages[0].content[1].type: missing"),
    (chat_body("a") | {"messages": [5]}, "messages[0]: 5 is not an object"),
    (chat_body(" "), "messages[0].content: expected text"),
    (chat_body(PNG_URL), "messages[0].content: an image in the place of a text"),
    (chat_body(text_part(PNG_URL)), "messages[0].content[0].text: an image in the place of"),
    (chat_body("hi", n=2), "n: 2 is not served"),
    (chat_body("hi", tools=[{"type": "function"}]), "tools: "),
    (chat_body("hi", response_format={"type": "json_object"}), "response_format: "),
    (chat_body("hi", skip_special_tokens=False), "skip_special_tokens: "),
    (chat_body("hi", images=["aGk="]), "images: ['aGk='] is not served"),
    (
        chat_body() | {"messages": [{"role": "user", "content": "a", "images": ["b"]}]},
        "[0].images: ",
    ),
    (chat_body("hi", retreival={}), "Did you mean 'retrieval'?"),
    (chat_body("hi", temperature=3), "temperature: 3 must be less than or equal to 2"),
    (chat_body("hi", temperature="1"), "temperature: '1' must be a valid number"),
    (chat_body("hi", top_p=0), "top_p: "),
    (chat_body("hi", top_k=-2), "top_k: "),
    (chat_body("hi", min_p=1.5), "min_p: "),
    (chat_body("hi", repetition_penalty=0), "repetition_penalty: "),
    (chat_body("hi", seed=1 << 63), "seed: "),
    (chat_body("hi", max_tokens=0), "max_tokens: "),
    (chat_body("hi", max_tokens=10**6), "window"),
    (chat_body("hi", retrieval={"where": ["no=1"]}), "no document has metadata 'no'"),
    (chat_body("hi", retrieval={"kk": 1}), "retrieval.kk: unknown field"),
    (chat_body("hi", retrieval={"where": 1}), "retrieval.where: "),
    (chat_body("hi") | {"messages": []}, "messages: 0 values. Send at least 1"),
    (conversation_body([("assistant", "hi")]), "the last turn is not a user's"),
    (chat_body("hi") | {"messages": [{"role": "tool", "content": "x"}]}, "role 'tool'"),
    (chat_body("hi", stop=["a"] * 17), "stop: 17 values. Send at most 16"),
    (chat_body("hi", stop="a" * 300), "stop"),
    (chat_body(*[text_part("a")] * 300), "messages: 300 parts. Send 256 at most"),
    (chat_body(*[image_part(tiny.random_image())] * 33), "33 images"),
    (chat_body("a" * (2 << 20)), "a text of 2097152 characters"),
]
WRONG_EMBEDDINGS = [
    ({"input": []}, "input: 0 values"),
    ({"input": {}}, "input: {} is neither text nor a list"),
    ({"input": ["a"] * 2049}, "input: 2049 values. Send at most 2048"),
    ({"input": [1, 2, 3]}, "check_embedding_ctx_length=False"),
    ({"input": [[1, 2, 3]]}, "check_embedding_ctx_length=False"),
    ({"input": ["a", [1, 2]]}, "input[1]: token ids"),
    ({"input": [text_part("a"), text_part("b")]}, 'input": [[{"type": "text"'),
    ({"messages": [{"role": "user", "content": "a"}] * 2}, 'input": [[{"type": "text"'),
    ({"input": "a", "messages": [{"role": "user", "content": "b"}]}, "messages: "),
    ({"input": ["a", ""]}, "input[1]: expected text"),
    ({"input": ["a", [{"type": "image_url", "image_url": "data:,x"}]]}, "input[1]"),
    ({"input": ["a", "data:image/png;base64,AA=="]}, "input[1]"),
    ({"input": ["a", [text_part(PNG_URL)]]}, "input[1][0].text: an image in the place of a text"),
    ({"input": PNG_URL.partition(",")[2]}, "input: an image in the place of a text"),
    ({"input": ["a", {}]}, "input[1]: neither text nor image"),
    ({"input": "a", "dimensions": 3}, "dimensions: "),
    ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
    ({"input": "a", "truncate_prompt_tokens": 7}, "truncate_prompt_tokens: 7"),
    ({"input": [[text_part("a")] * 256] * 65}, "input: 16640 parts. Send 16384 at most"),
    ({"input": ["b", "a " * 10000]}, "input[1]: "),
    ({"input": "a"} | {f"x{i}": 1 for i in range(300)}, "more than 256 unknown fields"),
    ({}, "input: missing"),
    (b"{", "the body is not JSON"),
    (b'{"input": NaN}', "the body is not JSON"),
    (b"[" * 10**5, "the body is not JSON"),
    (b"[" * 3 * 10**6, "commas and brackets"),
    ([], "the body is not a JSON object"),
]
WRONG_SEARCHES = [
    ({"query": "a", "k": 0}, "k: "),
    ({"query": [], "k": 1}, "query: 0 values"),
    ({"query": "a", "like": "n0"}, "either a query or the id of a document"),
    ({}, "either a query or the id of a document"),
    ({"query": "a", "threshold": 2}, "threshold: "),
    ({"query": "a", "offset": -1}, "offset: "),
    ({"query": "a", "where": ["i"]}, "where"),
]
WRONG_RERANKS = [
    ({"query": "a", "documents": []}, "documents: 0 values"),
    ({"query": "a", "documents": ["b", {"title": "c"}]}, "documents[1]: neither text nor image"),
    ({"query": "a", "documents": ["b"], "top_n": 0}, "top_n: "),
    ({"query": "a", "documents": ["b"], "max_tokens_per_doc": 9}, "max_tokens_per_doc: "),
    ({"query": "a", "documents": [[text_part("a")] * 256] * 65}, "documents: 16640 parts"),
    ({"query": "a", "documents": ["b", 5]}, "documents[1]: 5 is neither text nor a list"),
]
WRONG_CLASSIFICATIONS = [
    ({"input": ["a"], "labels": ["b"]}, "labels: 1 values. Send at least 2"),
    ({"input": ["a"], "labels": ["b", "B"]}, "labels: label 'B' occurs twice"),
    ({"input": ["a"], "labels": ["b", "c"], "templates": ["x"]}, "templates: a template without"),
    ({"input": "a", "labels": ["b" * 9000, "c"], "templates": ["{}" * 2000]}, "labels and templ"),
]
WRONG_REQUESTS = [
    *((CHAT, body, message) for body, message in WRONG_CHATS),
    *((EMBED, body, message) for body, message in WRONG_EMBEDDINGS),
    *(("/v1/search", body, message) for body, message in WRONG_SEARCHES),
    *(("/v1/rerank", body, message) for body, message in WRONG_RERANKS),
    *(("/v1/classify", body, message) for body, message in WRONG_CLASSIFICATIONS),
]


@pytest.mark.parametrize(
    ("path", "body", "message"),
    WRONG_REQUESTS,
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_request_gets_status_400_and_the_reason(server, path, body, message):
    status, response = server.request(path, body)
    assert status == 400 and message in response["error"]["message"], response
    assert response["error"]["type"] == "invalid_request_error"
    assert server.request("/health")[0] == 200


def test_wrong_model_host_path_method_and_type_are_refused(server):
    for model in ("gpt", "\ud800"):
        assert server.request(EMBED, {"model": model, "input": "a"})[0] == 404
    assert server.request(EMBED, b"{}", headers={"Content-Type": "text/plain"})[0] == 415
    assert server.send("/health", headers={"Host": "evil.example"}).status == 400
    assert server.send("/nothing").status == 404
    assert server.send(EMBED).status == 405


def test_busy_server_answers_503_with_retry_after(server, monkeypatch):
    monkeypatch.setattr("vlduet.serve.worker.MAX_WAITING", 0)
    response = server.send(EMBED, {"input": "a"})
    assert response.status == 503 and response.headers["Retry-After"] == "5"


def test_unexpected_error_answers_500_without_details_and_the_server_continues(
    server, duet, monkeypatch
):
    def broken_encode(sequences):
        raise RuntimeError("secret")

    with monkeypatch.context() as patched:
        patched.setattr(duet, "embed_sequences", broken_encode)
        status, body = server.request(EMBED, {"input": "a"})
    assert status == 500 and "secret" not in json.dumps(body)
    assert server.request(EMBED, {"input": "a"})[0] == 200


def test_search_and_retrieval_without_an_index_are_refused(duet):
    with RunningServer(Service(Worker(duet), name="tiny")) as server:
        assert server.request("/v1/search", {"query": "a"})[0] == 400
        status, body = server.request(CHAT, chat_body("a", retrieval={}))
        assert status == 400 and "--index" in body["error"]["message"]


def test_dual_encoder_embeds_and_refuses_to_chat(tmp_path):
    from vlduet.encoders.dual import DualEncoder
    from vlduet.encoders.frozen import FrozenEncoders
    from vlduet.encoders.loading import open_encoder
    from vlduet.model.feature_cache import FeatureCache

    folders = tiny.build_frozen_encoders(tmp_path)
    frozen = {role: open_encoder(folders[role]) for role in ("vision", "text")}
    model = DualEncoder(FrozenEncoders(frozen, cache=FeatureCache(None)), dim=8)
    image = tiny.random_image()
    with RunningServer(Service(Worker(model), name="towers")) as server:
        _, body = server.request(EMBED, {"input": ["a", [image_part(image)]]})
        vectors = np.array([item["embedding"] for item in body["data"]])
        np.testing.assert_allclose(vectors, model.encode(["a", image]), atol=1e-5)
        status, body = server.request(CHAT, chat_body("hi") | {"model": "towers"})
        assert status == 400 and "does not generate" in body["error"]["message"]
