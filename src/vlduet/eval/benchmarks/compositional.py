"""Compositionality: Winoground, SugarCrepe, SugarCrepe++ and MMVP-VLM, where a small change turns the meaning.

All comparisons are strict: a model that cannot tell two texts apart is wrong on them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlduet.data.records import ImageRef
from vlduet.errors import DataError
from vlduet.eval.answers import mmbench_letter
from vlduet.eval.benchmarks.source import UNCHANGED, Fields, Source
from vlduet.eval.benchmarks.tasks import (
    Answers,
    Pair,
    Pairs,
    Question,
    Questions,
    Score,
    by_tag,
    sample,
)

Floats = NDArray[np.floating]

# ------------------------------------------------------------------ Winoground


def winoground(source: Source) -> Pairs:
    """400 items of two captions with the same words and two images; chance 25, 25 and 16.7."""
    loose = source.has("winoground/examples.jsonl")
    rows = (
        source.lines("winoground/examples.jsonl")
        if loose
        else list(source.parquet("winoground/*.parquet"))
    )

    def image(row: Fields, key: str) -> ImageRef:
        if loose:
            return source.image(
                *(f"winoground/images/{row[key]}{ending}" for ending in ("", ".png"))
            )
        return ImageRef(data=row.within(key)["bytes"])

    items = [
        Pair(
            id=str(row["id"]),
            texts=(row["caption_0"], row["caption_1"]),
            images=(image(row, "image_0"), image(row, "image_1")),
            group=str(row.get("collapsed_tag", "")),
        )
        for row in rows
    ]
    return Pairs(tuple(items), winoground_rule)


def winoground_rule(similarity: Floats, texts: Floats) -> dict[str, bool]:
    """text: each image prefers its caption; image: each caption prefers its image; group: both."""
    s = similarity
    text = bool(s[0, 0] > s[1, 0] and s[1, 1] > s[0, 1])
    image = bool(s[0, 0] > s[0, 1] and s[1, 1] > s[1, 0])
    return {"text": text, "image": image, "group": text and image}


# ------------------------------------------------------------------ SugarCrepe

SUBSETS = (
    "replace_obj",
    "replace_att",
    "replace_rel",
    "swap_obj",
    "swap_att",
    "add_obj",
    "add_att",
)
PLUS_SUBSETS = SUBSETS[:5]
MEANS = {
    "mean": SUBSETS,
    "replace": SUBSETS[:3],
    "swap": SUBSETS[3:5],
    "add": SUBSETS[5:],
}
"""VladVA's ablations average subsets, not items."""
PLUS_MEANS = {"mean": PLUS_SUBSETS, "replace": PLUS_SUBSETS[:3], "swap": PLUS_SUBSETS[3:]}
COCO_2017 = "coco/val2017"


def sugarcrepe(source: Source) -> Pairs:
    """Seven subsets; right iff the image is nearer to its caption than to the hard negative."""
    items = [
        Pair(
            f"{subset}/{key}",
            (row["caption"], row["negative_caption"]),
            (_coco(source, row),),
            subset,
        )
        for subset in SUBSETS
        for key, row in source.entries(f"sugarcrepe/{subset}.json").items()
    ]
    return Pairs(tuple(items), sugarcrepe_rule, MEANS)


def sugarcrepe_rule(similarity: Floats, texts: Floats) -> dict[str, bool]:
    """accuracy: image to caption above image to negative."""
    return {"accuracy": bool(similarity[0, 0] > similarity[1, 0])}


def sugarcrepe_plus(source: Source) -> Pairs:
    """Five subsets with two captions of one meaning and a negative."""
    items = [
        Pair(
            f"{subset}/{row['id']}",
            (row["caption"], row["caption2"], row["negative_caption"]),
            (_coco(source, row),),
            subset,
        )
        for subset in PLUS_SUBSETS
        for row in source.items(f"sugarcrepe_pp/{subset}.json")
    ]
    return Pairs(tuple(items), sugarcrepe_plus_rule, PLUS_MEANS)


