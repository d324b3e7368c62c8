"""The built-in suite on small corpora of the project's own format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from vlduet.data.records import ImageRef, Parts
from vlduet.eval.benchmarks.builtin import load_captioned_images
from vlduet.eval.benchmarks.official_files import OfficialFiles
from vlduet.eval.benchmarks.registry import get_benchmark
from vlduet.eval.identities import prompt_text
from vlduet.eval.predictions import ModelFunctions
from vlduet.eval.run import evaluate


def load_task(name: str, data: Path, *, seed: int = 0) -> Any:
    return get_benchmark(name).load(OfficialFiles(data, seed=seed))


def test_next_image_query_shows_what_comes_before_and_excludes_it(data: Path) -> None:
    task = load_task("builtin_next_image", data)
    # Two corpora of two documents, with three distinct images each.
    assert len(task.queries) == 4
    assert len(task.documents) == 6
    assert [isinstance(part, ImageRef) for part in task.queries[0]] == [False, True, False]
    assert task.positives[0] == (1,)
    assert task.excluded_documents[0] == (0,)
    assert task.queries[1] == ("Third.",)  # its second image repeats the first one


def test_a_gallery_of_evenly_spaced_drawings_unites_equal_titles(data: Path) -> None:
    everything = load_captioned_images(OfficialFiles(data), corpora=["clipart"], max_records=600)
    assert [len(task) for task in (everything.queries, everything.documents)] == [4, 5]
    few = load_captioned_images(OfficialFiles(data), corpora=["clipart"], max_records=2)
    texts = [query[0] for query in few.queries if isinstance(query[0], str)]
    assert texts == ["Dog on leash.", "Red kettle."]


def test_minimal_pairs_differ_in_one_word_within_a_vendor(data: Path) -> None:
    emoji = load_task("builtin_pairs_emoji", data)
    assert [item.texts for item in emoji.items] == [("red heart", "blue heart")] * 2
    stamps = load_task("builtin_pairs_stamps", data)
    assert ("A red apple.", "A green apple.") in [item.texts for item in stamps.items]


def test_template_questions_take_their_answers_from_metadata(data: Path) -> None:
    task = load_task("builtin_vqa", data)
    races = [item for item in task.items if item.tags["kind"] == "wesnoth race"]
    assert [item.options[item.reference] for item in races] == ["elf", "orc", "elf"]
    other_task = load_task("builtin_vqa", data, seed=1)
    options = [item.options for item in task.items]
    assert [item.options for item in other_task.items] != options


def test_map_questions_have_distinct_options_of_the_same_map(data: Path) -> None:
    task = load_task("builtin_maps", data)
    items_by_kind: dict[str, list[Any]] = {}
    for item in task.items:
        items_by_kind.setdefault(item.tags["kind"], []).append(item)
        assert len(set(item.options)) == len(item.options) <= 4
    counts = {kind: len(items) for kind, items in items_by_kind.items()}
    assert counts == {"place": 5, "region": 5, "map": 2, "flag": 2, "capital": 2}
    region = items_by_kind["region"][0]
    question = "<image>\nWhich of the departments of Ruritania is shown in red?"
    assert prompt_text(region.prompt) == question
    assert set(region.options) == {"Ain", "Oise", "Var"}
    assert region.options[region.reference] == "Ain"
    # The flag of a region is not among the flags of countries.
    assert [item.id for item in items_by_kind["flag"]] == [
        "flag/flag/Ruritania",
        "flag/flag/Syldavia",
    ]


def test_map_questions_are_scored_with_and_without_images(data: Path, tmp_path: Path) -> None:
    def nll(pairs: list[tuple[Parts, str]]) -> list[tuple[float, int]]:
        """Prefer no option with an image, and the first letter of the alphabet without one."""
        scores = []
        for prompt, option in pairs:
            has_image = any(isinstance(part, ImageRef) for part in prompt)
            scores.append((1.0 if has_image else float(ord(option[0])), 1))
        return scores

    benchmark = get_benchmark("builtin_maps")
    scores = evaluate(
        benchmark,
        ModelFunctions(continuation_nll=nll),
        source=OfficialFiles(data),
        runs=tmp_path,
        provenance={"m": 1},
    )
    assert scores["values"]["accuracy"]["mean"] == 0.0  # all options are equal, and ties are wrong
    is_first = []
    for item in load_task("builtin_maps", data).items:
        first_letters = [option[0] for option in item.options]
        own = first_letters.pop(item.reference)
        is_first.append(all(own < letter for letter in first_letters))
    assert scores["values"]["accuracy_blind"]["mean"] == 100 * np.mean(is_first)
    assert scores["facts"]["chance"] > 25


def test_capitals_are_asked_by_image_and_answered_by_an_entry(data: Path) -> None:
    task = load_task("builtin_maps_rag", data)
    assert [item.tags["kind"] for item in task.items] == ["flag"] * 2 + ["region"] * 5
    # Five regions, two countries, and a sentence for the flag of a region of each country.
    assert len(task.entries) == 9
    for item, (index,) in zip(task.items, task.positives, strict=True):
        assert task.entries[index].prompt_parts[0].endswith(f" is {item.reference[0]}.")
        assert item.reference[0] not in prompt_text(item.prompt)
    prompt = prompt_text(task.build_prompt(task.items[0], task.entries[:1]))
    assert prompt.endswith(
        "\n<image>\nWhat is the capital of the country whose flag this is?"
        "\nAnswer with the name alone."
    )


def test_position_probe_asks_about_every_place_of_a_prompt(data: Path) -> None:
    task = load_task("builtin_position", data)
    assert task.without_images_too
    assert [item.reference for item in task.items] == list(range(6)) * 8
    for start in range(0, len(task.items), 6):
        context = task.items[start].prompt[:-2]
        assert len(set(task.items[start].options)) == 6
        for place, item in enumerate(task.items[start : start + 6]):
            assert item.prompt[:-2] == context
            assert item.tags == {"place": str(place + 1)}
            repeated = item.prompt[-2]
            captions = [context[n + 1] for n in range(0, 12, 2) if context[n] == repeated]
            assert captions == [f"This is: {item.options[place]}\n"]
