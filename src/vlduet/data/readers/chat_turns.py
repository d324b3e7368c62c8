"""Turns of chats in the formats of others: roles, contents, and the images that belong into them.

The images of a row stand in a column, or in the content parts themselves. Which of the places in
the turns the images of the column fill depends on how many there are:

1. Parts are structure. Where a turn holds image parts, and as many ``{"type": "image"}`` as the
   column has images, every ``<image>`` is a text.
2. Else the tags of the prompts (user, system) are places if they are as many as the images. Then
   the tags of answers are texts. They are places if only all tags together are as many.
3. Without parts and tags, all images precede the first user turn.
4. Everything else is an error that says how to write it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from vlduet.data.readers.chat_keys import (
    CONTENT_FIELDS,
    IMAGE_FIELDS,
    REFUSED_ROLES,
    REFUSED_TAGS,
    ROLE_BY_SPEAKER,
    SPEAKER_FIELDS,
    check_part_keys,
    check_turn_keys,
    is_empty,
)
from vlduet.data.readers.rows import SourceRow, interleave_images
from vlduet.data.record_json import IMAGE_TAG, JsonValue
from vlduet.data.records import ROLES, ImageRef, Message, Part
from vlduet.errors import DataError, suggest_name

TEXT_TYPES = ("text", "input_text", "output_text")
IMAGE_TYPES = ("image", "image_url", "input_image")

PlaceKind = Literal["placeholder", "prompt", "prompt part", "answer"]
"""Place for an image of the row: an image part without a source, or a tag in a text."""
PLACES_FIX = (
    f"Write one {IMAGE_TAG} in the prompts per image. If {IMAGE_TAG} is text, write content as "
    'parts: [{"type": "image"}, {"type": "text", "text": ...}]'
)


@dataclass(frozen=True, slots=True)
class ContentPart:
    """One part of the content of a turn, before the images of the row are in place."""

    part: Part | None
    """Text, or an image with a source of its own; None for an image of the row."""
    source: JsonValue
    """Value of the part and its place, for errors."""
    tag_kind: PlaceKind
    """Kind of the tags in the text."""

    def list_places(self) -> list[PlaceKind]:
        """Return the kinds of the places for images in this part, in their order."""
        if self.part is None:
            return ["placeholder"]
        num_tags = self.part.count(IMAGE_TAG) if isinstance(self.part, str) else 0
        return [self.tag_kind] * num_tags


@dataclass(frozen=True, slots=True)
class ChatTurn:
    """One turn of a chat of others, before the images of the row are in place."""

    role: str
    """One of `ROLES`."""
    supervised: bool
    """Meaning of `Message.supervised`."""
    parts: tuple[ContentPart, ...]
    """Content; a text is a single part."""


def parse_turns(row: SourceRow, turns: list[JsonValue]) -> list[ChatTurn]:
    """Return the turns of a row; keys that are not read are counted in its context.

    Raises:
        DataError: a turn is no object; or its role, content or supervision is wrong, or a key is
            refused.
    """
    return [_parse_turn(row, turn) for turn in turns]


def _parse_turn(row: SourceRow, turn: JsonValue) -> ChatTurn:
    """Return one turn; raise DataError as `parse_turns`."""
    if not isinstance(turn.value, dict):
        message = f"a turn is {type(turn.value).__name__}"
        raise turn.make_error(message, fix='Write {"role": ..., "content": ...}')
    for keys in (SPEAKER_FIELDS, CONTENT_FIELDS):
        if keys[0] in turn.value and keys[1] in turn.value:
            message = f"both {keys[0]} and {keys[1]} in a turn"
            raise turn.get_field(keys[1]).make_error(message, fix="Keep one of the two")
    check_turn_keys(row, turn)
    role = _parse_role(turn)
    supervised = turn.parse_supervision()
    if role != "assistant" and supervised:
        row.context.ignored.add("turn key", f"loss (or weight, train) of a {role} turn")
    parts = _parse_content(row, turn, is_answer=role == "assistant")
    is_supervised = role != "assistant" or supervised is not False
    return ChatTurn(role, is_supervised, tuple(parts))


def _parse_role(turn: JsonValue) -> str:
    """Return the role of a turn, one of `ROLES`.

    Raises:
        DataError: the role is missing, unknown, or one of `REFUSED_ROLES`.
    """
    from_llava = "from" in turn.value or ("value" in turn.value and "role" not in turn.value)
    field = turn.get_field("from" if from_llava else "role")
    if isinstance(field.value, str) and field.value in ROLE_BY_SPEAKER:
        return ROLE_BY_SPEAKER[field.value]
    fix = f"Use one of {', '.join(ROLES)}"
    if field.value in REFUSED_ROLES:
        fix = "Turns of tools are not trained: leave the row out, or write them as texts of turns"
    elif isinstance(field.value, str):
        fix = suggest_name(field.value, ROLE_BY_SPEAKER)
    raise field.make_error(f"the role of a turn is {field.value!r:.40}", fix=fix)


def _parse_content(row: SourceRow, turn: JsonValue, *, is_answer: bool) -> list[ContentPart]:
    """Return the content of a turn, a text or a list of parts; keys not read are counted.

    Raises:
        DataError: the content is empty or wrong, a text has one of `REFUSED_TAGS`, or a part is
            neither text nor image, both, or has a key that is refused.
    """
    content = turn.get_field("value" if "value" in turn.value else "content")
    if isinstance(content.value, str):
        text = content.parse_text()
        _refuse_tags(content, text, is_answer=is_answer)
        return [ContentPart(text, content, "answer" if is_answer else "prompt")]
    parts = []
    for item in content.parse_items("content parts"):
        if not isinstance(item.value, dict):
            message = f"a content part is {type(item.value).__name__}"
            raise item.make_error(message, fix='Write {"type": "text", "text": ...}')
        check_part_keys(row, item)
        part = _parse_part(item)
        parts.append(ContentPart(part, item, "answer" if is_answer else "prompt part"))
    return parts


def _refuse_tags(content: JsonValue, text: str, *, is_answer: bool) -> None:
    """Raise DataError for one of `REFUSED_TAGS` in a text.

    Tags of video and audio are allowed in answers, where no format puts media.
    """
    for tag, fix in REFUSED_TAGS.items():
        if tag in text and not (is_answer and tag in ("<video>", "<audio>")):
            fix = f'{fix}. If it is text, write content as [{{"type": "text", "text": ...}}]'
            raise content.make_error(f"{tag} (as of `objects` or videos) is not supported", fix=fix)


def _parse_part(item: JsonValue) -> Part | None:
    """Return a content part: a text, an image with a source, or None for an image of the row.

    Raises:
        DataError: it is neither text nor image, both, or its value is wrong or of several sources.
    """
    kind = item.value.get("type")
    sources = [key for key in IMAGE_FIELDS if not is_empty(item.value.get(key))]
    has_text = not is_empty(item.value.get("text"))
    is_text = kind in TEXT_TYPES or (kind is None and "text" in item.value)
    is_image = kind in IMAGE_TYPES or (kind is None and bool(sources))
    if not is_text and not is_image:
        place = item.place.with_field("type")
        message = f"a content part of type {kind!r:.40}"
        raise DataError(message, place=place, fix="Keep text and image parts")
    if (is_text and sources) or (is_image and has_text) or len(sources) > 1:
        keys = [*(["text"] if has_text or is_text else []), *sources]
        fix = "Write one part for each"
        raise item.make_error(f"{' and '.join(keys)} in one content part", fix=fix)
    if is_text:
        return item.get_field("text").parse_text()
    if kind != "image" and not sources:
        return item.get_field("image_url").parse_image()  # the error of a missing image
    return _parse_image(item, sources[0]) if sources else None


def _parse_image(item: JsonValue, key: str) -> ImageRef:
    """Return the image under a key of a content part, one of `IMAGE_FIELDS`, without opening it.

    Raises:
        DataError: the value is wrong, as in `JsonValue.parse_image`.
    """
    source = item.get_field(key)
    if key == "base64":
        source = JsonValue({"bytes": source.value}, source.place, source.root)
    elif key == "image_url" and isinstance(source.value, dict):
        source = source.get_field("url")
    return source.parse_image()


def place_images(turns: list[ChatTurn], images: list[ImageRef], column: JsonValue) -> list[Message]:
    """Return the messages of the turns, with the images of the row's column in their places.

    Args:
        images: images of the column; [] without one. The list is not modified.
        column: the column and its place, for errors.

    Raises:
        DataError: images and places are not equally many; or images stand in the column and in
            the parts, and are not the same.
    """
    parts = [part for turn in turns for part in turn.parts]
    part_images = [part.part for part in parts if isinstance(part.part, ImageRef)]
    counts: Counter[PlaceKind] = Counter()
    for part in parts:
        counts.update(part.list_places())
    kinds = _choose_places(counts, len(images), has_image_parts=bool(part_images))
    leading: list[Part] = []  # images that precede the first user turn
    if kinds is None:
        if not counts and not part_images:
            leading += images
        elif counts or part_images != images:
            raise _make_places_error(parts, images, column)
        kinds = frozenset()  # without places, a column that repeats the parts says nothing new
        images = []
    roles = [turn.role for turn in turns]
    first_user = roles.index("user") if "user" in roles else 0
    queue = list(images)
    messages = []
    for i, turn in enumerate(turns):
        filled = leading if i == first_user else []
        for part in turn.parts:
            filled = filled + _fill_places(part, queue, kinds)
        messages.append(Message(turn.role, tuple(filled), supervised=turn.supervised))
    return messages


def _choose_places(
    counts: Counter[PlaceKind], num_images: int, *, has_image_parts: bool
) -> frozenset[PlaceKind] | None:
    """Return the kinds of places that the images fill, by rules 1 and 2 of this module.

    None means that no choice of kinds has as many places as there are images.
    """
    prompts = counts["prompt"] + counts["prompt part"]
    if has_image_parts or counts["placeholder"]:
        if counts["placeholder"] == num_images:
            return frozenset({"placeholder"})
        if counts["placeholder"] + counts["prompt"] == num_images:
            return frozenset({"placeholder", "prompt"})
        return None
    if num_images == prompts:
        return frozenset({"prompt", "prompt part"})
    if prompts and num_images == prompts + counts["answer"]:
        return frozenset({"prompt", "prompt part", "answer"})
    if num_images == 0 and not counts["prompt"]:
        return frozenset()  # tags in parts only: texts
    return None


def _fill_places(
    part: ContentPart, images: list[ImageRef], kinds: frozenset[PlaceKind]
) -> list[Part]:
    """Return a part with images in its places of these kinds; they are removed from `images`."""
    if part.part is None:
        return [images.pop(0)]
    if not isinstance(part.part, str):
        return [part.part]
    if part.tag_kind in kinds:
        return interleave_images(part.part, IMAGE_TAG, images, place=part.source.place)
    return [part.part.strip()]


def _make_places_error(
    parts: list[ContentPart], images: list[ImageRef], column: JsonValue
) -> DataError:
    """Return the error of places that the images do not fill.

    It is placed at the first part without an image left, else at the column.
    """
    places = [(kind, part) for part in parts for kind in part.list_places()]
    if places and all(kind == "answer" for kind, _ in places):
        message = f"{len(images)} images, but {IMAGE_TAG} in answers only, where it may be text"
        return column.make_error(message, fix=PLACES_FIX)
    if len(places) > len(images):
        message = f"more places for images ({IMAGE_TAG} or image parts) than images"
        fix = f"{PLACES_FIX}. Images stand in the parts, or in a column such as images"
        return places[len(images)][1].source.make_error(message, fix=fix)
    if not places:
        message = "images in this column, and others in the content parts"
        return column.make_error(message, fix="Keep them in one of the two")
    message = f"{len(images)} images, but places for {len(places)}"
    return column.make_error(message, fix=PLACES_FIX)
