"""The one thread that owns the model: everybody gets what it alone would give, and nobody waits for an answer to end."""

from __future__ import annotations

import queue
import threading
import time

import numpy as np
import pytest

from helpers import tiny
from vlduet.data.records import ImageRef, Message
from vlduet.errors import DataError, ImageError, ModelError
from vlduet.model.generation import continuous
from vlduet.model.generation.continuous import Delta, SamplingParams
from vlduet.serve import scheduler
from vlduet.serve import worker as module
from vlduet.serve.scheduler import ChatRequest
from vlduet.serve.worker import ServerBusyError, Worker

QUESTIONS = ["what?", "tell me a long story, and then another one", "a"]
BROKEN = ImageRef(data=b"no picture")


@pytest.fixture
def worker(model):
    found = Worker(model)
    yield found
    found.close()


def turn(*parts):
    return (Message("user", parts),)


class Listener:
    """Everything that is told about one conversation."""

    def __init__(self):
        self.told: queue.Queue[Delta | Exception] = queue.Queue()

    def pieces(self) -> list[Delta]:
        found = [self.told.get(timeout=60)]
        while isinstance(found[-1], Delta) and found[-1].finish_reason is None:
            found.append(self.told.get(timeout=60))
        return found

    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces())


def asked(worker, messages, longest=12, **options):
    listener = Listener()
    talk = ChatRequest(messages, listener.told.put, longest, **options)
    worker.answer(talk)
    return listener, talk


# ------------------------------------------------------------------ embedding


def test_many_requests_at_once_get_what_one_alone_gets(model, worker, monkeypatch):
    forwards = []
    monkeypatch.setattr(
        model, "encode_document", lambda items: forwards.append(len(items)) or model.encode(items)
    )
    begin = threading.Event()
    first = worker.call(begin.wait)  # all of them wait before any is taken
    texts = [[f"text {i} {j}" for j in range(i + 1)] for i in range(9)]
    documents = [worker.embed(some, query=False) for some in texts]
    queries = [
        worker.embed([tiny.random_image(i), (tiny.random_image(i), "at night")], query=True)
        for i in range(3)
    ]
    begin.set()
    assert first.result(60)
    for some, future in zip(texts, documents, strict=True):
        np.testing.assert_allclose(future.result(60), model.encode(some), atol=1e-5)
    for i, future in enumerate(queries):
        wanted = model.encode_query([tiny.random_image(i), (tiny.random_image(i), "at night")])
        np.testing.assert_allclose(future.result(60), wanted, atol=1e-5)
    assert sum(forwards) == 45 and len(forwards) == 3, (
        "45 documents, beside six images, in turns that cost 32"
    )


def test_nothing_is_embedded_as_nothing(model, worker):
    assert worker.embed([], query=True).result(60).shape == (0, model.dim)


def test_a_turn_has_few_images_and_something_of_everybody(model, worker, monkeypatch):
    forwards = []
    real = model.encode
    monkeypatch.setattr(
        model, "encode_document", lambda items: forwards.append(list(items)) or real(items)
    )
    begin = threading.Event()
    worker.call(begin.wait)
    pictures = [tiny.random_image(i) for i in range(9)]
    order: list[str] = []
    many = worker.embed(pictures, query=False)
    many.add_done_callback(lambda _: order.append("many"))
    one = worker.embed(["one"], query=False)
    one.add_done_callback(lambda _: order.append("one"))
    begin.set()
    np.testing.assert_allclose(many.result(60), real(pictures), atol=1e-5)
    assert one.result(60).shape == (1, model.dim) and order == ["one", "many"]
    assert [sum(isinstance(item, ImageRef) for item in items) for items in forwards] == [4, 4, 1]
    assert "one" in forwards[0]


