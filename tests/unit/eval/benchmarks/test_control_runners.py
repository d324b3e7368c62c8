"""Runners with controls: forms of queries, several sets of positives, chance, text-only, yes/no."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from vlduet.data.images import encode_png, from_pixels, load_image, to_pixels
from vlduet.data.records import ImageRef, Parts
from vlduet.eval.benchmarks.composites import SIDE, join_side_by_side, make_grey_image
from vlduet.eval.benchmarks.compositional import decide_winoground
from vlduet.eval.benchmarks.control_runners import (
    chance_of_hit,
    compute_pair_chance,
    compute_search_chance,
    remove_images,
    run_controlled_pairs,
    run_existence,
    run_search,
)
from vlduet.eval.benchmarks.scores import BenchmarkScore
from vlduet.eval.benchmarks.tasks import (
    ChoiceTask,
    PairItem,
    PairTask,
    Question,
    SearchTask,
    WeightedParts,
)
from vlduet.eval.predictions import ModelFunctions, PredictionStore

RED, BLUE = ImageRef(path=Path("red.png")), ImageRef(path=Path("blue.png"))


def single(*parts: str | ImageRef) -> WeightedParts:
    return ((1.0, parts),)


def make_store(folder: Path, vector_of: Mapping[Parts, Sequence[float]]) -> PredictionStore:
    """Return a store whose model gives contents these vectors, and all others (9, 9, ...)."""
    dim = len(next(iter(vector_of.values())))

    def embed(items: list[Parts], is_query: bool) -> np.ndarray:
        return np.array([vector_of.get(item, [9.0] * dim) for item in items], dtype=np.float32)

    return PredictionStore(folder, ModelFunctions(embed=embed))


def means(score: BenchmarkScore) -> dict[str, float]:
    return {name: sample.mean for name, sample in score.samples.items()}


# ------------------------------------------------------------------ search


def test_forms_of_a_query_are_compared_query_by_query(tmp_path: Path) -> None:
    vectors = {("a",): (1.0, 0.0), ("b",): (0.0, 1.0), (RED,): (1.0, 0.1), (BLUE,): (0.1, 1.0)}
    task = SearchTask(
        {"all": (single("a"), single("b")), "part": (single("b"), single("b"))},
        (single(RED), single(BLUE)),
        (((0,),), ((1,),)),
        k=1,
        tags=("x", "y"),
    )
    numbers = means(run_search(task, make_store(tmp_path, vectors)))
    assert next(iter(numbers)) == "R@1"
    assert numbers == {
        "R@1": 100.0,
        "text_only/R@1": 0.0,  # no query has an image, so the gallery is grey and all tie
        "x/R@1": 100.0,
        "y/R@1": 100.0,
        "part/R@1": 50.0,
        "gain over part": 50.0,
    }


def test_a_weighted_sum_of_contents_is_searched_with(tmp_path: Path) -> None:
    vectors = {
        (RED,): (2.0, 0.0, 0.0),  # scaled to unit length before the sum
        ("up",): (0.0, 3.0, 0.0),
        ("down",): (0.0, 0.0, 1.0),
        (BLUE,): (1.0, 1.0, -1.0),
        ("other",): (1.0, 1.0, 1.0),
    }
    query: WeightedParts = ((1.0, (RED,)), (1.0, ("up",)), (-1.0, ("down",)))
    documents = (single(BLUE), single("other"))
    task = SearchTask({"A + B - C": (query,)}, documents, (((0,),),), k=1)
    score = run_search(task, make_store(tmp_path, vectors))
    assert score.samples["R@1"].mean == 100.0 and score.details["ties"] == 0
    assert score.details["gallery"] == 2 and score.num_missing == 0


def test_every_set_of_positives_needs_a_hit(tmp_path: Path) -> None:
    vectors = {("q",): (1.0, 0.0), ("a",): (1.0, 0.0), ("b",): (1.0, 0.5), ("c",): (0.0, 1.0)}
    documents = (single("a"), single("b"), single("c"))
    near = SearchTask({"f": (single("q"),)}, documents, (((0,), (1,)),), k=2)
    far = SearchTask({"f": (single("q"),)}, documents, (((0,), (2,)),), k=2)
    assert run_search(near, make_store(tmp_path / "1", vectors)).samples["R@2"].mean == 100.0
    assert run_search(far, make_store(tmp_path / "2", vectors)).samples["R@2"].mean == 0.0


def test_a_constant_embedder_hits_nothing(tmp_path: Path) -> None:
    task = SearchTask(
        {"f": (single(RED), single("a"))},
        tuple(single(text) for text in "abcd"),
        (((0,),), ((1,),)),
        ((2,), ()),
        k=2,
    )
    score = run_search(task, make_store(tmp_path, {("a",): (9.0, 9.0)}))
    assert means(score) == {"R@2": 0.0, "text_only/R@2": 0.0}
    assert score.details["ties"] == 2 and score.details["gallery"] == 3


def test_an_excluded_document_is_never_in_front(tmp_path: Path) -> None:
    vectors = {("q",): (1.0, 0.0), ("a",): (1.0, 0.0), ("b",): (1.0, 1.0), ("c",): (0.0, 1.0)}
    documents = tuple(single(text) for text in "abc")
    task = SearchTask({"f": (single("q"),)}, documents, (((1,),),), ((0,),), k=1)
    score = run_search(task, make_store(tmp_path, vectors))
    assert score.samples["R@1"].mean == 100.0
    assert score.details["chance"] == {"R@1": 50.0}


def test_text_only_queries_keep_their_texts_or_become_grey() -> None:
    grey = make_grey_image()
    queries = (single(RED, "a"), ((1.0, (RED,)), (-1.0, ("b",))))
    documents = (single(BLUE),)
    assert remove_images(queries, documents) == (
        (single("a"), ((1.0, (grey,)), (-1.0, ("b",)))),
        documents,
    )
    assert remove_images((single("a"),), documents) == ((single("a"),), (single(grey),))


@pytest.mark.parametrize("sizes", [[1], [2], [1, 1], [2, 3], [1, 2, 1]])
@pytest.mark.parametrize("k", [1, 2, 4, 9])
def test_chance_equals_the_share_of_all_subsets(sizes: list[int], k: int) -> None:
    sets = []
    for size in sizes:
        begin = sum(map(len, sets))
        sets.append(set(range(begin, begin + size)))
    subsets = [set(subset) for subset in itertools.combinations(range(7), min(k, 7))]
    hits = []
    for subset in subsets:
        hits.append(all(subset & members for members in sets))
    share = np.mean(hits)
    assert chance_of_hit(7, sizes, k) == pytest.approx(share)


def test_chance_of_a_task_is_the_mean_over_its_galleries() -> None:
    documents = tuple(single(text) for text in "abcd")
    queries = {"f": (single("q"), single("q"))}
    task = SearchTask(queries, documents, (((0,),), ((1, 2),)), ((1, 2), ()), k=1)
    assert compute_search_chance(task) == pytest.approx((1 / 2 + 2 / 4) / 2)


# ------------------------------------------------------------------ pairs


def test_pairs_have_a_chance_and_a_grey_control(tmp_path: Path) -> None:
    vectors = {("red",): (1.0, 0.0), ("blue",): (0.0, 1.0), (RED,): (1.0, 0.2), (BLUE,): (0.2, 1.0)}
    task = PairTask((PairItem("1", ("red", "blue"), (RED, BLUE)),), decide_winoground)
    score = run_controlled_pairs(task, make_store(tmp_path, vectors))
    assert list(score.samples)[:2] == ["text", "text_only/text"]
    assert score.samples["text"].mean == 100.0
    assert score.samples["text_only/text"].mean == 0.0  # a grey image cannot prefer both captions
    assert score.details["chance"] == {"text": 25.0}


def test_the_chance_of_the_group_score_is_a_sixth() -> None:
    task = PairTask((PairItem("1", ("a", "b"), (RED, BLUE)),), decide_winoground)
    assert compute_pair_chance(task, name="group") == pytest.approx(1 / 6)


# ------------------------------------------------------------------ existence


def make_existence_task(kinds: Sequence[str]) -> ChoiceTask:
    """Return a pair of questions per kind, in turns about what is there first and last."""
    items = []
    for n, kind in enumerate(kinds):
        answers = ("there", "absent") if n % 2 == 0 else ("absent", "there")
        for answer in answers:
            prompt = (RED, f"{answer} {n}")
            reference = 0 if answer == "there" else 1
            items.append(
                Question(f"{n}/{answer}", prompt, reference, {"kind": kind}, ("Yes", "No"))
            )
    return ChoiceTask(tuple(items), "kind", without_images_too=True)


def run_yes_no(folder: Path, kinds: Sequence[str], nats: Mapping[str, float]) -> BenchmarkScore:
    """Return the score of a model that gives Yes these nats by the first word, and No 1 nat.

    Without an image, both have 1 nat.
    """

    def nll(pairs: list[tuple[Parts, str]]) -> list[tuple[float, int]]:
        losses = []
        for prompt, option in pairs:
            is_yes_with_image = option == "Yes" and isinstance(prompt[0], ImageRef)
            word = str(prompt[-1]).split()[0]
            losses.append((nats[word] if is_yes_with_image else 1.0, 1))
        return losses

    store = PredictionStore(folder, ModelFunctions(continuation_nll=nll))
    return run_existence(make_existence_task(kinds), store)


def test_a_model_that_knows_scores_100_and_its_control_nothing(tmp_path: Path) -> None:
    score = run_yes_no(tmp_path, ["random", "near", "near"], {"there": 0.5, "absent": 2.0})
    numbers = means(score)
    assert next(iter(numbers)) == "F1"
    assert numbers["F1"] == numbers["ranked"] == numbers["ranked/near"] == 100.0
    assert numbers["yes/random"] == 50.0
    # Equal likelihoods give the wrong answer to all questions.
    assert numbers["text_only/F1"] == numbers["text_only/ranked"] == 0.0


def test_a_leaning_to_yes_changes_f1_and_not_the_ranking(tmp_path: Path) -> None:
    score = run_yes_no(tmp_path, ["random", "near"], {"there": 0.1, "absent": 0.2})
    numbers = means(score)
    assert numbers["F1"] == pytest.approx(200 / 3) == pytest.approx(score.details["always_yes"])
    assert numbers["yes/near"] == 100.0 and numbers["ranked"] == 100.0


def test_chance_of_existence_is_that_of_coins(tmp_path: Path) -> None:
    score = run_yes_no(tmp_path, ["random"] * 40, {"there": 1.0, "absent": 1.0})
    assert score.details["chance"]["F1"] == pytest.approx(50, abs=1)
    assert score.samples["F1"].mean == 0.0


# ------------------------------------------------------------------ images


def test_two_images_stand_side_by_side_on_white() -> None:
    tall = ImageRef(data=encode_png(from_pixels(np.full((400, 100, 3), 7, dtype=np.uint8))))
    small = ImageRef(data=encode_png(from_pixels(np.full((10, 20, 3), 50, dtype=np.uint8))))
    pixels = to_pixels(load_image(join_side_by_side(tall, small)))
    assert pixels.shape == (SIDE, 2 * SIDE, 3)
    columns = np.flatnonzero((pixels[:, :SIDE, 0] < 30).any(0))
    assert (columns[0], columns[-1] + 1) == (SIDE // 2 - SIDE // 8, SIDE // 2 + SIDE // 8)
    assert int((pixels[:, SIDE:, 0] == 50).sum()) == 200
    assert (pixels[0, -1] == 255).all()
