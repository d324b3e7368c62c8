"""Build the corpora of the claims by rule: scenes, sequences and shuffled stories.

    scenes       two stamps side by side, each on a coloured ground. Captions that name the same
                 things can differ in what stands where or on which ground, so a model must bind
                 words to places and colours
    sequences    four stamps in an order, each as its picture or as its name. The same stamps in
                 another order are another sequence
    stories      parts of a document in its order and in other orders

Training sets use training records alone, test sets test records alone; both are drawn with fixed
seeds, so that every run of the study has the same files.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from vlduet.data.formats import read_jsonl
from vlduet.data.images import encode_png, load_image
from vlduet.data.records import ImageRef, Parts, Record
from vlduet.files import replace_folder_atomically, write_text_atomically

NAME_PATTERN = re.compile(r"(An? [A-Za-z][a-z]+(?: [a-z]+)?)\.?")
"""Captions that are names of two words at most after an article."""
GROUNDS = {
    "red": (226, 60, 52),
    "blue": (58, 96, 214),
    "green": (70, 168, 72),
    "yellow": (246, 212, 62),
    "black": (28, 28, 28),
    "white": (255, 255, 255),
}
"""Colour of the ground behind a stamp, and its RGB value."""
SCENE_PIXELS = 224
"""Height and width of a scene."""
SCENES_PER_SPLIT = {"train": 480, "test": 160}
SETS_PER_SPLIT = {"train": 12, "test": 40}
"""Number of sets of four stamps that sequences are made of."""
ORDERS_PER_SET = {"train": 8, "test": 6}
"""Number of orders of every set."""
SEQUENCE_LENGTH = 4
TRAIN_MODALITIES = ["texts", "mixed", "named end"]
"""Forms of every training sequence; see `make_sequence_parts`."""
SEEDS = {"train": 20, "test": 21}
"""Seed of the draws of a split."""
WINDOW_PARTS = 5
"""Number of parts of a story."""
MAX_WINDOW_WORDS = 25
"""Number of words of the longest text in a story."""
NUM_STORIES = 8
"""Number of training stories."""
ORDERS_PER_STORY = 12
COMPLETE_FILE = "complete.json"
"""File that is written last, with what a corpus was built from."""


@dataclass(frozen=True, slots=True)
class NamedStamp:
    """A stamp whose caption is a short name."""

    name: str
    """Name with its article in lower case, such as ``a frog``."""
    image: ImageRef


@dataclass(frozen=True, slots=True)
class SceneHalf:
    """One stamp of a scene."""

    stamp: NamedStamp
    ground: str
    """Key of `GROUNDS`."""


@dataclass(frozen=True, slots=True)
class Scene:
    """Two stamps side by side."""

    left: SceneHalf
    right: SceneHalf
    mentions_right_first: bool
    """Captions name the right stamp first, so that the order of the names says nothing."""


def read_named_stamps(stamps: Path, split: str) -> list[NamedStamp]:
    """Return the stamps of a split whose caption is a short name without a colour, one per name.

    Args:
        stamps: folder of the corpus stamps.
        split: ``train`` or ``test``.

    Raises:
        DataError: the split is missing or broken.
    """
    named: dict[str, NamedStamp] = {}
    for record in read_jsonl(stamps / f"{split}.jsonl"):
        match = NAME_PATTERN.fullmatch(record.short[0]) if record.short else None
        if match is None or record.image is None:
            continue
        name = match[1][0].lower() + match[1][1:]
        if not set(name.split()) & GROUNDS.keys():
            named.setdefault(name, NamedStamp(name, record.image))
    return list(named.values())


# ------------------------------------------------------------------ scenes


def draw_scenes(stamps: Sequence[NamedStamp], *, count: int, seed: int) -> list[Scene]:
    """Draw scenes of two different stamps on two different grounds; at least two stamps needed."""
    draw = random.Random(seed)
    scenes = []
    for _ in range(count):
        pair = draw.sample(list(stamps), 2)
        grounds = draw.sample(list(GROUNDS), 2)
        halves = [SceneHalf(*half) for half in zip(pair, grounds, strict=True)]
        scenes.append(Scene(halves[0], halves[1], draw.random() < 0.5))
    return scenes


def describe_places(scene: Scene) -> str:
    """Return the caption that says which stamp is on which side."""
    phrases = [f"{scene.left.stamp.name} on the left", f"{scene.right.stamp.name} on the right"]
    return _join_phrases(phrases, scene)


def describe_grounds(scene: Scene) -> str:
    """Return the caption that says which stamp is on which ground."""
    halves = (scene.left, scene.right)
    return _join_phrases([f"{half.stamp.name} on {half.ground}" for half in halves], scene)


def describe_scene(scene: Scene) -> str:
    """Return the long caption, which says both."""
    phrases = [
        f"{half.stamp.name} on a {half.ground} ground is on the {side}"
        for half, side in ((scene.left, "left"), (scene.right, "right"))
    ]
    return "This picture shows two things: " + _join_phrases(phrases, scene, capital=False)


def _join_phrases(phrases: list[str], scene: Scene, *, capital: bool = True) -> str:
    """Return two phrases as one sentence, in the order of the scene's captions."""
    if scene.mentions_right_first:
        phrases = phrases[::-1]
    text = f"{phrases[0]} and {phrases[1]}."
    return text[0].upper() + text[1:] if capital else text


