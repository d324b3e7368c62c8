"""Search, rerank, classify, images and the documentation over a real socket."""

from __future__ import annotations

import base64
import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest

from helpers import tiny
from helpers.serving import RunningServer
from vlduet.data.images import encode_png, from_pixels, load_image
from vlduet.data.records import ImageRef
from vlduet.eval.classification import classify
from vlduet.model.duet import DuetModel
from vlduet.model.score_statistics import ScoreDistribution, ScoreStatistics
from vlduet.retrieval.build import build_index
from vlduet.retrieval.index import Index
from vlduet.retrieval.search import Hit, SearchOptions, search, search_similar
from vlduet.serve import fields
from vlduet.serve import resources as resources_module
from vlduet.serve.app import Service
from vlduet.serve.resources import format_hits
from vlduet.serve.routes import embeddings as embeddings_module
from vlduet.serve.routes import images as images_module
from vlduet.serve.worker import Worker

IDS = ["plain", "a folder/in it#1", "50 % ünïcode?&+", "no image", "gone"]
SEARCH, RERANK, CLASSIFY = "/v1/search", "/v1/rerank", "/v1/classify"


@pytest.fixture(scope="module")
def duet(tmp_path_factory: pytest.TempPathFactory) -> DuetModel:
    return tiny.build_duet_model(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, duet: DuetModel) -> Path:
    """A folder with an index of images, two of them identical documents but for the id."""
    root = tmp_path_factory.mktemp("data")
    lines = []
    for i, name in enumerate(IDS):
        parts: list[dict[str, str]] = [{"text": f"text {min(i, 1)}"}]
        if name != "no image":
            pixels = np.zeros((30, 60, 3), np.uint8)
            pixels[:, :, min(i, 1)] = 200
            (root / f"{i}.png").write_bytes(encode_png(from_pixels(pixels)))
            parts.append({"image": f"{i}.png"})
        lines.append(json.dumps({"id": name, "parts": parts, "metadata": {"i": i}}))
    (root / "source.jsonl").write_text("\n".join(lines) + "\n")
    build_index(duet, root / "source.jsonl", to=root / "index", side="record")
    (root / "4.png").unlink()
    return root


@pytest.fixture(scope="module")
def index(folder: Path, duet: DuetModel) -> Iterator[Index]:
    with Index.open(folder / "index", duet) as opened:
        yield opened


@pytest.fixture(scope="module")
def server(duet: DuetModel, index: Index) -> Iterator[RunningServer]:
    with RunningServer(Service(Worker(duet), name="tiny", index=index)) as running:
        yield running


def data_url(image: ImageRef) -> str:
    return "data:image/png;base64," + base64.b64encode(image.data or b"").decode()


def ids_of(body: dict[str, Any]) -> list[str]:
    return [hit["id"] for hit in body["data"]]


# ------------------------------------------------------------------ search


def test_options_of_a_search_are_those_of_the_library(
    server: RunningServer, duet: DuetModel, index: Index
) -> None:
    for fields_, options in (
        ({"offset": 1}, SearchOptions(offset=1)),
        ({"distinct": True, "exact": True}, SearchOptions(distinct=True, exact=True)),
        ({"threshold": 0.2}, SearchOptions(threshold=0.2)),
    ):
        status, body = server.request(SEARCH, {"query": "text 1", "k": 3, **fields_})
        hits = search(index, duet, "text 1", k=3, options=options)
        assert status == 200 and ids_of(body) == [hit.id for hit in hits]
        assert [hit["rank"] for hit in body["data"]] == [hit.rank for hit in hits]


