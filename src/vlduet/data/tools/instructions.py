"""Instruction data by rule: questions about images of pairs that their captions answer.

    describe       [image] What is shown?                         The picture shows a frog.
    choose         [image] Which of these four is it: ...?        The picture shows a frog.
    exists         [image] Is there a cat in the picture?         No, there is no cat. The ...
    exists_in_two  [image 1, image 2] Is there a cat in one ...?  Yes, there is a cat in the ...
    which          [image 1, image 2] Which picture shows a cat?  The second picture shows a cat.
    differ         [image 1, image 2] How do they differ?         The first picture shows ...

Only captions that are names are used, such as "A frog.": an article and a few words. Answers are
whole sentences. Half of the questions "is there" have the answer yes. What is absent, wrong options
and second images are near neighbours in one half, and random in the other. They are names of the
same file, and never right: no caption of an image in question has all their words, or the reverse.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from vlduet.data.content_keys import text_key
from vlduet.data.records import ImageRef, Message, Part, Parts, Record
from vlduet.data.tools.lexicon import choose_article
from vlduet.errors import ConfigError, suggest_name

MAX_NAME_LENGTH = 5
"""Number of words of the longest name, without its article."""
NUM_OPTIONS = 4
MAX_DISTRACTORS = 8
"""Number of images with wrong names that are drawn for a question, at most."""
MAX_DRAWS = 64
"""Number of random images among which they are looked for."""
ORDINALS = ("first", "second", "third", "fourth")

_NAME = re.compile(r"(?:(an?) )?([^\W_][\w'’ -]*)\.?", re.IGNORECASE)
_DETERMINER = re.compile(
    r"(the|this|these|some|any|no|one|two|three|four|five|six|seven|eight|nine|ten|my|your|his|her"
    r"|its|our|their|another) ",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class NamedImage:
    """Image of a pair whose caption is a name."""

    record: Record
    image: ImageRef
    name: str
    """Name with its article, such as ``a brown hen``."""
    tokens_by_caption: tuple[frozenset[str], ...]
    """Words, without articles, of the name and of every other short caption."""
    group: str
    """Value of the metadata key that near neighbours have in common; empty without one."""

    @property
    def tokens(self) -> frozenset[str]:
        """Words of the name, without its article."""
        return self.tokens_by_caption[0]

    def may_show(self, name: NamedImage) -> bool:
        """Return whether the image may be called by the name of another image, too."""
        return any(
            tokens <= name.tokens or name.tokens <= tokens for tokens in self.tokens_by_caption
        )


# ------------------------------------------------------------------ wording


def format_name(caption: str) -> str | None:
    """Return a caption as a name in a sentence, ``a frog``; None if it is none.

    A name has an article, or none and is written in lower case (``grinning face``), and at most
    `MAX_NAME_LENGTH` words; an article is added to a singular.
    """
    text = " ".join(caption.split())
    match = _NAME.fullmatch(text)
    if match is None or _DETERMINER.match(text):
        return None
    article, noun = match[1], match[2]
    if len(noun.split()) > MAX_NAME_LENGTH:
        return None
    if article is None and (not noun[0].islower() or noun.endswith("s")):
        return None
    return f"{(article or choose_article(noun)).lower()} {noun}"


def format_existence_question(name: str, place: str = "in the picture") -> str:
    """Return the question whether there is something, named with its article."""
    return f"Is there {name} {place}?"


def format_presence(name: str, place: str = "in the picture") -> str:
    """Return the answer that there is something."""
    return f"Yes, there is {name} {place}."


def format_absence(name: str) -> str:
    """Return the answer that there is nothing of a name with an article."""
    return f"No, there is no {name.split(maxsplit=1)[1]}."


def format_choice_question(names: Sequence[str]) -> str:
    """Return the question which of several names is right: ``..., a dog or a cat?``."""
    return f"Which of these {_NUMBERS[len(names)]} is it: {', '.join(names[:-1])} or {names[-1]}?"


def format_description(name: str, ordinal: str = "") -> str:
    """Return the statement what a picture shows; `ordinal` is which of several."""
    return f"The {ordinal} picture shows {name}." if ordinal else f"The picture shows {name}."


def present_pictures(images: Sequence[ImageRef], question: str) -> Parts:
    """Return the parts of a turn that names images by their ordinals, and asks a question.

    More images than `ORDINALS` raise ValueError.
    """
    parts: list[Part] = []
    for ordinal, image in zip(ORDINALS[: len(images)], images, strict=True):
        separator = "\n" if parts else ""
        parts += [f"{separator}The {ordinal} picture: ", image]
    return (*parts, f"\n{question}")


DESCRIBE_QUESTION = "What is shown?"
DIFFERENCE_QUESTION = "How do the two pictures differ?"
WHICH_PLACE = "in one of the pictures"
_NUMBERS = {2: "two", 3: "three", 4: "four"}


# ------------------------------------------------------------------ questions


@dataclass(frozen=True, slots=True)
class Draw:
    """Number, distractors and random generator of a question."""

    number: int
    """Number of the image among those that are asked about; decides what takes turns."""
    distractors: tuple[NamedImage, ...]
    """Images with names that are wrong for the image, near neighbours or random ones first."""
    random: random.Random

    @property
    def is_affirmed(self) -> bool:
        """Whether the answer of a question of existence is yes."""
        return self.number % 2 == 0


Turn = tuple[Parts, str]
"""Parts of the question, and the answer."""


def _describe(subject: NamedImage, draw: Draw) -> Turn:
    return (subject.image, DESCRIBE_QUESTION), format_description(subject.name)


def _choose(subject: NamedImage, draw: Draw) -> Turn | None:
    names = list(dict.fromkeys(other.name for other in draw.distractors))[: NUM_OPTIONS - 1]
    if len(names) < NUM_OPTIONS - 1:
        return None
    names.insert(draw.random.randrange(NUM_OPTIONS), subject.name)
    return (subject.image, format_choice_question(names)), format_description(subject.name)


def _ask_existence(subject: NamedImage, draw: Draw) -> Turn:
    if draw.is_affirmed:
        question = format_existence_question(subject.name)
        return (subject.image, question), format_presence(subject.name)
    absent = draw.distractors[0].name
    answer = f"{format_absence(absent)} {format_description(subject.name)}"
    return (subject.image, format_existence_question(absent)), answer


def _ask_existence_in_two(subject: NamedImage, draw: Draw) -> Turn | None:
    images, ordinal, other = _place(subject, draw)
    if draw.is_affirmed:
        question = format_existence_question(subject.name, WHICH_PLACE)
        answer = format_presence(subject.name, f"in the {ordinal} picture")
        return present_pictures(images, question), answer
    absent = next((name for name in draw.distractors[1:] if not other.may_show(name)), None)
    if absent is None:
        return None
    question = format_existence_question(absent.name, WHICH_PLACE)
    return present_pictures(images, question), format_absence(absent.name)


def _ask_which(subject: NamedImage, draw: Draw) -> Turn:
    images, ordinal, _ = _place(subject, draw)
    question = f"Which picture shows {subject.name}?"
    return present_pictures(images, question), format_description(subject.name, ordinal)


def _ask_difference(subject: NamedImage, draw: Draw) -> Turn:
    images, _, other = _place(subject, draw)
    names = (subject.name, other.name) if images[0] is subject.image else (other.name, subject.name)
    sentences = [format_description(name, o) for name, o in zip(names, ORDINALS, strict=False)]
    return present_pictures(images, DIFFERENCE_QUESTION), " ".join(sentences)


def _place(subject: NamedImage, draw: Draw) -> tuple[list[ImageRef], str, NamedImage]:
    """Return the images of a subject and of a distractor in random order.

    The second result is the ordinal of the subject's image, the third the distractor.
    """
    other = draw.distractors[0]
    position = draw.random.randrange(2)
    images = [other.image]
    images.insert(position, subject.image)
    return images, ORDINALS[position], other


QUESTION_RULES: dict[str, Callable[[NamedImage, Draw], Turn | None]] = {
    "describe": _describe,
    "choose": _choose,
    "exists": _ask_existence,
    "exists_in_two": _ask_existence_in_two,
    "which": _ask_which,
    "differ": _ask_difference,
}
"""Kind -> function that makes the question of an image; None without enough other images."""


# ------------------------------------------------------------------ records


def find_named_images(records: Sequence[Record], *, group_key: str = "") -> list[NamedImage]:
    """Return the pairs whose first short caption is a name, in order; see `format_name`.

    Args:
        records: of any kind.
        group_key: metadata key whose value near neighbours have in common.
    """
    subjects = []
    for record in records:
        if record.image is None or not record.short:
            continue
        name = format_name(record.short[0])
        if name is None:
            continue
        tokens = tuple(_list_tokens(caption) for caption in (name, *record.short[1:]))
        group = str(record.metadata.get(group_key, ""))
        subjects.append(NamedImage(record, record.image, name, tokens, group))
    return subjects


def generate_instructions(
    records: Sequence[Record],
    *,
    seed: int = 0,
    kinds: Sequence[str] | None = None,
    group_key: str = "",
) -> Iterator[Record]:
    """Yield chats of one question and answer, of every kind for every image with a name.

    Equal arguments give equal chats. An image without another one that it may not be called by has
    the kind `describe` alone. Ids are ``ID/KIND``; metadata have the kind as ``instruction``.

    Args:
        records: pairs; records of other kinds are left out.
        seed: seed of the draws.
        kinds: keys of `QUESTION_RULES`; None: all.
        group_key: metadata key whose value near neighbours have in common. Without one, they are
            the names that have a word in common.

    Raises:
        ConfigError: an unknown kind.
    """
    selected = list(QUESTION_RULES) if kinds is None else list(kinds)
    check_question_kinds(selected)
    names = _NameIndex(find_named_images(records, group_key=group_key))
    order = list(range(len(names.subjects)))
    # Numbers of images, which decide what takes turns, do not follow the order of the file.
    random.Random(f"{seed}:order").shuffle(order)
    numbers = {index: number for number, index in enumerate(order)}
    for index, subject in enumerate(names.subjects):
        for kind in selected:
            rng = random.Random(f"{seed}:{kind}:{subject.record.id}")
            number = numbers[index]
            distractors = names.draw_distractors(subject, rng, prefers_near=number % 4 < 2)
            if not distractors and kind != "describe":
                continue
            turn = QUESTION_RULES[kind](subject, Draw(number, distractors, rng))
            if turn is not None:
                question, answer = turn
                messages = (Message("user", question), Message("assistant", (answer,)))
                metadata = {"instruction": kind}
                yield Record(f"{subject.record.id}/{kind}", messages=messages, metadata=metadata)


def check_question_kinds(kinds: Sequence[str]) -> None:
    """Raise ConfigError for the first kind that is not a key of `QUESTION_RULES`."""
    for kind in kinds:
        if kind not in QUESTION_RULES:
            fix = suggest_name(kind, QUESTION_RULES)
            raise ConfigError(f"unknown kind of question '{kind}'", place="kinds", fix=fix)


class _NameIndex:
    """Images with names, and which of them are near neighbours."""

    def __init__(self, subjects: Sequence[NamedImage]):
        """Index the images by their groups, or those without a group by their words."""
        self.subjects = subjects
        self._indices_of_key: dict[str, list[int]] = {}
        for index, subject in enumerate(subjects):
            for key in _list_keys(subject):
                self._indices_of_key.setdefault(key, []).append(index)

    def draw_distractors(
        self, subject: NamedImage, rng: random.Random, *, prefers_near: bool
    ) -> tuple[NamedImage, ...]:
        """Draw up to `MAX_DISTRACTORS` images whose names are wrong for a subject, and the reverse.

        Args:
            subject: an image of the index.
            rng: source of the draws, which advances.
            prefers_near: near neighbours come first.
        """
        near: set[int] = set()
        if prefers_near:
            near.update(*(self._indices_of_key[key] for key in _list_keys(subject)))
        indices = rng.sample(sorted(near), len(near))
        indices += rng.sample(range(len(self.subjects)), min(len(self.subjects), MAX_DRAWS))
        distractors: dict[int, NamedImage] = {}
        for index in indices:
            other = self.subjects[index]
            if not subject.may_show(other) and not other.may_show(subject):
                distractors[index] = other
            if len(distractors) == MAX_DISTRACTORS:
                break
        return tuple(distractors.values())


def _list_keys(subject: NamedImage) -> list[str]:
    """Return the keys that near neighbours have in common."""
    if subject.group:
        return [f"group {subject.group}"]
    return [f"word {token}" for token in subject.tokens]


def _list_tokens(text: str) -> frozenset[str]:
    """Return the words of a text in lower case, without articles."""
    return frozenset(re.findall(r"[\w'’-]+", text_key(text))) - {"a", "an", "the"}
