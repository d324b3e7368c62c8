"""Caption negatives: right captions made wrong by a word or two, as in compositional benchmarks.

The seven kinds are those of SugarCrepe (Hsieh et al. 2023, arXiv 2306.14610), made here by rules on
short word lists:

    replace_obj   a thing by another one of its class       a dog on a bed -> a horse on a bed
    replace_att   a colour, size, number, ... by another    two red birds -> two blue birds
    replace_rel   a place or action by another              a dog on a bed -> a dog under a bed
    swap_obj      two things, a relation between them       a dog on a bed -> a bed on a dog
    swap_att      two attributes of one class               red cup, blue hat -> blue cup, red hat
    add_obj       a thing of a class that is not named      a dog -> a dog and a truck
    add_att       an unusual colour                         a dog -> a green dog

The rules read English, know some 150 nouns, no grammar beyond plurals and "a/an", and only what the
caption says of the picture. A replaced or swapped caption contradicts the right one; an *added*
thing or colour is only very probably wrong: the dog may be green, and the caption does not say so.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise

from vlduet.data.content_keys import text_key
from vlduet.data.records import ImageRef, Parts, Record
from vlduet.data.tools.lexicon import (
    ATTRIBUTES,
    OBJECTS,
    RELATIONS,
    Lexicon,
    LexiconEntry,
    choose_article,
)
from vlduet.data.tools.queries import get_query_and_positives
from vlduet.errors import ConfigError, suggest_name


@dataclass(frozen=True, slots=True)
class CaptionNegative:
    """A wrong caption, and the key of `EDIT_RULES` that made it."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class _Match:
    """Word or phrase of a lexicon at the characters [start, end) of a caption."""

    start: int
    end: int
    entry: LexiconEntry


Replacement = tuple[int, int, str]
"""(start, end, text): the text replaces the characters [start, end) of a caption."""

# Between two things that can be swapped without a change of meaning.
_SYMMETRIC = re.compile(r"\b(and|or|with|near|beside|next to|close to|far from)\b|[,;.]")
# After a noun that is not the first half of a longer one, as in "dog park".
_AFTER_NOUN = re.compile(
    r"\s*($|[.,;:!?)]|(and|or|is|are|was|were|with|in|at|that|which|who|[a-z]+ing)\b)", re.I
)
# Before a noun that nothing describes: "a tie", not "a bow tie".
_BEFORE_BARE_NOUN = re.compile(
    r"(^|[^\w\s-]\s*|\b(an?|the|this|that|these|those|some|and|or|with|of"
    r"|his|her|its|their|two|three|four|five)\s+)$",
    re.I,
)
_COPULA = re.compile(r"\b(is|are|was|were|looks?)\s+$", re.I)
_NO_NOUN = re.compile(
    r"\s+(and|or|of|in|at|with|is|are|was|were|to|from|that|which|who|while)\b", re.I
)


def generate_caption_negatives(
    caption: str,
    *,
    seed: int = 0,
    kinds: Sequence[str] | None = None,
    correct_captions: Collection[str] = (),
) -> list[CaptionNegative]:
    """Return wrong captions made of a right one: at most one per kind, none where no rule fits.

    Equal arguments give equal results, and the result of a kind does not depend on the other kinds
    (unless two rules would give the same text). Global random generators are not used.

    Args:
        seed: seed of the choice among possible edits.
        kinds: keys of `EDIT_RULES`, in the order of the result; None means all.
        correct_captions: further right captions. Neither they nor `caption` are returned, whatever
            their case and spacing.

    Raises:
        ConfigError: an unknown kind.
    """
    check_edit_kinds(kinds or ())
    used_keys = {text_key(text) for text in (caption, *correct_captions)}
    negatives = []
    for kind in EDIT_RULES if kinds is None else kinds:
        edits = list(EDIT_RULES[kind](caption))
        random.Random(f"{seed}:{kind}:{caption}").shuffle(edits)
        for replacements in edits:
            text = _apply_replacements(caption, replacements)
            if text_key(text) not in used_keys:
                used_keys.add(text_key(text))
                negatives.append(CaptionNegative(kind, text))
                break
    return negatives


