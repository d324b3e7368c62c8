"""The field `retrieval` of a chat, and images of the index in requests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.interleaved import CHAT, answer_parts, chat_body, generate_parts, image_part
from helpers.serving import RunningServer
from vlduet.data.records import ImageRef, Message
from vlduet.model.duet import DuetModel
from vlduet.retrieval.index import Index
from vlduet.retrieval.rag import Scope, select_query
from vlduet.retrieval.search import search

pytestmark = pytest.mark.usefixtures("write_sentences")


# ------------------------------------------------------------------ images of the index in requests


def test_images_of_the_index_are_named_by_their_url(
    server: RunningServer, duet: DuetModel, folder: Path
) -> None:
    image, text = ImageRef(path=folder / "3.png"), {"type": "text", "text": "what?"}
    expected = duet.generate([Message("user", (image, "what?"))], max_new_tokens=20)
    path = "/v1/images/image%203"
    for url in (path, f"http://127.0.0.1:{server.port}{path}?size=64"):
        body = {"messages": [{"role": "user", "content": [image_part(url), text]}]}
        status, answer = server.request(CHAT, body | {"max_tokens": 20})
        assert status == 200 and answer["choices"][0]["message"]["content"] == expected
        body = server.request("/v1/search", {"query": [image_part(url)], "k": 1})[1]
        assert body["data"][0]["id"] == "image 3"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("/v1/images/nothing", "the index has no document 'nothing'. Send the image of a hit"),
        ("/v1/images/text", "no image in document 'text'"),
        ("/v1/images/..%2F..%2Fetc%2Fpasswd", "the index has no document '../../etc/passwd'"),
        ("/v1/images/", "not a data: URL. Send data:image/png;base64,..., or /v1/images/ID"),
        ("/v1/images/a?size=1&key=2", "not a data: URL"),
        ("/v1/images/%ff", "not a data: URL"),
        ("//127.0.0.1/v1/images/image%203", "not a data: URL"),
        ("http://[/v1/images/image%203", "not a data: URL"),
        ("http://example.org/v1/images/image%203", "not a data: URL"),
        ("file:///v1/images/image%203", "not a data: URL"),
        ("/etc/passwd", "not a data: URL"),
    ],
)
def test_other_urls_are_refused_at_their_place(
    server: RunningServer, url: str, message: str
) -> None:
    body = {"messages": [{"role": "user", "content": [image_part(url)]}]}
    status, answer = server.request(CHAT, body)
    assert status == 400 and message in answer["error"]["message"]
    assert answer["error"]["param"] == "messages[0].content[0].image_url"


def test_earlier_answer_may_be_sent_back_and_its_images_are_read_with_feed_back(
    server: RunningServer, duet: DuetModel, index: Index, folder: Path
) -> None:
    content = [
        {"type": "text", "text": "A dog."},
        image_part("/v1/images/image%201") | {"hit": {"id": "image 1"}},
        {"type": "text", "text": " "},
        image_part("/v1/images/gone"),
        {"type": "text", "text": " A cat."},
    ]
    question, again = Message("user", ("tell me",)), Message("user", ("and then?",))
    texts = (question, Message("assistant", ("A dog.", " A cat.")), again)
    body = chat_body("tell me", content, "and then?")
    status, answer = server.request(CHAT, body)
    assert answer_parts((status, answer)) == generate_parts(duet, index, texts)
    assert answer["images"]["left_out"] == 2
    plain = server.request(CHAT, body | {"retrieval": None})[1]
    assert plain["images"] == {"retrieved": 0, "fed_back": 0, "left_out": 2}
    del content[3]
    image = ImageRef(path=folder / "1.png")
    turns = (question, Message("assistant", ("A dog.", image, " A cat.")), again)
    body = chat_body("tell me", content, "and then?", retrieval={"feed_back": True})
    status, answer = server.request(CHAT, body)
    assert answer_parts((status, answer)) == generate_parts(duet, index, turns, feed_back=True)
    assert answer["images"]["left_out"] == 0
    only_image = chat_body("tell me", [image_part("/v1/images/image%201")], "and then?")
    assert server.request(CHAT, only_image)[0] == 200


# ------------------------------------------------------------------ wrong requests


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "later"}, "retrieval.mode: mode 'later' is not served. Use one of context, "),
        ({"mode": 3}, "retrieval.mode: mode '3' is not served"),
        ({"k": 3}, 'retrieval.k: mode "interleave" has no such field. Leave it out, or send'),
        ({"mode": "context", "template": "{image}"}, 'retrieval.template: mode "context" has no'),
        ({"scope": "last"}, "retrieval.scope: 'last' must be 'dialog'"),
        ({"thresold": 0.1}, "retrieval.thresold: unknown field"),
        ({"threshold": 2}, "retrieval.threshold: 2 must be less than or equal to 1"),
        ({"max_images": 33}, "retrieval.max_images: 33 must be less than or equal to 32"),
        ({"template": "a story"}, "retrieval.template: no place of an image. Write {image}"),
        ({"template": "{image}{image}", "max_images": 1}, "retrieval.template: 2 places of images"),
        ({"template": "{image}" * 33}, "retrieval.template: 33 places of images, and at most 32"),
        ({"template": "{image}", "threshold": 0.1}, "retrieval.threshold: a threshold for a"),
        ({"where": {"colour": "red"}}, "where"),
    ],
)
def test_wrong_options_are_refused_by_name(
    server: RunningServer, options: dict[str, Any], message: str
) -> None:
    status, body = server.request(CHAT, chat_body(retrieval=options, stream=True))
    assert status == 400 and message in body["error"]["message"]
    assert body["error"]["param"] == message.partition(":")[0]


def test_model_or_index_that_cannot_be_used_so_is_an_error(
    server: RunningServer, duet: DuetModel, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(index, "manifest", replace(index.manifest, side="text"))
        status, body = server.request(CHAT, chat_body())
        assert status == 400 and "the index has texts and no images" in body["error"]["message"]
    with monkeypatch.context() as patch:
        patch.setattr(server.service.resources, "_index", None)
        status, body = server.request(CHAT, chat_body())
        assert status == 400 and "no index is served" in body["error"]["message"]
    prompts = duet.prompts
    duet.set_prompts(replace(prompts, pool="mean"))
    status, body = server.request(CHAT, chat_body())
    duet.set_prompts(prompts)
    assert status == 400 and body["error"]["param"] == "retrieval.mode"
    assert "means over all tokens" in body["error"]["message"]


# ------------------------------------------------------------------ retrieval before the answer


def test_whole_dialog_can_be_the_query(
    server: RunningServer, duet: DuetModel, index: Index
) -> None:
    contents = ["a red boat", "Here it is.", "the same, but at night"]
    roles = ["user", "assistant", "user"]
    messages = tuple(Message(r, (c,)) for r, c in zip(roles, contents, strict=True))
    scopes: tuple[Scope, Scope] = ("last", "dialog")
    ids = {}
    for scope in scopes:
        options = {"mode": "context", "scope": scope, "k": 9}
        status, body = server.request(CHAT, chat_body(*contents, retrieval=options))
        assert status == 200
        ids[scope] = [(hit["id"], hit["score"]) for hit in body["sources"]]
        hits = search(index, duet, select_query(messages, scope), k=9)
        assert [hit for hit, _ in ids[scope]] == [hit.id for hit in hits]
    assert ids["last"] != ids["dialog"]
