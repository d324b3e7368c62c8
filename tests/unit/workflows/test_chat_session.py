"""Turns, images, retrieval and window of a conversation, with prepared answers of a tiny model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers import tiny
from helpers.answer_script import AnswerScript
from helpers.fake_embedder import COLOURS, paint, write_pairs
from vlduet.data.records import ImageRef, Message
from vlduet.errors import (
    ConfigError,
    DataError,
    ImageError,
    ModelError,
    RetrievalError,
    VLDuetError,
)
from vlduet.model.duet import DuetModel
from vlduet.model.generation.interleave import ImageOptions, RetrievedImage, TextDelta
from vlduet.retrieval.build import build_index
from vlduet.retrieval.index import Index
from vlduet.retrieval.rag import RagPrompt
from vlduet.workflows import chat_session
from vlduet.workflows.chat_session import ChatSession, ChatSettings, Notice, Sources


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DuetModel:
    return tiny.build_duet_model(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def index(model: DuetModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Index]:
    folder = tmp_path_factory.mktemp("index")
    build_index(model, write_pairs(folder / "source"), to=folder / "index")
    with Index.open(folder / "index") as opened:
        yield opened


@pytest.fixture
def script(model: DuetModel, monkeypatch: pytest.MonkeyPatch) -> AnswerScript:
    script = AnswerScript()
    monkeypatch.setattr(model, "generate", script.generate)
    monkeypatch.setattr(model, "interleave", script.interleave)
    return script


@pytest.fixture
def session(model: DuetModel, script: AnswerScript, tmp_path: Path) -> ChatSession:
    (tmp_path / "copies").mkdir()
    return ChatSession(model, folder=tmp_path / "copies")


@pytest.fixture
def searching(model: DuetModel, script: AnswerScript, index: Index, tmp_path: Path) -> ChatSession:
    """Conversation with an index."""
    (tmp_path / "copies").mkdir()
    settings = ChatSettings(retrieval="context")
    return ChatSession(model, index, folder=tmp_path / "copies", settings=settings)


def message_texts(messages: tuple[Message, ...] | list[Message]) -> list[str]:
    """Return role and texts of every message, with an @ for an image."""
    return [
        f"{message.role}: " + "".join(p if isinstance(p, str) else "@" for p in message.parts)
        for message in messages
    ]


def test_turns_of_a_conversation_are_the_prompt_of_the_next_answer(
    session: ChatSession, script: AnswerScript
) -> None:
    assert list(session.answer("First?")) == [TextDelta("An "), TextDelta("answer.")]
    session.settings = replace(session.settings, system="Be brief.", temperature=0.5)
    list(session.answer("Second?"))
    first = ["user: First?", "assistant: An answer."]
    assert message_texts(script.prompts[1]) == ["system: Be brief.", *first, "user: Second?"]
    assert script.options[1] == {"max_new_tokens": 256, "stream": True, "temperature": 0.5}
    assert message_texts(session.turns) == [*first, "user: Second?", "assistant: An answer."]
    session.clear()
    list(session.answer("Third?"))
    assert message_texts(script.prompts[2]) == ["system: Be brief.", "user: Third?"]
    with pytest.raises(RetrievalError, match="an empty message"):
        list(session.answer(" \n"))


@pytest.mark.parametrize("events", [[KeyboardInterrupt()], [ModelError("broken")], [" "], []])
def test_a_message_without_an_answer_is_not_kept(
    session: ChatSession, script: AnswerScript, tmp_path: Path, events: list[Any]
) -> None:
    session.attach(paint(tmp_path / "red.png", (255, 0, 0)))
    script.events = events
    with suppress(KeyboardInterrupt, ModelError):
        list(session.answer("Anything?"))
    assert not session.turns and len(session.attached) == 1


def test_an_answer_that_ends_early_keeps_what_was_generated(
    session: ChatSession, script: AnswerScript, tmp_path: Path
) -> None:
    session.attach(paint(tmp_path / "red.png", (255, 0, 0)))
    script.events = [" Half", " an ", KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        list(session.answer("Interrupted?"))
    assert message_texts(session.turns) == ["user: @Interrupted?", "assistant: Half an"]
    assert not session.attached
    script.events = ["Closed", " and never reached"]
    events = session.answer("Closed?")
    next(events)
    events.close()
    assert message_texts(session.turns)[2:] == ["user: Closed?", "assistant: Closed"]


def test_an_attached_image_is_a_copy_with_a_number(session: ChatSession, tmp_path: Path) -> None:
    path = paint(tmp_path / "red.png", (255, 0, 0))
    data = path.read_bytes()
    assert session.attach(path) == 1 and session.attach(path) == 1
    blue = paint(tmp_path / "blue.png", (0, 0, 255))
    assert session.attach(blue) == 2
    path.write_bytes(b"changed")
    copy = session.attached[0].path
    assert copy is not None and copy.read_bytes() == data
    assert session.locate_image(2) == blue
    # The ending decides which program opens a file.
    disguised = blue.rename(tmp_path / "blue.desktop")
    assert session.attach(disguised) == 3
    assert session.locate_image(3).suffix == ".png" != disguised.suffix
    for number in (0, 4):
        with pytest.raises(DataError, match=f"no image {number}. Give a number from 1 to 3"):
            session.locate_image(number)
    disguised.unlink()
    with pytest.raises(ImageError, match="no such image"):
        session.locate_image(3)


def test_files_that_are_no_images_are_not_attached(session: ChatSession, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "link.png").symlink_to(tmp_path / "gone")
    for name, message in {
        "missing.png": f"no such file. Correct the path; relative ones start from {Path.cwd()}",
        "text.png": "an unknown kind of file",
        "link.png": "a link whose target does not exist",
        ".": "a folder",
    }.items():
        with pytest.raises(DataError) as caught:
            session.attach(tmp_path / name)
        assert message in str(caught.value) and str(tmp_path / name) in str(caught.value)
    assert not session.attached
    with pytest.raises(DataError, match="No image has been shown yet"):
        session.locate_image(1)


def test_references_are_quoted_for_the_last_message_alone(
    searching: ChatSession, script: AnswerScript, tmp_path: Path
) -> None:
    searching.settings = replace(searching.settings, k=2, where=["hue in red,blue"])
    first, *_ = searching.answer("a red square")
    assert isinstance(first, Sources)
    assert {hit.id for hit in first.hits} == {"red", "blue"}
    assert [hit.rank for hit in first.hits] == [1, 2]
    list(searching.answer("And now?"))
    earlier, answer, last = message_texts(script.prompts[-1])
    assert (earlier, answer) == ("user: a red square", "assistant: An answer.")
    assert "[references]" in last and "[2] a " in last and last.endswith("\nAnd now?")
    searching.change(retrieval="off")
    list(searching.answer("Without?"))
    assert message_texts(script.prompts[-1])[-1] == "user: Without?"


def test_the_scope_selects_what_is_searched_for(
    searching: ChatSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries: list[Any] = []

    def record_query(index: Index, model: DuetModel, question: Any, **options: Any) -> Any:
        queries.append((message_texts(question), options["scope"], options["where"]))
        return RagPrompt(question, ())

    monkeypatch.setattr(chat_session, "prepare_prompt", record_query)
    list(searching.answer("A boat."))
    searching.change(scope="dialog")
    (sources, *_) = searching.answer("At night.")
    assert sources == Sources(())
    assert queries == [
        (["user: A boat."], "last", None),
        (["user: A boat.", "assistant: An answer.", "user: At night."], "dialog", None),
    ]


def test_images_of_an_interleaved_answer_are_later_read_with_feed_back_alone(
    searching: ChatSession, script: AnswerScript, index: Index, caplog: pytest.LogCaptureFixture
) -> None:
    (hit,) = searching.search("red", k=1)
    script.events = [TextDelta("A square."), RetrievedImage(hit, 0, 0.5), TextDelta(" Then more. ")]
    searching.settings = replace(searching.settings, threshold=0.1, where=["year>=2000"])
    searching.change(retrieval="interleave")
    assert list(searching.answer("Show me.")) == script.events
    options = {**script.options[-1]}
    assert options.pop("images") == ImageOptions(threshold=0.1, where=["year>=2000"])
    assert options.pop("index") is index
    assert options == {"feed_back": False, "max_new_tokens": 256, "temperature": 0.0}
    assert message_texts(searching.turns)[-1] == "assistant: A square. Then more."
    searching.settings = replace(searching.settings, feed_back=True)
    list(searching.answer("Again."))
    assert script.options[-1]["feed_back"] is True
    assert message_texts(searching.turns)[-1] == "assistant: A square.@ Then more."
    image = searching.turns[-1].parts[1]
    assert isinstance(image, ImageRef) and image.path and image.path != hit.image.path
    assert searching.number_image(hit.image) == 1
    broken = replace(hit, image=ImageRef(path=Path("/nowhere/gone.png")))
    script.events = [TextDelta("Gone."), RetrievedImage(broken, 0, 0.5)]
    assert list(searching.answer("Once more.")) == script.events
    assert message_texts(searching.turns)[-1] == "assistant: Gone."
    assert f"{hit.id}: not part of later turns: /nowhere/gone.png: no such image" in caplog.text


def test_documents_that_are_added_meanwhile_are_retrieved(
    model: DuetModel, script: AnswerScript, tmp_path: Path
) -> None:
    def build(names: tuple[str, ...]) -> None:
        colours = {name: COLOURS[name] for name in names}
        build_index(model, write_pairs(tmp_path / "source", colours), to=tmp_path / "index")

    build(("red",))
    with Index.open(tmp_path / "index") as opened:
        settings = ChatSettings(retrieval="context")
        session = ChatSession(model, opened, folder=tmp_path, settings=settings)
        assert len(session.search("red")) == 1
        build(("red", "blue"))
        assert len(session.search("red")) == 2
        build(("red", "blue", "green"))
        sources, *_ = session.answer("red")
        assert isinstance(sources, Sources) and len(sources.hits) == 3


def test_a_search_uses_a_text_and_the_attached_images(
    searching: ChatSession, model: DuetModel, tmp_path: Path
) -> None:
    searching.attach(paint(tmp_path / "q.png", (255, 255, 0)))
    hits = searching.search("")
    assert hits[0].id == "yellow" and hits[0].score > 0.999 and len(hits) == 4
    assert searching.search("red", k=1)[0].score < 0.999
    assert len(searching.attached) == 1
    searching.clear()
    with pytest.raises(RetrievalError, match="an empty query"):
        searching.search(" ")
    with pytest.raises(ConfigError, match="there is no index to search"):
        ChatSession(model, folder=tmp_path).search("red")


def limit_tokens(model: DuetModel, monkeypatch: pytest.MonkeyPatch, max_tokens: int) -> None:
    monkeypatch.setattr(model, "renderer", model.renderer.with_options(max_tokens=max_tokens))


def test_a_conversation_that_is_too_long_forgets_its_oldest_turns_and_says_so(
    session: ChatSession, script: AnswerScript, model: DuetModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_tokens(model, monkeypatch, 150)  # a token is a byte
    session.settings = replace(session.settings, system="Be brief.")
    for text in ("a" * 40, "b" * 40):
        assert not any(isinstance(event, Notice) for event in session.answer(text))
    notice, *_ = session.answer("c" * 40)
    assert isinstance(notice, Notice) and "its oldest 2 messages are forgotten" in notice.text
    texts = message_texts(script.prompts[-1])
    assert [text[:8] for text in texts] == ["system: ", "user: bb", "assistan", "user: cc"]
    assert [text[:8] for text in message_texts(session.turns)][:2] == ["user: bb", "assistan"]
    with pytest.raises(DataError, match=r"the message takes 2\d\d tokens.*limit is 150 before"):
        list(session.answer("d" * 200))
    assert len(session.turns) == 4


def test_references_that_do_not_fit_are_left_out_from_the_last(
    searching: ChatSession, script: AnswerScript, model: DuetModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    searching.settings = replace(searching.settings, k=4)
    first, *_ = searching.answer("red")
    searching.clear()
    limit_tokens(model, monkeypatch, 190)
    notice, sources, *_ = searching.answer("red")
    assert isinstance(sources, Sources) and isinstance(first, Sources)
    num_removed = 4 - len(sources.hits)
    assert 0 < num_removed < 4 and sources.hits == first.hits[: len(sources.hits)]
    assert isinstance(notice, Notice)
    assert f"no room for {num_removed} of the references" in notice.text
    prompt = message_texts(script.prompts[-1])[0]
    assert prompt.count(" square") == len(sources.hits)


def test_a_conversation_that_is_too_long_is_searched_with_what_fits(
    searching: ChatSession, script: AnswerScript, model: DuetModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    searching.settings = replace(searching.settings, scope="dialog", k=1)
    list(searching.answer("a" * 500))
    limit_tokens(model, monkeypatch, 500)
    notice, sources, *_ = searching.answer("b" * 100)
    assert isinstance(notice, Notice) and isinstance(sources, Sources)
    assert [len(message.parts) for message in script.prompts[-1]] == [4]


def test_the_window_has_space_for_the_answer(
    session: ChatSession, model: DuetModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    window = model.backbone.context_length
    assert window is not None
    settings = replace(session.settings, max_new_tokens=window - 60)
    session = ChatSession(model, folder=session._folder, settings=settings)
    list(session.answer("a" * 20))
    with pytest.raises(DataError, match="the model's limit is 60 before an answer of up to"):
        list(session.answer("b" * 80))


def test_settings_that_cannot_work_are_refused_at_once(
    model: DuetModel, index: Index, searching: ChatSession, tmp_path: Path
) -> None:
    wrong: list[tuple[Index | None, dict[str, Any], type[VLDuetError], str]] = [
        (None, {"retrieval": "context"}, ConfigError, "retrieval: there is no index"),
        (None, {"scope": "dialog"}, ConfigError, "scope: there is no index"),
        (None, {"where": ["a=b"]}, ConfigError, "where: there is no index"),
        (None, {"threshold": 0.5}, ConfigError, "threshold: there is no index"),
        (None, {"feed_back": True}, ConfigError, "feed_back: there is no index"),
        (None, {"retrieval": "on"}, ConfigError, "Use off, context or interleave"),
        (None, {"scope": "all"}, ConfigError, "Use last or dialog"),
        (None, {"k": 0}, ConfigError, "k: 0. Give 1 or more"),
        (None, {"max_new_tokens": 10**9}, ConfigError, "the model's window is"),
        (None, {"temperature": -1.0}, ConfigError, "temperature: -1.0"),
        (index, {"threshold": 2.0}, RetrievalError, "from -1 to 1"),
        (index, {"where": ["size=1"]}, RetrievalError, "size"),
    ]
    for opened, options, error, message in wrong:
        with pytest.raises(error, match=message):
            ChatSession(model, opened, folder=tmp_path, settings=ChatSettings(**options))
    with pytest.raises(ConfigError, match="Use off, context or interleave"):
        searching.change(retrieval="on")  # type: ignore[arg-type]
    assert searching.settings.retrieval == "context"


def test_a_model_that_cannot_answer_is_refused_at_once(
    model: DuetModel, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.backbone, "has_lm_head", False)
    with pytest.raises(ModelError, match="it embeds and cannot generate"):
        ChatSession(model, folder=tmp_path)
    monkeypatch.undo()
    with Index.open(index.path) as opened:
        manifest = replace(opened.manifest, fingerprint="another")
        monkeypatch.setattr(opened, "manifest", manifest)
        with pytest.raises(RetrievalError, match="built by model another"):
            ChatSession(model, opened, folder=tmp_path)


def test_a_tiny_model_answers_in_every_mode(model: DuetModel, index: Index, tmp_path: Path) -> None:
    settings = ChatSettings(retrieval="context", max_new_tokens=8, feed_back=True)
    session = ChatSession(model, index, folder=tmp_path, settings=settings)
    session.attach(paint(tmp_path / "red.png", (255, 0, 0)))
    sources, *deltas = session.answer("What?")
    assert isinstance(sources, Sources) and len(sources.hits) == 3
    assert all(isinstance(delta, TextDelta) for delta in deltas)
    session.turns = [
        Message("user", ("What?",)),
        Message("assistant", ("That.", tiny.random_image(), "It is.")),
    ]
    session.change(scope="dialog")
    sources, *_ = session.answer("At night.")
    assert isinstance(sources, Sources) and len(sources.hits) == 3
    session.change(retrieval="interleave")
    for event in session.answer("Show me."):
        assert isinstance(event, TextDelta | RetrievedImage)
