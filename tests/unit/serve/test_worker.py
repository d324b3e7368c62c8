"""The worker thread: embedding requests in rotation, failures that stay isolated, and limits."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future

import numpy as np
import pytest

from helpers import tiny
from helpers.serving import OutputRecorder, becomes_true, hold_worker, submit_chat, user_message
from vlduet.data.records import ImageRef
from vlduet.errors import DataError, ImageError, ModelError
from vlduet.model.feature_cache import FeatureCache
from vlduet.model.generation.continuous import Delta
from vlduet.model.limits import accept_truncation
from vlduet.serve import scheduler as scheduler_module
from vlduet.serve import worker as worker_module
from vlduet.serve.chats import ChatRequest
from vlduet.serve.embedding_jobs import EmbeddingResult
from vlduet.serve.worker import ServerBusyError, Worker

BROKEN_IMAGE = ImageRef(data=b"no picture")
one_family = pytest.mark.parametrize("family", ["fast_vlm"], indirect=True)
"""Mark of tests of which the family of the model does not change the result."""


@pytest.fixture
def passes(model, monkeypatch):
    """The sequences of every forward pass that embeds, in order."""
    batches = []
    embed = model.embed_sequences

    def record(sequences):
        batches.append(list(sequences))
        return embed(sequences)

    monkeypatch.setattr(model, "embed_sequences", record)
    return batches


@pytest.fixture
def padded_sizes(model, monkeypatch):
    """The number of padded tokens of every pass of the language model over more than one token."""
    sizes = []

    def record(module, args, kwargs):
        rows, length, _ = kwargs["inputs_embeds"].shape
        if length > 1:
            sizes.append(rows * length)

    hook = model.backbone.language_model.register_forward_pre_hook(record, with_kwargs=True)
    yield sizes
    hook.remove()


def embed(worker, items, *, is_query=False, truncate=False):
    """Return the vectors of a request."""
    return worker.submit_embedding(items, is_query=is_query, truncate=truncate).result(60).vectors


# ------------------------------------------------------------------ embedding


def test_simultaneous_requests_get_the_vectors_of_requests_alone(model, worker, passes):
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
    assert sum(map(len, passes)) == 51 and len(passes) < 12


@one_family
def test_finished_and_failed_requests_leave_the_queue(model, worker):
    embed(worker, ["a", tiny.random_image()])
    assert becomes_true(lambda: not worker._embeddings.jobs), "it would keep its images"
    with pytest.raises(ImageError):
        embed(worker, [BROKEN_IMAGE])
    assert becomes_true(lambda: not worker._embeddings.jobs)


def test_no_items_give_an_empty_array(model, worker):
    assert worker.submit_embedding([], is_query=True).result(60).vectors.shape == (0, model.dim)


def test_tokens_and_images_of_a_turn_are_bounded_while_a_chat_runs(
    endless, worker, monkeypatch, padded_sizes
):
    """Short, long and very long texts and images: the padded tokens between two tokens."""
    tokens, images = 160, 2
    monkeypatch.setattr(worker_module, "TOKENS_PER_TURN", tokens)
    monkeypatch.setattr(worker_module, "IMAGES_PER_TURN", images)
    num_encoded = [0]
    compute_vision_features = endless.backbone.compute_vision_features

    def count_images(prepared):
        num_encoded[-1] += len(prepared)
        return compute_vision_features(prepared)

    items = ["a", "b " * 60, "c", "d " * 30, "e " * 200, *map(tiny.random_image, range(7)), "f"]
    expected = endless.encode(items)
    monkeypatch.setattr(endless, "feature_cache", FeatureCache(None))
    monkeypatch.setattr(endless.backbone, "compute_vision_features", count_images)
    padded_sizes.clear()
    turns: list[list[int]] = []
    futures: list[Future[EmbeddingResult]] = []
    recorder = OutputRecorder()

    def on_output(delta):
        if not futures:
            futures.extend(worker.submit_embedding(items, is_query=False) for _ in range(2))
        turns.append(list(padded_sizes))
        padded_sizes.clear()
        num_encoded.append(0)
        request.cancelled = all(future.done() for future in futures)
        recorder.outputs.put(delta)

    request = ChatRequest(user_message("go on"), on_output, endless.backbone.context_length // 2)
    worker.submit_chat(request)
    assert becomes_true(lambda: request.cancelled)
    for future in futures:
        np.testing.assert_allclose(future.result(60).vectors, expected, atol=1e-5)
    busy = [sum(sizes) for sizes in turns[1:]]
    if endless.backbone.family.attention_mask_kinds():  # such models read a long text at once
        busy = [sum(sizes) for sizes in turns[1:] if len(sizes) != 1 or sizes[0] < 200]
    assert max(busy) <= tokens and sum(size > 0 for size in busy) >= 5
    assert max(num_encoded) <= images and sum(num_encoded) == 7


def test_parts_of_a_long_text_give_its_vector(model, worker, monkeypatch, padded_sizes):
    monkeypatch.setattr(worker_module, "TOKENS_PER_TURN", 40)
    monkeypatch.setattr(worker_module, "FREE_TURN_FACTOR", 1)
    text = "one two three " * 30
    mixture = (tiny.random_image(), text)
    expected, expected_mixture = model.encode([text]), model.encode_query([mixture])
    padded_sizes.clear()
    finished: list[str] = []
    with hold_worker(worker):
        long = worker.submit_embedding([text], is_query=False)
        long.add_done_callback(lambda _: finished.append("long"))
        short = worker.submit_embedding(["a", "b"], is_query=False)
        short.add_done_callback(lambda _: finished.append("short"))
        assert becomes_true(lambda: sum(len(j.prepared) for j in worker._embeddings.jobs) == 3)
    np.testing.assert_allclose(long.result(60).vectors, expected, atol=1e-5)
    if not model.backbone.family.attention_mask_kinds():  # such models read a text at once
        assert finished[0] == "short" and max(padded_sizes) <= 64
    np.testing.assert_allclose(embed(worker, [mixture], is_query=True), expected_mixture, atol=1e-5)


@one_family
def test_without_chats_a_turn_embeds_more(model, worker, padded_sizes):
    items = ["word " * 50] * 12
    with hold_worker(worker):
        future = worker.submit_embedding(items, is_query=False)
        assert becomes_true(lambda: worker._embeddings.jobs[0].num_started == 12)
    assert len(future.result(60).vectors) == 12
    factor = worker_module.FREE_TURN_FACTOR
    limit = worker_module.TOKENS_PER_TURN
    assert limit < max(padded_sizes) <= limit * factor


@one_family
def test_slow_model_embeds_fewer_tokens_between_two_tokens_of_a_chat(worker):
    assert worker._limit_by_time(512) == 512, "the speed is not known yet"
    worker._note_speed(100, seconds=0.2)
    assert worker._limit_by_time(512) == 250
    worker._note_speed(0, seconds=10.0)
    assert worker._limit_by_time(512) == 64
    assert worker._limit_by_time(40) == 40


@one_family
def test_turn_has_an_item_of_every_request(model, worker, passes):
    images = [tiny.random_image(i) for i in range(20)]
    finished: list[str] = []
    with hold_worker(worker):
        many = worker.submit_embedding(images, is_query=False)
        many.add_done_callback(lambda _: finished.append("many"))
        single = worker.submit_embedding(["one"], is_query=False)
        single.add_done_callback(lambda _: finished.append("single"))
    np.testing.assert_allclose(many.result(60).vectors, model.encode(images), atol=1e-5)
    assert single.result(60).vectors.shape == (1, model.dim) and finished == ["single", "many"]


@one_family
def test_lengths_and_cuts_are_counted(model, worker):
    limit = model.renderer.max_tokens
    long = "word " * limit
    result = worker.submit_embedding(["a", long], is_query=False, truncate=True).result(60)
    num_tokens = len(model.renderer.render_embedding(("a",)))
    assert (result.num_tokens, result.num_truncated) == (num_tokens + limit, 1)
    expected = model.encode(["a", long], on_truncate=accept_truncation)
    np.testing.assert_allclose(result.vectors, expected, atol=1e-5)
    with pytest.raises(DataError, match=rf"input\[1\]: .*the limit is {limit}"):
        embed(worker, ["a", long])
    assert worker.read_statistics().embedded_items >= 2


@one_family
def test_text_that_is_certainly_too_long_is_not_tokenised(model, worker, monkeypatch):
    def refuse_to_tokenise(*_, **__):
        raise AssertionError("it was tokenised")

    monkeypatch.setattr(type(model.renderer.layouts.tokenizer), "encode", refuse_to_tokenise)
    with pytest.raises(DataError, match=r"at least \d+ tokens, the limit"):
        embed(worker, ["x" * 10_000_000])
    (error,) = submit_chat(worker, user_message("x" * 10_000_000)).read_all()
    assert isinstance(error, DataError) and "more than" in str(error)


@one_family
def test_slow_image_does_not_block_other_requests_and_chats(model, worker, monkeypatch):
    release = threading.Event()
    slow, prepare_image = tiny.random_image(9), model.prepare_image

    def prepare(ref):
        assert ref != slow or release.wait(60)
        return prepare_image(ref)

    monkeypatch.setattr(model, "prepare_image", prepare)
    try:
        waiting = worker.submit_embedding([slow], is_query=False)
        assert len(embed(worker, ["a", tiny.random_image(8)])) == 2
        assert submit_chat(worker, user_message("hi"), 3).read_deltas()
        assert not waiting.done()
    finally:
        release.set()
    assert len(waiting.result(60).vectors) == 1


@one_family
def test_many_slow_images_do_not_block_texts(model, worker, monkeypatch):
    release, prepare_image = threading.Event(), model.prepare_image

    def prepare(ref):
        assert release.wait(20)
        return prepare_image(ref)

    monkeypatch.setattr(model, "prepare_image", prepare)
    images = [tiny.random_image(seed) for seed in range(4)]
    try:
        chats = [submit_chat(worker, user_message(image, "what?"), 3) for image in images]
        waiting = [worker.submit_embedding(images, is_query=False) for _ in range(4)]
        assert len(embed(worker, ["a", "b"])) == 2
        assert submit_chat(worker, user_message("hi"), 3).read_deltas()
        assert not any(future.done() for future in waiting)
        assert all(chat.outputs.empty() for chat in chats)
    finally:
        release.set()
    assert all(len(future.result(60).vectors) == 4 for future in waiting)
    assert all(chat.read_deltas() for chat in chats)


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
    def raise_out_of_memory(sequences):
        raise RuntimeError("out of memory")

    def return_nan(sequences):
        return np.full((len(sequences), model.dim), np.nan)

    with monkeypatch.context() as patched:
        patched.setattr(model, "embed_sequences", raise_out_of_memory)
        with pytest.raises(RuntimeError, match="out of memory"):
            embed(worker, ["a"], is_query=True)
        patched.setattr(model, "embed_sequences", return_nan)
        with pytest.raises(ModelError, match=r"not finite for input\[0\]"):
            embed(worker, ["a"])
        with pytest.raises(ZeroDivisionError):
            worker.submit_call(lambda: 1 / 0).result(60)
    assert worker.submit_embedding(["a"], is_query=True).result(60).vectors.shape == (1, model.dim)


def test_vector_that_is_not_finite_fails_its_own_request(model, worker, monkeypatch):
    embed_sequences = model.embed_sequences
    num_tokens = len(model.renderer.render_embedding(("large",)))

    def embed_with_overflow(sequences):
        vectors = embed_sequences(sequences)
        vectors[[len(sequence) == num_tokens for sequence in sequences]] = np.inf
        return vectors

    monkeypatch.setattr(model, "embed_sequences", embed_with_overflow)
    with hold_worker(worker):
        good = worker.submit_embedding(["excellent"], is_query=False)
        bad = worker.submit_embedding(["a", "large"], is_query=False)
    np.testing.assert_allclose(good.result(60).vectors, model.encode(["excellent"]), atol=1e-5)
    with pytest.raises(ModelError, match=r"input\[1\]"):
        bad.result(60)


def test_cancelled_future_and_closed_listener_do_not_harm_others(model, worker, monkeypatch):
    futures = []
    embed_sequences = model.embed_sequences

    def embed_and_cancel(sequences):
        futures[0].cancel()
        return embed_sequences(sequences)

    with monkeypatch.context() as patched:
        patched.setattr(model, "embed_sequences", embed_and_cancel)
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
            assert becomes_true(worker._embeddings.has_prepared)
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
    prepare_image = endless.prepare_image

    def prepare_after_close(image):
        assert becomes_true(lambda: worker._closed)
        return prepare_image(image)

    monkeypatch.setattr(endless, "prepare_image", prepare_after_close)
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
        assert isinstance(waiting.read_all()[-1], ServerBusyError)
    with pytest.raises(ServerBusyError):
        worker.submit_embedding(["a"], is_query=False)
