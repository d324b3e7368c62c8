"""Every group of measures of the claims, on a tiny model and small corpora."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers import tiny
from helpers.claims import claims

ANIMALS = ("frog", "horse", "cat", "dog", "owl", "bee", "cow", "hen", "fox", "pig")


def write_records(folder: Path, split: str, rows: list[dict[str, Any]]) -> None:
    """Write records, and ten random images beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(len(ANIMALS)):
        (folder / f"{index}.png").write_bytes(tiny.random_image(index).data or b"")
    lines = [json.dumps({"id": f"{n}", **row}) + "\n" for n, row in enumerate(rows)]
    (folder / f"{split}.jsonl").write_text("".join(lines))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with small corpora."""
    folder = tmp_path_factory.mktemp("data")
    for split in ("train", "test"):
        stamps = []
        for index, name in enumerate(ANIMALS):
            article = "An" if name == "owl" else "A"
            category = "animals/pets" if index % 2 else "farm/yard"
            row = {"image": f"{index}.png", "short": f"{article} {name}."}
            stamps.append({**row, "metadata": {"category": category}})
        write_records(folder / "stamps", split, stamps)
    emoji = [
        {"image": "0.png", "short": "red square", "metadata": {"subgroup": "s", "vendor": "v"}},
        {"image": "1.png", "short": "blue square", "metadata": {"subgroup": "s", "vendor": "v"}},
    ]
    write_records(folder / "emoji", "test", emoji)
    for corpus in ("gimp-help", "campaigns"):
        parts: list[dict[str, str]] = [{"text": f"Sentence {n}."} for n in range(5)]
        parts.insert(2, {"image": "4.png"})
        documents = [{"parts": [*parts, {"image": f"{n}.png"}]} for n in (5, 6)]
        write_records(folder / corpus, "test", documents)
    return folder


@pytest.fixture(scope="module")
def subject(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny model as the subject of the measures."""
    folder = tmp_path_factory.mktemp("subject")
    model = tiny.build_duet_model(folder / "model", family="qwen2_vl")
    rows = [{"step": n, "loss": 1.0, "contrastive": 2.0, "language": 0.5 * n} for n in range(20)]
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return claims.subjects.Subject(
        model.encode_document,
        model.encode_query,
        model,
        data,
        folder,
        batch_size=8,
        retriever=lambda items: np.eye(len(items), 40, dtype=np.float32),
    )


@pytest.fixture(autouse=True)
def small_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few scenes, sequences and prompts."""
    sets = {"train": 1, "test": 2}
    for module in (claims.corpora, claims.embedding_measures):
        monkeypatch.setattr(module, "SETS_PER_SPLIT", sets)
    monkeypatch.setattr(claims.corpora, "SCENES_PER_SPLIT", {"train": 2, "test": 3})
    monkeypatch.setattr(claims.language_measures, "NUM_POSITION_PROMPTS", 2)
    monkeypatch.setattr(claims.language_measures, "NUM_RAG_QUESTIONS", 3)


SIZES = {
    "retrieval": {"text to image, hit@1": 10, "image to text, hit@10": 10},
    "captions": {"captions, nats": 10, "wrong image, nats more": 10, "captions, word F1": 10},
    "edits": {"stamps, replace": 9},
    "choices": {"caption of four": 10},
    "minimal pairs": {"minimal pairs, image": 1},
    "near images": {"near images": 10},
    "scenes": {"scenes, swapped": 6, "scenes, swapped less replaced": 6, "scenes, nats": 3},
    "sequences": {"order among six": 12, "order, mean share beaten": 12},
    "documents": {"next image by texts": 4, "order of stories among six": 4, "documents, nats": 4},
    "places": {"place, accuracy": 12, "place, edges less middle": 2},
    "questions": {"questions, own retrieval": 3, "questions, no retrieval": 3},
    "reading": {"entropy, nats": 10, "energy beyond 10 components": 10},
    "losses": {"contrastive loss, % of chance": 16, "language loss, nats": 16},
}
"""Number of items of some numbers of every group."""


@pytest.mark.parametrize("group", SIZES)
def test_a_group_has_a_finite_value_for_every_item(group: str, subject: Any) -> None:
    numbers = claims.measures.measure_groups(subject, [group])
    for name, sample in numbers.items():
        content = claims.results.sample_to_json(sample)
        assert np.isfinite(content["values"]).all(), name
    sizes = {name: len(numbers[name].groups[0][0]) for name in SIZES[group]}
    assert sizes == SIZES[group]


def test_losses_are_those_of_the_last_steps(subject: Any) -> None:
    numbers = claims.measures.measure_groups(subject, ["losses"])
    chance = 2 * np.log(8)
    assert numbers["contrastive loss, % of chance"].mean == pytest.approx(200 / chance)
    assert numbers["language loss, nats"].mean == pytest.approx(0.5 * (4 + 19) / 2)


def test_an_embedder_that_knows_the_answer_finds_every_order(subject: Any) -> None:
    stamps = claims.corpora.read_named_stamps(subject.data / "stamps", "test")
    pictures: dict[Any, str] = {stamp.image: stamp.name for stamp in stamps}

    def embed_parts(items: Any) -> np.ndarray:
        """Return a vector of the ordered names of every item."""
        vectors = []
        for parts in items:
            names = [pictures.get(part) or part.lower().rstrip(".") for part in parts]
            seed = abs(hash(tuple(names))) % 2**32
            vectors.append(np.random.default_rng(seed).normal(size=16))
        return np.stack(vectors).astype(np.float32)

    oracle = claims.subjects.Subject(embed_parts, embed_parts, None, subject.data)
    numbers = claims.measures.measure_groups(oracle, ["sequences"])
    assert numbers["order among six"].mean == 100
    assert numbers["set of sequences"].mean == 100
    constant = claims.subjects.Subject(make_equal, make_equal, None, subject.data)
    numbers = claims.measures.measure_groups(constant, ["sequences", "scenes", "near images"])
    assert numbers["order among six"].mean == 0
    assert numbers["scenes, swapped"].mean == 0
    assert numbers["near images"].mean == 0


def make_equal(items: Any) -> np.ndarray:
    """Return the same vector for all items."""
    return np.ones((len(items), 4), dtype=np.float32)
