"""The suite of abilities on small corpora: rules of selection, and what is never a wrong answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlduet.data.images import encode_png, from_pixels, image_key
from vlduet.data.records import ImageRef, Parts, Record
from vlduet.data.tools.instructions import find_named_images, format_existence_question
from vlduet.errors import DataError
from vlduet.eval.benchmarks import abilities
from vlduet.eval.benchmarks.abilities import (
    MAX_PREFIX_PARTS,
    MAX_PREFIX_WORDS,
    find_new_images,
    kinds_of,
    name_of,
    normalize_name,
    read_definitions,
    shorten_prefix,
)
from vlduet.eval.benchmarks.abilities_questions import (
    ORDINALS,
    YES_NO,
    make_existence_questions,
)
from vlduet.eval.benchmarks.official_files import OfficialFiles
from vlduet.eval.benchmarks.registry import BENCHMARKS, SUITES
from vlduet.eval.benchmarks.tasks import SearchTask
from vlduet.eval.predictions import ModelFunctions
from vlduet.eval.run import evaluate


def load_task(name: str, data: Path, *, seed: int = 0) -> Any:
    return BENCHMARKS[f"ability_{name}"].load(OfficialFiles(data, seed=seed))


def make_image(shade: int) -> ImageRef:
    pixels = np.full((8, 8, 3), shade, dtype=np.uint8)
    return ImageRef(data=encode_png(from_pixels(pixels)))


SEARCHES = [row.name for row in SUITES["abilities"] if row.protocol == "search"]


def test_every_ability_says_what_it_asks() -> None:
    for benchmark in SUITES["abilities"]:
        assert benchmark.question.endswith("?") and benchmark.name.startswith("ability_")
        assert all(file.endswith("/test.jsonl") for file in benchmark.files)
    assert len(SUITES["abilities"]) == 11


@pytest.mark.parametrize("name", SEARCHES)
def test_no_right_answer_is_excluded_or_in_two_sets(name: str, data: Path) -> None:
    task = BENCHMARKS[name].load(OfficialFiles(data))
    assert isinstance(task, SearchTask)
    assert all(len(queries) == len(task.positives) for queries in task.queries.values())
    assert not task.tags or len(task.tags) == len(task.positives)
    excluded = task.excluded_documents or ((),) * len(task.positives)
    for sets, left_out in zip(task.positives, excluded, strict=True):
        positives = [i for members in sets for i in members]
        assert positives and len(set(positives)) == len(positives)
        assert set(positives).isdisjoint(left_out)
        assert max(positives) < len(task.documents)


@pytest.mark.parametrize("name", [row.name for row in SUITES["abilities"]])
def test_the_same_seed_gives_the_same_items(name: str, data: Path) -> None:
    first = BENCHMARKS[name].load(OfficialFiles(data, seed=3))
    assert BENCHMARKS[name].load(OfficialFiles(data, seed=3)) == first


def perfect_embedder(task: SearchTask) -> Callable[[list[Parts], bool], np.ndarray]:
    """Return a model that gives a query the mean direction of its right documents.

    Every document has a direction of its own; the form that is reported decides.
    """
    size = len(task.documents)
    vector_of: dict[Parts, np.ndarray] = {}
    for n, document in enumerate(task.documents):
        for _, parts in document:
            vector_of[parts] = np.eye(size, dtype=np.float32)[n]
    queries = next(iter(task.queries.values()))
    query_vector_of: dict[Parts, np.ndarray] = {}
    for query, sets in zip(queries, task.positives, strict=True):
        target = sum(np.eye(size, dtype=np.float32)[list(members)].sum(0) for members in sets)
        query_vector_of[query[0][1]] = np.asarray(target)

    def embed(items: list[Parts], is_query: bool) -> np.ndarray:
        vectors = query_vector_of if is_query else vector_of
        return np.stack([vectors.get(item, np.zeros(size, dtype=np.float32)) for item in items])

    return embed


@pytest.mark.parametrize("name", ["knowledge", "fine_grained", "places", "classification"])
def test_a_perfect_embedder_scores_100(name: str, data: Path, tmp_path: Path) -> None:
    benchmark = BENCHMARKS[f"ability_{name}"]
    task = load_task(name, data)
    scores = evaluate(
        benchmark,
        ModelFunctions(embed=perfect_embedder(task)),
        source=OfficialFiles(data),
        runs=tmp_path,
        provenance={"model": "perfect"},
    )
    number, value = next(iter(scores["values"].items()))
    assert value["mean"] == 100.0 and value["n"] == len(task.positives)
    assert 0 < scores["facts"]["chance"][number] <= 100
    if number == "R@1":  # the small galleries of the others fit into ten
        assert scores["values"][f"text_only/{number}"]["mean"] < 100


# ------------------------------------------------------------------ searches


def test_definitions_do_not_contain_the_name() -> None:
    definitions = read_definitions()
    assert len(definitions) > 40
    for name, definition in definitions.items():
        assert name == normalize_name(name)
        assert set(name.split()).isdisjoint(normalize_name(definition).split()), name


def test_knowledge_asks_for_definitions_and_for_capitals_of_countries(data: Path) -> None:
    task = load_task("knowledge", data)
    assert dict.fromkeys(task.tags) == {"definition": None, "capital": None}
    texts = [query[0][1][0] for query in task.queries["query"]]
    assert read_definitions()["house"] in texts
    # The flag of the region Ain has the capital of its country here, but is none of a country.
    assert texts[-2:] == [
        "The flag of the country whose capital is Ruritania City.",
        "The flag of the country whose capital is Syldavia City.",
    ]
    assert len(task.documents) - len(task.excluded_documents[-1]) == 2
    assert len(task.excluded_documents[0]) == 2  # flags are no pictures of things


def test_fine_grained_galleries_are_the_names_of_one_category(data: Path) -> None:
    task = load_task("fine_grained", data)
    captions = [document[0][1][0] for document in task.documents]
    for excluded in task.excluded_documents:
        names = {captions[i] for i in range(len(captions)) if i not in excluded}
        assert names in (
            {"A red apple.", "A boat.", "A dog.", "A house."},
            {"A green apple.", "A cat.", "A tree.", "A boat."},
        )


def test_composed_queries_search_the_other_vendor(data: Path) -> None:
    task = load_task("composition", data)
    gallery = [Path(document[0][1][0].name).name for document in task.documents]
    assert all(name.startswith("twemoji") for name in gallery)
    for together, summed, sets in zip(
        task.queries["together"], task.queries["sum"], task.positives, strict=True
    ):
        image, text = together[0][1]
        assert Path(image.name).name.startswith("openmoji") and isinstance(text, str)
        assert summed == ((1.0, (image,)), (1.0, (text,)))
        assert len(sets) == 2 and set(sets[0]).isdisjoint(sets[1])


def test_arithmetic_adds_the_other_word_and_removes_the_own(data: Path) -> None:
    task = load_task("arithmetic", data)
    query = task.queries["A + B - C"][0]
    assert [(weight, parts[0]) for weight, parts in query[1:]] == [(1.0, "blue"), (-1.0, "red")]
    assert task.queries["A"][0] == (query[0],)
    image = query[0][1][0]
    target = task.documents[task.positives[0][0][0]][0][1][0]
    assert (Path(image.name).name, Path(target.name).name) == ("openmoji0.png", "openmoji1.png")
    left_out = {Path(task.documents[i][0][1][0].name).name for i in task.excluded_documents[0]}
    assert "openmoji0.png" in left_out and "twemoji1.png" in left_out
    assert len(task.documents) - len(left_out) == 4


def test_turns_of_a_dialog_become_narrower(data: Path) -> None:
    task = load_task("dialog", data)
    forms = {form: queries[0] for form, queries in task.queries.items()}
    assert forms["all turns"] == ((1.0, ("a", "x", "A red apple.")),)
    assert forms["turns 1 and 2"] == ((1.0, ("a", "x")),)
    assert forms["last turn alone"] == ((1.0, ("A red apple.",)),)
    stamps = {"group": "Animals & Nature", "subgroup": "animal-marine"}
    assert kinds_of(Record("1", metadata=stamps)) == ("animals & nature", "animal marine")
    folders = {"category": "food/fruit/cartoon"}
    assert kinds_of(Record("1", metadata=folders)) == ("food", "fruit cartoon")
    assert kinds_of(Record("1", metadata={"category": "space"})) == ("space", "")


def test_a_place_is_the_number_of_new_images(data: Path) -> None:
    task = load_task("places", data)
    assert task.tags == ("image 1", "image 2", "image 1") * 2
    assert task.queries["prefix"][0] == ((1.0, ("First.",)),)
    assert [len(excluded) for excluded in task.excluded_documents[:3]] == [0, 1, 0]
    images = [make_image(shade) for shade in (1, 2)]
    parts = ("a", images[0], images[0], "b", images[1])
    keys = {image: image_key(image) for image in images}
    assert find_new_images(parts, keys) == [(1, ()), (4, (keys[images[0]],))]


def test_a_prefix_is_shortened_from_its_beginning() -> None:
    image = make_image(0)
    words = " ".join(str(n) for n in range(MAX_PREFIX_WORDS + 3))
    parts = ("dropped", *("x" for _ in range(MAX_PREFIX_PARTS - 2)), image, words)
    prefix = shorten_prefix(parts)
    assert len(prefix) == MAX_PREFIX_PARTS and prefix[-2] == image
    assert prefix[-1].split()[0] == "3" and "dropped" not in prefix


def test_labels_of_classification_are_those_of_the_own_corpus(data: Path) -> None:
    task = load_task("classification", data)
    labels = [document[0][1][0] for document in task.documents]
    assert labels == ["a", "b", "country-flag", "face", "heart"]
    for tag, sets, excluded in zip(task.tags, task.positives, task.excluded_documents, strict=True):
        assert set(excluded) == ({2, 3, 4} if tag == "stamps" else {0, 1})
        assert len(sets) == len(sets[0]) == 1
    assert sum(weight for weight, _ in task.documents[0]) == pytest.approx(1)


def test_no_usable_records_are_an_error(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(abilities, "MIN_NEIGHBOURS", 50)
    with pytest.raises(DataError, match="no categories of 50 names"):
        load_task("fine_grained", data)


# ------------------------------------------------------------------ questions


def make_named_records(captions: dict[str, str]) -> list[Record]:
    """Return records with these captions, whose folders are the values."""
    records = []
    for n, (caption, folder) in enumerate(captions.items()):
        metadata = {"category": folder}
        records.append(Record(str(n), image=make_image(n), short=(caption,), metadata=metadata))
    return records


def test_only_short_names_with_an_article_get_questions() -> None:
    captions = {
        "A brown hen.": "a",
        "An elf's hat.": "a",
        "Half note.": "a",
        "A camera.  Say Cheese!": "a",
        "A peacock (a male peafowl).": "a",
        "A very big and old red house.": "a",
        "The full moon.": "a",
    }
    named_objects = find_named_images(make_named_records(captions), group_key="category")
    assert [named.name for named in named_objects] == ["a brown hen", "an elf's hat"]


@pytest.mark.parametrize("seed", range(5))
def test_an_absent_object_shares_no_word_with_the_image(seed: int) -> None:
    colours = ("red", "green", "blue", "old")
    captions = {}
    for n, noun in enumerate(("hat", "boat", "cat", "dog", "tree", "cup")):
        for colour in colours[: 2 + n % 3]:
            captions[f"A {colour} {noun}."] = f"folder{n % 3}"
    named_objects = find_named_images(make_named_records(captions), group_key="category")
    items = make_existence_questions(named_objects, seed=seed)
    folder_of = {format_existence_question(t.name): t.group for t in named_objects}
    tokens_of = {format_existence_question(t.name): t.tokens for t in named_objects}
    by_image: dict[ImageRef, set[str]] = {}
    for item in items:
        if item.reference == 0:
            by_image.setdefault(item.prompt[0], set()).update(tokens_of[item.prompt[1]])
    pairs = list(zip(items[::2], items[1::2], strict=True))
    assert pairs
    for present, absent in pairs:
        assert (present.reference, absent.reference) == (0, 1)
        assert present.prompt[0] == absent.prompt[0] and present.options == YES_NO
        assert present.tags == absent.tags
        assert tokens_of[absent.prompt[1]].isdisjoint(by_image[absent.prompt[0]])
        if absent.tags["kind"] == "near":
            assert folder_of[absent.prompt[1]] == folder_of[present.prompt[1]]


def test_existence_asks_about_both_sides(data: Path) -> None:
    task = load_task("existence", data)
    question_sets: dict[ImageRef, set[str]] = {}
    for item in task.items:
        if item.reference == 0:
            question_sets.setdefault(item.prompt[0], set()).add(item.prompt[1])
    assert max(map(len, question_sets.values())) == 2


def test_the_odd_one_is_of_another_kind(data: Path) -> None:
    task = load_task("odd_one", data)
    kind_of = {f"{n}.png": "ab"[n % 2] for n in range(8)}
    for item in task.items:
        images = [Path(p.name).name for p in item.prompt if isinstance(p, ImageRef)]
        kinds = [kind_of[name] for name in images]
        odd_kind = kinds.pop(item.reference)
        assert len(set(kinds)) == 1 and odd_kind not in kinds and len(set(images)) == 4
        assert item.options == tuple(f"The {ordinal} picture" for ordinal in ORDINALS)


def test_a_change_has_its_reverse_and_another_pair_as_options(tmp_path: Path) -> None:
    captions = ["blue heart", "green heart", "man guard", "woman guard"]
    write_emoji_of(tmp_path, captions)
    task = load_task("change", tmp_path)
    assert len(task.items) == 2
    names = ["blue", "green", "man", "woman"]
    for item in task.items:
        images = [part for part in item.prompt if isinstance(part, ImageRef)]
        first, second = (names[int(Path(image.name).stem)] for image in images)
        assert item.options[item.reference] == f"From {first} to {second}"
        assert f"From {second} to {first}" in item.options
        assert len(set(item.options)) == 4


def write_emoji_of(root: Path, captions: list[str]) -> None:
    """Write the test split of emoji of one vendor, two of each subgroup."""
    folder = root / "corpora/emoji"
    folder.mkdir(parents=True)
    lines = []
    for n, caption in enumerate(captions):
        (folder / f"{n}.png").write_bytes(make_image(n).data or b"")
        metadata = {"vendor": "x", "subgroup": str(n // 2)}
        row = {"id": str(n), "image": f"{n}.png", "short": caption, "metadata": metadata}
        lines.append(json.dumps(row) + "\n")
    (folder / "test.jsonl").write_text("".join(lines))


def test_names_are_compared_without_articles_and_case() -> None:
    assert name_of(Record("1", short=("A  Red Apple!",))) == "red apple"
