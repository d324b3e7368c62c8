"""The scheduler of chats: answers equal those of a chat alone, and failures stay isolated."""

from __future__ import annotations

import threading

import pytest

from helpers import tiny
from helpers.serving import OutputRecorder, becomes_true, hold_worker, submit_chat, user_message
from vlduet.data.records import ImageRef
from vlduet.errors import DataError, ImageError
from vlduet.model.generation import continuous, kv_state
from vlduet.model.generation.continuous import Delta, SamplingParams
from vlduet.serve import scheduler as scheduler_module
from vlduet.serve.chats import ChatRequest
from vlduet.serve.scheduler import prepare_chat_sequence

QUESTIONS = ["what?", "tell me a long story, and then another one", "a"]
BROKEN_IMAGE = ImageRef(data=b"no picture")


def raise_out_of_memory(*_):
    raise RuntimeError("out of memory")


def generate(model, messages, max_new_tokens: int) -> str:
    text: str = model.generate(messages, max_new_tokens=max_new_tokens)
    return text


def test_concurrent_answers_equal_those_of_a_chat_alone(model, worker):
    chats = [user_message(tiny.random_image(i), text) for i, text in enumerate(QUESTIONS)]
    lengths = [3, 12, 7]
    with hold_worker(worker):
        recorders = [submit_chat(worker, *pair) for pair in zip(chats, lengths, strict=True)]
    for messages, length, recorder in zip(chats, lengths, recorders, strict=True):
        deltas = recorder.read_deltas()
        text = "".join(delta.text for delta in deltas)
        last = deltas[-1]
        assert text.strip() == generate(model, messages, length)
        assert last.completion_tokens <= length
        is_full = last.completion_tokens == length
        assert last.finish_reason == ("length" if is_full else "stop")
        prompt = model.renderer.render_chat(messages, add_generation_prompt=True)
        assert last.prompt_tokens == len(prompt)


def test_prompt_and_longest_answer_must_fit_into_the_context(model):
    messages = user_message("what?")
    num_tokens = len(model.renderer.render_chat(messages, add_generation_prompt=True))
    limit = model.backbone.context_length - num_tokens
    request = ChatRequest(messages, print, limit)
    lock = threading.Lock()
    sequence = prepare_chat_sequence(model, request, render_lock=lock)
    assert sequence is not None and len(sequence) == num_tokens
    with pytest.raises(DataError, match=f"and an answer of up to {limit + 1}: the model's window"):
        too_long = ChatRequest(messages, print, limit + 1)
        prepare_chat_sequence(model, too_long, render_lock=lock)


def test_answer_ends_before_its_stop_string(model, worker, monkeypatch):
    class DistinctTokens:
        """Detokenizer that returns a letter and a digit per token, so that no two look alike."""

        def __init__(self, tokenizer):
            self.num_tokens = 0

        def add(self, token_id):
            self.num_tokens += 1
            return f"{chr(97 + token_id % 26)}{self.num_tokens % 10}"

        def flush(self):
            return ""

    monkeypatch.setattr(continuous, "IncrementalDetokenizer", DistinctTokens)
    text = submit_chat(worker, user_message("say"), 9).read_text()
    assert len(text) > 7, "an answer of one token would prove nothing"
    stop_strings = (text[3:5], "no such text")
    recorder = submit_chat(worker, user_message("say"), 9, stop_strings=stop_strings)
    deltas = recorder.read_deltas()
    assert deltas[-1].finish_reason == "stop" and deltas[-1].completion_tokens == 3
    assert "".join(delta.text for delta in deltas) == text[:3]


def test_very_low_temperature_is_greedy(model):
    message = user_message("say")
    greedy = model.generate(message, max_new_tokens=5)
    assert model.generate(message, max_new_tokens=5, temperature=1e-45) == greedy


def test_failing_chat_does_not_affect_the_others(model, worker):
    too_long = "word " * model.backbone.context_length
    with hold_worker(worker):
        good = submit_chat(worker, user_message("fine"), 5)
        broken = submit_chat(worker, user_message(BROKEN_IMAGE, "what?"), 5)
        long = submit_chat(worker, user_message(too_long), 5)
    assert good.read_text().strip() == generate(model, user_message("fine"), 5)
    assert isinstance(broken.read_all()[0], ImageError)
    (error,) = long.read_all()
    assert isinstance(error, DataError)
    assert f"the model's window is {model.backbone.context_length}" in str(error)