def test_hits_have_the_share_of_unrelated_pairs_where_it_is_known(
    server: RunningServer, duet: DuetModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "p" not in server.request(SEARCH, {"query": "text 1"})[1]["data"][0]
    scores = ScoreDistribution.from_scores(np.linspace(-1, 1, 99))
    statistics = ScoreStatistics(9, {("text", "both"): scores})
    monkeypatch.setattr(duet, "score_statistics", statistics)
    hits = server.request(SEARCH, {"query": "text 1", "k": 9})[1]["data"]
    shares = {hit["id"]: hit.get("p") for hit in hits}
    assert shares.pop("no image") is None, "its document is a text alone"
    scores_by_id = {hit["id"]: hit["score"] for hit in hits}
    assert shares == {name: scores.share_at_least(scores_by_id[name]) for name in shares}


def test_search_for_documents_like_another_one(server: RunningServer, index: Index) -> None:
    status, body = server.request(SEARCH, {"like": IDS[1], "k": 2})
    assert status == 200
    assert ids_of(body) == [hit.id for hit in search_similar(index, IDS[1], k=2)]
    assert IDS[1] not in ids_of(body) and body["usage"]["total_tokens"] == 0
    status, body = server.request(SEARCH, {"like": "nothing"})
    assert status == 400 and body["error"]["param"] == "like"
    assert str(index.path) not in json.dumps(body)


def test_error_in_a_filter_names_the_field(server: RunningServer) -> None:
    for where in ({"no": 1}, {"i": "x"}, ["i"]):
        status, body = server.request(SEARCH, {"query": "a", "where": where})
        assert status == 400 and body["error"]["param"] == "where", body


def test_search_with_an_image_as_a_text_or_an_object(server: RunningServer) -> None:
    url = data_url(tiny.random_image(3))
    part = {"type": "image_url", "image_url": {"url": url}}
    scores = []
    for query in (url, "  " + url.replace("data:image", "DATA:IMAGE"), {"image": url}, [part]):
        status, body = server.request(SEARCH, {"query": query})
        assert status == 200
        scores.append([hit["score"] for hit in body["data"]])
    assert scores == [scores[0]] * 4


def test_updated_index_is_searched_and_a_rebuilt_one_is_refused(
    tmp_path: Path, duet: DuetModel
) -> None:
    source, target = tmp_path / "a.jsonl", tmp_path / "index"
    source.write_text('{"id": "a", "parts": [{"text": "one"}]}\n')
    build_index(duet, source, to=target, side="record")
    with Index.open(target, duet) as opened:
        service = Service(Worker(duet), name="tiny", index=opened)
        with RunningServer(service) as server:
            assert ids_of(server.request(SEARCH, {"query": "one"})[1]) == ["a"]
            line = '{"id": "b", "parts": [{"text": "two"}], "metadata": {"colour": "red"}}\n'
            source.write_text(source.read_text() + line)
            build_index(duet, source, to=target, side="record")
            body = server.request(SEARCH, {"query": "one", "where": {"colour": "red"}})[1]
            assert ids_of(body) == ["b"]
            manifest = target / "manifest.json"
            manifest.write_text(manifest.read_text().replace(duet.fingerprint, "0" * 64))
            status, body = server.request(SEARCH, {"query": "one"})
            assert status == 503 and "started again" in body["error"]["message"]
            assert str(tmp_path) not in json.dumps(body)


# ------------------------------------------------------------------ usage and length


def test_usage_counts_the_tokens_and_truncation_is_reported(
    server: RunningServer, duet: DuetModel
) -> None:
    def usage(path: str, body: dict[str, Any]) -> int:
        status, response = server.request(path, body)
        assert status == 200, response
        assert response["usage"]["prompt_tokens"] == response["usage"]["total_tokens"]
        return int(response["usage"]["total_tokens"])

    one, two = usage("/v1/embeddings", {"input": "one"}), usage("/v1/embeddings", {"input": "two"})
    assert one > 0 and usage("/v1/embeddings", {"input": ["one", "two"]}) == one + two
    assert usage(SEARCH, {"query": "one"}) > 0
    assert usage(RERANK, {"query": "one", "documents": ["one", "two"]}) >= one + two
    long_text = "word " * duet.renderer.max_tokens
    for option in ({"truncate": True}, {"truncate": "END"}, {"truncate_prompt_tokens": -1}):
        body = {"input": ["one", long_text], **option}
        status, response = server.request("/v1/embeddings", body)
        assert status == 200 and response["truncated"] == 1
    limit = {"truncate_prompt_tokens": duet.renderer.max_tokens}
    assert server.request("/v1/embeddings", {"input": "one", **limit})[1]["truncated"] == 0
    for path, body, place in (
        ("/v1/embeddings", {"input": long_text}, "input"),
        ("/v1/embeddings", {"input": ["one", long_text]}, "input[1]"),
        (SEARCH, {"query": long_text}, "query"),
        (RERANK, {"query": "one", "documents": ["one", {"text": long_text}]}, "documents[1]"),
    ):
        status, response = server.request(path, body)
        assert status == 400 and response["error"]["param"] == place, response
        assert str(duet.renderer.max_tokens) in response["error"]["message"]


# ------------------------------------------------------------------ rerank and classify


def test_rerank_orders_all_forms_of_documents_by_their_cosine(
    server: RunningServer, duet: DuetModel
) -> None:
    image, other_image = tiny.random_image(5), tiny.random_image(6)
    part = {"type": "image_url", "image_url": {"url": data_url(other_image)}}
    documents = ["one", {"text": "two"}, {"image": data_url(image)}, [part], {"text": "three"}]
    contents = ["one", "two", image, other_image, "three"]
    scores = duet.encode_document(contents) @ duet.encode_query(["question"])[0]
    request = {"model": "tiny", "query": "question", "documents": documents}
    for path in (RERANK, "/v2/rerank"):
        status, body = server.request(path, request)
        assert status == 200
        results = body["results"]
        assert [result["index"] for result in results] == np.argsort(
            -scores, kind="stable"
        ).tolist()
        relevance = {result["index"]: result["relevance_score"] for result in results}
        assert [relevance[i] for i in range(5)] == pytest.approx(scores.tolist(), abs=2e-6)
    returned = {result["index"]: result.get("document") for result in results}
    assert returned == {
        0: {"text": "one"},
        1: {"text": "two"},
        2: None,
        3: None,
        4: {"text": "three"},
    }
    _, body = server.request(RERANK, {**request, "top_n": 2, "return_documents": False})
    assert len(body["results"]) == 2 and not any("document" in row for row in body["results"])
    _, body = server.request(RERANK, {**request, "return_documents": True})
    returned = {result["index"]: result["document"] for result in body["results"]}
    assert returned[2] == {"image": data_url(image)} and "content" in returned[3]


def test_classify_gives_the_probabilities_of_the_library(
    server: RunningServer, duet: DuetModel
) -> None:
    images = [tiny.random_image(i) for i in range(3)]
    labels = ["a cat", "a dog", "a boat"]
    expected = classify(duet, images, labels)
    request = {"input": [{"image": data_url(image)} for image in images], "labels": labels}
    status, body = server.request(CLASSIFY, request)
    assert status == 200 and body["usage"]["total_tokens"] > 0
    for i, row in enumerate(body["data"]):
        scores = {item["label"]: item["score"] for item in row["predictions"]}
        assert [scores[label] for label in labels] == pytest.approx(
            expected.probabilities[i].tolist(), abs=1e-4
        )
        assert row["index"] == i and row["prediction"] == row["predictions"][0]["label"]
        assert row["score"] == max(scores.values())
    one = {"input": "a cat", "labels": labels, "templates": ["{}"]}
    assert server.request(CLASSIFY, one)[1]["data"][0]["prediction"] == "a cat"


# ------------------------------------------------------------------ images


def test_hits_have_the_url_of_a_small_image_without_metadata(
    server: RunningServer, folder: Path
) -> None:
    hits = {hit["id"]: hit for hit in server.request(SEARCH, {"query": "text"})[1]["data"]}
    assert set(hits) == set(IDS) and "image" not in hits["no image"]
    for i, name in enumerate(IDS[:3]):
        assert hits[name]["image"] == f"/v1/images/{quote(name, safe='')}"
        response = server.send(hits[name]["image"])
        content = response.read()
        assert response.status == 200 and response.headers["Content-Type"] == "image/png"
        shown = np.asarray(load_image(ImageRef(data=content)))
        stored = np.asarray(load_image(ImageRef(path=folder / f"{i}.png")))
        np.testing.assert_array_equal(shown, stored)
        small = load_image(ImageRef(data=server.send(f"{hits[name]['image']}?size=20").read()))
        assert small.size == (20, 10)
    assert server.send(f"/v1/images/{quote(IDS[1])}").status == 200, "a slash as it is"


def test_images_are_cached_until_they_change(server: RunningServer, folder: Path) -> None:
    response = server.send("/v1/images/plain")
    response.read()
    assert response.headers["Cache-Control"].startswith("private")
    etag = {"If-None-Match": response.headers["ETag"]}
    again = server.send("/v1/images/plain", headers=etag)
    assert again.status == 304 and again.read() == b""
    assert server.send("/v1/images/plain?size=20", headers=etag).status == 200
    path = folder / "0.png"
    path.write_bytes(path.read_bytes() + b"\0")
    assert server.send("/v1/images/plain", headers=etag).status == 200


@pytest.mark.parametrize("name", [".", "..", "plain\n", "a\nb"])
def test_hit_whose_id_fits_into_no_url_has_no_image(name: str) -> None:
    image = ImageRef(data=b"an image")
    hits = [Hit("..a/.", 0.5, "text", image, {}, 1), Hit(name, 0.4, "text", image, {}, 2)]
    first, second = format_hits(hits)
    assert first["image"] == "/v1/images/..a%2F." and "image" not in second


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("no%20image", 404, "There is no image in document 'no image'"),
        ("nothing", 404, "The index has no document 'nothing'"),
        ("..%2F..%2Fetc%2Fpasswd", 404, "The index has no document"),
        ("gone", 404, "The image of document 'gone' is missing or broken"),
        ("plain?size=9999", 400, "size: '9999' must be less than or equal to 2048"),
        ("plain?size=x", 400, "size: 'x' must be a valid integer"),
    ],
)
def test_images_that_are_not_there(
    server: RunningServer, folder: Path, path: str, status: int, message: str
) -> None:
    response = server.send(f"/v1/images/{path}")
    body = json.loads(response.read())
    assert response.status == status and message in body["error"]["message"]
    assert str(folder) not in json.dumps(body)


