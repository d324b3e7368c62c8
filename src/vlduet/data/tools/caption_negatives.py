"""Caption edits: a right caption -> one that is wrong by a word or two, the hard negatives of compositional benchmarks.

The seven kinds are SugarCrepe's (Hsieh et al. 2023, arXiv 2306.14610), made here by rules on short word lists:

    replace_obj   a thing becomes another one of its class              a dog on a chair -> a horse on a chair
    replace_att   a colour, size, number, ... becomes another one       two red birds    -> two blue birds
    replace_rel   where or what it does becomes another one             a dog on a chair -> a dog under a chair
    swap_obj      two things on either side of a relation trade places  a dog on a chair -> a chair on a dog
    swap_att      two attributes of one class trade their nouns         red cup, blue bowl -> blue cup, red bowl
    add_obj       a thing of a class that the caption does not name     a dog on a chair -> a dog on a chair and a truck
    add_att       an unusual colour for a thing without any             a dog on a chair -> a green dog on a chair

What the rules cannot do: they read English, know some 150 nouns and nothing of grammar beyond plurals and "a/an", and
take the caption's word for what is in the picture. A replaced or swapped caption contradicts the right one. An *added*
thing or colour is only very probably wrong: the caption may have left out that the dog is, for once, green.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from vlduet.data.content_keys import text_key
from vlduet.data.questions import get_query_and_positives
from vlduet.data.records import ImageRef, Parts, Record
from vlduet.data.tools.lexicon import (
    ATTRIBUTES,
    OBJECTS,
    RELATIONS,
    Lexicon,
    LexiconEntry,
    choose_article,
)
from vlduet.errors import ConfigError, suggest_name


@dataclass(frozen=True, slots=True)
class CaptionNegative:
    """A caption that is wrong."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class _Found:
    """A listed word or phrase where it stands in a caption."""

    start: int
    end: int
    entry: LexiconEntry


Change = tuple[int, int, str]
"""Characters [start, end) of a caption, and what stands there instead."""

_SIDE_BY_SIDE = re.compile(r"\b(and|or|with|near|beside|next to|close to|far from)\b|[,;.]")
"""Between two things that may trade places without a change of meaning."""
# What shows that a noun is not the first half of a longer one ("dog park").
_FOLLOWS_A_NOUN = re.compile(
    r"\s*($|[.,;:!?)]|(and|or|is|are|was|were|with|in|at|that|which|who|[a-z]+ing)\b)", re.I
)
# "a tie", not "a bow tie"
_NOTHING_DESCRIBES = re.compile(
    r"(^|[^\w\s-]\s*|\b(an?|the|this|that|these|those|some|and|or|with|of|his|her|its|their|two|three|four|five)\s+)$",
    re.I,
)
_IS = re.compile(r"\b(is|are|was|were|looks?)\s+$", re.I)
_NO_HEAD = re.compile(
    r"\s+(and|or|of|in|at|with|is|are|was|were|to|from|that|which|who|while)\b", re.I
)


def generate_caption_negatives(
    caption: str,
    *,
    seed: int = 0,
    kinds: Sequence[str] | None = None,
    correct_captions: Collection[str] = (),
) -> list[CaptionNegative]:
    """Wrong captions made of a right one: at most one of each kind, fewer where a rule finds nothing to work on.

    A pure function: the same caption and seed give the same edits, whatever the other kinds.

    Args:
        kinds: keys of `RULES`, in the order wanted; None takes all.
        right: what is known to be right as well. Neither these nor the caption are returned, in any case and spacing.

    Raises:
        ConfigError: an unknown kind.
    """
    check_edit_kinds(kinds or ())
    taken, found = {text_key(text) for text in (caption, *correct_captions)}, []
    for kind in EDIT_RULES if kinds is None else kinds:
        options = list(EDIT_RULES[kind](caption))
        random.Random(f"{seed}:{kind}:{caption}").shuffle(options)
        text = next(
            (
                t
                for t in (_apply(caption, changes) for changes in options)
                if text_key(t) not in taken
            ),
            None,
        )
        if text is not None:
            taken.add(text_key(text))
            found.append(CaptionNegative(kind, text))
    return found


