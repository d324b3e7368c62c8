"""Roles of the columns of a table, guessed by their names or given by the user.

The names below are the complete list; docs/data-format.md repeats it. Names are compared as
`normalize_column` writes them. A column without a role is metadata.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from vlduet.data.readers.rows import find_image_columns, normalize_column
from vlduet.errors import DataError, suggest_name

COLUMN_ROLES: dict[str, str] = {
    "id": "name of the record, unique in the source",
    "image": "image of a pair, or the right candidate of a query",
    "caption": "short captions",
    "short": "short captions, as caption",
    "long": "long caption",
    "query": "query of a retrieval record: texts, images, or both in several columns",
    "positive": "right candidates of the query, or of the image",
    "negative": "wrong candidates of the query, or of the image",
    "messages": "turns of a chat",
}
"""Roles that the setting `columns` may name, and what a column of each holds."""

SHORT_COLUMNS = (
    *("short", "short_caption", "caption", "captions", "text", "title"),
    *("alt_text", "alt", "alttext", "sentence", "sentences"),
)
"""Columns of short captions; ``caption_1``, ``caption_2``, ... are of them too."""
FALLBACK_SHORT_COLUMNS = (
    *("comment", "comments", "raw", "sentences_raw", "product_name", "product_title"),
)
"""Columns that are short captions where a table has no other caption column."""
LONG_COLUMNS = (
    *("long", "long_caption", "description", "detailed_caption"),
    *("long_description", "detailed_description", "dense_caption"),
)
"""Columns of the long caption."""
QUERY_COLUMNS = ("query", "anchor")
"""Columns of the query of a retrieval record."""
QUESTION_COLUMN = "question"
"""Column that is the query where the table has none of `ANSWER_COLUMNS`, which would make it a chat
or a quiz."""
ANSWER_COLUMNS = ("answer", "answers", "response", "responses")
POSITIVE_COLUMNS = ("positive", "positives")
"""Columns of right candidates; ``positive_1`` and ``positive_image`` are of them too."""
QUERY_POSITIVE_COLUMNS = (*POSITIVE_COLUMNS, "pos", "document", "passage")
"""Columns of right candidates in a table with a query."""
NEGATIVE_COLUMNS = ("negative", "negatives", "hard_negative", "hard_negatives")
"""Columns of wrong candidates; ``negative_0`` and ``negative_image`` are of them too."""
QUERY_NEGATIVE_COLUMNS = (*NEGATIVE_COLUMNS, "neg")
"""Columns of wrong candidates in a table with a query."""
RELEVANCE_COLUMNS = ("label", "labels", "score", "scores", "similarity", "relevance")
"""Columns that say how right a candidate is, which nothing reads beside a query."""

LANGUAGES = (
    "af|am|ar|az|be|bg|bn|bs|ca|cs|cy|da|de|el|en|eo|es|et|eu|fa|fi|fil|fr|ga|gl|gu|he|hi|hr|hu|hy|"
    "is|it|ja|ka|kk|km|kn|ko|ku|ky|lo|lt|lv|mi|mk|ml|mn|mr|ms|my|nb|ne|nl|nn|pa|pl|ps|pt|ro|ru|si|"
    "sk|sl|so|sq|sr|sv|sw|ta|te|th|tl|tr|uk|ur|uz|vi|xh|zh|zu"
)
"""Codes that end the name of a column in one language, such as ``caption_de``; a pattern."""
TEXT_WORDS = (
    "captions?|texts?|titles?|descriptions?|alt|sentences?|comments?|query|question|answers?|"
    "responses?|anchor|positives?|negatives?|passage|document|prompt|instruction"
)
"""Words in the name of a column that is perhaps to be learned; a pattern."""
DESCRIPTION_WORDS = (
    "names?|labels?|class(?:es)?|category|categories|tags?|keywords?|summary|notes?|concepts?|body"
)
"""Words in the name of a column that may describe an image without captions; a pattern."""
NO_TEXT_WORDS = (
    "ids?|no|number|num|count|index|length|len|size|score|source|url|link|file|path|image|lang|"
    "language|model|type|author|date|time|tokens|label|similarity|split"
)
"""Words in the name of a column that says something about a text, and is none; a pattern."""

Group = tuple[str, ...]
"""Columns that together hold one query or one candidate."""

_TWO_LETTERS = re.compile(r"[^\W\d_]{2}")
_LANGUAGE_SUFFIX = re.compile(rf"(.+)_({LANGUAGES})")
_NUMBER_SUFFIX = re.compile(r"(.+?)_?\d{1,3}")
_IMAGE_SUFFIX = re.compile(r"(.+)_(?:image|img|image_path|image_file|file_name|path)(_?\d+)?")


@dataclass(frozen=True, slots=True)
class ColumnPlan:
    """Columns of a table by what is read from them, each tuple in the order of the table."""

    id: str | None
    """Column of the id; None: ids are made of file and line."""
    image: Group
    """Columns of the image: several are an error, none is a table without images."""
    short: Group
    """Columns of short captions."""
    long: Group
    """Columns of long captions, of which a row may fill one."""
    query: Group
    """Columns of the query, which are its parts."""
    positive: tuple[Group, ...]
    """Columns of each right candidate of the query; without a query, of short captions."""
    negative: tuple[Group, ...]
    """Columns of each wrong candidate."""
    unread: Group
    """Columns without a role whose names say that they are perhaps to be learned. Empty if the user
    has named columns of texts."""
    is_ambiguous: bool
    """Whether query, candidate and image are all guessed, so that the role of the image is open."""

    @property
    def captions(self) -> Group:
        """Columns that hold captions of the image, in a row without a query."""
        return (*self.short, *self.long, *itertools.chain.from_iterable(self.positive))


def check_roles(columns: Mapping[str, str]) -> None:
    """Raise DataError if a role that the user names is unknown."""
    for role in columns:
        if role not in COLUMN_ROLES:
            fix = f"{suggest_name(role, COLUMN_ROLES)} Roles: {', '.join(COLUMN_ROLES)}"
            raise DataError(f"no role '{role}'", place="columns", fix=fix)


def split_columns(text: str, names: Collection[str]) -> Group:
    """Return the columns that `text` names: itself, if it is among `names`, else its parts.

    Parts are separated by commas and stripped; they need not be among `names`.
    """
    return (text,) if text in names else tuple(name.strip() for name in text.split(","))


def find_missing_columns(columns: Mapping[str, str], names: Collection[str]) -> list[str]:
    """Return the columns that `columns` names and that are not among `names`, in their order."""
    groups = [split_columns(text, names) for text in columns.values()]
    return [name for group in groups for name in group if name not in names]


@lru_cache(maxsize=1024)
def is_image_column(name: str) -> bool:
    """Return whether the name of a column says that it holds images, such as ``query_image``."""
    normalized = normalize_column(name)
    return bool(find_image_columns([name]) or _IMAGE_SUFFIX.fullmatch(normalized))


def plan_columns(
    names: Collection[str],
    columns: Mapping[str, str],
    *,
    typed_columns: Collection[str] = frozenset(),
) -> ColumnPlan:
    """Return the roles of the columns of a table.

    A role that the user names has these columns and no guessed ones. If the user names a caption or
    a query, neither captions nor queries are guessed.

    Args:
        names: all columns of the table.
        columns: column by role, given by the user; several columns of a role are separated by
            commas, and those that the table lacks are left out.
        typed_columns: columns of numbers, which are no guessed candidates (``positive`` may be a
            score).
    """
    roles: dict[str, Group] = {}
    for role, text in columns.items():
        group = tuple(name for name in split_columns(text, names) if name in names)
        role = "short" if role == "caption" else role
        roles[role] = roles.get(role, ()) + group
    assigned = {name for group in roles.values() for name in group}
    free = {name: normalize_column(name) for name in names if name not in assigned}

    def take(role: str, group: Iterable[str]) -> Group:
        """Return the columns of a role: those of the user, else `group`, which leaves `free`."""
        if role in roles:
            return roles[role]
        columns_of_role = tuple(group)
        for name in columns_of_role:
            del free[name]
        return columns_of_role

    has_text_role = bool(roles.keys() & {"short", "long", "query"})
    query = take("query", () if has_text_role else _find_query(free))
    texts = {name: key for name, key in free.items() if name not in typed_columns}
    bases = {
        "positive": QUERY_POSITIVE_COLUMNS if query else POSITIVE_COLUMNS,
        "negative": QUERY_NEGATIVE_COLUMNS if query else NEGATIVE_COLUMNS,
    }
    candidates: dict[str, tuple[Group, ...]] = {}
    for role, names_of_role in bases.items():
        candidates[role] = tuple(_group_columns(texts, names_of_role).values())
        take(role, itertools.chain.from_iterable(candidates[role]))
        if role in roles:
            candidates[role] = tuple((name,) for name in roles[role])
    image = take("image", find_image_columns(free))
    if "image" not in roles and not image:
        image = take("image", [n for n, key in free.items() if key.endswith("_file_name")])
    id_columns = take("id", [name for name, key in free.items() if key == "id"][:1])
    captions = ([], []) if has_text_role else _find_captions(free)
    short, long = take("short", captions[0]), take("long", captions[1])
    unread = () if has_text_role else [n for n, key in free.items() if _is_text_name(key)]
    is_ambiguous = not roles.keys() & {"query", "positive"}
    return ColumnPlan(
        id=id_columns[0] if id_columns else None,
        image=image,
        short=short,
        long=long,
        query=query,
        positive=candidates["positive"],
        negative=candidates["negative"],
        unread=tuple(unread),
        is_ambiguous=is_ambiguous and bool(query and image and candidates["positive"]),
    )


def _find_query(names: Mapping[str, str]) -> Group:
    """Return the columns of the query, images first; () without one.

    Args:
        names: normalized name by column.
    """
    bases: Group = QUERY_COLUMNS
    if not any(key in ANSWER_COLUMNS for key in names.values()):
        bases = (*bases, QUESTION_COLUMN)
    groups = _group_columns(names, bases)
    return next((groups[base] for base in bases if base in groups), ())


def _group_columns(names: Mapping[str, str], bases: Collection[str]) -> dict[str, Group]:
    """Return the columns of each text or candidate whose name is one of `bases`, by this name.

    A candidate has a text column (``negative_0`` or ``negative_0_text``), an image column
    (``negative_0_image``), which comes first, or both.

    Args:
        names: normalized name by column.
    """
    groups: dict[str, list[str]] = {}
    for name, key in names.items():
        image = _IMAGE_SUFFIX.fullmatch(key)
        stem = image[1] + (image[2] or "") if image else key.removesuffix("_text")
        number = _NUMBER_SUFFIX.fullmatch(stem)
        if stem in bases or (number is not None and number[1] in bases):
            group = groups.setdefault(stem, [])
            group.insert(0 if image else len(group), name)
    return {stem: tuple(group) for stem, group in groups.items()}


def _find_captions(names: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Return the columns of (short captions, long captions) of a table.

    Columns in one language, such as ``caption_de``, count if all of them are in this language and
    the table has no column without a language in their place. If there is none, the only column
    whose name ends with "caption" is one of short captions, else `FALLBACK_SHORT_COLUMNS` are.

    Args:
        names: normalized name by column.
    """
    captions = {
        "short": [name for name, key in names.items() if _is_numbered(key, SHORT_COLUMNS)],
        "long": [name for name, key in names.items() if key in LONG_COLUMNS],
    }
    languages = set()
    by_language: dict[str, list[str]] = {"short": [], "long": []}
    for name, key in names.items():
        match = _LANGUAGE_SUFFIX.fullmatch(key)
        if match and match[1] in (*SHORT_COLUMNS, *LONG_COLUMNS):
            languages.add(match[2])
            by_language["long" if match[1] in LONG_COLUMNS else "short"].append(name)
    if len(languages) == 1:
        captions = {role: captions[role] or by_language[role] for role in captions}
    elif not languages and not captions["short"] and not captions["long"]:
        captions["short"] = [n for n, key in names.items() if re.search("(^|_)captions?$", key)]
        if len(captions["short"]) != 1:
            fallback = (n for n, key in names.items() if _is_numbered(key, FALLBACK_SHORT_COLUMNS))
            captions["short"] = [] if captions["short"] else list(fallback)
    return captions["short"], captions["long"]


def _is_numbered(key: str, bases: Collection[str]) -> bool:
    """Return whether `key` is one of `bases`, or one of them with a number at its end."""
    number = _NUMBER_SUFFIX.fullmatch(key)
    return key in bases or (number is not None and number[1] in bases)


def is_description(name: str, value: Any) -> bool:
    """Return whether a cell may describe the image of its row, in a table without captions.

    It is a text of two words of letters or more, or a text in a column with one of
    `DESCRIPTION_WORDS`.
    """
    if not isinstance(value, str) or find_image_columns([name]):
        return False
    words = (word for word in value.split() if _TWO_LETTERS.search(word))
    num_words = len(list(itertools.islice(words, 2)))
    return num_words == 2 or _has_word(normalize_column(name), DESCRIPTION_WORDS)


def _is_text_name(key: str) -> bool:
    """Return whether a normalized name has one of `TEXT_WORDS` and no `NO_TEXT_WORDS`."""
    return _has_word(key, TEXT_WORDS) and not _has_word(key, NO_TEXT_WORDS)


def _has_word(key: str, words: str) -> bool:
    """Return whether a normalized name has one of `words`, a pattern, perhaps with a number."""
    return re.search(rf"(?:^|_)(?:{words})\d*(?:_|$)", key) is not None
