"""Sequences that nano is trained on, and the order in which items are drawn."""

from __future__ import annotations

import random
import re

from material import Source

from vlduet.data.records import ImageRef, Message
from vlduet.data.sequences import Sequence
from vlduet.logs import ProgressBar
from vlduet.model import nano
from vlduet.model.duet import DuetModel
from vlduet.model.generation import offline

NO_LIMIT = 10**6
"""Number of tokens that no sequence of these reaches."""
QUESTIONS_PER_BATCH = 32
MAX_ANSWER_TOKENS = 32
TEXT_QUESTIONS = (
    "What is {}?",
    "Where can you find {}?",
    "Tell me one fact about {}.",
    "What is {} known for?",
)
"""Questions about a name, without an image."""
IMAGE_QUESTIONS = (
    "What is this?",
    "What do you see?",
    "Describe the picture.",
    "What is in the picture?",
)
"""Questions about an image; the caption is the answer. They name nothing, so no list has them."""


class Deck:
    """Indices in random order, each once before any is drawn again."""

    def __init__(self, size: int):
        self.size = size
        self._remaining: list[int] = []

    def draw(self, count: int) -> list[int]:
        """Remove and return the next `count` indices; shuffle the deck anew when it runs out."""
        while len(self._remaining) < count:
            self._remaining = random.sample(range(self.size), self.size) + self._remaining
        return [self._remaining.pop() for _ in range(count)]


def image_sequence(
    model: DuetModel, source: Source, index: int, *, with_caption: bool = False
) -> Sequence:
    """Return the tokens of an image with an anchor; its caption follows as labels if asked for."""
    builder = model.renderer.new_builder()
    builder.append_control(nano.START_TOKEN)
    image = source.images[index]
    caption = source.captions[index]
    builder.append_image(image)
    builder.add_anchor(
        builder.append_control(nano.IMAGE_END),
        is_last=True,
        role="image",
        record_name=caption.lower(),
        content_key=image.cache_key,
    )
    if with_caption:
        builder.append_text(caption, supervised=True)
        builder.append_token(model.renderer.eos_token_ids[0], supervised=True)
    return builder.build(NO_LIMIT)


def text_sequence(model: DuetModel, source: Source, index: int, *, role: str = "text") -> Sequence:
    """Return a text with an anchor at its last token."""
    text = source.captions[index]
    return model.renderer.render_embedding(
        (text,), role=role, record_name=text.lower(), content_key=text.lower()
    )


def composed_sequence(
    model: DuetModel, source: Source, index: int, *, text: str, key: str
) -> Sequence:
    """Return an image and a text with an anchor of role ``composed`` at the last token.

    Nano renders a query of an image and a text in the same way. There are no labels, because the
    text is no caption of the image. `key` is the anchor's record name.
    """
    builder = model.renderer.new_builder()
    builder.append_control(nano.START_TOKEN)
    image = source.images[index]
    builder.append_image(image)
    builder.add_anchor(
        builder.append_text(text),
        is_last=True,
        role="composed",
        record_name=key,
        content_key=image.cache_key,
    )
    return builder.build(NO_LIMIT)


def image_question_sequence(model: DuetModel, image: ImageRef, caption: str) -> Sequence:
    """Return a chat with a random question about an image, and its caption as the answer."""
    question = Message("user", (image, random.choice(IMAGE_QUESTIONS)))
    turns = (question, Message("assistant", (caption,)))
    return model.renderer.render_chat(turns, add_generation_prompt=False)


def generate_replay_chats(
    model: DuetModel, names: list[str], *, count: int
) -> list[tuple[str, str]]:
    """Return questions about random names with the model's own answers, before any training.

    They keep the language model from forgetting how to answer. Every answer is cut to its first
    sentence; a question whose answer has none is left out, so there may be fewer than `count`.
    """
    questions = []
    for number, name in enumerate(random.sample(names, count)):
        phrase = name[0].lower() + name[1:-1]  # without the capital and the full stop
        questions.append(TEXT_QUESTIONS[number % len(TEXT_QUESTIONS)].format(phrase))
    answers: list[str] = []
    with ProgressBar(total=count, label="answers to replay") as bar:
        for start in range(0, count, QUESTIONS_PER_BATCH):
            chunk = questions[start : start + QUESTIONS_PER_BATCH]
            prompts = []
            for question in chunk:
                turns = (Message("user", (question,)),)
                prompts.append(model.renderer.render_chat(turns, add_generation_prompt=True))
            prefill = model.prefill_inputs(prompts)
            answers += offline.generate_texts(model.backbone, prefill, MAX_ANSWER_TOKENS)
            bar.advance(len(chunk))
    chats = []
    for question, answer in zip(questions, answers, strict=True):
        sentence = re.match(r"[^.!?]{8,}[.!?]", " ".join(answer.split()))
        if sentence is not None:
            chats.append((question, sentence.group()))
    return chats


def chat_sequence(model: DuetModel, question: str, answer: str) -> Sequence:
    """Return a chat without an image, with labels on the answer."""
    turns = (Message("user", (question,)), Message("assistant", (answer,)))
    return model.renderer.render_chat(turns, add_generation_prompt=False)