def test_a_broken_item_fails_its_own_request_and_says_which(model, worker):
    begin = threading.Event()
    worker.call(begin.wait)
    good, bad = (
        worker.embed(["a", tiny.random_image()], query=False),
        worker.embed(["b", BROKEN, "c"], query=False),
    )
    empty = worker.embed(["d", " "], query=False)
    begin.set()
    np.testing.assert_allclose(good.result(60), model.encode(["a", tiny.random_image()]), atol=1e-5)
    with pytest.raises(ImageError, match=r"input\[1\]"):
        bad.result(60)
    with pytest.raises(DataError, match=r"input\[1\]: nothing to embed"):
        empty.result(60)


def test_the_thread_outlives_what_fails_in_it(model, worker, monkeypatch):
    def no_memory(items):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(model, "encode_query", no_memory)
        patched.setattr(
            model, "encode_document", lambda items: np.full((len(items), model.dim), np.nan)
        )
        with pytest.raises(RuntimeError, match="out of memory"):
            worker.embed(["a"], query=True).result(60)
        with pytest.raises(ModelError, match=r"not finite for input\[0\]"):
            worker.embed(["a"], query=False).result(60)
        with pytest.raises(ZeroDivisionError):
            worker.call(lambda: 1 / 0).result(60)
    assert worker.embed(["a"], query=True).result(60).shape == (1, model.dim)


def test_a_vector_that_is_not_finite_fails_its_own_request(model, worker, monkeypatch):
    real = model.encode

    def overflowing(items):
        return np.stack(
            [np.full(model.dim, np.inf) if item == "large" else real([item])[0] for item in items]
        )

    monkeypatch.setattr(model, "encode_document", overflowing)
    begin = threading.Event()
    worker.call(begin.wait)
    good, bad = worker.embed(["fine"], query=False), worker.embed(["a", "large"], query=False)
    begin.set()
    np.testing.assert_allclose(good.result(60), real(["fine"]), atol=1e-5)
    with pytest.raises(ModelError, match=r"input\[1\]"):
        bad.result(60)


def test_who_no_longer_waits_takes_nobody_along(model, worker, monkeypatch):
    """A future that is cancelled while it is answered, and a talk whose listener is gone."""
    futures = []

    def cancelling(items):
        futures[0].cancel()
        return model.encode(items)

    with monkeypatch.context() as patched:
        patched.setattr(model, "encode_document", cancelling)
        begin = threading.Event()
        worker.call(begin.wait)
        futures.append(worker.embed(["a"], query=False))
        begin.set()
        assert worker.embed(["b"], query=True).result(60).shape == (1, model.dim)

    def gone(_):
        raise RuntimeError("the loop is closed")

    talk = ChatRequest(turn("x"), gone, 4)
    worker.answer(talk)
    assert worker.embed(["c"], query=True).result(60).shape == (1, model.dim)
    assert asked(worker, turn("next"), 3)[0].pieces()[-1].tokens <= 3 and talk.cancelled


# ------------------------------------------------------------------ answers


def test_answers_side_by_side_are_those_of_one_alone(model, worker):
    begin = threading.Event()
    worker.call(begin.wait)
    chats = [turn(tiny.random_image(i), question) for i, question in enumerate(QUESTIONS)]
    lengths = [3, 12, 7]
    listeners = [
        asked(worker, chat, longest)[0] for chat, longest in zip(chats, lengths, strict=True)
    ]
    begin.set()
    for chat, longest, listener in zip(chats, lengths, listeners, strict=True):
        pieces = listener.pieces()
        assert "".join(piece.text for piece in pieces).strip() == model.generate(
            chat, max_new_tokens=longest
        )
        assert pieces[-1].tokens <= longest
        assert pieces[-1].reason == ("length" if pieces[-1].tokens == longest else "stop")
        assert pieces[-1].prompt_tokens == len(model.renderer.chat(chat, answer=True))


