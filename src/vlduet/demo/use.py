"""Use of the demo's trained model as by a user: an index, searches, and questions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vlduet.data.formats import read_jsonl
from vlduet.data.records import ImageRef
from vlduet.data.tools.instructions import generate_instructions
from vlduet.demo.prepare import CORPUS, DemoData
from vlduet.eval import examples
from vlduet.eval.protocols import RetrievalResult

if TYPE_CHECKING:
    from vlduet.model.duet import DuetModel

QUESTION_KINDS = ("describe", "choose", "exists")
"""Kinds of `generate_instructions` that are asked about held-out images."""
NUM_QUESTIONS_PER_KIND = 2
MAX_ANSWER_TOKENS = 32


def use_model(
    to: Path, model: DuetModel, data: DemoData, *, retrieval: RetrievalResult
) -> tuple[tuple[examples.Gallery, ...], tuple[examples.AnsweredQuestion, ...]]:
    """Write an index of the held-out images to ``to/index``, search it, and answer questions.

    Args:
        to: Folder of the demo, with the model in ``to/model`` and the held-out records below
            ``to/data``. An existing index is updated.
        retrieval: Retrieval of `model` on the held-out records, which the examples are taken from.

    Returns:
        Example searches (text to image, image to text, composed queries), and the answers of
        `answer_questions`.

    Raises:
        DataError: The file of held-out records cannot be read.
        RetrievalError: The folder of an index is in use, of another model, or holds other files.
    """
    from vlduet.retrieval.build import build_index
    from vlduet.retrieval.index import Index
    from vlduet.retrieval.search import search

    source = to / "data" / CORPUS / "test.jsonl"
    build_index(model, source, to=to / "index", model_path=to / "model")
    index = Index.open(to / "index", model)

    def find(*query: str | ImageRef) -> list[tuple[str, float]]:
        """Return the ids and scores of the first hits, one more than an example shows."""
        hits = search(index, model, query, k=examples.HITS_PER_EXAMPLE + 1)
        return [(hit.id, hit.score) for hit in hits]

    galleries = (
        examples.text_to_image_examples(retrieval, search=find),
        examples.image_to_text_examples(retrieval),
        examples.composed_query_examples(retrieval, search=find),
    )
    return galleries, answer_questions(to, model, data)


def answer_questions(
    to: Path, model: DuetModel, data: DemoData
) -> tuple[examples.AnsweredQuestion, ...]:
    """Answer questions about held-out images, without and with retrieval of training records.

    The questions are made from the captions by rule: `NUM_QUESTIONS_PER_KIND` of every kind of
    `QUESTION_KINDS`, evenly spaced. An index of the training records is written to
    ``to/references``. Raises as `use_model`.
    """
    from vlduet.retrieval import rag
    from vlduet.retrieval.build import build_index
    from vlduet.retrieval.index import Index

    build_index(model, data.train_file, to=to / "references", model_path=to / "model")
    index = Index.open(to / "references", model)
    training_records = list(read_jsonl(data.train_file))
    chats = list(generate_instructions(data.held_out, kinds=QUESTION_KINDS))
    answers = []
    for kind in QUESTION_KINDS:
        asked = [chat for chat in chats if chat.metadata["instruction"] == kind]
        for chat in examples.evenly_spaced(asked, NUM_QUESTIONS_PER_KIND):
            question, reference = chat.messages
            image, text = question.parts
            assert isinstance(image, ImageRef) and isinstance(text, str), "one image, one question"
            alone = model.generate([question], max_new_tokens=MAX_ANSWER_TOKENS)
            reply = rag.ask(index, model, (image, text), max_new_tokens=MAX_ANSWER_TOKENS)
            sources = [(hit.id, hit.score) for hit in reply.sources]
            answers.append(
                examples.AnsweredQuestion(
                    text,
                    image,
                    reference=str(reference.parts[0]),
                    answer_alone="".join(alone),
                    answer=reply.text,
                    sources=examples.example_hits(sources, training_records),
                )
            )
    return tuple(answers)
