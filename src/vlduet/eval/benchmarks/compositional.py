"""Compositionality: Winoground, SugarCrepe, SugarCrepe++ and MMVP-VLM.

A small change of a text or an image changes the meaning. All comparisons are strict: a model that
gives two texts the same score is wrong on them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vlduet.data.records import ImageRef
from vlduet.errors import DataError
from vlduet.eval.answers import parse_mmbench_letter
from vlduet.eval.benchmarks.multiple_choice import make_letter_scorer
from vlduet.eval.benchmarks.official_files import USE_OFFICIAL_FILE, OfficialFiles, OfficialObject
from vlduet.eval.benchmarks.tasks import AnswerTask, PairItem, PairTask, Question

Floats = NDArray[np.floating]

# ------------------------------------------------------------------ Winoground


def load_winoground(files: OfficialFiles) -> PairTask:
    """Return Winoground's 400 items of two captions with the same words and two images.

    Chance is 25 % for the text score, 25 % for the image score and 16.7 % for the group score. The
    group of an item is its ``collapsed_tag``, or empty. Rows are read from
    ``winoground/examples.jsonl`` with ``images/``, or else from ``winoground/*.parquet``, which
    contain the images. File hashes are stored in `files.hashes`; a missing file or image raises
    DataError.
    """
    if files.has_file("winoground/examples.jsonl"):
        rows = files.read_json_lines("winoground/examples.jsonl")
    else:
        rows = list(files.iter_parquet_rows("winoground/*.parquet"))
    items = []
    for row in rows:
        item = PairItem(
            str(row["id"]),
            texts=(row["caption_0"], row["caption_1"]),
            images=tuple(_read_winoground_image(files, row, f"image_{i}") for i in (0, 1)),
            group=str(row.get("collapsed_tag", "")),
        )
        items.append(item)
    return PairTask(tuple(items), decide_winoground)


def _read_winoground_image(files: OfficialFiles, row: OfficialObject, key: str) -> ImageRef:
    """Return the image that a field names (examples.jsonl) or contains as bytes (parquet).

    A named image is searched with and without ``.png``; DataError is raised if it is missing.
    """
    if isinstance(row[key], str):
        stem = f"winoground/images/{row[key]}"
        return files.find_image(stem, f"{stem}.png")
    return ImageRef(data=row.get_object(key)["bytes"])


def decide_winoground(similarity: Floats, text_similarity: Floats) -> dict[str, bool]:
    """Return whether an item is correct by the scores ``text``, ``image`` and ``group``.

    ``text``: each image prefers its caption. ``image``: each caption prefers its image. ``group``:
    both. Ties and NaN are wrong.

    Args:
        similarity: text-image cosines, float[2, 2]; caption i belongs to image i.
        text_similarity: not used.
    """
    s = similarity
    text = bool(s[0, 0] > s[1, 0] and s[1, 1] > s[0, 1])
    image = bool(s[0, 0] > s[0, 1] and s[1, 1] > s[1, 0])
    return {"text": text, "image": image, "group": text and image}


# ------------------------------------------------------------------ SugarCrepe

REPLACE_SUBSETS = ("replace_obj", "replace_att", "replace_rel")
SWAP_SUBSETS = ("swap_obj", "swap_att")
ADD_SUBSETS = ("add_obj", "add_att")
SUGARCREPE_AVERAGES = {
    "mean": REPLACE_SUBSETS + SWAP_SUBSETS + ADD_SUBSETS,
    "replace": REPLACE_SUBSETS,
    "swap": SWAP_SUBSETS,
    "add": ADD_SUBSETS,
}
"""Name -> averaged subsets. As in VladVA's ablations, subsets count equally, not items."""
SUGARCREPE_PLUS_AVERAGES = {
    "mean": REPLACE_SUBSETS + SWAP_SUBSETS,
    "replace": REPLACE_SUBSETS,
    "swap": SWAP_SUBSETS,
}


def load_sugarcrepe(files: OfficialFiles) -> PairTask:
    """Return SugarCrepe's seven subsets: an image, its caption and a hard negative per item.

    The texts of an item are (caption, negative), its id is ``SUBSET/KEY`` and its group the subset.
    File hashes are stored in `files.hashes`; a missing file or image raises DataError.
    """
    items = []
    for subset in SUGARCREPE_AVERAGES["mean"]:
        for key, row in files.read_named_objects(f"sugarcrepe/{subset}.json").items():
            texts = (row["caption"], row["negative_caption"])
            items.append(PairItem(f"{subset}/{key}", texts, _find_coco_image(files, row), subset))
    return PairTask(tuple(items), decide_sugarcrepe, SUGARCREPE_AVERAGES)


def decide_sugarcrepe(similarity: Floats, text_similarity: Floats) -> dict[str, bool]:
    """Return ``accuracy``: the image is nearer to its caption than to the negative.

    Args:
        similarity: text-image cosines, float[2, 1].
        text_similarity: not used.
    """
    return {"accuracy": bool(similarity[0, 0] > similarity[1, 0])}


def load_sugarcrepe_plus(files: OfficialFiles) -> PairTask:
    """Return SugarCrepe++'s five subsets: an image, two captions of one meaning and a negative.

    The texts of an item are in this order, its id is ``SUBSET/ID`` and its group the subset. File
    hashes are stored in `files.hashes`; a missing file or image raises DataError.
    """
    items = []
    for subset in SUGARCREPE_PLUS_AVERAGES["mean"]:
        for row in files.read_objects(f"sugarcrepe_pp/{subset}.json"):
            texts = (row["caption"], row["caption2"], row["negative_caption"])
            key = f"{subset}/{row['id']}"
            items.append(PairItem(key, texts, _find_coco_image(files, row), subset))
    return PairTask(tuple(items), decide_sugarcrepe_plus, SUGARCREPE_PLUS_AVERAGES)


def decide_sugarcrepe_plus(similarity: Floats, text_similarity: Floats) -> dict[str, bool]:
    """Return whether an item is correct by ``ITT``, ``TOT``, ``image_caption1``/``2``.

    ``ITT``: the image is nearer to both captions than to the negative; the last two say it of each
    caption alone. ``TOT``: the captions are nearer to each other than either is to the negative.
    Ties and NaN are wrong.

    Args:
        similarity: text-image cosines, float[3, 1], in the order caption, caption, negative.
        text_similarity: text-text cosines, float[3, 3], in the same order.
    """
    first = bool(similarity[0, 0] > similarity[2, 0])
    second = bool(similarity[1, 0] > similarity[2, 0])
    paraphrase = text_similarity[0, 1]
    text_only = bool(paraphrase > text_similarity[0, 2] and paraphrase > text_similarity[1, 2])
    return {
        "ITT": first and second,
        "TOT": text_only,
        "image_caption1": first,
        "image_caption2": second,
    }


def _find_coco_image(files: OfficialFiles, row: OfficialObject) -> tuple[ImageRef]:
    """Return the only image of an item of SugarCrepe."""
    return (files.find_image(f"coco/val2017/{row['filename']}"),)


# ------------------------------------------------------------------ MMVP-VLM

MMVP_QUESTIONS = "mmvp_vlm/Questions.csv"
MMVP_FOLDERS = ("mmvp_vlm/MMVP_VLM_Images", "mmvp_vlm/MLLM_VLM Images")
"""Image folder as the README and as the official script spell it."""
MMVP_COLUMNS = {"question id": "id", "type": "pattern"}
"""Lower-case column names of the file -> names used here."""


def load_mmvp_vlm(files: OfficialFiles) -> PairTask:
    """Return MMVP-VLM's pairs, 15 for each of nine visual patterns, scored by `decide_mmvp`.

    An item contains both statements, as "a photo of ...", and both images; its group is the
    pattern. File hashes are stored in `files.hashes`; a missing file or image raises DataError. An
    odd number of rows raises it too.
    """
    items = []
    for first, second in _read_mmvp_pairs(files):
        texts = tuple(f"a photo of {row['statement']}" for row in (first, second))
        images = (_find_mmvp_image(files, first), _find_mmvp_image(files, second))
        items.append(PairItem(_pair_id(first, second), texts, images, first["pattern"]))
    patterns = tuple(dict.fromkeys(item.group for item in items))
    return PairTask(tuple(items), decide_mmvp, {"mean": patterns})


def decide_mmvp(similarity: Floats, text_similarity: Floats) -> dict[str, bool]:
    """Return ``pair``: Winoground's image score, for text-image cosines float[2, 2]."""
    return {"pair": decide_winoground(similarity, text_similarity)["image"]}


def load_mmvp_questions(files: OfficialFiles) -> AnswerTask:
    """Return the pairs of MMVP-VLM as questions with two options, as Sugar asks them.

    Both images are shown, and the first statement of a pair is always correct; `files.seed` decides
    whether it is option A or B. Letters are scored per question and by ``pattern``, so that the
    accuracy does not compare with the pair accuracy of CLIP models. File hashes are stored in
    `files.hashes`; a missing file or image raises DataError. An odd number of rows raises it too.
    """
    random = np.random.default_rng(files.seed)
    items = []
    for first, second in _read_mmvp_pairs(files):
        is_swapped = bool(random.integers(2))
        options = (first["statement"], second["statement"])
        if is_swapped:
            options = options[::-1]
        prompt = (
            "First Image:",
            _find_mmvp_image(files, first),
            "Second Image:",
            _find_mmvp_image(files, second),
            f" which choice meets the first image:\n A.{options[0]}\nB.{options[1]}\n"
            ".please answer in A or B",
        )
        reference = "B" if is_swapped else "A"
        tags = {"pattern": first["pattern"]}
        items.append(Question(_pair_id(first, second), prompt, reference, tags, options))
    return AnswerTask(
        tuple(items), make_letter_scorer(parse_mmbench_letter, {"accuracy/": "pattern"})
    )


def _read_mmvp_pairs(files: OfficialFiles) -> list[tuple[OfficialObject, OfficialObject]]:
    """Return consecutive rows of ``mmvp_vlm/Questions.csv`` as pairs.

    Columns are in lower case, with ``id`` and ``pattern`` for two of them (see `MMVP_COLUMNS`). The
    file hash is stored in `files.hashes`. A missing file or an odd number of rows raises DataError.
    """
    rows = []
    for row in files.read_table(MMVP_QUESTIONS):
        cells = {}
        for column, value in row.items():
            name = column.strip().lower()
            cells[MMVP_COLUMNS.get(name, name)] = value
        rows.append(OfficialObject(cells, row.place))
    if len(rows) % 2:
        message = f"{len(rows)} rows, but every pair has two"
        place = files.find_path(MMVP_QUESTIONS)
        raise DataError(message, place=place, fix=USE_OFFICIAL_FILE)
    return list(zip(rows[::2], rows[1::2], strict=True))


def _pair_id(first: OfficialObject, second: OfficialObject) -> str:
    """Return the id of a pair of rows."""
    return f"{first['id']}-{second['id']}"


def _find_mmvp_image(files: OfficialFiles, row: OfficialObject) -> ImageRef:
    """Return the image of a row, in either image folder."""
    stems = [f"{folder}/{row['pattern']}/{row['id']}" for folder in MMVP_FOLDERS]
    return files.find_image(*(f"{stem}{suffix}" for stem in stems for suffix in (".jpg", ".png")))