def test_new_chat_joins_running_ones_and_waits_only_for_its_images(endless, worker):
    images = [tiny.random_image(i) for i in range(3)]
    first, with_images, with_text = OutputRecorder(), OutputRecorder(), OutputRecorder()
    num_outputs: list[tuple[int, int]] = []
    expected = generate(endless, user_message("go on"), 20)
    expected_with_images = generate(endless, user_message(*images), 4)

    def on_output(delta):
        if delta.completion_tokens == 2:  # called in the worker's thread, between two tokens
            worker.submit_chat(ChatRequest(user_message(*images), with_images.outputs.put, 4))
            worker.submit_chat(ChatRequest(user_message("and I?"), with_text.outputs.put, 4))
            assert becomes_true(lambda: len(worker._scheduler._prepared) == 2)
        num_outputs.append((with_text.outputs.qsize(), with_images.outputs.qsize()))
        first.outputs.put(delta)

    worker.submit_chat(ChatRequest(user_message("go on"), on_output, 20))
    assert first.read_text().strip() == expected
    assert with_images.read_text().strip() == expected_with_images
    assert len(with_text.read_deltas()) == 4
    text_counts, image_counts = zip(*num_outputs, strict=True)
    text_start = next(i for i, count in enumerate(text_counts) if count)
    image_start = next(i for i, count in enumerate(image_counts) if count)
    # One token of the running chats after each image; the chat without images starts at once.
    assert image_start - text_start == 2
    assert max(text_counts) == max(image_counts) == 4, "both end before the first chat does"


def test_cancelled_chats_are_not_started(endless, worker, monkeypatch):
    """Neither the chat that waits nor the one whose images are being prepared."""
    prepared = []
    recorders = [OutputRecorder(), OutputRecorder()]
    message = user_message(*[tiny.random_image(i) for i in range(4)])
    requests = [ChatRequest(message, recorder.outputs.put, 4) for recorder in recorders]
    prepare_image = endless.prepare_image

    def cancel_and_prepare(image):
        prepared.append(image)
        for request in requests:
            request.cancelled = True
        return prepare_image(image)

    monkeypatch.setattr(endless, "prepare_image", cancel_and_prepare)
    with hold_worker(worker):
        for request in requests:
            worker.submit_chat(request)
    assert len(submit_chat(worker, user_message("next"), 3).read_deltas()) == 3
    assert 1 <= len(prepared) <= 2, "one in each of the threads that prepare"
    assert [recorder.outputs.qsize() for recorder in recorders] == [0, 0]


def test_prompts_of_different_lengths_are_read_in_separate_forwards(endless, worker, monkeypatch):
    """Padding short prompts to the length of a long one would waste memory."""
    batch_sizes = []
    prefill_inputs = endless.prefill_inputs

    def record(sequences):
        batch_sizes.append(len(sequences))
        return prefill_inputs(sequences)

    monkeypatch.setattr(endless, "prefill_inputs", record)
    monkeypatch.setattr(scheduler_module, "FORWARD_MAX_TOKENS", 400)
    with hold_worker(worker):
        recorders = [submit_chat(worker, user_message("word " * n), 3) for n in (1, 60, 2, 3)]
        assert becomes_true(lambda: len(worker._scheduler._prepared) == 4)
    assert [len(recorder.read_deltas()) for recorder in recorders] == [3, 3, 3, 3]
    assert sorted(batch_sizes) == [1, 3]


def test_number_of_concurrent_chats_is_limited(model, worker, monkeypatch):
    monkeypatch.setattr(scheduler_module, "MAX_CONCURRENT_CHATS", 2)
    batch_sizes = []
    forward = model.backbone.lm_head.forward

    def record(hidden):
        batch_sizes.append(len(hidden))
        return forward(hidden)

    monkeypatch.setattr(model.backbone.lm_head, "forward", record)
    with hold_worker(worker):
        recorders = [submit_chat(worker, user_message(text), 5) for text in QUESTIONS]
        assert becomes_true(lambda: len(worker._scheduler._prepared) == 2)
    texts = [recorder.read_text().strip() for recorder in recorders]
    assert max(batch_sizes) == 2
    assert texts == [generate(model, user_message(text), 5) for text in QUESTIONS]


def test_chats_count_while_their_prompts_and_images_are_read(endless, worker, monkeypatch):
    """A chat that did not count for a moment would let another one in beyond the limit."""
    counts = []

    def count_and_call(function):
        def call(value):
            counts.append(worker._scheduler.num_running)
            return function(value)

        return call

    for name in ("prefill_inputs", "vision_features"):
        monkeypatch.setattr(endless, name, count_and_call(getattr(endless, name)))
    with hold_worker(worker):
        texts = [submit_chat(worker, user_message("a"), 1) for _ in range(2)]
        assert becomes_true(lambda: len(worker._scheduler._prepared) == 2)
    assert [len(recorder.read_deltas()) for recorder in texts] == [1, 1]
    assert counts == [2]
    assert len(submit_chat(worker, user_message(tiny.random_image()), 1).read_deltas()) == 1
    assert counts[1:] and set(counts[1:]) == {1}


