"""The demo uses its model as a user would: an index of the held-out images, searches, questions, two documents aligned."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vlduet.data.records import ImageRef
from vlduet.demo import encoders
from vlduet.demo.prepare import HELD_OUT_CORPUS, DemoData
from vlduet.eval import protocols
from vlduet.reports import galleries, pages
from vlduet.reports.compose import Shown

if TYPE_CHECKING:
    from vlduet.model.duet import DuetModel

QUESTIONS = (
    "Name a fruit.",
    "What can fly?",
    "Which animal lives in the water?",
    "What could I play music with?",
)
"""Asked of the index as they stand; a fixed list, whatever the answers."""
IMAGE_QUESTION, IMAGE_QUESTIONS = "What is this?", 2


def use_model(
    to: Path,
    model: DuetModel,
    data: DemoData,
    *,
    result: protocols.RetrievalResult,
    dual: Path,
    seed: int,
) -> Shown:
    """Index the held-out images and use the index as a user would; `dual` is the trained dual encoder."""
    from vlduet.retrieval import rag
    from vlduet.retrieval.build import build_index
    from vlduet.retrieval.index import Index
    from vlduet.retrieval.search import search

    source = to / "data" / HELD_OUT_CORPUS / "test.jsonl"
    build_index(model, source, to=to / "index", model_path=to / "model")
    index, album = Index.open(to / "index", model), galleries.Album(data.held_out)

    def find(*query: str | ImageRef) -> galleries.Found:
        return [(hit.id, hit.score) for hit in search(index, model, query, k=galleries.SHOWN + 1)]

    def ask(question: str, identity: str | None = None) -> pages.Asked:
        image = None if identity is None else album.image(identity)
        answer = rag.ask(
            index,
            model,
            question,
            image=image,
            exclude=[identity] if identity else (),
            max_new_tokens=48,
        )
        sources = album.hits([(hit.id, hit.score) for hit in answer.sources])
        return pages.Asked(
            question, answer.text, sources, image=album.picture(identity) if identity else ""
        )

    frozen_encoders = encoders.open_frozen_encoders(to, model, cross=dual)
    chosen = galleries.evenly_spaced(result.ids, IMAGE_QUESTIONS)
    return Shown(
        galleries=(
            galleries.text_to_image_examples(result, album, find=find),
            galleries.image_to_text_examples(result, album),
            galleries.composed_query_examples(result, album, find=find),
        ),
        heat=galleries.heat(result, album),
        asked=(*map(ask, QUESTIONS), *(ask(IMAGE_QUESTION, identity) for identity in chosen)),
        album=album,
        alignments=encoders.align_demo_records(data.held_out, frozen_encoders),
        augmented=encoders.measure_retrieval_augmented(
            to, model, data=data, encoders=frozen_encoders, seed=seed
        ),
    )
