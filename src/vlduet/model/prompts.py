"""Rendering of texts, images and chats into sequences, the same for training, indexing and serving.

1. `Prompts` say which text surrounds a content, and where its embedding is read.
2. `Renderer` renders embeddings, documents, captions and chats for one checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from vlduet.data import content_keys
from vlduet.data.records import ImageRef, Message, Part, Parts
from vlduet.data.sequences import PreparedImage, Sequence
from vlduet.errors import ConfigError, DataError, quote_value, suggest_name
from vlduet.model.chat_layout import ChatLayouts
from vlduet.model.embedding_layout import append_embedding, append_part, find_prompt_texts
from vlduet.model.limits import DEFAULT_MAX_TOKENS
from vlduet.model.processing import Processor
from vlduet.model.sequence_builder import SequenceBuilder
from vlduet.model.text_tokenizer import TextTokenizer
from vlduet.structured_files import check_fields

SLOT_PATTERN = re.compile(r"\{(image|text|parts)\}")
"""Place of the content in a prompt."""
POOLS = ("last", "mean", "first")
"""Values of `Prompts.pool`."""
PUBLISHED_FIELDS = ("template", "system", "query_system", "pool", "pool_system")
"""Fields of `Prompts` that published embedding models set."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """Presentation of contents for an embedding, saved with the model.

    Raises:
        ConfigError: a prompt does not have its slot exactly once, or `image_pool` is unknown.
    """

    image: str = "{image}\nSummarize the provided image in one word:"
    """Text around an image alone."""
    text: str = "{text}\nSummarize the provided text in one word:"
    """Text around a text alone."""
    parts: str = "{parts}\nSummarize the provided content in one word:"
    """Text around a mixture of images and texts."""
    query: str = ""
    """Prefix of the texts of a query: some models embed queries differently from documents."""
    chat: bool = True
    """Put the prompt into a user turn of the chat template, so that an answer would follow."""
    image_pool: str = "last"
    """Position where the embedding of an image is read.

    `last`: at the prompt's last token, the summary token of VladVA. `mean`: the mean over the
    image's tokens (Sugar); this also holds for a mixture that ends with an image, if the prompt has
    nothing after it. `vision`: an image alone is read from the vision tower (FROMAGe), a mixture at
    the last token."""
    joined: bool = True
    """Tokenise the prompt and its content as one text, as other servers do, and present several
    images without a text by the prompt `image`. False, for models of early versions: tokenise every
    text apart, and present them by `text`."""
    template: str = ""
    """Chat template that lays a content out as the turn of a user, in place of the texts above;
    empty: they do. Published embedding models have one."""
    system: str = ""
    """Text of a system turn before a content that `template` lays out: the model's instruction."""
    query_system: str = ""
    """The same for a query."""
    pool: str = "last"
    """Tokens over which an embedding is the mean: the `last`, all (`mean`) or the `first`; those of
    an image by `image_pool` come first."""
    pool_system: bool = True
    """Count the tokens before the content among those of `pool`."""

    def __post_init__(self) -> None:
        """Raise ConfigError for the first invalid field; nothing is modified.

        `image`, `text` and `parts` must each contain their own slot, such as ``{image}``, exactly
        once and no slot of another. `image_pool` must be `last`, `mean` or `vision`, and `pool` one
        of `POOLS`.
        """
        for name in ("image", "text", "parts"):
            prompt = getattr(self, name)
            if SLOT_PATTERN.findall(prompt) != [name]:
                fix = f"Write {{{name}}} in it once"
                raise ConfigError(quote_value(prompt), place=f"prompts.{name}", fix=fix)
        if self.image_pool not in ("last", "mean", "vision"):
            raise ConfigError(
                f"'{self.image_pool}'",
                place="prompts.image_pool",
                fix="Use last or mean (vision is for recipe fromage)",
            )
        if self.pool not in POOLS:
            fix = f"Use {', '.join(POOLS)}"
            raise ConfigError(f"'{self.pool}'", place="prompts.pool", fix=fix)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name, as in configs."""
        return asdict(self)

    def to_manifest(self) -> dict[str, Any]:
        """Return the fields by name, as in manifests.

        Those that only published models set are left out where they have their defaults, and
        `joined` for a model of an early version: the fingerprints of earlier models stay.
        """
        values = asdict(self)
        for field in fields(self):
            if field.name in PUBLISHED_FIELDS and values[field.name] == field.default:
                del values[field.name]
        if not self.joined:
            del values["joined"]
        return values

    def split(self, text: str) -> tuple[str, str]:
        """Return what is before and after the slot of `image`, `text` or `parts`."""
        before, _, after = SLOT_PATTERN.split(text)
        return before, after

    @classmethod
    def from_manifest(cls, values: Mapping[str, Any], *, place: object = "prompts") -> Self:
        """Return the prompts of a manifest.

        Args:
            values: the manifest's key ``prompts``.
            place: place of an error.

        Raises:
            ConfigError: a field is unknown, of another type, or invalid as in `Prompts`.
        """
        types = {field.name: type(field.default) for field in fields(cls)}
        for name in values:
            if name not in types:
                fix = f"{suggest_name(name, types)} Or update vlduet"
                raise ConfigError(f"unknown prompt {quote_value(name)}", place=place, fix=fix)
        check_fields(
            dict(values), place=place, error_class=ConfigError, fix="Correct it", optional=types
        )
        return cls(**{"joined": False, **values})


@dataclass(frozen=True, slots=True)
class ChatPart:
    """Text or image of a chat in a sequence under construction."""

    segment: int
    """Index of its segment in the builder."""
    part: Part
    """The image, or the text as it is in the sequence: some templates strip it."""
    role: str
    """Role of its turn."""
    is_supervised: bool = False
    """The tokens of the text are labels."""


class Renderer:
    """Renderer of sequences for one checkpoint. Its methods do not modify it."""

    def __init__(
        self, processor: Processor, *, prompts: Prompts, max_tokens: int = DEFAULT_MAX_TOKENS
    ):
        """Store the options, and the begin-of-sequence token if the tokenizer adds one to texts.

        Args:
            processor: tokenizer, image preprocessing and special tokens of the checkpoint.
            prompts: presentation of contents for an embedding.
            max_tokens: longest sequence; user texts are cut to fit, images never.
        """
        self.tokenizer = processor.tokenizer
        self.prepare_image = processor.prepare_image
        self.image_token_id = processor.image_token_id
        self.image_delimiters = processor.image_delimiters
        self.image_placeholder = processor.image_placeholder
        self.template_delimits_images = processor.template_delimits_images
        self.eos_token_ids = [*processor.eos_token_ids]
        self.prompts = prompts
        self.max_tokens = max_tokens
        start = self.tokenizer.encode("", add_special_tokens=True)
        bos = self.tokenizer.bos_token_id
        self.bos_ids = [bos] if bos is not None and start[:1] == [bos] else []
        self.bos_text = str(self.tokenizer.bos_token) if self.bos_ids else ""
        self.end_ids = start[len(self.bos_ids) :]  # special tokens that end every text
        # Shared by all copies. A list, as tokens or a template may be set later.
        self._layouts: list[ChatLayouts] = []
        self._template_layouts: dict[tuple[str, str, bool], ChatLayouts] = {}

    def with_options(
        self,
        *,
        prompts: Prompts | None = None,
        max_tokens: int | None = None,
        prepare_image: Callable[[ImageRef], PreparedImage] | None = None,
    ) -> Self:
        """Return a copy with some options replaced; None keeps an option.

        The copy shares tokenizer and processor with the original, which is not modified.
        """
        renderer = copy(self)
        renderer.prompts = prompts or self.prompts
        renderer.max_tokens = self.max_tokens if max_tokens is None else max_tokens
        renderer.prepare_image = prepare_image or self.prepare_image
        return renderer

    @property
    def layouts(self) -> ChatLayouts:
        """Layouts of chats by the tokenizer's template; new ones where it has changed."""
        if not self._layouts or not self._layouts[0].tokenizer.is_current(self.tokenizer):
            control_ids = (self.image_token_id, *self.bos_ids, *self.eos_token_ids)
            layouts = ChatLayouts(
                TextTokenizer(self.tokenizer, control_ids),
                image_placeholder=self.image_placeholder,
                eos_token_ids=self.eos_token_ids,
            )
            self._layouts[:] = [layouts]
            self._template_layouts.clear()
        return self._layouts[0]

    def template_layouts(self, *, is_query: bool) -> ChatLayouts:
        """Return the layouts of queries, or else of documents, by `prompts.template`."""
        tokenizer = self.layouts.tokenizer
        prompts = self.prompts
        system = prompts.query_system if is_query else prompts.system
        key = (prompts.template, system, is_query)
        if key not in self._template_layouts:
            self._template_layouts[key] = ChatLayouts(
                tokenizer,
                image_placeholder=self.image_placeholder,
                eos_token_ids=self.eos_token_ids,
                template=prompts.template,
                system=system,
                variables={
                    "task": "query" if is_query else "document",
                    "image_placeholder": self.image_placeholder,
                },
            )
        return self._template_layouts[key]

    def new_builder(self, *, joined: bool = True) -> SequenceBuilder:
        """Return an empty builder; it begins with the begin-of-sequence token, if there is one.

        Args:
            joined: see `SequenceBuilder`; that of the prompts for contents that are embedded.
        """
        return SequenceBuilder(
            self.layouts.tokenizer,
            self.image_token_id,
            self.image_delimiters,
            bos_text=self.bos_text,
            joined=joined,
        )

    # ------------------------------------------------------------------ contents to embed

    def render_embedding(
        self,
        parts: Parts,
        *,
        is_query: bool = False,
        role: str = "",
        record_name: str = "",
        content_key: str = "",
    ) -> Sequence:
        """Return the sequence with one anchor, the embedding of `parts` by the prompts; no labels.

        Texts are cut at their ends until the sequence fits `max_tokens`. Images are decoded.

        Args:
            parts: images and texts in order.
            is_query: put `prompts.query` before every text.
            role: field of the anchor, as the following two.
            record_name: name of the record.
            content_key: hash of the content.

        Raises:
            DataError: no part, a blank text, or more tokens than `max_tokens` without any text to
                cut.
            ImageError: an image cannot be decoded.
            ConfigError: `prompts.chat` is set and the checkpoint has no usable chat template.
        """
        if not parts or any(isinstance(part, str) and not part.strip() for part in parts):
            raise DataError("nothing to embed", fix="Give a non-empty text or an image")
        builder = self.new_builder(joined=self.prompts.joined)
        append_embedding(
            self,
            builder,
            parts,
            is_query=is_query,
            role=role,
            record_name=record_name,
            content_key=content_key,
        )
        return builder.build(self.max_tokens)

    def render_caption(self, image: ImageRef, caption: str, *, record_name: str = "") -> Sequence:
        """Return an image with its caption: one pass over the image serves both losses of VladVA.

        The image's prompt comes first, with the anchor of its embedding (role `image`, the image's
        content key). The caption, which may be empty, and the end-of-text token follow as labels. A
        caption that does not fit `max_tokens` is cut, and the token after it is no label.

        Raises:
            DataError: the image with its prompt leaves no room for one token of the caption.
            ImageError, ConfigError: as `render_embedding`.
        """
        builder = self.new_builder(joined=self.prompts.joined)
        space = append_embedding(
            self,
            builder,
            (image,),
            role="image",
            record_name=record_name,
            content_key=content_keys.content_key((image,)),
        )
        if space:
            builder.append_control(space, supervised=True, starts_answer=True)
        builder.append_text(caption, supervised=True, starts_answer=not space)
        self._append_end_of_text(builder)
        return builder.build(self.max_tokens)

    def render_document(
        self, parts: Parts, *, has_prompt: bool = True, has_end_token: bool = True
    ) -> tuple[SequenceBuilder, list[int]]:
        """Render as many leading parts of a document as fit `max_tokens`; texts are labels.

        A text after a text gets a space before it. After the last part, if all fit and it is a
        text, the end-of-text token follows as a label.

        Args:
            parts: images and texts in order, at least one.
            has_prompt: surround them by the prompt for their kinds.
            has_end_token: False writes no end-of-text token.

        Returns:
            The builder, to which the caller adds anchors, and the segment of every part that fits:
            at least one, even if it alone is too long (`SequenceBuilder.build` cuts it).

        Raises:
            ImageError: an image cannot be decoded.
            DataError, ConfigError: as `render_embedding`, with a prompt.
        """
        before, after, _ = find_prompt_texts(self, parts) if has_prompt else ("", "", "")
        builder = self.new_builder(joined=self.prompts.joined or not has_prompt)
        builder.append_control(before)
        limit = self.max_tokens
        segments: list[int] = []
        part_ends: list[int] = []
        for i, part in enumerate(parts):
            # Images after the limit are not decoded.
            is_image = isinstance(part, ImageRef)
            if i and is_image and builder.count_tokens()[-1] >= limit:
                break
            segments.append(append_part(self, builder, parts, index=i, supervised=True))
            part_ends.append(len(builder.segments))
        # The end of text after an image would teach the model to leave images without a caption.
        if has_end_token and len(segments) == len(parts) and isinstance(parts[-1], str):
            self._append_end_of_text(builder)
        builder.append_control(after)
        counts = builder.count_tokens()
        closing_length = counts[-1] - counts[part_ends[-1] - 1]
        num_fitting = len(segments)
        while num_fitting > 1 and counts[part_ends[num_fitting - 1] - 1] + closing_length > limit:
            num_fitting -= 1
        if num_fitting < len(segments):
            builder.drop_segments(part_ends[num_fitting - 1])
            builder.append_control(after)
        return builder, segments[:num_fitting]

    def _append_end_of_text(self, builder: SequenceBuilder) -> None:
        """Append the end-of-text token, if there is one, to `builder`, in place, as a label."""
        for token_id in self.eos_token_ids[:1]:
            builder.append_token(token_id, supervised=True)

    # ------------------------------------------------------------------ chats

    def render_caption_request(self, image: ImageRef, prompt: str) -> Sequence:
        """Return the open sequence after which the model writes a caption.

        Args:
            image: the image.
            prompt: instruction in a user's turn; empty: the caption follows the image's embedding
                prompt.

        Raises:
            ConfigError: an instruction, or `prompts.chat`, for a checkpoint without a usable chat
                template.
            DataError: the sequence has more tokens than `max_tokens`, even with the instruction
                cut.
            ImageError: the image cannot be decoded.
        """
        if not prompt:
            return self.render_embedding((image,))
        if not self.tokenizer.chat_template:
            raise ConfigError(
                "the checkpoint has no chat template for an instruction",
                place="prompt",
                fix="Give an empty one: captions then go on from the image prompt",
            )
        return self.render_chat((Message("user", (image, prompt)),), add_generation_prompt=True)

    def render_chat(
        self, messages: tuple[Message, ...], *, add_generation_prompt: bool
    ) -> Sequence:
        """Return a conversation in the checkpoint's own chat template, without anchors.

        Images are decoded. Texts are cut at their ends until it fits `max_tokens`.

        Args:
            messages: turns in order.
            add_generation_prompt: True ends the sequence where the model's answer begins, without
                labels. False makes the texts and the end-of-turn token of every supervised turn of
                the assistant labels (`ChatLayouts.layout`). The token is added, for either, where
                the template writes none.

        Raises:
            DataError: the sequence cannot be cut to `max_tokens`, or the template refuses the chat.
            ImageError: an image cannot be decoded.
            ConfigError: the checkpoint has no chat template, or it loses content.
        """
        builder, _ = self.render_chat_parts(messages, add_generation_prompt=add_generation_prompt)
        return builder.build(self.max_tokens)

    def render_chat_parts(
        self, messages: tuple[Message, ...], *, add_generation_prompt: bool
    ) -> tuple[SequenceBuilder, list[ChatPart]]:
        """Render a conversation as `render_chat` does, for a caller that adds anchors.

        Returns:
            The builder, whose `build` cuts texts, and all texts and images in order.

        Raises:
            ImageError, ConfigError: as `render_chat`.
            DataError: the template refuses the chat.
        """
        places = [(message.role, part) for message in messages for part in message.parts]
        texts = [(role, part) for role, part in places if isinstance(part, str)]
        images = [(role, part) for role, part in places if isinstance(part, ImageRef)]
        builder = self.new_builder()
        parts = []
        layout = self.layouts.layout(messages, add_generation_prompt=add_generation_prompt)
        for part in layout:
            if part.kind == "image":
                role, image = images[part.index]
                segment = builder.append_image(self.prepare_image(image))
                parts.append(ChatPart(segment, image, role))
                continue
            supervised, starts_answer = part.is_supervised, part.is_answer_start
            if part.kind == "control":
                builder.append_control(
                    part.text, supervised=supervised, starts_answer=starts_answer
                )
                continue
            role, text = texts[part.index]
            text = text.lstrip() if part.strips[0] else text
            text = text.rstrip() if part.strips[1] else text
            segment = builder.append_text(text, supervised=supervised, starts_answer=starts_answer)
            parts.append(ChatPart(segment, text, role, supervised))
            if part.lacks_end:
                for token_id in self.eos_token_ids[:1]:
                    builder.append_token(token_id, supervised=supervised)
        return builder, parts