def add_caption_negatives(
    record: Record, *, seed: int = 0, kinds: Sequence[str] | None = None
) -> Record:
    """A pair or a retrieval record with edited copies of its right answers as further negatives: at most one of each kind.

    Of several answers, and several texts in one, the first that a kind's rule can work on is edited, in an order drawn
    by seed and id. ``metadata["edits"]`` gets the kinds, in the order of the new negatives.

    Raises:
        ConfigError: an unknown kind.
    """
    check_edit_kinds(kinds or ())
    _, positive = get_query_and_positives(record)
    places = [
        (parts, i) for parts in positive for i, part in enumerate(parts) if isinstance(part, str)
    ]
    random.Random(f"{seed}:{record.id}").shuffle(places)
    right = [part for parts in positive for part in parts if isinstance(part, str)]
    known = {_parts_key(parts) for parts in (*positive, *record.negative)}
    made: dict[str, Parts] = {}
    for kind in EDIT_RULES if kinds is None else kinds:
        for parts, i in places:
            found = generate_caption_negatives(
                str(parts[i]), seed=seed, kinds=[kind], correct_captions=right
            )
            edited = (*parts[:i], *(edit.text for edit in found), *parts[i + 1 :])
            if found and _parts_key(edited) not in known:
                known.add(_parts_key(edited))
                made[kind] = edited
                break
    metadata = {**record.metadata, "edits": list(made)} if made else record.metadata
    return replace(record, negative=(*record.negative, *made.values()), metadata=metadata)


def check_edit_kinds(kinds: Collection[str]) -> None:
    """Raises ConfigError for a name that is none of `RULES`."""
    for kind in kinds:
        if kind not in EDIT_RULES:
            raise ConfigError(
                f"no edit '{kind}'", place="--kinds", fix=suggest_name(kind, EDIT_RULES)
            )


# ------------------------------------------------------------------ the rules: a caption -> ways to change it


def replace_obj(caption: str) -> Iterator[list[Change]]:
    """Another thing of the class, in the same number, that the caption does not name."""
    yield from _replaced(caption, _things(caption), OBJECTS)


def replace_att(caption: str) -> Iterator[list[Change]]:
    """Another attribute of the class that the caption does not name."""
    yield from _replaced(caption, _attributes(caption), ATTRIBUTES)


def replace_rel(caption: str) -> Iterator[list[Change]]:
    """Another place or action of the class that the caption does not name."""
    yield from _replaced(caption, list(_find(caption, RELATIONS)), RELATIONS)


def swap_obj(caption: str) -> Iterator[list[Change]]:
    """Two neighbouring things with a relation between them that changes when they trade places, each in the other's
    number."""
    relations = list(_find(caption, RELATIONS))
    for one, other in pairwise(_things(caption)):
        between = caption[one.end : other.start]
        directed = any(one.end <= r.start and r.end <= other.start for r in relations)
        if (
            one.entry.lemma != other.entry.lemma
            and directed
            and not _SIDE_BY_SIDE.search(between.lower())
        ):
            yield [
                (
                    one.start,
                    one.end,
                    OBJECTS.inflect(other.entry.lemma, plural=one.entry.is_plural),
                ),
                (
                    other.start,
                    other.end,
                    OBJECTS.inflect(one.entry.lemma, plural=other.entry.is_plural),
                ),
            ]


def swap_att(caption: str) -> Iterator[list[Change]]:
    """Two attributes of one class that stand before different nouns trade them."""
    attributes = _attributes(caption)
    for i, one in enumerate(attributes):
        for other in attributes[i + 1 :]:
            heads = _head(caption, one, attributes), _head(caption, other, attributes)
            same_class = (
                one.entry.group == other.entry.group and one.entry.lemma != other.entry.lemma
            )
            if same_class and None not in heads and heads[0] != heads[1]:
                yield [
                    (one.start, one.end, other.entry.surface_form),
                    (other.start, other.end, one.entry.surface_form),
                ]


def add_obj(caption: str) -> Iterator[list[Change]]:
    """A thing beside a named one, of a class of which the caption names nothing."""
    things = _things(caption)
    named = {thing.entry.group for thing in things}
    for thing in things:
        if _FOLLOWS_A_NOUN.match(caption[thing.end :]) or _starts_with(
            caption[thing.end :], RELATIONS
        ):
            for group, words in enumerate(OBJECTS.groups):
                if group not in named:
                    yield from (
                        [(thing.end, thing.end, f" and {choose_article(word)} {word}")]
                        for word in words
                    )


