"""Documents and dialogs whose images are searched place by place, and questions about images.

They are those of the suite ``abilities`` (`vlduet.eval.benchmarks.abilities`) on the held-out
splits: the same images are searched in the same galleries. What a place has before it is
all that is written in the document so far, where the suite has its last eight parts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from vlduet.data.images import image_key
from vlduet.data.records import ImageRef, Message, Parts, Record
from vlduet.eval.benchmarks.abilities import (
    CORPORA,
    MAX_PLACE,
    find_new_images,
    kinds_of,
    load_dialog,
    load_places,
    shorten_prefix,
)
from vlduet.eval.benchmarks.builtin import (
    captioned_images,
    load_caption_choice,
    read_split,
    read_splits,
)
from vlduet.eval.benchmarks.official_files import OfficialFiles
from vlduet.eval.benchmarks.tasks import Question, SearchTask

PROMPTS = {
    "campaigns": 'Tell the story "{title}" with pictures.',
    "gimp-help": 'Explain "{title}" with pictures.',
}
"""Request for a document of a corpus by its title."""
CONTINUATION_WORDS = 24
"""Number of words after an image whose likelihood is measured."""
IMAGE_REQUEST = "Show me a picture: {name}"
IMAGE_SENTENCE = "Here is a picture:"
"""Answer of the assistant, at whose end the image is retrieved."""
IMAGE_QUESTION = "What is shown?"
"""Question about an image, as in the instructions of the corpus stamps."""


@dataclass(frozen=True, slots=True)
class Place:
    """Position of an answer where an image belongs."""

    text: str
    """What is written before it, since the place before."""
    positives: tuple[int, ...]
    """Indices of the right images in the gallery."""
    excluded: tuple[int, ...] = ()
    """Indices of images that leave the gallery: those that the document has shown before."""
    right_image: ImageRef | None = None
    """Image that the upper bound feeds back; None for none."""
    continuation: str = ""
    """What follows the image in the document; empty for nothing."""
    suite_query: Parts = ()
    """Content that the suite searches with."""


@dataclass(frozen=True, slots=True)
class Document:
    """Answer in several parts, each of which ends where an image is searched."""

    id: str
    requests: tuple[str, ...]
    """What the user says: once for a document, before every place for a dialog."""
    places: tuple[Place, ...]

    def list_messages(self, images: Sequence[ImageRef | None]) -> tuple[Message, ...]:
        """Return the conversation up to the place after those of `images`.

        Args:
            images: images at the first places, None where a place gets none; fewer than places.
        """
        messages: list[Message] = []
        for number, place in enumerate(self.places[: len(images) + 1]):
            parts: Parts = (place.text,)
            if number < len(self.requests):
                messages.append(Message("user", (self.requests[number],)))
            else:  # the answer goes on
                answer = messages.pop()
                parts = (*answer.parts, f" {place.text}")
            image = images[number] if number < len(images) else None
            parts = parts if image is None else (*parts, image)
            messages.append(Message("assistant", parts))
        return tuple(join_texts(message) for message in messages)


def join_texts(message: Message) -> Message:
    """Return a message in which neighbouring texts are one."""
    parts: list[str | ImageRef] = []
    for part in message.parts:
        if parts and isinstance(part, str) and isinstance(parts[-1], str):
            parts[-1] += part
        else:
            parts.append(part)
    return Message(message.role, tuple(parts), supervised=message.supervised)


@dataclass(frozen=True, slots=True)
class SearchSet:
    """Documents with the gallery that their images are searched in."""

    documents: tuple[Document, ...]
    gallery: tuple[ImageRef, ...]
    num_left_out: int = 0
    """Searches of the suite that have no text of their own."""


# ------------------------------------------------------------------ documents


def load_document_set(files: OfficialFiles) -> SearchSet:
    """Return the documents of the suite's task *retrieval at different places*.

    A place without text between it and the one before is left out: there is no end of a sentence
    to read.

    Raises:
        DataError, ImageError: as `load_places`.
    """
    task = load_places(files)
    gallery = list_gallery(task)
    number = num_left_out = 0
    documents = []
    for corpus, prompt in PROMPTS.items():
        for record in read_splits(files, (corpus,)):
            keys = {part: image_key(part) for part in record.parts if isinstance(part, ImageRef)}
            places = []
            start = 0
            for position, earlier in find_new_images(record.parts, keys)[:MAX_PLACE]:
                if position == 0:
                    continue
                assert task.tags[number] == f"image {len(earlier) + 1}", record.id
                text = join_prefix(record.parts[start:position])
                if text:
                    places.append(_make_place(task, number, text=text, record=record, at=position))
                    start = position + 1
                num_left_out += not text
                number += 1
            if places:
                request = prompt.format(title=find_title(record))
                documents.append(Document(record.id, (request,), tuple(places)))
    assert number == len(task.positives), "not the searches of the suite"
    return SearchSet(tuple(documents), gallery, num_left_out)


def list_gallery(task: SearchTask) -> tuple[ImageRef, ...]:
    """Return the images that a task searches."""
    images = []
    for ((_, (image,)),) in task.documents:
        assert isinstance(image, ImageRef)
        images.append(image)
    return tuple(images)


def join_prefix(parts: Parts) -> str:
    """Return the texts of parts as one, shortened as those of the suite's queries."""
    texts = tuple(part for part in parts if isinstance(part, str))
    return " ".join(part for part in shorten_prefix(texts) if isinstance(part, str))


