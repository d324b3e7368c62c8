"""A conversation is embedded where its last turn ends, which is where the recipe duet trains."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helpers import tiny
from vlduet.data.records import Message, Record
from vlduet.data.stream import Sample
from vlduet.errors import ConfigError, DataError
from vlduet.model.conversation import is_conversation, render_conversation
from vlduet.recipes.duet import DuetOptions, layout_chat

PICTURE = tiny.random_image(0, 16)
QUESTION = "what is it? tell me."
ANSWER = 'a dog. "It runs." So it is fast'
MESSAGES = (
    Message("system", ("be brief",)),
    Message("user", (PICTURE, QUESTION)),
    Message("assistant", (ANSWER,)),
    Message("user", ("and why?",)),
    Message("assistant", ("who knows.",)),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conversation") / "base"
    prompts = tiny.Prompts(image_pool="mean")
    return tiny.scale_up_weights(tiny.build_duet_model(folder, prompts=prompts))


def test_conversations_are_embedded_at_the_positions_that_the_recipe_duet_trains(model):
    """At the image, at the ends of questions, and at every sentence of the answers."""
    system, question, answer, other_question, other_answer = MESSAGES
    before_answer = (system, question)
    before_last = (*before_answer, answer, other_question)
    conversations = [
        (system, Message("user", (PICTURE,))),
        before_answer,
        (*before_answer, Message("assistant", ("a dog.",))),
        (*before_answer, Message("assistant", ('a dog. "It runs."',))),
        (*before_answer, answer),
        before_last,
        (*before_last, other_answer),
    ]
    sample = Sample(Record("chat", messages=MESSAGES), 0, seed=0)
    sequence = layout_chat(sample, model.renderer, DuetOptions(k=99))
    assert len(sequence.anchors) == len(conversations)
    with torch.no_grad():
        trained = model(model.collate([sequence])).embeddings.numpy()
    np.testing.assert_allclose(model.encode(conversations), trained, atol=1e-5)


def test_conversations_are_encoded_with_other_contents_and_as_queries(model):
    items = [MESSAGES, "a dog", (PICTURE, "a dog"), MESSAGES[:2]]
    rows = model.encode_query(items)
    np.testing.assert_allclose(rows[0], model.encode([MESSAGES])[0], atol=1e-5)
    np.testing.assert_allclose(rows[3], model.encode([MESSAGES[:2]])[0], atol=1e-5)
    assert [is_conversation(item) for item in items] == [True, False, False, True]


def test_what_follows_the_last_turn_is_no_part_of_a_conversation(model):
    sequence = render_conversation(model.renderer, MESSAGES[:3])
    assert sequence.anchors[0].end == len(sequence)
    assert sequence.num_labels == 0


@pytest.mark.parametrize(
    ("messages", "error", "message"),
    [
        ((Message("user", (" ",)),), DataError, "nothing to embed in the last turn"),
        ((Message("user", ("a " * 3000,)),), DataError, "the limit is"),
    ],
)
def test_conversations_that_cannot_be_embedded_are_refused(model, messages, error, message):
    with pytest.raises(error, match=message):
        model.encode([messages], on_truncate=lambda position, num_tokens: None)


def test_a_checkpoint_without_a_chat_template_is_refused(model):
    tokenizer = model.renderer.tokenizer
    template = tokenizer.chat_template
    tokenizer.chat_template = None
    try:
        with pytest.raises(ConfigError, match="no chat template"):
            model.encode([MESSAGES])
    finally:
        tokenizer.chat_template = template