# ------------------------------------------------------------------ event loop


def test_slow_work_on_requests_is_outside_of_the_event_loop(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: dict[str, threading.Thread] = {}

    def record(module: Any, name: str) -> None:
        function = getattr(module, name)

        def call(*args: Any, **options: Any) -> Any:
            threads[name] = threading.current_thread()
            return function(*args, **options)

        monkeypatch.setattr(module, name, call)

    record(resources_module, "check_fields")
    record(embeddings_module, "parse_inputs")
    record(embeddings_module, "format_vectors")
    record(resources_module, "search_vector")
    record(images_module, "encode_preview")
    assert server.request("/v1/embeddings", {"input": "a"})[0] == 200
    assert server.request(SEARCH, {"query": "a"})[0] == 200
    assert server.send("/v1/images/plain").status == 200
    assert len(threads) == 5
    assert server.thread not in threads.values()
    assert "model" not in {thread.name for thread in threads.values()}


# ------------------------------------------------------------------ fields


def test_unknown_fields_are_ignored_with_one_line_and_refused_by_a_strict_server(
    server: RunningServer, duet: DuetModel, caplog: pytest.LogCaptureFixture
) -> None:
    fields._logged_fields.clear()
    harmless = {"input": "a", "user": "me", "tools": [], "frobnicate": None}
    with caplog.at_level(logging.WARNING, "uvicorn.error"):
        assert server.request("/v1/embeddings", harmless)[0] == 200
        assert not caplog.messages
        for _ in range(2):
            assert server.request("/v1/embeddings", {"input": "a", "frobnicate": 1})[0] == 200
        assert len(caplog.messages) == 1 and "frobnicate" in caplog.messages[0]
        assert server.request("/v1/embeddings", {"input": "a", "z" * 10**6: 1})[0] == 200
        assert max(map(len, fields._logged_fields)) <= 40, "long names would fill the memory"
    with RunningServer(Service(Worker(duet), name="tiny", strict=True)) as strict_server:
        for field, value in (("user", "me"), ("frobnicate", 1), ("tools", [])):
            status, body = strict_server.request("/v1/embeddings", {"input": "a", field: value})
            assert status == 400 and body["error"]["param"] == field
        assert strict_server.request("/v1/embeddings", {"input": "a"})[0] == 200


# ------------------------------------------------------------------ documentation


def test_document_describes_every_endpoint_and_its_body(server: RunningServer) -> None:
    document = json.loads(server.send("/openapi.json").read())
    posts = {path for path, methods in document["paths"].items() if "post" in methods}
    assert posts == {
        "/v1/chat/completions",
        "/v1/embeddings",
        SEARCH,
        RERANK,
        "/v2/rerank",
        CLASSIFY,
    }
    schemas = document["components"]["schemas"]
    for path in posts:
        post = document["paths"][path]["post"]
        name = post["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        assert schemas[name.rpartition("/")[2]]["properties"]["model"]
        assert {"200", "4XX"} <= set(post["responses"])
    text = json.dumps(document)
    for name in set(text.split('"#/components/schemas/')[1:]):
        assert name.partition('"')[0] in schemas
    message = schemas["ChatBody"]["properties"]["messages"]["items"]
    assert message["discriminator"]["propertyName"] == "role"


def test_page_of_the_documentation_loads_nothing_else(server: RunningServer) -> None:
    response = server.send("/docs")
    page = response.read().decode()
    assert response.status == 200 and response.headers["Content-Type"].startswith("text/html")
    assert "default-src 'none'" in response.headers["Content-Security-Policy"]
    for word in ("POST /v1/rerank", "repetition_penalty", "truncate_prompt_tokens"):
        assert word in page
    for word in ("<script", "src=", "http:", "https:", "@import"):
        assert word not in page