def find_title(record: Record) -> str:
    """Return the first text of a document with a word of two letters, not the number before it."""
    texts = (part for part in record.parts if isinstance(part, str))
    return next(text for text in texts if re.search(r"[^\W\d_]{2}", text))


def _make_place(task: SearchTask, number: int, *, text: str, record: Record, at: int) -> Place:
    """Return a place of a document with what the suite's search of this number has."""
    ((_, suite_query),) = task.queries["prefix"][number]
    (target,) = task.positives[number][0]
    following = next((part for part in record.parts[at + 1 :] if isinstance(part, str)), "")
    return Place(
        text,
        (target,),
        task.excluded_documents[number],
        list_gallery(task)[target],
        " ".join(following.split()[:CONTINUATION_WORDS]),
        suite_query,
    )


# ------------------------------------------------------------------ dialogs


def load_dialog_set(files: OfficialFiles) -> SearchSet:
    """Return the dialogs of the suite's task *retrieval and dialog*: kind, narrower kind, name.

    The assistant answers every turn with the same sentence and an image. The right image
    of the first two turns is one of the kind with another name, if there is one.

    Raises:
        DataError: as `load_dialog`.
    """
    task = load_dialog(files)
    gallery = list_gallery(task)
    kinds = []
    for corpus in CORPORA:
        kinds += [kinds_of(record) for record, _ in captioned_images(read_split(files, corpus))]
    documents: list[Document] = []
    for ((_, turns),), (positives,) in zip(task.queries["all turns"], task.positives, strict=True):
        requests = tuple(str(turn) for turn in turns)
        same_kind = [i for i, (kind, _) in enumerate(kinds) if kind == requests[0]]
        same_narrower = [i for i in same_kind if kinds[i] == requests[:2]]
        places = []
        for number, candidates in enumerate((same_kind, same_narrower, list(positives))):
            if number < 2:
                candidates = [i for i in candidates if i not in positives]
            image = gallery[candidates[len(documents) % len(candidates)]] if candidates else None
            query = requests[: number + 1]
            places.append(Place(IMAGE_SENTENCE, positives, (), image, suite_query=query))
        documents.append(Document(requests[2], requests, tuple(places)))
    return SearchSet(tuple(documents), gallery)


# ------------------------------------------------------------------ questions


@dataclass(frozen=True, slots=True)
class QuestionSet:
    """Requests for an image, and a question about every image that may be shown for them."""

    documents: tuple[Document, ...]
    """Request for an image of a name, with the sentence that it is shown after."""
    gallery: tuple[ImageRef, ...]
    questions: tuple[Question, ...]
    """Question about each image of the gallery; its options are captions."""


def load_question_set(files: OfficialFiles) -> QuestionSet:
    """Return a request for every name of a held-out stamp, and the question what each one shows.

    The questions are those of `load_caption_choice`: which of four captions belongs to an image.
    """
    questions = load_caption_choice(files, corpus="stamps").items
    gallery = tuple(image for _, image in captioned_images(read_split(files, "stamps")))
    captions = [question.options[question.reference] for question in questions]
    documents: list[Document] = []
    for name in dict.fromkeys(captions):
        positives = tuple(i for i, caption in enumerate(captions) if caption == name)
        place = Place(IMAGE_SENTENCE, positives, (), gallery[positives[0]])
        documents.append(Document(name, (IMAGE_REQUEST.format(name=name),), (place,)))
    return QuestionSet(tuple(documents), gallery, questions)
