"""The worker thread: embedding requests in rotation, failures that stay isolated, and limits."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from helpers import tiny
from helpers.serving import OutputRecorder, hold_worker, submit_chat, user_message
from vlduet.data.records import ImageRef
from vlduet.errors import DataError, ImageError, ModelError
from vlduet.model.generation.continuous import Delta
from vlduet.serve import scheduler as scheduler_module
from vlduet.serve import worker as worker_module
from vlduet.serve.scheduler import ChatRequest
from vlduet.serve.worker import ServerBusyError, Worker

BROKEN_IMAGE = ImageRef(data=b"no picture")


@pytest.fixture
def document_batches(model, monkeypatch):
    """The items of every call of the model's `encode_document`."""
    batches = []
    encode = model.encode_document

    def record(items, **options):
        batches.append(list(items))
        return encode(items, **options)

    monkeypatch.setattr(model, "encode_document", record)
    return batches


def is_image(item) -> bool:
    return isinstance(item, ImageRef)


# ------------------------------------------------------------------ embedding


def test_simultaneous_requests_get_the_vectors_of_requests_alone(model, worker, document_batches):
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    texts = [words[:length] for length in range(1, 10)]
    queries = []
    for i in range(3):
        image = tiny.random_image(i)
        queries.append([image, (image, "at night")])
    with hold_worker(worker):
        document_futures = [worker.submit_embedding(t, is_query=False) for t in texts]
        query_futures = [worker.submit_embedding(q, is_query=True) for q in queries]
    for items, future in zip(texts, document_futures, strict=True):
        np.testing.assert_allclose(future.result(60).vectors, model.encode(items), atol=1e-5)
    for items, future in zip(queries, query_futures, strict=True):
        np.testing.assert_allclose(future.result(60).vectors, model.encode_query(items), atol=1e-5)
    # 45 documents and six images in turns that cost 32 texts each.
    assert sum(map(len, document_batches)) == 45 and len(document_batches) == 3


def test_no_items_give_an_empty_array(model, worker):
    assert worker.submit_embedding([], is_query=True).result(60).vectors.shape == (0, model.dim)


def test_turn_has_few_images_and_an_item_of_every_request(model, worker, document_batches):
    images = [tiny.random_image(i) for i in range(9)]
    finished: list[str] = []
    with hold_worker(worker):
        many = worker.submit_embedding(images, is_query=False)
        many.add_done_callback(lambda _: finished.append("many"))
        single = worker.submit_embedding(["one"], is_query=False)
        single.add_done_callback(lambda _: finished.append("single"))
    np.testing.assert_allclose(many.result(60).vectors, model.encode(images), atol=1e-5)
    assert single.result(60).vectors.shape == (1, model.dim) and finished == ["single", "many"]
    assert [sum(map(is_image, batch)) for batch in document_batches] == [4, 4, 1]
    assert "one" in document_batches[0]


def test_broken_item_fails_its_own_request_with_its_position(model, worker):
    image = tiny.random_image()
    with hold_worker(worker):
        good = worker.submit_embedding(["a", image], is_query=False)
        broken = worker.submit_embedding(["b", BROKEN_IMAGE, "c"], is_query=False)
        empty = worker.submit_embedding(["d", " "], is_query=False)
    np.testing.assert_allclose(good.result(60).vectors, model.encode(["a", image]), atol=1e-5)
    with pytest.raises(ImageError, match=r"input\[1\]"):
        broken.result(60)
    with pytest.raises(DataError, match=r"input\[1\]: nothing to embed"):
        empty.result(60)


def test_thread_survives_errors_of_embeddings_and_calls(model, worker, monkeypatch):
    def raise_out_of_memory(items, **options):
        raise RuntimeError("out of memory")

    def return_nan(items, **options):
        return np.full((len(items), model.dim), np.nan)

    with monkeypatch.context() as patched:
        patched.setattr(model, "encode_query", raise_out_of_memory)
        patched.setattr(model, "encode_document", return_nan)
        with pytest.raises(RuntimeError, match="out of memory"):
            worker.submit_embedding(["a"], is_query=True).result(60)
        with pytest.raises(ModelError, match=r"not finite for input\[0\]"):
            worker.submit_embedding(["a"], is_query=False).result(60)
        with pytest.raises(ZeroDivisionError):
            worker.submit_call(lambda: 1 / 0).result(60)
    assert worker.submit_embedding(["a"], is_query=True).result(60).vectors.shape == (1, model.dim)


