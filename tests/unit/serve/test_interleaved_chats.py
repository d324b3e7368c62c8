"""Chats whose answers have images of the index: equal to those of the library, also together."""

from __future__ import annotations

import http.client
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from helpers import tiny
from helpers.interleaved import (
    CHAT,
    QUESTION,
    answer_parts,
    chat_body,
    collect_parts,
    generate_parts,
)
from helpers.serving import RunningServer, becomes_true, hold_worker
from vlduet.data.records import ImageRef
from vlduet.errors import ImageError, RetrievalError
from vlduet.model.backbone import Backbone
from vlduet.model.duet import DuetModel
from vlduet.model.generation.continuous import ContinuousBatcher
from vlduet.model.generation.interleave import ImageOptions
from vlduet.retrieval.index import Index
from vlduet.retrieval.search import Hit
from vlduet.serve import interleaved_chats
from vlduet.serve.interleaved_chats import PausedChat

pytestmark = pytest.mark.usefixtures("write_sentences")


def read_events(response: http.client.HTTPResponse) -> list[dict[str, Any]]:
    """Return the events of a stream."""
    events = [event for event in response.read().decode().split("\n\n") if event]
    assert events.pop() == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]


# ------------------------------------------------------------------ answers


@pytest.mark.parametrize("feed_back", [False, True])
def test_answer_equals_the_library_s(
    server: RunningServer, duet: DuetModel, index: Index, feed_back: bool
) -> None:
    request = chat_body(retrieval={"feed_back": feed_back, "where": {"group": "a"}})
    images = ImageOptions(where={"group": "a"})
    expected = generate_parts(duet, index, feed_back=feed_back, images=images)
    assert [part for part in expected if part.startswith("image")], expected
    status, body = server.request(CHAT, request)
    assert answer_parts((status, body)) == expected
    num_images = (len(expected) - 1) // 2
    assert body["images"] == {
        "retrieved": num_images,
        "fed_back": num_images * feed_back,
        "left_out": 0,
    }
    assert [hit["rank"] for hit in body["sources"]] == [*range(1, num_images + 1)]
    content = body["choices"][0]["message"]["content"]
    assert [part["hit"] for part in content if "hit" in part] == body["sources"]
    assert [part["image_url"]["url"] for part in content if "hit" in part] == [
        hit["image"] for hit in body["sources"]
    ]
    assert server.send(content[1]["image_url"]["url"]).status == 200
    assert body["usage"]["completion_tokens"] == 28


def test_usage_counts_what_the_model_has_read(server: RunningServer, duet: DuetModel) -> None:
    usages = [
        server.request(CHAT, chat_body(retrieval={"feed_back": value}))[1]["usage"]
        for value in (False, True)
    ]
    prompt = duet.renderer.render_chat(QUESTION, add_generation_prompt=True)
    num_image_tokens = len(duet.prepare_image(tiny.random_image()).token_ids(0))
    assert usages[0]["prompt_tokens"] == len(prompt)
    assert usages[1]["prompt_tokens"] == len(prompt) + 3 * num_image_tokens
    assert usages[1]["total_tokens"] == usages[1]["prompt_tokens"] + 28


def test_streamed_answer_is_a_text_for_clients_that_know_texts_only(server: RunningServer) -> None:
    expected = server.request(CHAT, chat_body())[1]
    options = {"stream": True, "stream_options": {"include_usage": True}}
    events = read_events(server.send(CHAT, chat_body(**options)))
    usage_event = events.pop()
    assert usage_event["choices"] == [] and usage_event["usage"] == expected["usage"]
    deltas = [event["choices"][0]["delta"] for event in events]
    # OpenAI's clients add up `content`, which must be a text or missing.
    assert all(isinstance(delta.get("content", ""), str) for delta in deltas)
    content = expected["choices"][0]["message"]["content"]
    text = "".join(part.get("text", "") for part in content)
    assert "".join(delta.get("content", "") for delta in deltas).strip() == text
    assert collect_parts(deltas) == collect_parts(content)
    assert [p for d in deltas for p in d.get("parts", ())] == [p for p in content if "hit" in p]
    last = events[-1]
    assert last["choices"][0]["finish_reason"] == "length" and "sources" not in events[0]
    assert (last["sources"], last["images"]) == (expected["sources"], expected["images"])


