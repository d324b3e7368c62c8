"""Searches at every place of documents and dialogs, by the operation and by what it is compared to.

    operation                   the state at the end of what the assistant has written so far
    operation, retrieved images   the same after the images that it has retrieved, fed back
    operation, right images     the same after the right images: an upper bound
    scope dialog                where the last text of the user ends
    before generation           one search with the user's last request
    encode                      requests and texts so far as one content, by the embedding prompt
    encode, last text           the last of these texts alone
    suite                       the query of the suite ``abilities``
    dual encoder ...            the same contents by an independent dual encoder, part by part

`DuetModel.interleave` searches an index that keeps the vectors that it is searched with, which are
ranked here against the whole gallery. Seconds are those of the processor.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from items import IMAGE_SENTENCE, Document, SearchSet
from numpy.typing import NDArray

from vlduet.data.records import ImageRef, Message, Parts
from vlduet.eval.benchmarks.control_runners import chance_of_hit
from vlduet.eval.benchmarks.runners import best_positive_ranks
from vlduet.files import write_text_atomically
from vlduet.model.duet import DuetModel
from vlduet.model.embedding import Embeddable
from vlduet.model.generation.interleave import RetrievedImage
from vlduet.retrieval.build import build_index
from vlduet.retrieval.filters import Where
from vlduet.retrieval.index import Index
from vlduet.retrieval.search import Hit, search_vector

Vectors = NDArray[np.float32]
EmbedContents = Callable[[list[Parts]], Vectors]
"""Contents -> unit vectors float[N, E]."""
CUTOFFS = (1, 10)
"""Values of k of the reported hit@k."""

BEFORE = "before generation"
OPERATION = "operation"
RETRIEVED = "operation, retrieved images"
RIGHT = "operation, right images"
TEXT_ALONE = "text alone"
MAX_NEW_TOKENS = 48
"""Length limit of answers that the model writes itself."""


# ------------------------------------------------------------------ the operation


@dataclass(frozen=True, slots=True)
class Answer:
    """What the operation has retrieved for one document."""

    images: tuple[int, ...]
    """Index in the gallery of the image of every place."""
    vectors: Vectors
    """float32[places, E], embeddings that the index was searched with."""


@dataclass(slots=True)
class RecordingIndex:
    """Index that keeps the vectors that it is searched with."""

    index: Index
    vectors: list[Vectors] = field(default_factory=list)
    prescribed_ids: list[str] = field(default_factory=list)
    """Documents that the next searches find, one each, whatever is nearest; then the nearest."""

    def check_model(self, model: Any) -> None:
        """Raise RetrievalError unless the model built the index."""
        self.index.check_model(model)

    def check_image_search(self, where: Where) -> None:
        """Raise RetrievalError as `Index.check_image_search`."""
        self.index.check_image_search(where)

    def search_vector(self, vector: Vectors, *, k: int, where: Where = None) -> list[Hit]:
        """Return the nearest documents, or the one that is prescribed."""
        self.vectors.append(vector)
        hits = search_vector(self.index, vector, k=k, where=where)
        if not self.prescribed_ids:
            return hits
        row = self.index.get_row(self.prescribed_ids.pop(0))
        assert row is not None, "an image of the gallery"
        return [Hit(row.id, 0.0, row.text, self.index.row_image(row), row.metadata, 1)]


@contextmanager
def count_passes(model: DuetModel) -> Iterator[list[int]]:
    """Count the forward passes of the language model in the block, in a list of one number."""
    count = [0]

    def increase(*_: object) -> None:
        count[0] += 1

    hook = model.backbone.language_model.register_forward_pre_hook(increase)
    try:
        yield count
    finally:
        hook.remove()


def build_gallery_index(model: DuetModel, gallery: Sequence[ImageRef], folder: Path) -> Index:
    """Write an index of images, whose ids are their numbers, and open it.

    Every image must have a file of its own.

    Raises:
        RetrievalError: `folder` has an index of another model.
    """
    rows = []
    for number, image in enumerate(gallery):
        assert image.path is not None, "an image without a file"
        rows.append(json.dumps({"id": str(number), "image": str(image.path.resolve())}) + "\n")
    source = folder / "gallery.jsonl"
    write_text_atomically(source, "".join(rows))
    build_index(model, source, to=folder / "index")
    return Index.open(folder / "index", model)


def read_gallery_vectors(index: Index, count: int) -> Vectors:
    """Return the embeddings float32[count, E] of an index of `build_gallery_index`."""
    return index.store.read_vectors([str(number) for number in range(count)])


def answer_document(
    model: DuetModel,
    index: Index,
    document: Document,
    *,
    feed_back: bool,
    images: Sequence[int | None] = (),
) -> Answer:
    """Search an image for every place of a document by `DuetModel.interleave`.

    The texts are the template of one answer to a single request, or of one answer to each request;
    then the images of earlier answers are in the conversation if `feed_back`.

    Args:
        model: the model.
        index: index of the gallery.
        document: the document.
        feed_back: let the model read the images.
        images: indices of the images that are shown in place of those that are found; None, in a
            dialog, for no image at all.
    """
    prescribed_ids = [str(image) for image in images if image is not None]
    recorder = RecordingIndex(index, prescribed_ids=prescribed_ids)
    if len(document.requests) == 1:
        template = " ".join(f"{place.text}{{image}}" for place in document.places)
        request = (Message("user", document.requests),)
        hits = _retrieve(model, recorder, request, template=template, feed_back=feed_back)
    else:
        hits = []
        earlier_images: list[ImageRef | None] = []
        for number, place in enumerate(document.places):
            messages = document.list_messages(earlier_images)[:-1]
            if images and images[number] is None:
                recorder.prescribed_ids.insert(0, "0")  # it is not shown
            template = f"{place.text}{{image}}"
            hits += _retrieve(model, recorder, messages, template=template, feed_back=False)
            is_read = feed_back and not (images and images[number] is None)
            earlier_images.append(hits[-1].image if is_read else None)
    assert len(hits) == len(recorder.vectors) == len(document.places), document.id
    return Answer(tuple(int(hit.id) for hit in hits), np.stack(recorder.vectors))


def _retrieve(
    model: DuetModel,
    index: RecordingIndex,
    messages: Sequence[Message],
    *,
    template: str,
    feed_back: bool,
) -> list[Hit]:
    """Return the document of every place of a template."""
    events = model.interleave(messages, index, template=template, feed_back=feed_back)
    return [event.hit for event in events if isinstance(event, RetrievedImage)]


def answer_documents(
    model: DuetModel, index: Index, search_set: SearchSet
) -> dict[str, list[Answer]]:
    """Return the answers for all documents without, with retrieved, and with right images."""
    position = {image: number for number, image in enumerate(search_set.gallery)}
    answers: dict[str, list[Answer]] = {OPERATION: [], RETRIEVED: [], RIGHT: []}
    for document in search_set.documents:
        right = [
            None if place.right_image is None else position[place.right_image]
            for place in document.places
        ]
        for method, images in ((OPERATION, []), (RETRIEVED, []), (RIGHT, right)):
            feed_back = method != OPERATION
            answer = answer_document(model, index, document, feed_back=feed_back, images=images)
            answers[method].append(answer)
    return answers


# ------------------------------------------------------------------ contents of the other methods


def list_contents(document: Document, images: Sequence[ImageRef | None]) -> Parts:
    """Return requests and texts up to the place after those of `images`, with these images."""
    contents: list[str | ImageRef] = []
    for number, place in enumerate(document.places[: len(images) + 1]):
        contents += document.requests[number : number + 1]
        if place.text != IMAGE_SENTENCE:
            contents.append(place.text)
        if number < len(images) and (image := images[number]) is not None:
            contents.append(image)
    return tuple(contents)


def list_right_images(document: Document, number: int) -> list[ImageRef | None]:
    """Return the right images of the first `number` places."""
    return [place.right_image for place in document.places[:number]]


def last_request(document: Document, number: int) -> Parts:
    """Return what the user has said last before the place of index `number`."""
    return (document.requests[min(number, len(document.requests) - 1)],)


def list_method_contents(
    documents: Sequence[Document],
) -> tuple[dict[str, list[Embeddable]], dict[str, list[Parts]]]:
    """Return the contents that every place is searched with, of our model and of the dual encoder.

    They are keyed by method, in the order of documents and places.
    """
    by_model: dict[str, list[Embeddable]] = {}
    by_dual: dict[str, list[Parts]] = {}
    for document in documents:
        is_dialog = len(document.requests) > 1
        for number, place in enumerate(document.places):
            blank = [None] * number
            contents = list_contents(document, blank)
            with_images = list_contents(document, list_right_images(document, number))
            if is_dialog:
                dialog = document.list_messages(blank)[:-1]
                by_model.setdefault("scope dialog", []).append(dialog)
            by_model.setdefault(BEFORE, []).append(last_request(document, number))
            by_model.setdefault("encode", []).append(contents)
            if not is_dialog:  # of a dialog they are the two above
                by_model.setdefault("encode, last text", []).append(contents[-1:])
                by_model.setdefault("suite", []).append(place.suite_query)
            by_dual.setdefault("dual encoder", []).append(contents)
            by_dual.setdefault("dual encoder, last text", []).append(contents[-1:])
            by_dual.setdefault("dual encoder, right images", []).append(with_images)
    return by_model, by_dual


# ------------------------------------------------------------------ ranks


@dataclass(frozen=True, slots=True)
class SearchResults:
    """Ranks of the right image at all places of all documents, in order."""

    ranks: dict[str, list[int]]
    """Method -> rank at every place, 1 is best."""
    chance: dict[str, list[float]]
    """``hit@K`` -> chance of a random order at every place."""
    groups: list[int]
    """Index of the document of every place."""
    numbers: list[int]
    """Number of every place in its document, from 1."""


def measure_searches(
    model: DuetModel,
    search_set: SearchSet,
    answers: dict[str, list[Answer]],
    *,
    gallery_vectors: Vectors,
    embed_by_dual: EmbedContents,
) -> SearchResults:
    """Return the ranks of the right images by all methods.

    Images that a document has shown before are left out, as in the suite, for every method.

    Args:
        model: the model.
        search_set: documents and gallery.
        answers: results of `answer_documents`.
        gallery_vectors: embeddings of the gallery by the model.
        embed_by_dual: the independent dual encoder.
    """
    documents, gallery = search_set.documents, search_set.gallery
    places = [place for document in documents for place in document.places]
    vectors = {
        method: np.concatenate([answer.vectors for answer in method_answers])
        for method, method_answers in answers.items()
    }
    by_model, by_dual = list_method_contents(documents)
    vectors |= embed_distinct(model.encode_query, by_model)
    gallery_of = dict.fromkeys(vectors, gallery_vectors)
    images: list[Parts] = [(image,) for image in gallery]
    vectors |= embed_distinct(embed_by_dual, by_dual)
    gallery_of |= dict.fromkeys(by_dual, embed_by_dual(images))
    ranks = {}
    for method, queries in vectors.items():
        method_ranks, _ = best_positive_ranks(
            queries,
            gallery_of[method],
            [place.positives for place in places],
            excluded=[place.excluded for place in places],
        )
        ranks[method] = [int(rank) for rank in method_ranks]
    chance: dict[str, list[float]] = {f"hit@{k}": [] for k in CUTOFFS}
    for place in places:
        size = len(gallery) - len(set(place.excluded))
        for k in CUTOFFS:
            chance[f"hit@{k}"].append(chance_of_hit(size, [len(place.positives)], k))
    groups = [n for n, document in enumerate(documents) for _ in document.places]
    numbers = [n for document in documents for n in range(1, len(document.places) + 1)]
    return SearchResults(ranks, chance, groups, numbers)


def embed_distinct(
    embed: Callable[[list[Any]], Vectors], contents: Mapping[str, Sequence[Embeddable]]
) -> dict[str, Vectors]:
    """Return the vectors of the contents of every method; equal contents are embedded once."""
    distinct = list(dict.fromkeys(chain.from_iterable(contents.values())))
    position = {content: i for i, content in enumerate(distinct)}
    vectors = embed(distinct)
    return {name: vectors[[position[c] for c in rows]] for name, rows in contents.items()}


# ------------------------------------------------------------------ costs


def measure_costs(
    model: DuetModel, index: Index, documents: Sequence[Document]
) -> dict[str, dict[str, list[float]]]:
    """Return seconds and forward passes per answer of four ways to search at every place.

    They are measured in turn, document by document, each search by itself. Returned are lists by
    method and by ``seconds`` and ``passes``.
    """
    costs: dict[str, dict[str, list[float]]] = {}
    for document in documents:
        for method in (BEFORE, "encode", OPERATION, RETRIEVED):
            start = time.process_time()
            with count_passes(model) as count:
                if method == BEFORE:
                    _search(model, index, last_request(document, 0))
                elif method == "encode":
                    for number in range(len(document.places)):
                        _search(model, index, list_contents(document, [None] * number))
                else:
                    answer_document(model, index, document, feed_back=method == RETRIEVED)
            numbers = costs.setdefault(method, {"seconds": [], "passes": []})
            numbers["seconds"].append(time.process_time() - start)
            numbers["passes"].append(count[0])
    return costs


def measure_writing(
    model: DuetModel, index: Index, documents: Sequence[Document]
) -> dict[str, dict[str, list[float]]]:
    """Return what it costs that the model writes an answer itself, with an image at every sentence.

    Methods are text alone, and text with images that are not and that are fed back. Returned are
    lists by method and by ``seconds``, ``passes`` and ``images``.
    """
    costs: dict[str, dict[str, list[float]]] = {}
    for document in documents:
        messages = (Message("user", document.requests[:1]),)
        for method in (TEXT_ALONE, OPERATION, RETRIEVED):
            start = time.process_time()
            images = 0
            with count_passes(model) as count:
                if method == TEXT_ALONE:
                    model.generate(messages, max_new_tokens=MAX_NEW_TOKENS)
                else:
                    events = model.interleave(
                        messages,
                        index,
                        feed_back=method == RETRIEVED,
                        max_new_tokens=MAX_NEW_TOKENS,
                    )
                    images = sum(isinstance(event, RetrievedImage) for event in events)
            numbers = costs.setdefault(method, {"seconds": [], "passes": [], "images": []})
            numbers["seconds"].append(time.process_time() - start)
            numbers["passes"].append(count[0])
            numbers["images"].append(images)
    return costs


def _search(model: DuetModel, index: Index, content: Parts) -> None:
    """Search an index with one content."""
    search_vector(index, model.encode_query([content])[0], k=1)
