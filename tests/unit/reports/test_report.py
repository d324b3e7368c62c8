"""The report is one safe file, and its galleries show what was found."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest

from helpers import pages
from vlduet.data import images
from vlduet.data.records import ImageRef, Record
from vlduet.eval import protocols
from vlduet.reports import compose, galleries, pages

COLOURS = 30


def record(i: int, caption: str) -> Record:
    data = images.encode_png(images.from_pixels(np.full((8, 12, 3), 8 * i, dtype=np.uint8)))
    return Record(id=f"r{i}", image=ImageRef(data=data), short=(caption,))


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return [record(i, pages.HOSTILE if i == 3 else f"Thing {i // 2 * 2}.") for i in range(COLOURS)]


def embed_images(refs: Sequence[ImageRef]) -> np.ndarray:
    return np.array(
        [vector(int(images.to_pixels(images.load_image(ref))[0, 0, 0]) // 8) for ref in refs]
    )


def vector(i: int) -> np.ndarray:
    return np.random.default_rng(i).normal(size=16).astype(np.float32)


def measured(records: list[Record], text: str) -> compose.Measurement:
    def embed_text(captions: list[str]) -> np.ndarray:
        first = {r.short[0]: i for i, r in reversed(list(enumerate(records)))}
        return np.array([vector(first[caption]) for caption in captions])

    return compose.Measurement(
        retrieval=protocols.measure_retrieval(embed_images, embed_text, records=records),
        mixed=protocols.measure_composed_retrieval(
            embed_images, lambda pairs: embed_images([image for image, _ in pairs]), records
        ),
        entropy=protocols.measure_caption_cross_entropy(
            lambda pairs: [(3.0 * len(t), len(t)) for _, t in pairs], records
        ),
        captions=protocols.measure_captions(
            lambda refs: [text, *["A known thing."] * (len(refs) - 1)], records
        ),
        known=frozenset(["A known thing."]),
        plain=2.0,
    )


def make(records: list[Record], text: str) -> pages.DemoReport:
    one = measured(records, text)
    album = galleries.Album(records)
    found = [(r.id, 0.5) for r in records[:6]]
    shown = compose.Shown(
        album=album,
        galleries=(
            galleries.text_to_image_examples(one.retrieval, album, find=lambda _: found),
            galleries.image_to_text_examples(one.retrieval, album),
            galleries.composed_query_examples(one.retrieval, album, find=lambda *_: found),
        ),
        heat=galleries.heat(one.retrieval, album),
        alignments=(alignment(album, text),),
        augmented=pages.RetrievalAugmented(
            questions=4,
            solved=9,
            chance=0.25,
            accuracy={who: pages.Interval(0.5, 0.25, 0.75) for who in ("none", "self", "other")},
            found={who: pages.Interval(0.5, 0.25, 0.75) for who in ("self", "other")},
            gaps=(pages.Gap("self against none", "accuracy", pages.Interval(0.1, -0.1, 0.2)),),
        ),
        asked=(
            pages.Asked(text, text, album.hits(found[:2])),
            pages.Asked(text, "", (), image=album.picture("r0")),
        ),
    )
    told = compose.Told(
        command=text,
        seed=0,
        facts={text: text},
        seconds={"download": 600.0, "train": 90.0, "after": 30.0},
        data=({"corpus": text, "held out": "30"},),
        metrics=[
            {"step": i, "seconds": i, "language": 3.0 / (i + 1), "contrastive": 1.0}
            for i in range(80)
        ],
        next_commands=(text,),
    )
    return compose.compose(
        compose.Measured(one.retrieval, one, one, one.retrieval), shown, told=told
    )


def alignment(album: galleries.Album, text: str) -> pages.Alignment:
    grid = ((0.9, 0.1), (0.2, 0.8))
    picture = album.picture("r0")
    return pages.Alignment(
        (picture, text), (text, picture), grid, grid, gak=0.5, awm=0.6, mean=0.4, sigma=1.0
    )


@pytest.fixture(scope="module")
def page(records: list[Record], tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "deep" / "report.html"
    pages.write_report(path, make(records, pages.HOSTILE))
    assert [p.name for p in path.parent.iterdir()] == ["report.html"], "no staging file is left"
    assert path.stat().st_size < 6_000_000
    return path.read_text(encoding="utf-8")


def test_hostile_texts_stay_texts_and_the_page_reaches_out_to_nothing(page: str) -> None:
    found = pages.parse_checked_page(page)
    assert pages.SCRIPT in found.text, "it is there, as text"
    assert "{{ 7*7 }}" in found.text, "never a template of its own"


def test_a_caption_is_said_to_be_written_or_known(page: str) -> None:
    assert page.count("<dt>written</dt>") == 1 and page.count("<dt>known</dt>") == COLOURS - 1
    assert f"{COLOURS - 1} of {COLOURS} are of the training stamps" in " ".join(
        pages.Page(page).text.split()
    )


def test_every_anchor_of_the_navigation_exists_and_every_picture_is_described(page: str) -> None:
    found = pages.Page(page)
    ids = {a["id"] for _, a in found.tags if "id" in a}
    assert {str(a["href"]).removeprefix("#") for t, a in found.tags if t == "a"} <= ids
    assert all(a.get("alt") for t, a in found.tags if t == "img")
    assert all(a.get("aria-label") for t, a in found.tags if t == "svg")


def test_an_image_that_is_no_data_url_is_refused() -> None:
    for url in (
        "https://example.org/x.png",
        "javascript:alert(1)",
        'data:image/png;base64,A"onerror="x',
        "data:text/html,x",
    ):
        with pytest.raises(AssertionError, match="data URL"):
            pages.picture(url)


def test_summary_has_exactly_the_promised_keys(records: list[Record]) -> None:
    made = make(records, "x")
    found = json.loads(json.dumps(pages.summary(made)))
    hits = {"hit@1", "hit@5", "hit@10"}
    rows = ("text_to_image", "image_to_text", "chance", "untrained", "start", "ridge_baseline")
    assert set(found) == {*rows, "gallery", "caption_cross_entropy", "mixed", "self_rag", "minutes"}
    assert set(found["mixed"]) == {"image", "text", "both", "start"}
    assert found["mixed"]["both"] == found["mixed"]["start"] < found["mixed"]["image"] == 1.0
    assert found["self_rag"] == {
        "none": 0.5,
        "self": 0.5,
        "other": 0.5,
        "chance": 0.25,
        "questions": 4,
    }
    for name in rows:
        assert set(found[name]) == hits and all(0 <= v <= 1 for v in found[name].values())
    assert set(found["caption_cross_entropy"]) == {"before", "after", "wrong_image"}
    assert found["gallery"] == COLOURS
    assert found["minutes"] == pytest.approx(2.0), "downloads are not counted"
    both = [made.untrained.text_to_image["hit@1"].mean, made.untrained.image_to_text["hit@1"].mean]
    assert found["untrained"]["hit@1"] == pytest.approx(sum(both) / 2)


def test_a_gap_is_called_what_its_interval_resolves() -> None:
    for low, high, verdict in ((0.01, 0.1, "above"), (-0.1, 0.1, "level"), (-0.2, -0.1, "below")):
        assert (
            pages.Gap("x", "hit@1", pages.Interval((low + high) / 2, low, high)).verdict == verdict
        )


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.2, "< 1 s"), (59.4, "59 s"), (60, "1 min"), (75, "1 min 15 s"), (0, "< 1 s")],
)
def test_durations(seconds: float, told: str) -> None:
    assert pages.duration(seconds) == told


def test_examples_are_spaced_evenly() -> None:
    assert galleries.evenly_spaced_indices(100, 4) == [12, 37, 62, 87]
    assert galleries.evenly_spaced_indices(3, 10) == [0, 1, 2]
    assert galleries.evenly_spaced_indices(0, 5) == []
    for count in range(
        200
    ):  # three times as many hold them, too: the demo's examples are among what it captions
        assert set(galleries.evenly_spaced_indices(count, 18)) <= set(
            galleries.evenly_spaced_indices(count, 54)
        )


def test_galleries_tick_what_is_right(records: list[Record]) -> None:
    made = make(records, "x")
    _, image_to_text, mixed = made.galleries
    for search in image_to_text.searches:
        right = [hit.right for hit in search.hits]
        assert search.first_hit is not None
        assert (True in right) == (search.first_hit <= galleries.SHOWN)
        if True in right:
            assert right.index(True) + 1 == search.first_hit
    assert all(
        len(search.hits) == galleries.SHOWN and search.first_hit is None
        for search in mixed.searches
    )


def test_a_mixed_search_never_shows_its_own_image(records: list[Record]) -> None:
    one = measured(records, "x").retrieval
    album = galleries.Album(records)
    found = galleries.composed_query_examples(
        one, album, find=lambda image, text: [(r.id, 1.0) for r in records]
    )
    for search in found.searches:
        assert search.image not in [hit.image for hit in search.hits]


def test_curves_read_the_metrics_by_name() -> None:
    rows = [
        {
            "step": 0,
            "seconds": 0.0,
            "validation/text_to_image/hit@10": 0.1,
            "validation/caption_cross_entropy": 5.0,
        },
        {"step": 1, "seconds": 60.0, "language": 3.0, "contrastive": 2.0},
    ]
    losses, hits, entropy = galleries.curves(rows)
    assert [s.points for s in losses.series] == [((1.0, 3.0),), ((1.0, 2.0),)]
    assert hits.series[0].points == ((0.0, 0.1),) and entropy.series[0].points == ((0.0, 5.0),)
