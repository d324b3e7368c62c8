"""Questions with options of the suite ``abilities``, answered by likelihood.

    existence  two stamps side by side: is there a ...?  absent objects are random, popular or near
    odd_one    four stamps: which of these differs from the others?
    change     two emoji whose names differ in one word: what has changed?

The questions and their wrong options follow from held-out records by fixed rules; what is drawn is
drawn with the run's seed. No wrong option is also right: names of absent objects share no word with
the names of the objects in the image.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from vlduet.data.records import ImageRef
from vlduet.data.tools.instructions import (
    ORDINALS,
    NamedImage,
    find_named_images,
    format_existence_question,
    present_pictures,
)
from vlduet.eval.benchmarks.abilities import (
    find_difference,
    kinds_of,
    name_of,
    normalize_name,
    require_items,
)
from vlduet.eval.benchmarks.builtin import captioned_images, find_one_word_pairs, read_split
from vlduet.eval.benchmarks.composites import join_side_by_side
from vlduet.eval.benchmarks.official_files import OfficialFiles
from vlduet.eval.benchmarks.tasks import ChoiceTask, Question

MAX_IMAGES = 40
"""Maximum number of images with two stamps, each asked about once per kind of absent object."""
MAX_QUESTIONS = 60
"""Maximum number of questions of the other two benchmarks."""
NUM_ALIKE = 3
"""Number of images of one kind beside the one that differs."""
NUM_POPULAR = 10
"""Number of the most frequent names that are popular; they take turns."""
ODD_ONE_QUESTION = "Three of these pictures show the same kind of thing. Which one differs?"
CHANGE_QUESTION = "What has changed from the first picture to the second?"
YES_NO = ("Yes", "No")


# ------------------------------------------------------------------ existence


def load_existence(files: OfficialFiles) -> ChoiceTask:
    """Return the questions of `make_existence_questions` on the test split of stamps.

    The file hash is stored in `files.hashes`. A missing or empty split, or one without two objects
    that can be asked about, raises DataError; an unreadable image ImageError.
    """
    objects = find_named_images(read_split(files, "stamps"), group_key="category")
    items = make_existence_questions(objects, seed=files.seed)
    require_items(items, files, missing="two stamps with a short name")
    return ChoiceTask(tuple(items), "kind", without_images_too=True)


def make_existence_questions(objects: Sequence[NamedImage], *, seed: int) -> list[Question]:
    """Return pairs of yes-or-no questions about images with two objects side by side.

    Up to `MAX_IMAGES` images are drawn; their two objects share no word and have different groups.
    Every image gives, for each kind of absent object, a question about one of its objects (left and
    right take turns) and one about the absent object:

        random   an object drawn from all
        popular  one of the `NUM_POPULAR` names that most records show; they take turns
        near     an object of the group of the object that is asked about

    An absent object shares no word with either object. A kind without one has no questions for this
    image. The tag ``kind`` names it; options are `YES_NO` and the reference is the index.
    """
    random = np.random.default_rng(seed)
    order = [objects[i] for i in random.permutation(len(objects))]
    object_by_name = {name_of(named.record): named for named in objects}
    frequency = Counter(name_of(named.record) for named in objects)
    popular = [object_by_name[name] for name, _ in frequency.most_common(NUM_POPULAR)]
    items: list[Question] = []
    for number, (left, right) in enumerate(_draw_pairs(order)):
        image = join_side_by_side(left.image, right.image)
        shuffled = [order[i] for i in random.permutation(len(order))]
        turn = number % len(popular)
        for n, kind in enumerate(("random", "popular", "near")):
            present = (left, right)[(number + n) % 2]
            candidates = popular[turn:] + popular[:turn] if kind == "popular" else shuffled
            if kind == "near":
                candidates = [named for named in candidates if named.group == present.group]
            present_tokens = left.tokens | right.tokens
            absent = next(
                (named for named in candidates if present_tokens.isdisjoint(named.tokens)),
                None,
            )
            if absent is None:
                continue
            for answer, named in enumerate((present, absent)):
                prompt = (image, format_existence_question(named.name))
                key = f"{kind}/{number}/{YES_NO[answer].lower()}"
                items.append(Question(key, prompt, answer, {"kind": kind}, YES_NO))
    return items


def _draw_pairs(objects: Sequence[NamedImage]) -> list[tuple[NamedImage, NamedImage]]:
    """Return up to `MAX_IMAGES` pairs of objects without a common word, of different groups.

    Every object is used once at most: the first unused one takes the next one that fits.
    """
    unused = list(objects)
    pairs: list[tuple[NamedImage, NamedImage]] = []
    while unused and len(pairs) < MAX_IMAGES:
        left = unused.pop(0)
        for i, right in enumerate(unused):
            if left.tokens.isdisjoint(right.tokens) and left.group != right.group:
                pairs.append((left, unused.pop(i)))
                break
    return pairs


# ------------------------------------------------------------------ interleaved instructions


def load_odd_one(files: OfficialFiles) -> ChoiceTask:
    """Return questions which of four stamps differs, `MAX_QUESTIONS` at most.

    `NUM_ALIKE` stamps with distinct names are of one kind (the first folder), the odd one of
    another; kinds take turns. Everything is drawn with `files.seed`. The file hash is stored in
    `files.hashes`; a missing or empty split, or too few stamps, raises DataError.
    """
    random = np.random.default_rng(files.seed)
    by_kind: dict[str, dict[str, ImageRef]] = {}
    for record, image in captioned_images(read_split(files, "stamps")):
        by_kind.setdefault(kinds_of(record)[0], {})[name_of(record)] = image
    large_kinds = sorted(kind for kind, images in by_kind.items() if len(images) >= NUM_ALIKE)
    options = tuple(f"The {ordinal} picture" for ordinal in ORDINALS[: NUM_ALIKE + 1])
    items = []
    for number in range(MAX_QUESTIONS if len(by_kind) > 1 and large_kinds else 0):
        kind = large_kinds[number % len(large_kinds)]
        alike = _draw_images(by_kind[kind], NUM_ALIKE, random)
        other_kinds = sorted(by_kind.keys() - {kind})
        odd_kind = other_kinds[random.integers(len(other_kinds))]
        names_alike = by_kind[kind].keys()
        candidates = {n: i for n, i in by_kind[odd_kind].items() if n not in names_alike}
        if not candidates:
            continue
        position = int(random.integers(NUM_ALIKE + 1))
        images = [*alike]
        images.insert(position, _draw_images(candidates, 1, random)[0])
        prompt = present_pictures(images, ODD_ONE_QUESTION)
        items.append(Question(str(number), prompt, position, {}, options))
    require_items(items, files, missing="stamps of two kinds")
    return ChoiceTask(tuple(items), without_images_too=True)


def _draw_images(
    images: Mapping[str, ImageRef], count: int, random: np.random.Generator
) -> list[ImageRef]:
    """Return `count` of the images, in random order, or all where there are fewer."""
    values = list(images.values())
    return [values[i] for i in random.permutation(len(values))[:count]]


def load_change(files: OfficialFiles) -> ChoiceTask:
    """Return questions what has changed from one emoji to another, `MAX_QUESTIONS` at most.

    The two emoji are a pair of `find_one_word_pairs` of one subgroup, in either order. The options
    are "from X to Y" with their words in this order (correct) and in the reverse order, and both
    orders for another pair with neither of these words, so that the options alone tell nothing.
    Everything is drawn with `files.seed`. The file hash is stored in `files.hashes`; a missing or
    empty split, or no pair, raises DataError.
    """
    random = np.random.default_rng(files.seed)
    changes = []
    for pair in find_one_word_pairs(read_split(files, "emoji"), "subgroup"):
        first, second = (normalize_name(text) for text in pair.texts)
        changes.append((pair, find_difference(first, second)))
    items = []
    for n in sorted(random.permutation(len(changes))[:MAX_QUESTIONS]):
        pair, change = changes[n]
        images = pair.images
        if random.integers(2):
            images, change = images[::-1], change[::-1]
        options = [change, change[::-1]]
        # With repetitions, so that a frequent change is as often wrong as it is right.
        other_changes = [other for _, other in changes if set(other).isdisjoint(change)]
        if other_changes:
            other = other_changes[random.integers(len(other_changes))]
            options += [other, other[::-1]]
        order = random.permutation(len(options))
        prompt = present_pictures(images, CHANGE_QUESTION)
        reference = int(np.flatnonzero(order == 0)[0])
        shuffled = tuple(format_change(*options[i]) for i in order)
        items.append(Question(f"{n}/{pair.id}", prompt, reference, {}, shuffled))
    require_items(items, files, missing="emoji whose names differ in one word")
    return ChoiceTask(tuple(items), without_images_too=True)


def format_change(before: str, after: str) -> str:
    """Return the option that a word of the name has changed."""
    return f"From {before} to {after}"