def test_cancelled_chat_leaves_the_queue_while_others_run(endless, worker, monkeypatch):
    monkeypatch.setattr(scheduler_module, "MAX_CONCURRENT_CHATS", 1)
    recorder = OutputRecorder()
    num_waiting, outputs = [], []

    def on_output(delta):
        if delta.completion_tokens == 2:
            waiting = [ChatRequest(user_message("later"), outputs.append, 3) for _ in range(2)]
            for request in waiting:
                worker.submit_chat(request)
            waiting[0].cancelled = True
        num_waiting.append(len(worker._waiting_chats))
        recorder.outputs.put(delta)

    worker.submit_chat(ChatRequest(user_message("go on"), on_output, 4))
    recorder.read_deltas()
    assert num_waiting == [0, 2, 1, 1]


def test_each_chat_is_sampled_with_its_own_parameters(model, worker):
    def sample() -> list[str]:
        params = [SamplingParams(1.5, seed=3), SamplingParams(), SamplingParams(1.5, seed=4)]
        message = user_message("one")
        with hold_worker(worker):
            recorders = [submit_chat(worker, message, 9, sampling_params=p) for p in params]
        return [recorder.read_text() for recorder in recorders]

    seed_3, greedy, seed_4 = sample()
    assert seed_3 != seed_4 and sample() == [seed_3, greedy, seed_4]
    assert greedy.strip() == generate(model, user_message("one"), 9)


def test_cancelled_answer_gets_no_further_tokens(endless, worker, monkeypatch):
    recorder = OutputRecorder()
    num_forwards = []
    forward = endless.backbone.lm_head.forward

    def record(hidden):
        num_forwards.append(1)
        return forward(hidden)

    def on_output(delta):
        recorder.outputs.put(delta)
        request.cancelled = True

    monkeypatch.setattr(endless.backbone.lm_head, "forward", record)
    max_new_tokens = endless.backbone.context_length // 2
    request = ChatRequest(user_message("go on and on"), on_output, max_new_tokens)
    worker.submit_chat(request)
    assert isinstance(recorder.outputs.get(timeout=60), Delta)
    assert worker.submit_embedding(["after"], is_query=False).result(60).vectors.shape == (
        1,
        endless.dim,
    )
    assert len(submit_chat(worker, user_message("next"), 3).read_deltas()) == 3
    assert recorder.outputs.qsize() == 0
    assert len(num_forwards) == 4, "one token of the cancelled answer, three of the next"


def test_error_of_a_step_reaches_all_running_chats_and_frees_the_batch(
    endless, worker, monkeypatch
):
    recorders = [OutputRecorder(), OutputRecorder()]
    batchers = []

    def on_output(output):
        if isinstance(output, Exception):
            batchers.append(worker._scheduler._batcher)
        elif output.completion_tokens == 2:
            monkeypatch.setattr(endless.backbone.lm_head, "forward", raise_out_of_memory)
        recorders[0].outputs.put(output)

    forward = endless.backbone.lm_head.forward
    with hold_worker(worker):
        worker.submit_chat(ChatRequest(user_message("x"), on_output, 30))
        worker.submit_chat(ChatRequest(user_message("y"), recorders[1].outputs.put, 30))
    for recorder in recorders:
        assert isinstance(recorder.read_all()[-1], RuntimeError)
    assert batchers == [None]
    monkeypatch.setattr(endless.backbone.lm_head, "forward", forward)
    assert len(submit_chat(worker, user_message("x"), 3).read_deltas()) == 3


@pytest.mark.parametrize("failure", ["prefill", "concatenation", "request"])
def test_chat_that_cannot_start_fails_alone(endless, worker, monkeypatch, failure):
    running, failing = OutputRecorder(), OutputRecorder()
    expected = generate(endless, user_message("x"), 9)
    functions = {
        "prefill": (endless, "prefill_inputs"),
        "concatenation": (kv_state, "_concatenate_left_padded"),
        "request": (scheduler_module, "Request"),
    }

    def raise_on_any_arguments(*_, **__):
        raise RuntimeError("out of memory")

    def on_output(output):
        if isinstance(output, Delta) and output.completion_tokens == 2:
            monkeypatch.setattr(*functions[failure], raise_on_any_arguments)
            worker.submit_chat(ChatRequest(user_message("y"), failing.outputs.put, 4))
        running.outputs.put(output)

    worker.submit_chat(ChatRequest(user_message("x"), on_output, 9))
    assert isinstance(failing.read_all()[-1], RuntimeError)
    assert running.read_text().strip() == expected


def test_invalid_generation_config_is_delivered_as_an_error(model, worker, monkeypatch):
    monkeypatch.setattr(model.backbone.model.generation_config, "no_repeat_ngram_size", -1)
    (error,) = submit_chat(worker, user_message("x")).read_all()
    assert isinstance(error, ValueError)