def test_vector_that_is_not_finite_fails_its_own_request(model, worker, monkeypatch):
    encode = model.encode_document

    def encode_with_overflow(items, **options):
        vectors = encode(items, **options)
        vectors[[item == "large" for item in items]] = np.inf
        return vectors

    monkeypatch.setattr(model, "encode_document", encode_with_overflow)
    with hold_worker(worker):
        good = worker.submit_embedding(["fine"], is_query=False)
        bad = worker.submit_embedding(["a", "large"], is_query=False)
    np.testing.assert_allclose(good.result(60).vectors, model.encode(["fine"]), atol=1e-5)
    with pytest.raises(ModelError, match=r"input\[1\]"):
        bad.result(60)


def test_cancelled_future_and_closed_listener_do_not_harm_others(model, worker, monkeypatch):
    futures = []
    encode = model.encode_document

    def encode_and_cancel(items, **options):
        futures[0].cancel()
        return encode(items, **options)

    with monkeypatch.context() as patched:
        patched.setattr(model, "encode_document", encode_and_cancel)
        with hold_worker(worker):
            futures.append(worker.submit_embedding(["a"], is_query=False))
        assert worker.submit_embedding(["b"], is_query=True).result(60).vectors.shape == (
            1,
            model.dim,
        )

    def raise_closed(_):
        raise RuntimeError("the loop is closed")

    request = ChatRequest(user_message("x"), raise_closed, 4)
    worker.submit_chat(request)
    assert worker.submit_embedding(["c"], is_query=True).result(60).vectors.shape == (1, model.dim)
    last = submit_chat(worker, user_message("next"), 3).read_deltas()[-1]
    assert last.completion_tokens <= 3 and request.cancelled


def test_embedding_does_not_wait_for_the_end_of_an_answer(model, worker):
    recorder = OutputRecorder()
    futures = []
    was_done_at: dict[int, bool] = {}

    def on_output(delta):
        if not futures:  # called in the worker's thread, between two tokens
            futures.append(worker.submit_embedding(["a dog"], is_query=False))
        was_done_at[delta.completion_tokens] = futures[0].done()
        recorder.outputs.put(delta)

    worker.submit_chat(ChatRequest(user_message("go on"), on_output, 12))
    num_tokens = recorder.read_deltas()[-1].completion_tokens
    np.testing.assert_allclose(futures[0].result(60).vectors, model.encode(["a dog"]), atol=1e-5)
    assert num_tokens == 1 or was_done_at[2], "the vector must be there with the second token"
    expected = model.generate(user_message("go on"), max_new_tokens=12)
    assert submit_chat(worker, user_message("go on")).read_text().strip() == expected


# ------------------------------------------------------------------ limits


def test_too_many_waiting_items_are_refused(worker, monkeypatch):
    with hold_worker(worker):
        while worker._calls:  # until the holding call has started
            time.sleep(0.01)
        monkeypatch.setattr(worker_module, "MAX_WAITING", 3)
        accepted = worker.submit_embedding(["a", "b"], is_query=False)
        with pytest.raises(ServerBusyError):
            worker.submit_embedding(["c", "d"], is_query=False)
    assert len(accepted.result(60).vectors) == 2
    assert len(worker.submit_embedding(["c", "d"], is_query=False).result(60).vectors) == 2


def test_close_fails_running_preparing_and_waiting_chats(endless, monkeypatch):
    monkeypatch.setattr(scheduler_module, "MAX_CONCURRENT_CHATS", 2)
    worker = Worker(endless)
    recorder = OutputRecorder()
    later: list[OutputRecorder] = []

    def on_output(output):
        if not later:
            message = user_message(tiny.random_image(), "later")
            later.extend(submit_chat(worker, message) for _ in range(2))
        elif isinstance(output, Delta) and output.completion_tokens == 2:
            threading.Thread(target=worker.close).start()
            while not worker._closed:
                time.sleep(0.01)
        recorder.outputs.put(output)

    max_new_tokens = endless.backbone.context_length // 2
    worker.submit_chat(ChatRequest(user_message("go on and on"), on_output, max_new_tokens))
    outputs = recorder.read_all()
    worker.close()
    assert isinstance(outputs[-1], ServerBusyError)
    for waiting in later:
        assert isinstance(waiting.read_all()[0], ServerBusyError)
    with pytest.raises(ServerBusyError):
        worker.submit_embedding(["a"], is_query=False)
