"""The experiment on interleaved retrieval, end to end with a tiny model and few records."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from helpers import tiny
from helpers.scripts import load_scripts
from vlduet.data.images import read_bytes
from vlduet.data.records import ImageRef
from vlduet.eval.benchmarks.official_files import OfficialFiles
from vlduet.model.prompts import Prompts

scripts = load_scripts("interleave")
items, run, report, searches = scripts.items, scripts.run, scripts.report, scripts.searches


def write_corpora(folder: Path) -> None:
    """Write test splits of two documents each with three images, and of six captioned images."""
    number = 0

    def add_image(corpus: str) -> str:
        nonlocal number
        number += 1
        path = folder / "corpora" / corpus / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(read_bytes(tiny.random_image(number, 16)))
        return path.name

    def write(corpus: str, rows: list[dict[str, object]]) -> None:
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / "corpora" / corpus / "test.jsonl").write_text("".join(lines))

    for corpus in ("campaigns", "gimp-help"):
        rows = []
        for title in ("The dark cave", "1."):
            texts = [title, "A frog sits there.", "It jumps.", "The end of it."]
            parts: list[dict[str, str]] = []
            for text in texts:
                parts += [{"text": text}, {"image": add_image(corpus)}]
            rows.append({"id": f"{corpus}/{title}", "parts": parts[:-1]})
        write(corpus, rows)
    for corpus in ("stamps", "emoji"):
        rows = []
        for n, name in enumerate(("A frog.", "A red car.", "A cat.", "A big house.", "A boat.")):
            kind = ("animals", "vehicles")[n % 2]
            facts: dict[str, object] = {"category": f"{kind}/small"}
            if corpus == "emoji":
                facts = {"group": kind, "subgroup": "small", "vendor": "openmoji"}
            image = add_image(corpus)
            rows.append({"id": name, "image": image, "short": name, "metadata": facts})
        write(corpus, rows)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> OfficialFiles:
    folder = tmp_path_factory.mktemp("corpora")
    write_corpora(folder)
    return OfficialFiles(folder)


def test_a_place_has_the_text_since_the_one_before_and_the_image_of_the_suite(files):
    documents = items.load_document_set(files)
    assert len(documents.gallery) == 12 and documents.num_left_out == 0
    first = documents.documents[0]
    assert first.requests == ('Tell the story "The dark cave" with pictures.',)
    assert [place.text for place in first.places] == [
        "The dark cave",
        "A frog sits there.",
        "It jumps.",
    ]
    assert [place.continuation for place in first.places] == [
        "A frog sits there.",
        "It jumps.",
        "The end of it.",
    ]
    assert [place.positives for place in first.places] == [(0,), (1,), (2,)]
    assert [place.excluded for place in first.places] == [(), (0,), (0, 1)]
    assert "A frog sits there." in documents.documents[-1].requests[0]  # "1." is no title
    image = documents.gallery[0]
    request, answer = first.list_messages([image])
    assert request.parts == first.requests
    assert answer.parts == ("The dark cave", image, " A frog sits there.")
    assert first.list_messages([None])[1].parts == ("The dark cave A frog sits there.",)


def test_the_right_image_of_an_early_turn_has_another_name(files):
    dialogs = items.load_dialog_set(files)
    for dialog in dialogs.documents:
        *early, last = dialog.places
        right = [dialogs.gallery.index(place.right_image) for place in early]
        assert not set(right) & set(last.positives)
        assert dialogs.gallery.index(last.right_image) in last.positives
        assert len(dialog.list_messages([None, None])) == 6


def test_everything_is_measured_and_reported(files, tmp_path, monkeypatch):
    monkeypatch.setattr(searches, "MAX_NEW_TOKENS", 8)
    prompts = Prompts(chat=True)
    model = tiny.scale_up_weights(tiny.build_duet_model(tmp_path / "base", prompts=prompts))

    def embed_by_dual(contents):
        """Return a vector of the parts that equal contents share."""
        random = np.random.default_rng(0)
        vectors = {part: random.normal(size=4) for content in contents for part in content}
        return np.stack([sum(vectors[part] for part in content) for content in contents])

    sizes = run.Sizes(documents=2, dialogs=2, requests=3)
    content = {
        part: run.measure_part(part, model, files, embed_by_dual=embed_by_dual, sizes=sizes)
        for part in run.PARTS
    }
    documents = content["documents"]
    assert documents["numbers"] == [1, 2, 3] * 2 and documents["groups"] == [0] * 3 + [1] * 3
    assert {len(ranks) for ranks in documents["ranks"].values()} == {6}
    # Nothing is before the first place but text, whatever is fed back later.
    ranks = documents["ranks"]
    methods = ("operation", "operation, retrieved images", "operation, right images")
    assert len({ranks[method][0] for method in methods}) == 1
    assert documents["costs"]["operation"]["passes"] == [3, 3]
    assert documents["costs"]["operation, retrieved images"]["passes"] == [3, 3]
    assert documents["costs"]["encode"]["passes"] == [3, 3]
    limit = 1 + searches.MAX_NEW_TOKENS
    written = documents["writing"]["operation, retrieved images"]
    for passes, images in zip(written["passes"], written["images"], strict=True):
        assert passes <= limit + images
    assert content["dialogs"]["numbers"] == [1, 2, 3] * 2
    nats = documents["continuations"]["nats"]
    assert len(nats["no image"]) == 6 and nats["no image"] != nats["retrieved image"]
    assert len(content["questions"]["correct"]["no image"]) == 3
    facts = {"command": "run", "minutes": 1, **run.describe_machine()}
    path = tmp_path / "demo.json"
    for part, results in content.items():
        run.add_part(path, {"fingerprint": "0"}, part, results={"run": facts, **results})
    assert max(len(line) for line in path.read_text().splitlines()) < 400
    report.main(["--results", str(tmp_path), "--to", str(tmp_path / "page.md")])
    page = (tmp_path / "page.md").read_text()
    for method in methods:
        assert f"| {method} |" in page


def test_vectors_of_the_operation_are_those_of_encode(files, tmp_path):
    prompts = Prompts(chat=True)
    model = tiny.scale_up_weights(tiny.build_duet_model(tmp_path / "base", prompts=prompts))
    for load in (items.load_document_set, items.load_dialog_set):
        search_set = load(files)
        document = search_set.documents[0]
        folder = tmp_path / load.__name__
        folder.mkdir()
        index = searches.build_gallery_index(model, search_set.gallery, folder)
        right = [search_set.gallery.index(place.right_image) for place in document.places]
        answer = searches.answer_document(model, index, document, feed_back=True, images=right)
        index.close()
        assert answer.images == tuple(right)
        images: list[ImageRef | None] = [place.right_image for place in document.places]
        conversations = [document.list_messages(images[:n]) for n in range(len(images))]
        np.testing.assert_allclose(answer.vectors, model.encode(conversations), atol=1e-5)


def test_an_interval_resamples_whole_documents():
    values, groups = [1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]
    value = report.average_by_group(values, groups, scale=100.0).estimate()
    assert (value.mean, value.low, value.high) == (50.0, 0.0, 100.0)
