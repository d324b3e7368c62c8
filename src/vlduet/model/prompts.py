"""Rendering of texts, images and chats into sequences, the same for training, indexing and serving.

1. `Prompts` say which text surrounds a content, and where its embedding is read.
2. `Renderer` renders embeddings, documents, captions and chats for one checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from copy import copy
from dataclasses import asdict, dataclass
from typing import Any, Self

from jinja2 import TemplateError

from vlduet.data import content_keys
from vlduet.data.records import ImageRef, Message, Parts, extract_images
from vlduet.data.sequences import PreparedImage, Sequence
from vlduet.errors import ConfigError, DataError
from vlduet.model.families.family import token_string
from vlduet.model.limits import DEFAULT_MAX_TOKENS
from vlduet.model.processing import Processor
from vlduet.model.sequence_builder import SequenceBuilder, Span

SLOT_PATTERN = re.compile(r"\{(image|text|parts)\}")
"""Place of the content in a prompt."""


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

    def __post_init__(self) -> None:
        """Raise ConfigError for the first invalid field; nothing is modified.

        `image`, `text` and `parts` must each contain their own slot, such as ``{image}``, exactly
        once and no slot of another. `image_pool` must be `last`, `mean` or `vision`.
        """
        for name in ("image", "text", "parts"):
            prompt = getattr(self, name)
            if SLOT_PATTERN.findall(prompt) != [name]:
                raise ConfigError(
                    f"{prompt!r}", place=f"prompts.{name}", fix=f"Write {{{name}}} in it once"
                )
        if self.image_pool not in ("last", "mean", "vision"):
            raise ConfigError(
                f"'{self.image_pool}'",
                place="prompts.image_pool",
                fix="Use last or mean (vision is for recipe fromage)",
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name, as in configs and manifests."""
        return asdict(self)


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
        self.eos_token_ids = [*processor.eos_token_ids]
        self.prompts = prompts
        self.max_tokens = max_tokens
        start = self.tokenizer.encode("", add_special_tokens=True)
        bos = self.tokenizer.bos_token_id
        self.bos_ids = [bos] if bos is not None and start[:1] == [bos] else []
        self.bos_text = str(self.tokenizer.bos_token) if self.bos_ids else ""

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

    def new_builder(self) -> SequenceBuilder:
        """Return a builder with only the begin-of-sequence token, if the checkpoint uses one."""
        builder = SequenceBuilder(self.tokenizer, self.image_token_id, self.image_delimiters)
        builder.append_tokens(list(self.bos_ids))
        return builder

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
        builder = self.new_builder()
        spans = self.append_prompt(builder, parts, is_query=is_query)
        span = self.pooling_span(builder, parts, spans)
        builder.add_anchor(span, role=role, record_name=record_name, content_key=content_key)
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
        builder = self.new_builder()
        spans = self.append_prompt(builder, (image,))
        builder.add_anchor(
            self.pooling_span(builder, (image,), spans),
            role="image",
            record_name=record_name,
            content_key=content_keys.content_key((image,)),
        )
        builder.append_text(caption, supervised=True)
        builder.append_tokens(self.eos_token_ids[:1], supervised=True)
        return builder.build(self.max_tokens)

    def render_document(self, parts: Parts) -> tuple[SequenceBuilder, list[Span]]:
        """Render as many leading parts of a document as fit `max_tokens`; texts are labels.

        The prompt for their kinds surrounds them. After the last part, if all fit and it is a text,
        the end-of-text token follows as a label.

        Args:
            parts: images and texts in order, at least one.

        Returns:
            The builder, to which the caller adds anchors, and the span of every part that fits: at
            least one, even if it alone is too long (`SequenceBuilder.build` cuts it).

        Raises:
            ImageError: an image cannot be decoded.
            DataError, ConfigError: as `append_prompt`.
        """
        before, after = self._prompt_texts(parts)
        builder = self.new_builder()
        builder.append_control(before)
        closing_length = len(self.tokenizer.encode(after, add_special_tokens=False))
        limit = self.max_tokens - 1 - closing_length  # 1: the end-of-text token
        spans: list[Span] = []
        for i in range(len(parts)):
            previous = builder.copy()
            span = self._append_part(builder, parts, i, supervised=True)
            if i and len(builder.token_ids) > limit:
                builder = previous
                break
            spans.append(span)
        # The end of text after an image would teach the model to leave images without a caption.
        if len(spans) == len(parts) and isinstance(parts[-1], str):
            builder.append_tokens(self.eos_token_ids[:1], supervised=True)
        builder.append_control(after)
        return builder, spans

    def append_prompt(
        self, builder: SequenceBuilder, parts: Parts, *, is_query: bool = False
    ) -> list[Span]:
        """Append `parts` in their embedding prompt to `builder`; return the span of every part.

        Args:
            builder: sequence so far, modified in place.
            parts: images, which are decoded, and texts in order.
            is_query: put `prompts.query` before every text.

        Raises:
            ImageError: an image cannot be decoded.
            DataError: the chat template refuses a single turn of a user.
            ConfigError: `prompts.chat` is set and the checkpoint has no usable chat template.
        """
        before, after = self._prompt_texts(parts)
        builder.append_control(before)
        spans = [self._append_part(builder, parts, i, is_query=is_query) for i in range(len(parts))]
        builder.append_control(after)
        return spans

    def pooling_span(self, builder: SequenceBuilder, parts: Parts, spans: list[Span]) -> Span:
        """Return the span where the embedding of a prompt that was just appended is read.

        Args:
            builder: sequence that ends with the prompt; it is not modified.
            parts: contents of the prompt, at least one.
            spans: result of `append_prompt`.

        Returns:
            The span of the last part, an image, in two cases: it is the only part and
            `prompts.image_pool` is not `last`; or the prompt has no text after it and `image_pool`
            is `mean`. Else the last token of the sequence.
        """
        pool = self.prompts.image_pool
        is_single_image = len(parts) == 1 and isinstance(parts[0], ImageRef)
        ends_with_image = (
            isinstance(parts[-1], ImageRef) and builder.trailing_control == self.image_delimiters[1]
        )
        if (is_single_image and pool != "last") or (ends_with_image and pool == "mean"):
            return spans[-1]
        return len(builder.token_ids) - 1, len(builder.token_ids)

    def _prompt_texts(self, parts: Parts) -> tuple[str, str]:
        """Return the control texts before and after contents that are embedded.

        The prompt is `parts` for a mixture, `image` for a single image, else `text` (several images
        included). With `prompts.chat` the texts include the chat template around a user turn, up to
        where the answer begins. A begin-of-sequence token, which every builder has, is left out.
        Raises DataError and ConfigError as `_apply_chat_template`.
        """
        if len({isinstance(part, ImageRef) for part in parts}) > 1:
            template = self.prompts.parts
        elif len(parts) == 1 and isinstance(parts[0], ImageRef):
            template = self.prompts.image
        else:
            # Several images without a text are presented by this prompt, too.
            template = self.prompts.text
        before, _, after = SLOT_PATTERN.split(template)
        if self.prompts.chat:
            marker = "\ue000"  # a character for private use, where the content will be
            turn = self._apply_chat_template(
                [Message("user", (marker,))], add_generation_prompt=True
            )
            opening, closing = turn.split(marker)
            before = opening + before
            after = after + closing
        return before.removeprefix(self.bos_text), after

    def _append_part(
        self,
        builder: SequenceBuilder,
        parts: Parts,
        i: int,
        *,
        is_query: bool = False,
        supervised: bool = False,
    ) -> Span:
        """Append part i to `builder` in place and return its span; raises ImageError.

        A text gets a space before it if it follows a text, then the query prompt if `is_query`;
        `supervised` makes its tokens labels. An image is decoded, and takes none of these.
        """
        part = parts[i]
        if isinstance(part, ImageRef):
            return builder.append_image(self.prepare_image(part))
        separator = " " if i and not isinstance(parts[i - 1], ImageRef) else ""
        prefix = self.prompts.query if is_query else ""
        return builder.append_text(separator + prefix + part, supervised=supervised)

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
                labels. False makes the texts and the end-of-turn token of every assistant turn
                labels; the token is added where the template writes none.

        Raises:
            DataError: the sequence cannot be cut to `max_tokens`, or the template refuses the chat.
            ImageError: an image cannot be decoded.
            ConfigError: the checkpoint has no chat template, or it loses content.
        """
        # Every user text is a numbered marker in the template's output, so that control text and
        # user text stay apart.
        texts: list[tuple[str, bool, bool]] = []  # text, is supervised, ends an answer
        marked_messages = []
        for message in messages:
            is_answer = message.role == "assistant" and message.supervised
            supervised = is_answer and not add_generation_prompt
            parts: list[Any] = []
            for part in message.parts:
                if isinstance(part, str):
                    parts.append(f"\ue000{len(texts)}\ue001")
                    texts.append((part, supervised, False))
                else:
                    parts.append(part)
            if supervised and any(isinstance(part, str) for part in message.parts):
                texts[-1] = (texts[-1][0], True, True)
            marked_messages.append(Message(message.role, tuple(parts)))
        images = extract_images(part for message in messages for part in message.parts)
        rendered = self._apply_chat_template(
            marked_messages, add_generation_prompt=add_generation_prompt
        ).removeprefix(self.bos_text)

        builder = self.new_builder()
        after_answer = False  # the last token belongs to an answer: its end of turn is a label, too
        separators = rf"(\ue000\d+\ue001|{re.escape(self.image_placeholder)})"
        for part in re.split(separators, rendered):
            if part == self.image_placeholder:
                builder.append_image(self.prepare_image(images[len(builder.images)]))
            elif part.startswith("\ue000"):
                text, supervised, after_answer = texts[int(part[1:-1])]
                builder.append_text(text, supervised=supervised)
            elif part or after_answer:
                self._append_template_text(builder, part, after_answer=after_answer)
                after_answer = False
        return builder.build(self.max_tokens)

    def _append_template_text(
        self, builder: SequenceBuilder, text: str, *, after_answer: bool
    ) -> None:
        """Append text of the chat template to `builder`, in place, as control text.

        `after_answer` says that it follows an answer directly: then its tokens up to the first
        end-of-turn token become labels. Where it has none, that token is put before it as a label.
        """
        token_ids = self.tokenizer.encode(text, add_special_tokens=False)
        if after_answer:
            ends = [i for i, token_id in enumerate(token_ids) if token_id in self.eos_token_ids]
            if not ends:
                builder.append_tokens(self.eos_token_ids[:1], supervised=True)
            else:
                builder.append_tokens(token_ids[: ends[0] + 1], supervised=True)
                _, _, text = text.partition(token_string(self.tokenizer, token_ids[ends[0]]))
                token_ids = token_ids[ends[0] + 1 :]
        builder.append_tokens(token_ids, control_text=text)

    def _apply_chat_template(self, messages: list[Message], *, add_generation_prompt: bool) -> str:
        """Return messages in the checkpoint's chat template, with `image_placeholder` for images.

        Contents are passed as lists of typed parts, and as strings if the template does not take
        these. Callers pass markers as texts: each must occur exactly once in the result.

        Raises:
            DataError: the template refuses the messages, for example roles that do not alternate.
            ConfigError: there is no template, or no form of the messages keeps all content.
        """
        if not self.tokenizer.chat_template:
            raise ConfigError(
                "the checkpoint has no chat template",
                place="prompts.chat",
                fix="Set prompts.chat to false",
            )
        parts = [part for message in messages for part in message.parts]
        texts = [part for part in parts if isinstance(part, str)]
        refusal: Exception | None = None
        for as_list in (True, False):  # templates of text-only origin accept strings only
            rows = [
                {"role": message.role, "content": self._message_content(message, as_list=as_list)}
                for message in messages
            ]
            try:
                rendered = str(
                    self.tokenizer.apply_chat_template(
                        rows, tokenize=False, add_generation_prompt=add_generation_prompt
                    )
                )
            except (TemplateError, TypeError) as error:
                refusal = error
                continue
            is_complete = (
                all(rendered.count(text) == 1 for text in texts)
                and rendered.count(self.image_placeholder) == len(parts) - len(texts)
                and "'type'" not in rendered  # the list itself, printed by a template for strings
            )
            if is_complete:
                return rendered
        if refusal is not None:
            raise DataError(
                f"the checkpoint's chat template refuses this chat ({refusal})",
                fix="Correct the order of its turns",
            )
        raise ConfigError(
            "the checkpoint's chat template drops or repeats content",
            place="chat_template",
            fix="Correct chat_template.jinja",
        )

    def _message_content(self, message: Message, *, as_list: bool) -> list[dict[str, str]] | str:
        """Return a message's content for a chat template: a list of typed parts, or one string.

        The string joins the texts without separators, with `image_placeholder` and a newline for an
        image.
        """
        if as_list:
            return [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
                for part in message.parts
            ]
        return "".join(
            part if isinstance(part, str) else self.image_placeholder + "\n"
            for part in message.parts
        )
