"""The protocol of the claims, its corpora by rule, and the published page."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest

from helpers import tiny
from helpers.claims import CLAIMS_FOLDER, claims
from vlduet.data.formats import read_jsonl
from vlduet.data.images import load_image
from vlduet.data.records import ImageRef

ROOT = CLAIMS_FOLDER.parents[1]
PROTOCOL = claims.protocol.load_protocol()
PATHS = claims.protocol.StudyPaths(*map(Path, ("data", "model", "minilm", "work", "results")))


def test_thirteen_claims_have_statement_paper_and_comparisons() -> None:
    assert [claim.id for claim in PROTOCOL.claims] == list(range(1, 14))
    assert len(PROTOCOL.seeds) >= 5


def test_all_runs_fit_into_the_time_of_the_protocol() -> None:
    total = sum(row.minutes * len(PROTOCOL.get_seeds(row)) for row in PROTOCOL.rows.values())
    assert total <= PROTOCOL.core_minutes


@pytest.mark.parametrize("name", PROTOCOL.rows)
def test_the_settings_of_every_row_are_valid(name: str) -> None:
    run = claims.rows.RowRun(name, PROTOCOL.rows[name], 0, PATHS)
    settings = claims.rows.describe_settings(PROTOCOL, run)
    assert settings["config"]["train"]["steps"] == PROTOCOL.get_steps(run.row)
    assert set(PROTOCOL.get_measures(run.row)) <= claims.measures.MEASURES.keys()


def test_rows_that_are_compared_with_each_other_train_equally_long() -> None:
    steps = set()
    for row in PROTOCOL.rows.values():
        is_dual_encoder = "recipe={name: clip}" in row.overrides
        if row.kind == "trained" and not is_dual_encoder:
            steps.add((row.track, PROTOCOL.get_steps(row)))
    assert len(steps) == len(PROTOCOL.tracks)


def test_every_result_has_the_numbers_that_are_compared() -> None:
    folder = ROOT / "docs" / "results" / "claims"
    results = claims.analysis.read_results(PROTOCOL, folder)
    for claim in PROTOCOL.claims:
        for comparison in claim.comparisons:
            for _, row, number in comparison.signed_terms:
                groups = set(PROTOCOL.get_measures(PROTOCOL.rows[row]))
                for seed, result in results[row].items():
                    if groups <= set(result.measures):
                        assert number in result.numbers, (claim.id, row, seed, number)


def test_the_page_is_the_one_that_the_results_give() -> None:
    folder = ROOT / "docs" / "results"
    results = claims.analysis.read_results(PROTOCOL, folder / "claims")
    pilots = claims.report.read_pilots(PROTOCOL, folder / "claims")
    page = claims.report.format_page(PROTOCOL, results, pilots)
    published = (folder / "claims.md").read_text(encoding="utf-8")
    number = re.compile(r"(?<![\w.])[+-]?\d+\.\d\d\b")
    assert number.sub("#", published) == number.sub("#", page)
    # Another processor may round the last digit otherwise.
    values, published_values = (
        [float(text) for text in number.findall(content)] for content in (page, published)
    )
    assert values == pytest.approx(published_values, abs=0.0101)


# --------------------------------------------------------------------- corpora by rule

ANIMALS = ("frog", "horse", "cat", "dog", "owl", "bee", "cow", "hen", "fox", "pig", "elk", "ape")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with stamps and campaigns."""
    folder = tmp_path_factory.mktemp("data")
    for split, prefix in (("train", ""), ("test", "young ")):
        rows = [{"id": "no", "image": "0.png", "short": "Two red frogs and a cat in a house."}]
        for index, name in enumerate(ANIMALS):
            article = "An" if not prefix and name[0] in "aeo" else "A"
            rows.append(
                {"id": name, "image": f"{index}.png", "short": f"{article} {prefix}{name}."}
            )
        write_rows(folder / "stamps", split, rows)
    parts = [{"text": f"Sentence {index}."} for index in range(5)]
    parts.insert(2, {"image": "3.png"})
    write_rows(folder / "campaigns", "train", [{"id": "story", "parts": parts}])
    return folder


def write_rows(folder: Path, split: str, rows: list[dict[str, object]]) -> None:
    """Write records, and twelve random images beside them."""
    folder.mkdir(exist_ok=True)
    for index in range(len(ANIMALS)):
        (folder / f"{index}.png").write_bytes(tiny.random_image(index).data or b"")
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"{split}.jsonl").write_text(text)


