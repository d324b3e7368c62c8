"""Measure fixed predictions: the built-in suite, the protocols and the metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from frozen import calls, fixed
from frozen.measures import INPUTS, plain

CORPORA = fixed.DATA
"""Holds corpora/, tiny splits of every corpus of the built-in suite."""
REPLIES = (
    "A red apple.",
    "a boat",
    "the dog",
    "",
    "Bourg en Bresse",
    "Thing 1",
    "a house and a tree",
)


def vector(item: Any) -> np.ndarray:
    """Return float64[12]: the sum of its parts' fixed numbers, so that alike items are near."""
    return sum((_sum_of_word_vectors(name) for name in calls.content(item)), np.zeros(12))


def _sum_of_word_vectors(name: str) -> np.ndarray:
    """Return float64[12]: the sum of the fixed numbers of the words of a text."""
    words = calls.tokenize_answer(name) or [name]
    return sum((fixed.numbers(word, 12) for word in words), np.zeros(12))


def reply(prompt: Any) -> str:
    """Return an answer that the prompt decides."""
    return REPLIES[fixed.choice("|".join(calls.content(prompt)), len(REPLIES))]


def nats(prompt: Any, text: str) -> tuple[float, int]:
    """Return a likelihood that prompt and text decide, in quarters so that no rounding does."""
    return 1 + fixed.choice("|".join((*calls.content(prompt), text)), 40) / 4, len(
        text.split()
    ) or 1


def benchmark(name: str, runs: Path) -> dict[str, Any]:
    """Play a benchmark of the built-in suite."""
    scored = calls.play(name, CORPORA, runs=runs, embed=vector, reply=reply, nats=nats)
    return plain({"values": scored["values"], "facts": scored["facts"]})


# ------------------------------------------------------------------ protocols


def protocols() -> dict[str, Any]:
    """Take every measurement of the protocols on fixed records."""
    pairs = [r for r in calls.records(INPUTS / "pairs.jsonl") if r.short]

    def embed(items: Sequence[Any]) -> np.ndarray:
        rows = [vector(item if isinstance(item, tuple) else (item,)) for item in items]
        return np.stack(rows).astype(np.float32)

    measured = calls.protocols.measure_retrieval(embed, embed, records=pairs)
    mixed = calls.protocols.measure_composed_retrieval(embed, embed, pairs, seed=3)
    entropy = calls.protocols.measure_caption_cross_entropy(
        lambda batch: [nats((i,), t) for i, t in batch], pairs
    )
    captions = calls.protocols.measure_captions(
        lambda images: [reply((image,)) for image in images], pairs
    )
    directions = {"to image": measured.text_to_image, "to text": measured.image_to_text}
    return plain(
        {
            "captions": measured.captions,
            "directions": {name: _direction(value) for name, value in directions.items()},
            "mixed": {k: mixed.hit_values(k) for k in (1, 2, 5)},
            "entropy": {
                "right": asdict(entropy.nats_right_image()),
                "wrong": asdict(entropy.nats_wrong_image()),
                "gap": asdict(entropy.nats_gap(seed=1)),
            },
            "written": {
                "f1": asdict(captions.token_f1()),
                "exact": asdict(captions.exact_match()),
                "distinct": captions.num_distinct,
            },
            "wrong images": calls.protocols.wrong_image_indices(
                [["a"], ["b", "c"], ["a"], ["c"], ["d"]], 5
            ),
        }
    )


def _direction(measured: Any) -> dict[str, Any]:
    return {
        "ranks": measured.ranks,
        "hits": measured.hit_rates(),
        "chance": measured.chance_hit_rates(),
        "interval": asdict(measured.hit_interval(1)),
        "top": [measured.top_indices(query, 3) for query in range(measured.num_queries)],
    }


def metrics() -> dict[str, Any]:
    """Compute every metric on fixed arrays, ties and NaN among them."""
    scores = np.round(fixed.numbers("scores", 9, 14), 1)
    scores[2, 3], scores[4] = np.nan, 0.5
    relevant = fixed.numbers("relevant", 9, 14) > 1
    relevant[np.arange(9), np.arange(9)] = True
    values, weights = fixed.numbers("values", 40), 1.1 + np.abs(fixed.numbers("weights", 40))
    texts = [
        ("The red apple!", ["a red apple", "apple"]),
        ("", ["", "x"]),
        ("a boat", ["the green boat"]),
    ]
    return plain(
        {
            "ranks": calls.metrics.first_hit_ranks(scores, relevant),
            "hits": calls.metrics.hit_at_k(scores, relevant),
            "chance": calls.metrics.chance_hit_at_k(relevant),
            "interval": asdict(calls.metrics.bootstrap_interval(values, 7)),
            "weighted": asdict(calls.metrics.bootstrap_interval(values, 7, weights=weights)),
            "paired": asdict(calls.metrics.paired_bootstrap(values, weights, seed=2)),
            "words": [calls.tokenize_answer(text) for text, _ in texts],
            "exact": [calls.metrics.exact_match(*pair) for pair in texts],
            "f1": [calls.metrics.token_f1(*pair) for pair in texts],
        }
    )