def test_text_that_may_begin_a_stop_string_is_before_the_image(server: RunningServer) -> None:
    bodies = [server.request(CHAT, chat_body(**more))[1] for more in ({}, {"stop": [". no"]})]
    contents = [body["choices"][0]["message"]["content"] for body in bodies]
    assert contents[0] == contents[1]
    body = server.request(CHAT, chat_body(stop=[contents[0][2]["text"].strip()]))[1]
    assert collect_parts(body["choices"][0]["message"]["content"]) == collect_parts(contents[0])[:2]
    assert body["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_index_of_another_model_ends_the_answer(
    server: RunningServer, index: Index, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """The index is replaced after the request was accepted."""
    refreshes = iter([None, RetrievalError("rebuilt by another model")])

    def refresh() -> None:
        if (error := next(refreshes, None)) is not None:
            raise error

    monkeypatch.setattr(index, "refresh", refresh)
    response = server.send(CHAT, chat_body(stream=stream))
    assert response.status == (200 if stream else 503)
    assert ("ended with an error" if stream else "started again") in response.read().decode()


def test_threshold_and_number_of_images_are_limits(
    server: RunningServer, duet: DuetModel, index: Index
) -> None:
    hits = server.request(CHAT, chat_body())[1]["sources"]
    threshold = sorted(hit["score"] for hit in hits)[-1]
    images = ImageOptions(threshold=threshold)
    answer = server.request(CHAT, chat_body(retrieval={"threshold": threshold}))
    assert answer_parts(answer) == generate_parts(duet, index, images=images)
    scores = [hit["score"] for hit in answer[1]["sources"]]
    assert 0 < len(scores) < len(hits) and min(scores) >= threshold
    assert len(server.request(CHAT, chat_body(retrieval={"max_images": 2}))[1]["sources"]) == 2


@pytest.mark.parametrize("template", ["A day: {image}{image} Then {image}, the end.", "{image}"])
@pytest.mark.parametrize("feed_back", [False, True])
def test_template_gets_an_image_at_every_place_and_nothing_is_generated(
    server: RunningServer, duet: DuetModel, index: Index, template: str, feed_back: bool
) -> None:
    expected = generate_parts(duet, index, template=template, feed_back=feed_back)
    options = {"template": template, "feed_back": feed_back}
    status, body = server.request(CHAT, chat_body(retrieval=options))
    assert answer_parts((status, body)) == expected
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == 0
    assert len(body["sources"]) == template.count("{image}")


def test_image_without_a_url_is_not_retrieved(server: RunningServer) -> None:
    """Four documents of the group have an image with a URL, one has one without, one a text."""
    options = {"template": "{image}" * 6, "where": {"group": "a"}}
    status, body = server.request(CHAT, chat_body(retrieval=options))
    assert status == 200
    assert sorted(hit["id"] for hit in body["sources"]) == [f"image {i}" for i in (0, 2, 4, 6)]


def test_image_that_does_not_fit_the_window_is_not_read(
    server: RunningServer, duet: DuetModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = duet.renderer.render_chat(QUESTION, add_generation_prompt=True)
    num_image_tokens = len(duet.prepare_image(tiny.random_image()).token_ids(0))
    window = len(prompt) + 28 + num_image_tokens  # room for one of three images
    monkeypatch.setattr(Backbone, "context_length", property(lambda _: window))
    status, answer = server.request(CHAT, chat_body(retrieval={"feed_back": True}))
    assert status == 200 and answer["images"] == {"retrieved": 3, "fed_back": 1, "left_out": 0}
    template = "{image}" + "a" * 40 + "{image}"
    status, answer = server.request(CHAT, chat_body(retrieval={"template": template}))
    assert status == 400 and "an answer of up to 40: the model's window is" in str(answer)


def test_image_without_a_readable_file_is_not_read(
    server: RunningServer, duet: DuetModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare_image(image: ImageRef) -> None:
        raise ImageError("the image is missing", place=image.name)

    expected = answer_parts(server.request(CHAT, chat_body()))
    monkeypatch.setattr(duet, "prepare_image", prepare_image)
    answer = server.request(CHAT, chat_body(retrieval={"feed_back": True}))
    assert answer_parts(answer) == expected and answer[1]["images"]["fed_back"] == 0


# ------------------------------------------------------------------ several chats


def test_answers_with_filters_of_their_own_run_in_one_batch(
    server: RunningServer, duet: DuetModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    bodies = [
        chat_body("one", retrieval={"where": {"group": "a"}}),
        chat_body("another question", retrieval={"where": {"group": "b"}, "feed_back": True}),
        chat_body("three", retrieval={"template": "First {image} then {image}"}),
        {"messages": [{"role": "user", "content": "without images"}], "max_tokens": 20},
    ]
    alone = [server.request(CHAT, body) for body in bodies]
    batch_sizes = []
    forward = duet.backbone.lm_head.forward

    def record(hidden: torch.Tensor) -> torch.Tensor:
        batch_sizes.append(len(hidden))
        return forward(hidden)

    monkeypatch.setattr(duet.backbone.lm_head, "forward", record)
    worker = server.service.worker
    with ThreadPoolExecutor(len(bodies)) as threads, hold_worker(worker):
        futures = [threads.submit(server.request, CHAT, body) for body in bodies]
        assert becomes_true(lambda: len(worker._scheduler._prepared) == len(bodies))
    for future, (_, expected) in zip(futures, alone, strict=True):
        status, body = future.result()
        assert status == 200 and body["usage"] == expected["usage"]
        content, expected_content = (
            answer["choices"][0]["message"]["content"] for answer in (body, expected)
        )
        if "sources" in expected:
            assert collect_parts(content) == collect_parts(expected_content)
        else:
            assert content == expected_content
    groups = [{hit["metadata"]["group"] for hit in body["sources"]} for _, body in alone[:2]]
    assert groups == [{"a"}, {"b"}] and max(batch_sizes) > 1


class SlowSearch:
    """Search of the server's index that waits for `release` and notes its threads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.started, self.release = threading.Event(), threading.Event()
        self.threads: set[str] = set()
        self._find_image = interleaved_chats.find_image
        monkeypatch.setattr(interleaved_chats, "find_image", self.find_image)

    def find_image(self, paused: PausedChat) -> Hit | None:
        self.threads.add(threading.current_thread().name)
        self.started.set()
        assert self.release.wait(60)
        return self._find_image(paused)


def test_other_chats_and_embeddings_go_on_during_a_search(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = answer_parts(server.request(CHAT, chat_body()))
    search = SlowSearch(monkeypatch)
    with ThreadPoolExecutor(1) as threads:
        future = threads.submit(server.request, CHAT, chat_body())
        assert search.started.wait(60)
        plain = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9}
        assert server.request(CHAT, plain)[1]["usage"]["completion_tokens"] == 9
        assert server.request("/v1/embeddings", {"input": "a dog"})[0] == 200
        assert not future.done()
        search.release.set()
        assert answer_parts(future.result()) == expected
    assert search.threads and "model" not in search.threads


def test_chat_that_is_cancelled_during_a_search_is_forgotten(
    server: RunningServer, duet: DuetModel, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, search = server.service.worker, SlowSearch(monkeypatch)
    response = server.send(CHAT, chat_body(stream=True))
    assert search.started.wait(60)
    assert worker.read_statistics().running_chats == 1
    response.close()
    assert becomes_true(lambda: len(worker._scheduler._running) == 0 or search.release.set())
    assert becomes_true(lambda: worker.read_statistics().running_chats == 0)
    assert worker._scheduler._batcher is None and not worker._scheduler.has_work
    assert answer_parts(server.request(CHAT, chat_body())) == generate_parts(duet, index)


def test_error_of_a_search_ends_its_chat_alone(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = answer_parts(server.request(CHAT, chat_body()))
    find_image = interleaved_chats.find_image

    def fail_for_group(paused: PausedChat) -> Hit | None:
        if paused.interleaving.answer.images.where:
            raise RetrievalError("no such key", place="where")
        return find_image(paused)

    monkeypatch.setattr(interleaved_chats, "find_image", fail_for_group)
    failing = chat_body(retrieval={"where": {"group": "a"}})
    worker = server.service.worker
    with ThreadPoolExecutor(3) as threads, hold_worker(worker):
        good = threads.submit(server.request, CHAT, chat_body())
        bad = threads.submit(server.request, CHAT, failing)
        stream = threads.submit(server.send, CHAT, failing | {"stream": True})
        assert becomes_true(lambda: len(worker._scheduler._prepared) == 3)
    assert answer_parts(good.result()) == expected
    status, body = bad.result()
    assert status == 400 and "no such key" in body["error"]["message"]
    events = read_events(stream.result())
    assert "ended with an error" in events[-1]["error"]["message"]
    assert any(event["choices"][0]["delta"].get("content") for event in events[:-1])


def test_error_of_the_batch_reaches_chats_that_pause(
    server: RunningServer, duet: DuetModel, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raise_out_of_memory(*_: Any) -> None:
        raise RuntimeError("out of memory")

    search = SlowSearch(monkeypatch)
    with ThreadPoolExecutor(1) as threads, monkeypatch.context() as patch:
        future = threads.submit(server.request, CHAT, chat_body())
        assert search.started.wait(60)
        patch.setattr(ContinuousBatcher, "step", raise_out_of_memory)
        plain = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9}
        assert server.request(CHAT, plain)[0] == 500
        assert future.result()[0] == 500
        search.release.set()
    assert answer_parts(server.request(CHAT, chat_body())) == generate_parts(duet, index)
