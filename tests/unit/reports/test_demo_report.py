"""The demo's report is one safe file, and it shows the results as they were measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from helpers import pages
from vlduet.data import images
from vlduet.data.records import ImageRef, Record
from vlduet.eval import examples, protocols
from vlduet.eval.benchmarks.scores import BenchmarkScore, average
from vlduet.inspect.alignment import Alignment
from vlduet.reports.demo_report import (
    ModelResults,
    Report,
    TradeOffPoint,
    summarize_report,
    training_charts,
    write_report,
)
from vlduet.reports.terminal import format_demo_changes

NUM_RECORDS = 30


def make_record(i: int, caption: str) -> Record:
    """Return a pair whose image has the grey value 8 i, by which `embed_images` recognises it."""
    pixels = np.full((8, 12, 3), 8 * i, dtype=np.uint8)
    image = ImageRef(data=images.encode_png(images.from_pixels(pixels)))
    return Record(id=f"r{i}", image=image, short=(caption,))


@pytest.fixture(scope="module")
def records() -> list[Record]:
    """Pairs of which two share a caption, except for one with a hostile caption."""
    captions = [f"Thing {i // 2 * 2}." for i in range(NUM_RECORDS)]
    captions[3] = pages.HOSTILE
    return [make_record(i, caption) for i, caption in enumerate(captions)]


def make_vector(i: int) -> np.ndarray:
    return np.random.default_rng(i).normal(size=16).astype(np.float32)


def embed_images(refs: Sequence[ImageRef]) -> np.ndarray:
    greys = [int(images.to_pixels(images.load_image(ref))[0, 0, 0]) for ref in refs]
    return np.array([make_vector(grey // 8) for grey in greys])


def make_results(records: list[Record], text: str, *, nats: float = 3.0) -> ModelResults:
    """Measure a toy model that finds an image by its first record and captions with `text`.

    A caption costs `nats` per token after its own image, and one more after another image.
    """
    first_index: dict[str, int] = {}
    for i, record in enumerate(records):
        first_index.setdefault(record.short[0], i)

    def embed_text(captions: list[str]) -> np.ndarray:
        return np.array([make_vector(first_index[caption]) for caption in captions])

    def embed_composed(queries: list[tuple[ImageRef, str]]) -> np.ndarray:
        return embed_images([image for image, _ in queries])

    own_pairs = {(record.image, record.short[0]) for record in records}

    def nll(pairs: list[tuple[ImageRef, str]]) -> list[tuple[float, int]]:
        values = []
        for image, caption in pairs:
            cost = nats if (image, caption) in own_pairs else nats + 1
            values.append((cost * len(caption), len(caption)))
        return values

    return ModelResults(
        retrieval=protocols.measure_retrieval(embed_images, embed_text, records=records),
        composed=protocols.measure_composed_retrieval(embed_images, embed_composed, records),
        cross_entropy=protocols.measure_caption_cross_entropy(nll, records),
        captions=protocols.measure_captions(
            lambda refs: [text, *["A thing."] * (len(refs) - 1)], records
        ),
        answers=protocols.AnswerCrossEntropy(np.array([2.0, 6.0]), np.array([2.0, 2.0])),
    )


def make_score() -> BenchmarkScore:
    accuracies = {"none": [0, 0, 1, 0], "self": [1, 0, 1, 0], "other": [0, 1, 1, 1]}
    samples = {f"{name}/accuracy": average(values) for name, values in accuracies.items()}
    samples |= {f"{name}/retrieval/R@1": average([1, 0, 0, 0]) for name in ("self", "other")}
    return BenchmarkScore(samples, details={"items": 4, "facts": 9, "chance": 25.0})


def make_report(records: list[Record], text: str) -> Report:
    """Return a report in which every free text is `text`."""
    start = make_results(records, text, nats=5.0)
    trained = make_results(records, text)
    retrieval = trained.retrieval
    hits = [(record.id, 0.5) for record in records[:6]]
    sources = examples.example_hits(hits[:2], records)
    image = records[0].image
    assert image is not None
    grid = [[0.9, 0.1], [0.2, 0.8]]
    alignment = Alignment(
        "story", "echo", (image, text), (text, image), "x", grid, grid, 0.5, 0.6, 0.4, 1.0
    )
    return Report(
        trained=trained,
        start=start,
        single_losses=(TradeOffPoint("language loss alone", 0.2, 3.1, 0.4, is_of_this_run=False),),
        num_copied_captions=2,
        ridge=retrieval,
        galleries=(
            examples.text_to_image_examples(retrieval, search=lambda _: hits),
            examples.image_to_text_examples(retrieval),
            examples.composed_query_examples(retrieval, search=lambda *_: hits),
        ),
        answers=(
            examples.AnsweredQuestion(text, image, text, text, text, sources),
            examples.AnsweredQuestion(text, image, text, "", "", ()),
        ),
        alignments={text: alignment},
        rag=make_score(),
        seed=0,
        command=text,
        facts={text: text},
        seconds={"download": 600.0, "train": 90.0, "after": 30.0},
        corpus_table=({"corpus": text, "held out": "30"},),
        metrics=[
            {"step": i, "seconds": i, "language": 3.0 / (i + 1), "contrastive": 1.0}
            for i in range(80)
        ],
        next_commands=(text,),
    )


@pytest.fixture(scope="module")
def page(records: list[Record], tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "deep" / "report.html"
    write_report(path, make_report(records, pages.HOSTILE))
    assert [p.name for p in path.parent.iterdir()] == ["report.html"], "no staging file is left"
    assert path.stat().st_size < 6_000_000
    return path.read_text(encoding="utf-8")


def test_hostile_texts_are_escaped_and_the_page_loads_nothing(page: str) -> None:
    parsed = pages.parse_checked_page(page)
    assert pages.SCRIPT in parsed.text, "it is there, as text"
    assert "{{ 7*7 }}" in parsed.text, "it is never a template of its own"


def test_page_shows_captions_before_and_after_by_a_fixed_rule(page: str) -> None:
    assert page.count("<dt>after training</dt>") == page.count("<dt>at the start</dt>") == 18
    text = " ".join(pages.Page(page).text.split())
    assert f"2 distinct captions for {NUM_RECORDS} images" in text
    assert "2 of them equal a caption of the training records" in text


def test_page_shows_every_competitor_with_intervals_and_chance(
    page: str, records: list[Record]
) -> None:
    report = make_report(records, "x")
    parsed = pages.Page(page)
    labels = [a["aria-label"] or "" for _, a in parsed.tags if a.get("role") == "img"]
    for name in ("VLDuet", "Ridge baseline", "Start", "Chance"):
        assert len([label for label in labels if label.startswith(f"{name}, ")]) == 6
    score = report.trained.retrieval.text_to_image.hit_interval(5, 0)
    low, high = 100 * score.low, 100 * score.high
    expected = f"{100 * score.mean:.1f} %, 95 % interval {low:.1f} to {high:.1f}"
    assert f"VLDuet, Text → image, hit@5: {expected}" in labels


def test_first_table_has_paired_changes_with_their_direction(records: list[Record]) -> None:
    report = make_report(records, "x")
    changes = {change.name: change for change in report.changes}
    assert list(changes) == [
        "text → image, hit@10",
        "text → image, hit@1",
        "image → text, hit@10",
        "image → text, hit@1",
        "Captions, nats per token",
        "Cost of a wrong image, nats per token",
        "Generated captions, word F1",
        "Plain answers, nats per token",
    ]
    captions = changes["Captions, nats per token"]
    assert (captions.before.mean, captions.after.mean) == pytest.approx((5.0, 3.0))
    assert (captions.change.low, captions.change.high) == pytest.approx((-2.0, -2.0))
    assert captions.verdict == "better"
    assert changes["Cost of a wrong image, nats per token"].after.mean == pytest.approx(1.0)
    assert changes["Plain answers, nats per token"].after.mean == pytest.approx(2.0)
    retrieval = changes["text → image, hit@10"]
    assert retrieval.change.mean == 0.0 and retrieval.verdict == "level"
    assert retrieval.ridge == retrieval.after and retrieval.ridge_difference is not None
    assert 0 < (retrieval.chance or 0) < 1
    worse = replace(report, trained=report.start, start=report.trained)
    assert {c.name: c.verdict for c in worse.changes}["Captions, nats per token"] == "worse"


def test_first_table_is_printed_with_intervals(records: list[Record]) -> None:
    title, *lines = format_demo_changes(make_report(records, "x").changes)
    assert "before" in title and "95 % interval" in title
    assert len(lines) == 8
    (captions,) = [line for line in lines if line.startswith("Captions")]
    assert captions.split()[4:] == ["5.00", "3.00", "-2.00", "(-2.00", "to", "-2.00)", "better"]
    assert "against ridge" in lines[0] and "chance" in lines[0]


def test_navigation_targets_exist_and_images_are_described(page: str) -> None:
    tags = pages.Page(page).tags
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids)), "ids are unique"
    targets = {str(a["href"]).removeprefix("#") for tag, a in tags if tag == "a"}
    assert targets <= set(ids) and len(targets) == 11
    assert all(attributes.get("alt") for tag, attributes in tags if tag == "img")
    assert all(attributes.get("aria-label") for tag, attributes in tags if tag == "svg")
    assert len([tag for tag, _ in tags if tag == "svg"]) == 2, "the losses and the trade-off"


def test_summary_has_exactly_the_documented_keys(records: list[Record]) -> None:
    report = make_report(records, "x")
    summary = json.loads(json.dumps(summarize_report(report)))
    assert set(summary) == {
        "changes",
        "wrong_image_nats",
        "trade_off",
        "gallery",
        "captions",
        "mixed",
        "self_rag",
        "minutes",
    }
    assert list(summary["changes"]) == [change.name for change in report.changes]
    retrieval = summary["changes"]["text → image, hit@10"]
    assert set(retrieval) == {"before", "after", "change", "ridge", "ridge_difference", "chance"}
    captions = summary["changes"]["Captions, nats per token"]
    assert set(captions) == {"before", "after", "change"}
    assert captions["after"]["mean"] == pytest.approx(3.0)
    assert summary["wrong_image_nats"]["mean"] == pytest.approx(4.0)
    assert list(summary["trade_off"]) == ["start", "language loss alone", "all losses"]
    published = {"hit@10": 0.2, "nats": 3.1, "nats_gap": 0.4, "is_of_this_run": False}
    assert summary["trade_off"]["language loss alone"] == published
    assert summary["captions"] == {"distinct": 2, "copied": 2}
    assert set(summary["mixed"]) == {"image", "text", "both", "start"}
    assert summary["mixed"]["both"] == summary["mixed"]["start"] < summary["mixed"]["image"] == 1.0
    assert summary["self_rag"] == {
        "none": 0.25,
        "self": 0.5,
        "other": 0.75,
        "chance": 0.25,
        "questions": 4,
    }
    assert summary["gallery"] == NUM_RECORDS
    assert summary["minutes"] == pytest.approx(2.0), "downloads are not counted"


def test_gain_from_retrieval_is_paired_over_questions(records: list[Record]) -> None:
    report = make_report(records, "x")
    gain = report.rag_gain("none")
    assert gain.mean == pytest.approx(0.25) and gain.low == 0.0, "no question got worse"
    assert report.rag_gain("other").mean == pytest.approx(-0.25)
    assert report.composed_gain.mean == 0.0


def test_gain_of_composed_queries_is_after_minus_before(records: list[Record]) -> None:
    report = make_report(records, "x")
    hits = np.ones(len(records), dtype=np.int64)
    better = protocols.ComposedRetrievalResult(hits, hits)
    # Three of four queries find the text among the first ten hits, none of them the image.
    worse = protocols.ComposedRetrievalResult(hits * 11, np.where(np.arange(len(hits)) % 4, 1, 11))
    trained = replace(report.trained, composed=better)
    start = replace(report.start, composed=worse)
    gain = replace(report, trained=trained, start=start).composed_gain
    assert (gain.mean, gain.low, gain.high) == (1.0, 1.0, 1.0)
    loss = replace(report, trained=start, start=trained).composed_gain
    assert (loss.mean, loss.low, loss.high) == (-1.0, -1.0, -1.0)


def test_similarity_sample_has_the_pairs_on_its_diagonal(records: list[Record]) -> None:
    result = make_report(records, "x").similarity_sample
    assert len(result.captions) == len(result.records) == 24
    assert result.text_to_image.relevant.diagonal().all()
    for caption, record in zip(result.captions, result.records, strict=True):
        assert caption == record.short[0]


def test_training_charts_read_the_metrics_by_name() -> None:
    rows = [
        {
            "step": 0,
            "seconds": 0.0,
            "validation/text_to_image/hit@10": 0.1,
            "validation/caption_cross_entropy": 5.0,
        },
        {"step": 1, "seconds": 60.0, "language": 3.0, "contrastive": 2.0},
    ]
    losses, hits, entropy = training_charts(rows)
    assert [series.points for series in losses.series] == [((1.0, 3.0),), ((1.0, 2.0),)]
    assert hits.series[0].points == ((0.0, 0.1),)
    assert entropy.series[0].points == ((0.0, 5.0),)
    assert hits.percent and not losses.percent
