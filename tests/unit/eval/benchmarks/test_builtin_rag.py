"""Stamps as knowledge bases: what may be retrieved, what is shown, and how views combine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from helpers import tiny
from vlduet.data.records import ImageRef, Parts, Record
from vlduet.errors import DataError
from vlduet.eval.benchmarks import builtin_rag, runners
from vlduet.eval.benchmarks.builtin import score_captions
from vlduet.eval.predictions import ModelFunctions, PredictionStore

KINDS = ("animals", "food", "town", "plants", "sports")


def make_stamps(count: int, *, first: int = 0) -> list[Record]:
    records = []
    for n in range(first, first + count):
        metadata = {"category": f"{KINDS[n % 5]}/x"}
        image = tiny.random_image(n)
        records.append(Record(f"r{n}", image=image, short=(f"Thing {n}.",), metadata=metadata))
    return records


def embed_item(item: Parts) -> np.ndarray:
    """Embed the kind of thing: of a text by its words, of an image by its number."""
    text = " ".join(part for part in item if isinstance(part, str))
    kinds = [n for n, kind in enumerate(KINDS) if kind in text]
    kind_of_image = {tiny.random_image(n).data: n % 5 for n in range(40)}
    embedding = np.full(5, 0.01, np.float32)
    for kind in kinds or [kind_of_image[p.data] for p in item if isinstance(p, ImageRef)]:
        embedding[kind] = 1.0
    return embedding


def embed(items: list[Parts], query: bool) -> np.ndarray:
    return np.stack([embed_item(item) for item in items])


def embed_nothing(items: list[Parts], query: bool) -> np.ndarray:
    """Return the embeddings of a retriever that can read no item."""
    return np.full((len(items), 5), np.nan, np.float32)


def nll_of_a_believer(pairs: list[tuple[Parts, str]]) -> list[tuple[float, int]]:
    """Return low nats for options that the prompt mentions."""
    scores = []
    for prompt, option in pairs:
        is_mentioned = any(option in part for part in prompt if isinstance(part, str))
        scores.append((0.5 if is_mentioned else 1.0, 1))
    return scores


def test_solved_questions_are_retrieved_but_never_the_question_s_own_image() -> None:
    task = builtin_rag.make_solved_question_task(
        make_stamps(10), make_stamps(15, first=5), num_questions=8, seed=0
    )
    assert len(task.items) == 8
    assert len(task.entries) == 15
    rows = zip(task.items, task.excluded_entries, task.positives, strict=True)
    for item, excluded, positives in rows:
        number = int(item.id[1:])
        assert excluded == ((number - 5,) if number >= 5 else ())
        answer = item.options[item.reference]
        assert answer == KINDS[number % 5]
        assert len(set(item.options)) == 4
        assert positives
        assert all(answer in str(task.entries[i].prompt_parts[0]) for i in positives)
    for entry in task.entries:
        assert all("Answer" not in str(view) for view in entry.search_views)


def test_retrieval_decides_the_accuracy_of_solved_questions(tmp_path: Path) -> None:
    task = builtin_rag.make_solved_question_task(
        make_stamps(10), make_stamps(15, first=5), num_questions=8, seed=0
    )
    functions = ModelFunctions(
        embed=embed, continuation_nll=nll_of_a_believer, retriever_embed=embed_nothing
    )
    score = runners.run_rag(task, PredictionStore(tmp_path, functions))
    means = {name: sample.mean for name, sample in score.samples.items()}
    assert means["none/accuracy"] == 0
    assert means["self/retrieval/R@1"] == means["self/accuracy"] == 100
    # A retriever that embeds nothing retrieves nothing.
    assert means["other/retrieval/R@1"] == means["other/accuracy"] == 0
    assert score.details["chance"] == 25
    assert score.details["facts"] == 15


def test_documents_have_one_sentence_per_thing() -> None:
    task = builtin_rag.make_document_task(
        [*make_stamps(10), *make_stamps(10)], num_questions=6, seed=1
    )
    assert len(task.entries) == 10
    assert len(task.items) == 6
    for item, (index,) in zip(task.items, task.positives, strict=True):
        thing = f"Thing {item.id[1:]}"
        answer = item.options[item.reference]
        assert task.entries[index].prompt_parts == (f"{thing}: one of the {answer}.",)
        assert item.prompt == (f"What kind of thing is this: {thing}?",)


def test_view_that_a_retriever_cannot_read_does_not_count(tmp_path: Path) -> None:
    """A sentence encoder gives NaN for the image view; the text view decides."""

    def embed_texts_only(items: list[Parts], query: bool) -> np.ndarray:
        is_text = isinstance(items[0][0], str)
        return embed(items, query) if is_text else embed_nothing(items, query)

    documents = builtin_rag.make_document_task(make_stamps(5), num_questions=5, seed=0)
    views = tuple(((tiny.random_image(i),), (KINDS[i],)) for i in range(5))
    entries = tuple(builtin_rag.KnowledgeEntry(str(i), view, ()) for i, view in enumerate(views))
    task = builtin_rag.RagTask(
        items=documents.items,
        query_views=views,
        entries=entries,
        build_prompt=documents.build_prompt,
        score=None,
        positives=tuple((i,) for i in range(5)),
    )
    functions = ModelFunctions(embed=embed_texts_only, continuation_nll=nll_of_a_believer)
    score = runners.run_rag(task, PredictionStore(tmp_path, functions))
    assert score.samples["self/retrieval/R@1"].mean == 100


def test_question_that_cannot_be_answered_freely_counts_as_missing(tmp_path: Path) -> None:
    def generate_except_for_thing_2(prompts: list[Parts], max_new_tokens: int) -> list[str]:
        if any("Thing 2" in str(prompt[-1]) for prompt in prompts):
            raise DataError("broken", fix="Replace it")
        return ["answer"] * len(prompts)

    documents = builtin_rag.make_document_task(make_stamps(5), num_questions=5, seed=0)
    items = tuple(replace(item, reference=["answer"]) for item in documents.items)
    task = replace(documents, items=items, score=score_captions)
    functions = ModelFunctions(embed=embed, generate=generate_except_for_thing_2)
    score = runners.run_rag(task, PredictionStore(tmp_path, functions))
    assert score.num_missing == 1
    assert score.samples["self/exact"].mean == score.samples["none/exact"].mean == 80


def test_nothing_to_retrieve_is_refused() -> None:
    with pytest.raises(DataError, match="an empty knowledge base"):
        builtin_rag.make_solved_question_task(make_stamps(5), [], num_questions=5, seed=0)


def test_one_kind_of_thing_is_refused() -> None:
    with pytest.raises(DataError, match="1 things of 1 kinds"):
        builtin_rag.make_document_task(make_stamps(1), num_questions=5, seed=0)