def test_an_embedding_does_not_wait_for_the_end_of_an_answer(model, worker):
    listener = Listener()
    seen: list[tuple[int, bool]] = []
    futures = []

    def tell(piece):
        if not futures:  # in the worker's own thread, between two tokens
            futures.append(worker.embed(["a dog"], query=False))
        seen.append((piece.tokens, futures[0].done()))
        listener.told.put(piece)

    worker.answer(ChatRequest(turn("go on"), tell, 12))
    tokens = listener.pieces()[-1].completion_tokens
    np.testing.assert_allclose(futures[0].result(60), model.encode(["a dog"]), atol=1e-5)
    assert tokens == 1 or seen[1][1], "it was there with the second token"
    whole = model.generate(turn("go on"), max_new_tokens=12)
    listener, _ = asked(worker, turn("go on"))
    assert listener.text().strip() == whole, "what came between changed no word"


def test_an_answer_ends_before_its_stop_string(model, worker, monkeypatch):
    class DistinctPieces:
        """Detokenizer that returns a letter and a digit per token, so that no two look alike."""

        def __init__(self, tokenizer):
            self.num_tokens = 0

        def add(self, token_id):
            self.num_tokens += 1
            return f"{chr(97 + token_id % 26)}{self.num_tokens % 10}"

        def flush(self):
            return ""

    monkeypatch.setattr(continuous, "IncrementalDetokenizer", DistinctPieces)
    streamed = asked(worker, turn("say"), 9)[0].text()
    assert len(streamed) > 7, "a model that ends at once would prove nothing"
    stop = streamed[3:5]
    pieces = asked(worker, turn("say"), 9, stop=(stop, "no such thing"))[0].pieces()
    assert pieces[-1].reason == "stop" and pieces[-1].tokens == 3
    assert "".join(piece.text for piece in pieces) == streamed[:3]


def test_colder_than_what_can_be_sampled_is_greedy(model):
    greedy = model.generate(turn("say"), max_new_tokens=5)
    assert model.generate(turn("say"), max_new_tokens=5, temperature=1e-45) == greedy


def test_a_conversation_that_fails_leaves_the_others_alone(model, worker):
    begin = threading.Event()
    worker.call(begin.wait)
    long = "word " * model.backbone.window
    listeners = [
        asked(worker, turn(*parts), 5)[0] for parts in (("fine",), (BROKEN, "what?"), (long,))
    ]
    begin.set()
    assert listeners[0].text().strip() == model.generate(turn("fine"), max_new_tokens=5)
    assert isinstance(listeners[1].pieces()[0], ImageError)
    (refused,) = listeners[2].pieces()
    assert isinstance(
        refused, DataError
    ) and f"the model's window is {model.backbone.window}" in str(refused)


@pytest.fixture
def endless(model, monkeypatch):
    """A model that never ends an answer by itself."""
    monkeypatch.setattr(model.renderer, "eos_ids", [])
    return model


def test_who_comes_while_others_are_answered_joins_them(endless, worker):
    """It waits for its images, one a round of all, and not for the end of a long answer, of which it changes no word."""
    pictures = [tiny.random_image(i) for i in range(3)]
    late, text = Listener(), Listener()
    first, seen = Listener(), []
    wanted = [
        endless.generate(turn("go on"), max_new_tokens=20),
        endless.generate(turn(*pictures), max_new_tokens=4),
    ]

    def tell(piece):
        if piece.tokens == 2:  # in the worker's own thread, between two tokens
            worker.answer(ChatRequest(turn(*pictures), late.told.put, 4))
            worker.answer(ChatRequest(turn("and I?"), text.told.put, 4))
        seen.append((text.told.qsize(), late.told.qsize()))
        first.told.put(piece)

    worker.answer(ChatRequest(turn("go on"), tell, 20))
    assert first.text().strip() == wanted[0]
    assert late.text().strip() == wanted[1]
    assert len(text.pieces()) == 4
    counts = [row[0] for row in seen], [row[1] for row in seen]
    begun = [next(i for i, n in enumerate(count) if n) for count in counts]
    assert begun[0] < begun[1], "who has no image does not wait for those of others"
    assert begun[1] - begun[0] == 2, "a token of the others after every image"
    assert max(counts[0]) == max(counts[1]) == 4, "both had ended before the first one did"


