"""What an image that is fed back does to the text after it: likelihoods and answers.

no image           the assistant's text goes on without one
retrieved image    after the image that the operation retrieves there
right image        after the image that the document has there
wrong image        after the right image of another document or request: a control
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from items import IMAGE_QUESTION, Document, QuestionSet, join_texts
from searches import Answer

from vlduet.data.records import ImageRef, Message
from vlduet.data.sequences import Sequence as TokenSequence
from vlduet.eval.plain_questions import PLAIN_QUESTIONS
from vlduet.model.duet import DuetModel

NO_IMAGE = "no image"
RETRIEVED_IMAGE = "retrieved image"
RIGHT_IMAGE = "right image"
WRONG_IMAGE = "wrong image"
ASKED_DIRECTLY = "asked directly"
"""The user gives the image and asks about it in one turn."""


@dataclass(frozen=True, slots=True)
class TextNats:
    """Negative log likelihoods of the same texts under several conditions."""

    nats: dict[str, list[float]]
    """Condition -> nats of every text."""
    num_tokens: list[int]
    groups: list[int]
    """Number of the document or question of every text."""


@dataclass(frozen=True, slots=True)
class QuestionResults:
    """Answers to questions about an image that was shown."""

    correct: dict[str, list[int]]
    """Condition -> 1 for every question whose correct option is the likeliest, else 0."""
    chance: float
    num_right_images: int
    """Number of requests that retrieved an image of their name."""


def continue_answer(
    messages: Sequence[Message], image: ImageRef | None, text: str = ""
) -> tuple[Message, ...]:
    """Return a conversation whose last turn, of the assistant, goes on with an image and a text.

    Earlier turns, and this one unless it gets a text, are context only.
    """
    answer = messages[-1]
    added = (*(() if image is None else (image,)), *((text,) if text else ()))
    last = Message(answer.role, (*answer.parts, *added), supervised=bool(text))
    context = tuple(replace(message, supervised=False) for message in messages[:-1])
    return (*context, last)


def render_continuation(model: DuetModel, messages: Sequence[Message]) -> TokenSequence:
    """Return a conversation whose last text alone is learned, without the end of its turn."""
    renderer = model.renderer
    builder, parts = renderer.render_chat_parts(tuple(messages), add_generation_prompt=False)
    last = parts[-1].segment
    builder.segments[:] = [
        replace(segment, is_supervised=number == last)
        for number, segment in enumerate(builder.segments)
    ]
    return builder.build(renderer.max_tokens)


def measure_continuations(
    model: DuetModel,
    documents: Sequence[Document],
    *,
    gallery: Sequence[ImageRef],
    answers: Sequence[Answer],
) -> TextNats:
    """Return the nats of what follows each image in its document, after different images.

    Before the image is what the document has up to it, without earlier images. Places that nothing
    follows are left out.

    Args:
        model: the model.
        documents: documents with a single request.
        gallery: the images by their index.
        answers: what the operation has retrieved without feed-back for each document.
    """
    sequences: list[TokenSequence] = []
    groups = []
    conditions: tuple[str, ...] = ()
    for index, (document, answer) in enumerate(zip(documents, answers, strict=True)):
        other = documents[(index + len(documents) // 2) % len(documents)]
        for number, place in enumerate(document.places):
            if not place.continuation:
                continue
            images: dict[str, ImageRef | None] = {
                NO_IMAGE: None,
                RETRIEVED_IMAGE: gallery[answer.images[number]],
                RIGHT_IMAGE: place.right_image,
                WRONG_IMAGE: other.places[number % len(other.places)].right_image,
            }
            conditions = tuple(images)
            messages = document.list_messages([None] * number)
            for image in images.values():
                continued = continue_answer(messages, image, f" {place.continuation}")
                sequences.append(render_continuation(model, continued))
            groups.append(index)
    return _collect_nats(model, sequences, conditions=conditions, groups=groups)


def _collect_nats(
    model: DuetModel,
    sequences: list[TokenSequence],
    *,
    conditions: Sequence[str],
    groups: list[int],
) -> TextNats:
    """Return the nats of sequences that are in the order of texts, and of conditions for each."""
    results = model.compute_sequence_nll(sequences)
    size = len(conditions)
    nats = {
        condition: [total for total, _ in results[number::size]]
        for number, condition in enumerate(conditions)
    }
    counts = [[count for _, count in results[number::size]] for number in range(size)]
    assert all(count == counts[0] for count in counts), "a text has the same tokens everywhere"
    return TextNats(nats, counts[0], groups)


def measure_plain_answers(
    model: DuetModel, questions: QuestionSet, answers: Sequence[Answer]
) -> TextNats:
    """Return the nats of plain answers after a turn that has shown an image, and without it.

    Each of the `PLAIN_QUESTIONS` follows another request for an image.
    """
    conditions = (NO_IMAGE, RETRIEVED_IMAGE)
    sequences = []
    step = len(questions.documents) // len(PLAIN_QUESTIONS) or 1
    for number, (question, answer) in enumerate(PLAIN_QUESTIONS):
        index = number * step % len(questions.documents)
        messages = questions.documents[index].list_messages([])
        retrieved = questions.gallery[answers[index].images[0]]
        turns = (Message("user", (question,)), Message("assistant", (answer,)))
        for image in (None, retrieved):
            conversation = (*continue_answer(messages, image), *turns)
            chat = model.renderer.render_chat(conversation, add_generation_prompt=False)
            sequences.append(chat)
    groups = list(range(len(PLAIN_QUESTIONS)))
    return _collect_nats(model, sequences, conditions=conditions, groups=groups)


def measure_questions(
    model: DuetModel, questions: QuestionSet, answers: Sequence[Answer]
) -> QuestionResults:
    """Return the answers to the question what the retrieved image shows.

    The user asks for an image by a name, the assistant shows the retrieved one, the user asks what
    it shows, and the caption among four that is likeliest per token is the answer. Without
    feed-back the model has the name alone; it may be the answer if the right image was retrieved.

    Args:
        model: the model.
        questions: requests, and a question about every image.
        answers: what the operation has retrieved for each request.
    """
    sequences: list[TokenSequence] = []
    size = len(questions.gallery)
    conversations: Mapping[str, tuple[Message, ...]] = {}
    retrieved = [answer.images[0] for answer in answers]
    for document, image in zip(questions.documents, retrieved, strict=True):
        request = document.list_messages([])
        question = Message("user", (IMAGE_QUESTION,))
        wrong = questions.gallery[(image + size // 2) % size]
        right = questions.gallery[image]
        conversations = {
            NO_IMAGE: (*continue_answer(request, None), question),
            RETRIEVED_IMAGE: (*continue_answer(request, right), question),
            WRONG_IMAGE: (*continue_answer(request, wrong), question),
            ASKED_DIRECTLY: (Message("user", (right, IMAGE_QUESTION)),),
        }
        for conversation in conversations.values():
            for option in questions.questions[image].options:
                messages = (*conversation, Message("assistant", (option,)))
                chat = tuple(join_texts(message) for message in messages)
                sequences.append(model.renderer.render_chat(chat, add_generation_prompt=False))
    losses = [nats / count for nats, count in model.compute_sequence_nll(sequences)]
    correct: dict[str, list[int]] = {condition: [] for condition in conversations}
    position = 0
    for image in retrieved:
        question_item = questions.questions[image]
        num_options = len(question_item.options)
        for values in correct.values():
            options = losses[position : position + num_options]
            right_loss = options.pop(question_item.reference)
            values.append(int(all(right_loss < loss for loss in options)))
            position += num_options
    chance = sum(1 / len(questions.questions[image].options) for image in retrieved) / len(
        retrieved
    )
    pairs = zip(questions.documents, retrieved, strict=True)
    num_right = sum(image in document.places[0].positives for document, image in pairs)
    return QuestionResults(correct, chance, num_right)