def add_caption_negatives(
    record: Record, *, seed: int = 0, kinds: Sequence[str] | None = None
) -> Record:
    """Return a pair or retrieval record with edited copies of its right answers as negatives.

    At most one negative per kind is appended: of the first text that the rule fits, where all texts
    of all right answers are tried in an order drawn by `seed` and id; the other parts of its answer
    are kept. No right answer or present negative is repeated. ``metadata["edits"]`` of the copy
    lists the kinds in the order of the new negatives; without any, it is not set.

    Args:
        record: a pair or retrieval record; it is not modified.
        kinds: keys of `EDIT_RULES`, in the order of the negatives; None means all.

    Raises:
        ConfigError: an unknown kind.
    """
    check_edit_kinds(kinds or ())
    _, positives = get_query_and_positives(record)
    texts = [
        (parts, i) for parts in positives for i, part in enumerate(parts) if isinstance(part, str)
    ]
    correct_captions = [str(parts[i]) for parts, i in texts]
    random.Random(f"{seed}:{record.id}").shuffle(texts)
    used_keys = {_parts_key(parts) for parts in (*positives, *record.negative)}
    negatives: dict[str, Parts] = {}  # by kind
    for kind in EDIT_RULES if kinds is None else kinds:
        for parts, i in texts:
            edits = generate_caption_negatives(
                str(parts[i]), seed=seed, kinds=[kind], correct_captions=correct_captions
            )
            edited = (*parts[:i], *(edit.text for edit in edits), *parts[i + 1 :])
            if edits and _parts_key(edited) not in used_keys:
                used_keys.add(_parts_key(edited))
                negatives[kind] = edited
                break
    metadata = {**record.metadata, "edits": list(negatives)} if negatives else record.metadata
    negative = (*record.negative, *negatives.values())
    return replace(record, negative=negative, metadata=metadata)


def _parts_key(parts: Parts) -> tuple[str, ...]:
    return tuple(part.name if isinstance(part, ImageRef) else text_key(part) for part in parts)


def check_edit_kinds(kinds: Collection[str]) -> None:
    """Raise ConfigError for a name that is no key of `EDIT_RULES`."""
    for kind in kinds:
        if kind not in EDIT_RULES:
            fix = suggest_name(kind, EDIT_RULES)
            raise ConfigError(f"no edit '{kind}'", place="--kinds", fix=fix)


# --- rules: each yields the possible edits of a caption, as lists of replacements


def replace_obj(caption: str) -> Iterator[list[Replacement]]:
    """Yield edits of one thing to another of its class, in the same number, not named yet."""
    yield from _replace_by_class(caption, _find_objects(caption), OBJECTS)


def replace_att(caption: str) -> Iterator[list[Replacement]]:
    """Yield edits of one attribute to another of its class that the caption does not name."""
    yield from _replace_by_class(caption, _find_attributes(caption), ATTRIBUTES)


def replace_rel(caption: str) -> Iterator[list[Replacement]]:
    """Yield edits of one place or action to another of its class that is not named yet."""
    yield from _replace_by_class(caption, list(_find_matches(caption, RELATIONS)), RELATIONS)


def _replace_by_class(
    caption: str, matches: Sequence[_Match], lexicon: Lexicon
) -> Iterator[list[Replacement]]:
    """Yield, for each match and each lemma of its class that is not in the caption, one edit.

    An edit has one replacement: of the match by the lemma, in the plural if the match is plural.
    """
    named = {match.entry.lemma for match in _find_matches(caption, lexicon)}
    for match in matches:
        for lemma in lexicon.groups[match.entry.group]:
            if lemma not in named:
                form = lexicon.inflect(lemma, plural=match.entry.is_plural)
                yield [(match.start, match.end, form)]


def swap_obj(caption: str) -> Iterator[list[Replacement]]:
    """Yield swaps of neighbouring things with a directed relation between them.

    A relation is directed unless a comma or a word such as "and" or "with" stands there too. Each
    thing takes the number (singular or plural) of the place that it moves to.
    """
    relations = list(_find_matches(caption, RELATIONS))
    for first, second in pairwise(_find_objects(caption)):
        between = caption[first.end : second.start]
        is_directed = any(
            first.end <= relation.start and relation.end <= second.start for relation in relations
        )
        if not is_directed or _SYMMETRIC.search(between.lower()):
            continue
        if first.entry.lemma != second.entry.lemma:
            new_first = OBJECTS.inflect(second.entry.lemma, plural=first.entry.is_plural)
            new_second = OBJECTS.inflect(first.entry.lemma, plural=second.entry.is_plural)
            yield [(first.start, first.end, new_first), (second.start, second.end, new_second)]


def swap_att(caption: str) -> Iterator[list[Replacement]]:
    """Yield swaps of two different attributes of one class that precede different nouns."""
    attributes = _find_attributes(caption)
    for first, second in combinations(attributes, 2):
        nouns = [_find_described_noun(caption, match, attributes) for match in (first, second)]
        is_same_class = first.entry.group == second.entry.group
        if not is_same_class or first.entry.lemma == second.entry.lemma:
            continue
        if None not in nouns and nouns[0] != nouns[1]:
            yield [
                (first.start, first.end, second.entry.surface_form),
                (second.start, second.end, first.entry.surface_form),
            ]