def test_what_is_cancelled_is_not_begun(endless, worker, monkeypatch):
    """Neither while it waits, nor while its images are prepared; nothing more is told."""
    looked, listeners = [], [Listener(), Listener()]
    scheduler = [
        ChatRequest(turn(*[tiny.random_image(i) for i in range(4)]), listener.told.put, 4)
        for listener in listeners
    ]
    real = endless.prepare

    def prepare(ref):
        looked.append(ref)
        scheduler[0].cancelled = scheduler[1].cancelled = True
        return real(ref)

    monkeypatch.setattr(endless, "prepare", prepare)
    begin = threading.Event()
    worker.call(begin.wait)
    for talk in scheduler:
        worker.answer(talk)
    begin.set()
    assert len(asked(worker, turn("next"), 3)[0].pieces()) == 3
    assert len(looked) == 1 and not any(listener.told.qsize() for listener in listeners)


def test_long_prompts_are_not_read_with_short_ones(endless, worker, monkeypatch):
    """Eight rows as long as the longest would take memory that nobody asked for."""
    shapes = []
    real = endless.start
    monkeypatch.setattr(
        endless, "start", lambda some: shapes.append([len(s) for s in some]) or real(some)
    )
    monkeypatch.setattr(scheduler, "FORWARD", 400)
    begin = threading.Event()
    worker.call(begin.wait)
    listeners = [asked(worker, turn("word " * n), 3)[0] for n in (1, 60, 2, 3)]
    begin.set()
    assert all(len(listener.pieces()) == 3 for listener in listeners)
    assert sorted(map(len, shapes)) == [1, 3]


def test_no_more_than_so_many_are_answered_side_by_side(model, worker, monkeypatch):
    monkeypatch.setattr(scheduler, "MAX_CONCURRENT_CHATS", 2)
    rows = []
    real = model.backbone.lm_head.forward
    monkeypatch.setattr(
        model.backbone.lm_head, "forward", lambda hidden: rows.append(len(hidden)) or real(hidden)
    )
    begin = threading.Event()
    worker.call(begin.wait)
    listeners = [asked(worker, turn(question), 5)[0] for question in QUESTIONS]
    begin.set()
    texts = [listener.text().strip() for listener in listeners]
    assert max(rows) == 2
    assert texts == [model.generate(turn(question), max_new_tokens=5) for question in QUESTIONS]


def test_each_samples_in_its_own_way(model, worker):
    def answered():
        begin = threading.Event()
        worker.call(begin.wait)
        ways = [SamplingParams(1.5, seed=3), SamplingParams(), SamplingParams(1.5, seed=4)]
        listeners = [asked(worker, turn("one"), 9, sampling=way)[0] for way in ways]
        begin.set()
        return [listener.text() for listener in listeners]

    one, greedy, other = answered()
    assert one != other and answered() == [one, greedy, other]
    assert greedy.strip() == model.generate(turn("one"), max_new_tokens=9)


