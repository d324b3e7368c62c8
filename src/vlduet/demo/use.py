"""Use of the demo's trained model as by a user: an index, searches, and questions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vlduet.data.records import ImageRef
from vlduet.demo.prepare import HELD_OUT_CORPUS, DemoData
from vlduet.eval import examples
from vlduet.eval.protocols import RetrievalResult

if TYPE_CHECKING:
    from vlduet.model.duet import DuetModel

QUESTIONS = (
    "Name a fruit.",
    "What can fly?",
    "Which animal lives in the water?",
    "What could I play music with?",
)
"""Questions to the index. The list is fixed, however good or bad the answers are."""
IMAGE_QUESTION = "What is this?"
NUM_IMAGE_QUESTIONS = 2
"""Number of held-out images that `IMAGE_QUESTION` is asked about."""
MAX_ANSWER_TOKENS = 48


def use_model(
    to: Path, model: DuetModel, data: DemoData, *, retrieval: RetrievalResult
) -> tuple[tuple[examples.Gallery, ...], tuple[examples.AnsweredQuestion, ...]]:
    """Write an index of the held-out images to ``to/index``, then search it and ask it questions.

    Args:
        to: Folder of the demo, with the model in ``to/model`` and the held-out records below
            ``to/data``. An existing index is updated.
        retrieval: Retrieval of `model` on the held-out records, which the examples are taken from.

    Returns:
        Example searches (text to image, image to text, composed queries), and the answers to
        `QUESTIONS`, then to `IMAGE_QUESTION` about `NUM_IMAGE_QUESTIONS` held-out images.

    Raises:
        DataError: The file of held-out records cannot be read.
        RetrievalError: The folder of the index is in use, of another model, or holds other files.
    """
    from vlduet.retrieval import rag
    from vlduet.retrieval.build import build_index
    from vlduet.retrieval.index import Index
    from vlduet.retrieval.search import search

    source = to / "data" / HELD_OUT_CORPUS / "test.jsonl"
    build_index(model, source, to=to / "index", model_path=to / "model")
    index = Index.open(to / "index", model)

    def find(*query: str | ImageRef) -> list[tuple[str, float]]:
        """Return the ids and scores of the first hits, one more than an example shows."""
        hits = search(index, model, query, k=examples.HITS_PER_EXAMPLE + 1)
        return [(hit.id, hit.score) for hit in hits]

    def answer(
        question: str, record_id: str | None = None, image: ImageRef | None = None
    ) -> examples.AnsweredQuestion:
        """Return the model's answer and its sources; the document `record_id` is never one."""
        exclude = [] if record_id is None else [record_id]
        reply = rag.ask(
            index,
            model,
            question,
            image=image,
            exclude=exclude,
            max_new_tokens=MAX_ANSWER_TOKENS,
        )
        sources = [(hit.id, hit.score) for hit in reply.sources]
        hits = examples.example_hits(sources, retrieval.records)
        return examples.AnsweredQuestion(question, reply.text, hits, image=image)

    galleries = (
        examples.text_to_image_examples(retrieval, search=find),
        examples.image_to_text_examples(retrieval),
        examples.composed_query_examples(retrieval, search=find),
    )
    answers = [answer(question) for question in QUESTIONS]
    for record in examples.evenly_spaced(retrieval.records, NUM_IMAGE_QUESTIONS):
        answers.append(answer(IMAGE_QUESTION, record.id, record.image))
    return galleries, tuple(answers)