def add_att(caption: str) -> Iterator[list[Change]]:
    """A colour that few things have, for a thing that nothing describes, in a caption that does not name this colour."""
    named = {one.entry.lemma for one in _find(caption, ATTRIBUTES)}
    colours = [word for word in ("green", "blue", "purple", "pink") if word not in named]
    for thing in _things(caption):
        if _NOTHING_DESCRIBES.search(caption[: thing.start]):
            shown = caption[thing.start : thing.end]
            yield from (
                [(thing.start, thing.end, f"{colour} {_lowered(shown)}")] for colour in colours
            )


EDIT_RULES: dict[str, Callable[[str], Iterator[list[Change]]]] = {
    "replace_obj": replace_obj,
    "replace_att": replace_att,
    "replace_rel": replace_rel,
    "swap_obj": swap_obj,
    "swap_att": swap_att,
    "add_obj": add_obj,
    "add_att": add_att,
}
"""By the names of SugarCrepe's files."""


# ------------------------------------------------------------------ reading and writing captions


def _find(caption: str, vocabulary: Lexicon) -> Iterator[_Found]:
    """The listed words and phrases of a caption, longest first where they overlap, in order."""
    for match in vocabulary.pattern.finditer(caption):
        yield _Found(match.start(), match.end(), vocabulary.lookup(match[0]))


def _things(caption: str) -> list[_Found]:
    return list(_find(caption, OBJECTS))


def _attributes(caption: str) -> list[_Found]:
    """Listed attributes that are used as such: before a noun, or after "is". In "a glass of milk" glass is a thing."""
    every = list(_find(caption, ATTRIBUTES))
    return [
        a for a in every if _head(caption, a, every) is not None or _IS.search(caption[: a.start])
    ]


def _head(caption: str, attribute: _Found, attributes: Sequence[_Found]) -> str | None:
    """The word that an attribute stands before, other attributes left out; None where there is none."""
    rest, at = caption[attribute.end :], attribute.end
    for following in attributes:  # in order
        if following.start > at and not caption[at : following.start].strip():
            rest, at = caption[following.end :], following.end
    if _NO_HEAD.match(rest) or _starts_with(rest, RELATIONS):
        return None
    word = re.match(r"\s+([A-Za-z][\w'-]*)", rest)
    return word[1].lower() if word else None


def _starts_with(text: str, vocabulary: Lexicon) -> bool:
    """Whether the next words are listed ones."""
    return bool(text[:1].isspace() and vocabulary.pattern.match(text.lstrip()))


def _replaced(caption: str, found: Sequence[_Found], vocabulary: Lexicon) -> Iterator[list[Change]]:
    named = {one.entry.lemma for one in _find(caption, vocabulary)}
    for one in found:
        for word in vocabulary.groups[one.entry.group]:
            if word not in named:
                yield [(one.start, one.end, vocabulary.inflect(word, plural=one.entry.is_plural))]


def _apply(caption: str, changes: Sequence[Change]) -> str:
    """The caption with its changes; "a" and "an" before them, and capitals, follow."""
    for start, end, new in sorted(changes, reverse=True):
        old, before = caption[start:end], caption[:start]
        if match := re.search(r"\b(an?)(\s+)$", before, re.I):
            right = choose_article(new)
            right = right.capitalize() if match[1][0].isupper() else right
            before = f"{before[: match.start()]}{right}{match[2]}"
        if len(old) > 1 and old.isupper():
            new = new.upper()
        elif old[:1].isupper():
            new = new[:1].upper() + new[1:]
        caption = before + new + caption[end:]
    return caption


def _lowered(word: str) -> str:
    """A capital at the beginning goes; all capitals stay."""
    return word if len(word) > 1 and word.isupper() else word[:1].lower() + word[1:]


def _parts_key(parts: Parts) -> tuple[str, ...]:
    return tuple(part.name if isinstance(part, ImageRef) else text_key(part) for part in parts)