def sugarcrepe_plus_rule(similarity: Floats, texts: Floats) -> dict[str, bool]:
    """ITT: the image is nearer to both captions than to the negative; TOT: the captions are nearer to each other."""
    first, second = (
        bool(similarity[0, 0] > similarity[2, 0]),
        bool(similarity[1, 0] > similarity[2, 0]),
    )
    both = bool(texts[0, 1] > texts[0, 2] and texts[0, 1] > texts[1, 2])
    return {"ITT": first and second, "TOT": both, "image_caption1": first, "image_caption2": second}


def _coco(source: Source, row: Fields) -> ImageRef:
    return source.image(f"{COCO_2017}/{row['filename']}")


# ------------------------------------------------------------------ MMVP-VLM

FOLDERS = ("mmvp_vlm/MMVP_VLM_Images", "mmvp_vlm/MLLM_VLM Images")
"""The README's name and the official script's."""


def mmvp_vlm(source: Source) -> Pairs:
    """Nine visual patterns of 15 pairs: each statement must pick its image (Winoground's image score)."""
    items = [
        Pair(
            f"{a['id']}-{b['id']}",
            (_photo(a), _photo(b)),
            (_mmvp_image(source, a), _mmvp_image(source, b)),
            a["pattern"],
        )
        for a, b in _mmvp_pairs(source)
    ]
    patterns = tuple(dict.fromkeys(item.group for item in items))
    return Pairs(tuple(items), mmvp_rule, {"mean": patterns})


def mmvp_rule(similarity: Floats, texts: Floats) -> dict[str, bool]:
    """pair: both statements prefer their own image."""
    return {"pair": winoground_rule(similarity, texts)["image"]}


def mmvp_questions(source: Source) -> Questions:
    """Sugar's question form of the same pairs: single questions, not to be compared with the pair accuracy of CLIPs.

    Which statement comes first is drawn with the run's seed.
    """
    random = np.random.default_rng(source.seed)
    items = []
    for a, b in _mmvp_pairs(source):
        turned = bool(random.integers(2))
        first, second = (b, a) if turned else (a, b)
        text = (
            f" which choice meets the first image:\n A.{first['statement']}\nB.{second['statement']}\n"
            ".please answer in A or B"
        )
        parts = (
            "First Image:",
            _mmvp_image(source, a),
            "Second Image:",
            _mmvp_image(source, b),
            text,
        )
        options = (first["statement"], second["statement"])
        answer = "B" if turned else "A"
        items.append(
            Question(f"{a['id']}-{b['id']}", parts, answer, {"pattern": a["pattern"]}, options)
        )
    return Questions(tuple(items), score_letters("pattern"))


def _mmvp_pairs(source: Source) -> list[tuple[Fields, Fields]]:
    rows = source.table("mmvp_vlm/Questions.csv")
    lowered = [
        Fields({key.strip().lower(): value for key, value in row.items()}, row.place)
        for row in rows
    ]
    named = [
        Fields({_MMVP.get(key, key): value for key, value in row.items()}, row.place)
        for row in lowered
    ]
    if len(named) % 2:
        raise DataError(
            "an odd number of rows, pairs are two",
            place=source.path("mmvp_vlm/Questions.csv"),
            fix=UNCHANGED,
        )
    return list(zip(named[::2], named[1::2], strict=True))


_MMVP = {"question id": "id", "type": "pattern"}
"""Spellings of the header."""


def _photo(row: Fields) -> str:
    return f"a photo of {row['statement']}"


def _mmvp_image(source: Source, row: Fields) -> ImageRef:
    return source.image(
        *(
            f"{folder}/{row['pattern']}/{row['id']}{s}"
            for folder in FOLDERS
            for s in (".jpg", ".png")
        )
    )


def score_letters(tag: str) -> Callable[[Any, Answers], Score]:
    """A scorer of letters by MMBench's rules, broken down by a tag."""

    def score(items: Any, answers: Answers) -> Score:
        letters = [
            mmbench_letter(text or "", item.options)
            for item, text in zip(items, answers, strict=True)
        ]
        right = [float(letter == item.answer) for item, letter in zip(items, letters, strict=True)]
        samples = {"accuracy": sample(right)} | by_tag(
            right, [item.tags[tag] for item in items], prefix="accuracy/"
        )
        unparsed = sum(
            letter is None and text is not None
            for letter, text in zip(letters, answers, strict=True)
        )
        return Score(samples, unparsed=unparsed)

    return score
