"""Stamps as knowledge bases: what may be found, what is shown, and that a retriever which reads no image still retrieves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from helpers import tiny
from vlduet.data.records import ImageRef, Parts, Record
from vlduet.errors import DataError
from vlduet.eval.benchmarks import protocols, solved
from vlduet.eval.predictions import ModelFunctions, PredictionStore

KINDS = ("animals", "food", "town", "plants", "sports")


def stamps(count: int, *, first: int = 0) -> list[Record]:
    return [
        Record(
            f"r{first + i}", image=tiny.random_image(first + i), short=(f"Thing {first + i}.",),
            metadata={"category": f"{KINDS[i % 5]}/x"},
        )
        for i in range(count)
    ]  # fmt: skip


def vector(item: Parts) -> np.ndarray:
    """The kind: of an image by its place in the data, of a sentence by its words."""
    words = " ".join(part for part in item if isinstance(part, str))
    named = [n for n, name in enumerate(KINDS) if name in words]
    pictures = {tiny.random_image(i).data: i % 5 for i in range(40)}
    found = np.full(5, 0.01, np.float32)
    for n in named or [pictures[part.data] for part in item if isinstance(part, ImageRef)]:
        found[n] = 1.0
    return found


def copies(pairs: list[tuple[Parts, str]]) -> list[tuple[float, int]]:
    """A generator that believes its reference: likely is what stands in the prompt."""
    return [
        (0.5 if any(o in p for p in prompt if isinstance(p, str)) else 1.0, 1)
        for prompt, o in pairs
    ]


def embed(items: list[Parts], query: bool) -> np.ndarray:
    return np.stack([vector(item) for item in items])


def blind(items: list[Parts], query: bool) -> np.ndarray:
    return np.full((len(items), 5), np.nan, np.float32)


def test_solved_questions(tmp_path: Path) -> None:
    task = solved.make_solved_question_task(stamps(10), stamps(15, first=5), num_questions=8, seed=0)
    assert len(task.items) == 8 and len(task.entries) == 15
    for item, excluded, right in zip(task.items, task.excluded_entries, task.positives, strict=True):
        number = int(item.id[1:])
        assert excluded == ((number - 5,) if number >= 5 else ())  # never a question's own image
        assert item.options[item.reference] == KINDS[number % 5] and len(set(item.options)) == 4
        assert all(item.options[item.reference] in str(task.entries[i].prompt_parts[0]) for i in right)
    assert all("Answer" not in str(key) for fact in task.entries for key in fact.search_views)
    score = protocols.run_rag(
        task,
        PredictionStore(
            tmp_path, ModelFunctions(embed=embed, continuation_nll=copies, retriever_embed=blind)
        ),
    )
    assert score.samples["self/accuracy"].mean == 100 and score.samples["none/accuracy"].mean == 0
    assert score.samples["self/retrieval/R@1"].mean == 100
    assert (
        score.samples["other/retrieval/R@1"].mean == 0 == score.samples["other/accuracy"].mean
    )  # it finds nothing
    assert score.details["chance"] == 25 and score.details["facts"] == 15


def test_documents(tmp_path: Path) -> None:
    task = solved.make_document_task([*stamps(10), *stamps(10)], num_questions=6, seed=1)
    assert len(task.entries) == 10, "one sentence a thing"
    for item, (right,) in zip(task.items, task.positives, strict=True):
        assert task.entries[right].prompt_parts == (
            f"Thing {item.id[1:]}: one of the {item.options[item.reference]}.",
        )
        assert item.prompt == (f"What kind of thing is this: Thing {item.id[1:]}?",)


def test_a_view_that_a_retriever_cannot_read_does_not_count() -> None:
    """An image view is NaN for a sentence encoder; the text view decides."""

    class Half:
        def embed(self, items: list[Parts], *, name: str, query: bool) -> np.ndarray:
            assert isinstance(items[0][0], (str, ImageRef))
            return embed(items, query) if isinstance(items[0][0], str) else blind(items, query)

    task = solved.make_document_task(stamps(5), num_questions=5, seed=0)
    views = tuple(((tiny.random_image(i),), (KINDS[i],)) for i in range(5))
    facts = tuple(solved.KnowledgeEntry(str(i), view, ()) for i, view in enumerate(views))
    both = solved.RagTask(items=task.items, query_views=views, entries=facts, build_prompt=task.build_prompt, score=None)
    found = protocols._rag_similarity(both, Half().embed, "self")
    assert found is not None and [int(row.argmax()) for row in found] == [0, 1, 2, 3, 4]


def test_nothing_to_ask_or_to_find() -> None:
    with pytest.raises(DataError, match="an empty knowledge base"):
        solved.make_solved_question_task(stamps(5), [], num_questions=5, seed=0)
    with pytest.raises(DataError, match="1 things of 1 kinds"):
        solved.make_document_task(stamps(1), num_questions=5, seed=0)