def swap_stamps(scene: Scene) -> Scene:
    """Return the scene with its two stamps exchanged; the grounds stay where they are."""
    return Scene(
        SceneHalf(scene.right.stamp, scene.left.ground),
        SceneHalf(scene.left.stamp, scene.right.ground),
        scene.mentions_right_first,
    )


def replace_ground(scene: Scene) -> Scene:
    """Return the scene with another ground on the left: the first of `GROUNDS` that is unused."""
    used = {scene.left.ground, scene.right.ground}
    unused = next(name for name in GROUNDS if name not in used)
    return Scene(SceneHalf(scene.left.stamp, unused), scene.right, scene.mentions_right_first)


def replace_stamp(scene: Scene, stamp: NamedStamp) -> Scene:
    """Return the scene with another stamp on the left."""
    return Scene(SceneHalf(stamp, scene.left.ground), scene.right, scene.mentions_right_first)


def describe_addition(scene: Scene, stamp: NamedStamp) -> str:
    """Return the caption of places with a thing that the scene does not show."""
    return f"{describe_places(scene).rstrip('.')} and {stamp.name} in the middle."


def draw_scene_image(scene: Scene) -> Image.Image:
    """Return the picture of a scene, `SCENE_PIXELS` high and wide.

    Raises ImageError for a stamp that cannot be read.
    """
    width = SCENE_PIXELS // 2
    canvas = Image.new("RGB", (SCENE_PIXELS, SCENE_PIXELS))
    for column, half in enumerate((scene.left, scene.right)):
        colour = GROUNDS[half.ground]
        tile = Image.new("RGB", (width, SCENE_PIXELS), colour)
        stamp = ImageOps.contain(load_image(half.stamp.image), (width - 8, width - 8))
        # Stamps are read on white; where they are white, the ground shines through.
        mask = stamp.convert("L").point(lambda level: 255 if level < 250 else 0)
        corner = ((width - stamp.width) // 2, (SCENE_PIXELS - stamp.height) // 2)
        tile.paste(stamp, corner, mask)
        canvas.paste(tile, (column * width, 0))
    return canvas


def list_caption_edits(
    scenes: Sequence[Scene], stamps: Sequence[NamedStamp]
) -> dict[str, list[tuple[int, str, str]]]:
    """Return pairs of a right and a wrong caption by the kind of the error.

    Kinds are ``swapped things``, ``swapped grounds``, ``replaced things``, ``replaced grounds`` and
    ``added things``.

    Args:
        scenes: the scenes; every scene gives one pair of each kind.
        stamps: at least three stamps, of which the one after the left one that the scene does not
            show is the replaced or added thing.

    Returns:
        kind -> (index of the scene, right caption, wrong caption), in the order of the scenes.
    """
    position = {stamp.name: i for i, stamp in enumerate(stamps)}
    edits: dict[str, list[tuple[int, str, str]]] = {}
    for index, scene in enumerate(scenes):
        scene_names = {scene.left.stamp.name, scene.right.stamp.name}
        start = position[scene.left.stamp.name] + 1
        candidates = (stamps[(start + step) % len(stamps)] for step in range(len(stamps)))
        other = next(stamp for stamp in candidates if stamp.name not in scene_names)
        places, grounds = describe_places(scene), describe_grounds(scene)
        wrong = {
            "swapped things": (places, describe_places(swap_stamps(scene))),
            "swapped grounds": (grounds, describe_grounds(swap_stamps(scene))),
            "replaced things": (places, describe_places(replace_stamp(scene, other))),
            "replaced grounds": (grounds, describe_grounds(replace_ground(scene))),
            "added things": (places, describe_addition(scene, other)),
        }
        for kind, captions in wrong.items():
            edits.setdefault(kind, []).append((index, *captions))
    return edits


# ------------------------------------------------------------------ sequences


@dataclass(frozen=True, slots=True)
class StampSequence:
    """Stamps in an order."""

    set_index: int
    """Number of the set that the stamps are from; all its orders have the same number."""
    stamps: tuple[NamedStamp, ...]


def draw_sequences(
    stamps: Sequence[NamedStamp], *, num_sets: int, num_orders: int, seed: int
) -> list[StampSequence]:
    """Draw sets of `SEQUENCE_LENGTH` stamps and different orders of each, set by set.

    Sets share no stamp as long as there are enough; then the next round of draws begins.
    """
    draw = random.Random(seed)
    deck: list[NamedStamp] = []
    sequences = []
    for index in range(num_sets):
        if len(deck) < SEQUENCE_LENGTH:
            deck = draw.sample(list(stamps), len(stamps))
        members = [deck.pop() for _ in range(SEQUENCE_LENGTH)]
        for order in draw.sample(list(itertools.permutations(members)), num_orders):
            sequences.append(StampSequence(index, order))
    return sequences


def make_sequence_parts(sequence: StampSequence, modality: str) -> tuple[ImageRef | str, ...]:
    """Return the parts of a sequence.

    Args:
        modality: ``images``; ``texts`` (``A frog.``); ``mixed``, which begins with an image and
            alternates; or ``named end``, images with a text at the end, so that a language loss has
            something to learn.
    """
    parts: list[ImageRef | str] = []
    for index, stamp in enumerate(sequence.stamps):
        is_image = {
            "images": True,
            "texts": False,
            "mixed": index % 2 == 0,
            "named end": index < len(sequence.stamps) - 1,
        }[modality]
        parts.append(stamp.image if is_image else f"{stamp.name[0].upper()}{stamp.name[1:]}.")
    return tuple(parts)


# ------------------------------------------------------------------ stories


def draw_windows(documents: list[Record], draw: random.Random) -> list[Parts]:
    """Return one window of distinct parts with an image for every document that has one."""
    windows: list[Parts] = []
    for record in documents:
        parts = [
            part
            for part in record.parts
            if isinstance(part, ImageRef) or len(part.split()) <= MAX_WINDOW_WORDS
        ]
        candidates = []
        for start in range(len(parts) - WINDOW_PARTS + 1):
            window = tuple(parts[start : start + WINDOW_PARTS])
            has_image = any(isinstance(part, ImageRef) for part in window)
            if has_image and len(set(window)) == WINDOW_PARTS:
                candidates.append(window)
        if candidates:
            windows.append(draw.choice(candidates))
    return windows


def draw_story_orders(windows: Sequence[Parts], *, num_orders: int, seed: int) -> list[Parts]:
    """Return every window in its own order and in `num_orders` - 1 others, window by window."""
    draw = random.Random(seed)
    stories: list[Parts] = []
    for window in windows:
        orders = list(itertools.permutations(window))
        stories += [orders[0], *draw.sample(orders[1:], num_orders - 1)]
    return stories


# ------------------------------------------------------------------ files


def build_corpora(data: Path, folder: Path) -> None:
    """Write ``train.jsonl`` and images of scenes, sequences and stories into a folder.

    A corpus that is complete, and of the same rules and sources, is left as it is.

    Args:
        data: folder with the corpora stamps and campaigns.
        folder: parent of the three corpora; created if missing.

    Raises:
        DataError: a corpus is missing or broken.
    """
    named = read_named_stamps(data / "stamps", "train")
    documents = list(read_jsonl(data / "campaigns" / "train.jsonl"))
    windows = draw_windows(documents, random.Random(SEEDS["train"]))[:NUM_STORIES]
    source = {
        "stamps": [stamp.name for stamp in named],
        "documents": [record.id for record in documents],
        "counts": [SCENES_PER_SPLIT, SETS_PER_SPLIT, ORDERS_PER_SET, NUM_STORIES, ORDERS_PER_STORY],
        "seeds": SEEDS,
        "modalities": TRAIN_MODALITIES,
    }
    writers = {
        "scenes": lambda draft: _write_scenes(named, draft),
        "sequences": lambda draft: _write_sequences(named, draft),
        "stories": lambda draft: _write_stories(windows, draft),
    }
    for name, write in writers.items():
        path = folder / name / COMPLETE_FILE
        if path.is_file() and json.loads(path.read_text(encoding="utf-8")) == source:
            continue
        with replace_folder_atomically(folder / name, marker=COMPLETE_FILE) as draft:
            (draft / "images").mkdir(parents=True)
            write(draft)
            write_text_atomically(draft / COMPLETE_FILE, json.dumps(source) + "\n")


def _write_scenes(stamps: Sequence[NamedStamp], folder: Path) -> None:
    """Write the training scenes into a folder: pairs with two short captions and a long one."""
    scenes = draw_scenes(stamps, count=SCENES_PER_SPLIT["train"], seed=SEEDS["train"])
    rows = []
    for number, scene in enumerate(scenes):
        name = f"images/{number:04}.png"
        (folder / name).write_bytes(encode_png(draw_scene_image(scene)))
        short = [describe_places(scene), describe_grounds(scene)]
        row = {"id": f"{number:04}", "image": name, "short": short, "long": describe_scene(scene)}
        rows.append(row)
    _write_rows(rows, folder)


def _write_sequences(stamps: Sequence[NamedStamp], folder: Path) -> None:
    """Write the training sequences into a folder: documents of all three modalities."""
    sequences = draw_sequences(
        stamps,
        num_sets=SETS_PER_SPLIT["train"],
        num_orders=ORDERS_PER_SET["train"],
        seed=SEEDS["train"],
    )
    documents = []
    for sequence in sequences:
        for modality in TRAIN_MODALITIES:
            documents.append(make_sequence_parts(sequence, modality))
    _write_documents(documents, folder)


def _write_stories(windows: Sequence[Parts], folder: Path) -> None:
    """Write the training stories in all their orders into a folder."""
    _write_documents(
        draw_story_orders(windows, num_orders=ORDERS_PER_STORY, seed=SEEDS["train"]), folder
    )


def _write_documents(documents: Sequence[Parts], folder: Path) -> None:
    """Write interleaved records with their images, each distinct image once."""
    names: dict[ImageRef, str] = {}
    rows = []
    for number, document in enumerate(documents):
        parts: list[dict[str, str]] = []
        for part in document:
            if isinstance(part, str):
                parts.append({"text": part})
                continue
            if part not in names:
                names[part] = f"images/{len(names):04}.png"
                (folder / names[part]).write_bytes(encode_png(load_image(part)))
            parts.append({"image": names[part]})
        rows.append({"id": f"{number:04}", "parts": parts})
    _write_rows(rows, folder)


def _write_rows(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """Write records as train.jsonl."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_text_atomically(folder / "train.jsonl", "".join(lines))


def make_test_scenes(stamps: Path) -> tuple[list[Scene], list[Record], list[NamedStamp]]:
    """Return the test scenes, a record of each with its image in memory, and the test stamps."""
    named = read_named_stamps(stamps, "test")
    scenes = draw_scenes(named, count=SCENES_PER_SPLIT["test"], seed=SEEDS["test"])
    records = []
    for number, scene in enumerate(scenes):
        image = ImageRef(data=encode_png(draw_scene_image(scene)))
        record = Record(
            id=f"{number:04}",
            image=image,
            short=(describe_places(scene), describe_grounds(scene)),
            long=describe_scene(scene),
        )
        records.append(record)
    return scenes, records, named