@pytest.fixture(scope="module")
def built(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the corpora that were built from `data`."""
    folder = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, counts in (("SCENES_PER_SPLIT", 9), ("SETS_PER_SPLIT", 4)):
            monkeypatch.setattr(claims.corpora, name, {"train": counts, "test": counts})
        claims.corpora.build_corpora(data, folder)
        before = (folder / "scenes" / "train.jsonl").stat().st_mtime_ns
        claims.corpora.build_corpora(data, folder)  # complete: nothing is written
        assert (folder / "scenes" / "train.jsonl").stat().st_mtime_ns == before
    return folder


def test_training_scenes_show_training_stamps_alone(built: Path) -> None:
    records = list(read_jsonl(built / "scenes" / "train.jsonl"))
    assert len(records) == 9
    for record in records:
        assert len(record.short) == 2
        assert record.long is not None
        assert "young" not in record.long
        assert load_image(record.image).size == (224, 224)  # type: ignore[arg-type]


def test_every_edit_of_a_test_scene_is_wrong_in_its_own_way(data: Path) -> None:
    corpora = claims.corpora
    stamps = corpora.read_named_stamps(data / "stamps", "test")
    assert len(stamps) == len(ANIMALS)
    scenes = corpora.draw_scenes(stamps, count=40, seed=1)
    edits = corpora.list_caption_edits(scenes, stamps)
    for kind, triples in edits.items():
        assert [index for index, _, _ in triples] == list(range(40)), kind
        for index, right, wrong in triples:
            words = sorted(right.lower().replace(".", "").split())
            wrong_words = sorted(wrong.lower().replace(".", "").split())
            stamp_names = {scenes[index].left.stamp.name, scenes[index].right.stamp.name}
            assert right != wrong
            if kind.startswith("swapped"):
                assert wrong_words == words
            else:
                assert set(wrong_words) - set(words)
            if kind == "replaced grounds":
                assert set(wrong_words) - set(words) <= corpora.GROUNDS.keys()
            elif kind == "replaced things":
                assert sum(name in wrong.lower() for name in stamp_names) == 1
            elif kind == "added things":
                assert wrong.startswith(right.rstrip("."))


def test_captions_say_what_the_scene_shows(data: Path) -> None:
    corpora = claims.corpora
    frog, horse = corpora.read_named_stamps(data / "stamps", "train")[:2]
    halves = (corpora.SceneHalf(frog, "red"), corpora.SceneHalf(horse, "blue"))
    scene = corpora.Scene(*halves, mentions_right_first=True)
    assert corpora.describe_places(scene) == "A horse on the right and a frog on the left."
    assert corpora.describe_grounds(scene) == "A horse on blue and a frog on red."
    assert corpora.describe_scene(scene).endswith(
        "a horse on a blue ground is on the right and a frog on a red ground is on the left."
    )
    pixels = corpora.draw_scene_image(scene)
    assert pixels.getpixel((1, 1)) == corpora.GROUNDS["red"]
    assert pixels.getpixel((222, 1)) == corpora.GROUNDS["blue"]


def test_sequences_of_a_set_are_different_orders_of_the_same_stamps(data: Path) -> None:
    corpora = claims.corpora
    stamps = corpora.read_named_stamps(data / "stamps", "test")
    sequences = corpora.draw_sequences(stamps, num_sets=3, num_orders=6, seed=2)
    for index, group in itertools.groupby(sequences, key=lambda sequence: sequence.set_index):
        members = list(group)
        names = [sequence.stamps for sequence in members]
        assert len(set(names)) == 6, index
        assert len({frozenset(order) for order in names}) == 1
    parts = corpora.make_sequence_parts(sequences[0], "mixed")
    assert [isinstance(part, ImageRef) for part in parts] == [True, False, True, False]
    parts = corpora.make_sequence_parts(sequences[0], "named end")
    assert [isinstance(part, ImageRef) for part in parts] == [True, True, True, False]


def test_training_stories_are_orders_of_the_same_parts(built: Path) -> None:
    records = list(read_jsonl(built / "stories" / "train.jsonl"))
    orders = [record.parts for record in records]
    assert len(set(orders)) == claims.corpora.ORDERS_PER_STORY
    assert len(set(map(frozenset, orders))) == 1
    sequences = list(read_jsonl(built / "sequences" / "train.jsonl"))
    assert len(sequences) == 4 * 8 * 3
    assert sum(not record.images() for record in sequences) == 32
    assert all(any(isinstance(part, str) for part in record.parts) for record in sequences)