def add_obj(caption: str) -> Iterator[list[Replacement]]:
    """Yield insertions, as " and a truck", of a thing of a class of which nothing is named.

    Insertions follow each named thing that ends its noun phrase; without any, nothing is yielded.
    """
    objects = _find_objects(caption)
    named_groups = {match.entry.group for match in objects}
    new_lemmas = [
        lemma
        for group, lemmas in enumerate(OBJECTS.groups)
        if group not in named_groups
        for lemma in lemmas
    ]
    for match in objects:
        following = caption[match.end :]
        if _AFTER_NOUN.match(following) or _starts_with(following, RELATIONS):
            for lemma in new_lemmas:
                yield [(match.end, match.end, f" and {choose_article(lemma)} {lemma}")]


def add_att(caption: str) -> Iterator[list[Replacement]]:
    """Yield insertions of green, blue, purple or pink, if not named yet, before a bare thing.

    A bare thing has no word but an article, number, pronoun, "and" or the like before it. The
    replacement spans the thing, whose capital goes unless all letters are capitals.
    """
    named = {match.entry.lemma for match in _find_matches(caption, ATTRIBUTES)}
    colours = [colour for colour in ("green", "blue", "purple", "pink") if colour not in named]
    for match in _find_objects(caption):
        if _BEFORE_BARE_NOUN.search(caption[: match.start]):
            noun = caption[match.start : match.end]
            is_upper = len(noun) > 1 and noun.isupper()
            noun = noun if is_upper else noun[:1].lower() + noun[1:]
            for colour in colours:
                yield [(match.start, match.end, f"{colour} {noun}")]


EDIT_RULES: dict[str, Callable[[str], Iterator[list[Replacement]]]] = {
    "replace_obj": replace_obj,
    "replace_att": replace_att,
    "replace_rel": replace_rel,
    "swap_obj": swap_obj,
    "swap_att": swap_att,
    "add_obj": add_obj,
    "add_att": add_att,
}
"""Rules by the names of SugarCrepe's files."""


# --- reading and writing captions


def _find_matches(caption: str, lexicon: Lexicon) -> Iterator[_Match]:
    """Yield the words and phrases of a lexicon in order; of overlapping ones, the longest."""
    for match in lexicon.pattern.finditer(caption):
        yield _Match(match.start(), match.end(), lexicon.lookup(match[0]))


def _find_objects(caption: str) -> list[_Match]:
    return list(_find_matches(caption, OBJECTS))


def _find_attributes(caption: str) -> list[_Match]:
    """Return the attributes before a noun or after "is"; "a glass of milk" has none."""
    matches = list(_find_matches(caption, ATTRIBUTES))
    return [
        match
        for match in matches
        if _find_described_noun(caption, match, matches) is not None
        or _COPULA.search(caption[: match.start])
    ]


def _find_described_noun(
    caption: str, attribute: _Match, attributes: Sequence[_Match]
) -> str | None:
    """Return the word after an attribute in lower case, further attributes skipped.

    Return None if no word follows, or a conjunction, preposition, verb or relation.

    Args:
        attributes: all attributes of the caption, in order.
    """
    end = attribute.end
    for following in attributes:  # in order
        if following.start > end and not caption[end : following.start].strip():
            end = following.end
    text = caption[end:]
    if _NO_NOUN.match(text) or _starts_with(text, RELATIONS):
        return None
    word = re.match(r"\s+([A-Za-z][\w'-]*)", text)
    return word[1].lower() if word else None


def _starts_with(text: str, lexicon: Lexicon) -> bool:
    """Return whether white space and then a form of the lexicon begin the text."""
    return bool(text[:1].isspace() and lexicon.pattern.match(text.lstrip()))


def _apply_replacements(caption: str, replacements: Sequence[Replacement]) -> str:
    """Return the caption after replacements that do not overlap, in any order.

    A new text takes the capitals of the old one, and "a" or "an" before it is adapted.
    """
    # From the end, so that the positions of the others stay valid.
    for start, end, text in sorted(replacements, reverse=True):
        old = caption[start:end]
        before = caption[:start]
        if match := re.search(r"\b(an?)(\s+)$", before, re.I):
            article = choose_article(text)
            article = article.capitalize() if match[1][0].isupper() else article
            before = f"{before[: match.start()]}{article}{match[2]}"
        if len(old) > 1 and old.isupper():
            text = text.upper()
        elif old[:1].isupper():
            text = text[:1].upper() + text[1:]
        caption = before + text + caption[end:]
    return caption