def test_who_goes_away_is_told_nothing_more(endless, worker, monkeypatch):
    listener, passes = Listener(), []
    real = endless.backbone.lm_head.forward
    monkeypatch.setattr(
        endless.backbone.lm_head, "forward", lambda hidden: passes.append(1) or real(hidden)
    )
    talk = ChatRequest(turn("go on and on"), listener.told.put, endless.backbone.window // 2)

    def tell(piece):
        listener.told.put(piece)
        talk.cancelled = True

    talk.on_output = tell
    worker.answer(talk)
    assert isinstance(listener.told.get(timeout=60), Delta)
    assert worker.embed(["after"], query=False).result(60).shape == (1, endless.dim)
    assert len(asked(worker, turn("next"), 3)[0].pieces()) == 3
    assert listener.told.qsize() == 0 and len(passes) == 4, "a token of the one, three of the next"


def test_an_error_of_a_token_reaches_everyone_who_is_answered(endless, worker, monkeypatch):
    """What they held is let go, and the next ones are answered."""

    def no_memory(hidden):
        raise RuntimeError("out of memory")

    listeners, kept = [Listener(), Listener()], []
    real = endless.backbone.lm_head.forward

    def tell(piece):
        if isinstance(piece, Delta) and piece.completion_tokens == 2:
            monkeypatch.setattr(endless.backbone.lm_head, "forward", no_memory)
        if isinstance(piece, Exception):
            kept.append(worker._talks._decoder)
        listeners[0].told.put(piece)

    begin = threading.Event()
    worker.call(begin.wait)
    worker.answer(ChatRequest(turn("x"), tell, 30))
    worker.answer(ChatRequest(turn("y"), listeners[1].told.put, 30))
    begin.set()
    assert all(isinstance(listener.pieces()[-1], RuntimeError) for listener in listeners)
    assert kept == [None]
    monkeypatch.setattr(endless.backbone.lm_head, "forward", real)
    assert len(asked(worker, turn("x"), 3)[0].pieces()) == 3


@pytest.mark.parametrize("broken", ["prompt", "beside", "habits"])
def test_who_cannot_join_is_told_and_nobody_else(endless, worker, monkeypatch, broken):
    first, second = Listener(), Listener()
    wanted = endless.generate(turn("x"), max_new_tokens=9)

    def no_memory(*_):
        raise RuntimeError("out of memory")

    def tell(piece):
        if isinstance(piece, Delta) and piece.completion_tokens == 2:
            place = {
                "prompt": (endless, "start"),
                "beside": (continuous, "_concatenate_left_padded"),
                "habits": (scheduler, "Continuation"),
            }
            monkeypatch.setattr(
                *place[broken], no_memory if broken != "habits" else lambda *_, **__: 1 / 0
            )
            worker.answer(ChatRequest(turn("y"), second.told.put, 4))
        first.told.put(piece)

    worker.answer(ChatRequest(turn("x"), tell, 9))
    assert isinstance(second.pieces()[-1], RuntimeError | ZeroDivisionError)
    assert first.text().strip() == wanted


def test_a_config_that_cannot_be_read_is_told(model, worker, monkeypatch):
    monkeypatch.setattr(model.backbone.model.generation_config, "repetition_penalty", 2)
    (told,) = asked(worker, turn("x"))[0].pieces()
    assert isinstance(told, ValueError)


# ------------------------------------------------------------------ limits


def test_too_much_is_turned_away(worker, monkeypatch):
    begin = threading.Event()
    worker.call(begin.wait)
    while worker._calls:  # taken, not yet done
        time.sleep(0.01)
    monkeypatch.setattr(module, "MAX_WAITING", 3)
    kept = worker.embed(["a", "b"], query=False)
    with pytest.raises(ServerBusyError):
        worker.embed(["c", "d"], query=False)
    begin.set()
    assert len(kept.result(60)) == 2
    assert len(worker.embed(["c", "d"], query=False).result(60)) == 2


def test_closing_ends_answers_and_tells_who_waits(endless, monkeypatch):
    """Those under way, the one whose prompt is made, and the one behind it."""
    monkeypatch.setattr(scheduler, "MAX_CONCURRENT_CHATS", 2)
    worker = Worker(endless)
    listener = Listener()
    waiting: list = []

    def tell(piece):
        if not waiting:
            waiting.extend(asked(worker, turn(tiny.random_image(), "later"))[0] for _ in range(2))
        elif isinstance(piece, Delta) and piece.completion_tokens == 2:
            threading.Thread(target=worker.close).start()
            while not worker._closed:
                time.sleep(0.01)
        listener.told.put(piece)

    worker.submit_chat(ChatRequest(turn("go on and on"), tell, endless.backbone.window // 2))
    told = listener.pieces()
    worker.close()
    assert isinstance(told[-1], ServerBusyError)
    assert [isinstance(each.pieces()[0], ServerBusyError) for each in waiting] == [True, True]
    with pytest.raises(ServerBusyError):
        worker.embed(["a"], query=False)
