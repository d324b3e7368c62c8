"""Loaders read official files into tasks: galleries, correct answers and exclusions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers import official
from vlduet.data.records import ImageRef
from vlduet.eval.benchmarks.official_files import OfficialFiles
from vlduet.eval.benchmarks.registry import get_benchmark
from vlduet.eval.benchmarks.tasks import PairTask, RetrievalTask


def load_retrieval_task(name: str, data: Path) -> RetrievalTask:
    task = get_benchmark(name).load(OfficialFiles(data))
    assert isinstance(task, RetrievalTask)
    return task


def test_coco_uses_five_all_or_distinct_captions(data: Path) -> None:
    names = ("coco", "coco_all", "coco_unique")
    five, all_captions, distinct = (load_retrieval_task(name, data) for name in names)
    assert [len(task.queries) for task in (five, all_captions, distinct)] == [20, 24, 23]
    assert len(five.documents) == len(distinct.documents) == 4
    assert five.positives[5] == (1,)
    assert distinct.positives[0] == (0, 1)  # "A flower." is on both


def test_nocaps_uses_ten_five_or_one_caption(data: Path) -> None:
    names = ("nocaps", "nocaps_first5", "nocaps_first1")
    assert [len(load_retrieval_task(name, data).queries) for name in names] == [30, 15, 3]


def test_vist_leaves_out_incomplete_stories_but_keeps_their_images(data: Path) -> None:
    task = load_retrieval_task("vist_1c", data)
    assert task.details == {"stories": 2, "stories_without_an_image": 1}
    assert len(task.documents) == 13
    assert task.queries[0] == ("story 0 sentence 4 .",)


def test_vist_query_alternates_captions_and_images_and_can_exclude_them(data: Path) -> None:
    task = load_retrieval_task("vist_5c4i", data)
    is_image = [isinstance(part, ImageRef) for part in task.queries[0]]
    assert is_image == [False, True] * 4 + [False]
    assert not task.excluded_documents
    unseen = load_retrieval_task("vist_5c4i_unseen", data)
    assert len(unseen.excluded_documents[0]) == 4
    assert unseen.positives[0][0] not in unseen.excluded_documents[0]


def test_imagenet_classes_are_named_by_one_or_eighty_templates(data: Path) -> None:
    plain = load_retrieval_task("imagenet", data)
    assert plain.documents[2] == ("a photo of a great white shark",)
    assert plain.positives == ((0,), (0,), (1,), (1,), (2,), (2,))
    ensemble = load_retrieval_task("imagenet_80", data)
    assert len(ensemble.documents) == 240
    assert ensemble.documents_per_class == 80
    assert ("a bad photo of a tench.",) in ensemble.documents[:80]


def test_winoground_is_read_from_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    row = {"id": [0], "caption_0": ["a b"], "caption_1": ["b a"], "collapsed_tag": ["Object"]}
    row |= {f"image_{i}": [{"bytes": official.random_png(i), "path": None}] for i in (0, 1)}
    (tmp_path / "winoground").mkdir()
    pyarrow.parquet.write_table(pa.table(row), tmp_path / "winoground/test-00000.parquet")
    files = OfficialFiles(tmp_path)
    task = get_benchmark("winoground").load(files)
    assert isinstance(task, PairTask)
    assert task.items[0].images[1].data == official.random_png(1)
    assert list(files.hashes) == ["winoground/test-00000.parquet"]


def test_rag_excludes_the_question_s_own_image(data: Path) -> None:
    task: Any = get_benchmark("vizwiz_rag").load(OfficialFiles(data))
    assert task.excluded_entries == ((0,), ())
    shown_text = "Question: What is this? and what color is it? Answer: Blue."
    assert task.entries[0].prompt_parts == (shown_text,)
