"""Rendering, in one place: texts, images and chats -> `Sequence`, the same way for training, indexing and serving.

Everything is built from pieces, each tokenised by itself, so a label or an anchor is where its piece is: nothing is ever
re-tokenised to find offsets. *Control* pieces (prompts, chat templates) may contain special tokens; *user* pieces never do,
so a caption that spells `<|im_end|>` or `<image>` stays text.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from jinja2 import TemplateError

from vlduet.data.content_keys import content_key
from vlduet.data.records import ImageRef, Message, Parts, extract_images
from vlduet.data.sequences import IGNORE_INDEX, Anchor, PreparedImage, Sequence, Slice
from vlduet.errors import ConfigError, DataError
from vlduet.model.families.family import ImageDelimiters, token_string
from vlduet.model.processing import Processor, Tokenizer

SLOT_PATTERN = re.compile(r"\{(image|text|parts)\}")
Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Prompts:
    """How content is presented when an embedding is wanted; saved with the model, because it decides every vector."""

    image: str = "{image}\nSummarize the provided image in one word:"
    """Around an image alone."""
    text: str = "{text}\nSummarize the provided text in one word:"
    """Around a text alone."""
    parts: str = "{parts}\nSummarize the provided content in one word:"
    """Around anything mixed."""
    query: str = ""
    """Written before a query's text: some models embed questions otherwise than documents."""
    chat: bool = True
    """Put the prompt in a user turn of the checkpoint's chat template: the summary token is where an answer begins."""
    image_pool: str = "last"
    """An image alone is read from the prompt's `last` token (VladVA's summary) or the `mean` of its tokens (Sugar). So is
    a mixture that ends with an image, where the prompt writes nothing after it. With `vision`, an image alone is read from
    the vision tower (FROMAGe), and a mixture from the last token."""

    def __post_init__(self) -> None:
        for name in ("image", "text", "parts"):
            if SLOT_PATTERN.findall(getattr(self, name)) != [name]:
                raise ConfigError(
                    f"{getattr(self, name)!r}",
                    place=f"prompts.{name}",
                    fix=f"Write {{{name}}} in it once",
                )
        if self.image_pool not in ("last", "mean", "vision"):
            raise ConfigError(
                f"'{self.image_pool}'", place="prompts.image_pool", fix="Use last or mean"
            )

    def to_dict(self) -> dict[str, Any]:
        """As it stands in configs and manifests."""
        return asdict(self)


@dataclass(slots=True)
class SequenceBuilder:
    """A sequence under construction. `text` returns spans, which may shrink only when `build` cuts to a limit."""

    tokenizer: Tokenizer
    image_token_id: int
    image_delimiters: ImageDelimiters
    token_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    images: list[tuple[int, PreparedImage]] = field(default_factory=list)
    anchors: list[Anchor] = field(default_factory=list)
    text_spans: list[Span] = field(default_factory=list)
    """User pieces that carry no anchor inside: what may be cut when the sequence is too long."""
    last_control: tuple[int, str] = (0, "")
    """The prompt piece that it ends with, and where that begins."""

    def append_tokens(self, ids: list[int], *, supervised: bool = False, text: str = "") -> Span:
        """Tokens as they are; of a prompt piece with its `text`."""
        start = len(self.token_ids)
        self.last_control = start, text
        self.token_ids += ids
        self.labels += ids if supervised and start > 0 else [IGNORE_INDEX] * len(ids)
        if supervised and start == 0 and ids:
            self.labels[0:] = [IGNORE_INDEX, *ids[1:]]
        return start, len(self.token_ids)

    def append_control(self, text: str) -> Span:
        """A prompt piece; special tokens in it are special. With a piece right before it, it is one text: two line ends
        may be one token."""
        start, before = self.last_control
        if not text:
            return len(self.token_ids), len(self.token_ids)
        if before:
            del self.token_ids[start:], self.labels[start:]
        return self.append_tokens(
            self.tokenizer.encode(before + text, add_special_tokens=False), text=before + text
        )

    def append_text(self, text: str, *, supervised: bool = False) -> Span:
        """A user's text: special tokens in it are spelled out."""
        ids = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        span = self.append_tokens(ids, supervised=supervised)
        self.text_spans.append(span)
        return span

    def append_image(self, image: PreparedImage) -> Span:
        """An image's place, in the checkpoint's frame; the span is the image's own, without words around it."""
        before, after = self.image_delimiters
        framed = bool(before) and self.last_control[1].endswith(
            before
        )  # a chat template may write its frames itself
        self.append_control("" if framed else before)
        start, _ = self.append_tokens(image.token_ids(self.image_token_id))
        self.images.append((start, image))
        self.append_control("" if framed else after)
        first, end = image.feature_span
        return start + first, start + end

    def copy(self) -> SequenceBuilder:
        """As it is now, whatever is written on."""
        found = replace(self)
        for name in ("ids", "labels", "images", "anchors", "texts"):
            setattr(found, name, [*getattr(self, name)])
        return found

    def add_anchor(
        self,
        span: Span,
        *,
        role: str,
        record_name: str,
        content_key: str,
        slices: tuple[Slice, ...] = (),
    ) -> None:
        """Read an embedding at `span` (its mean; pass the span of one token for a last-token reading)."""
        self.anchors.append(Anchor(span[0], span[1], role, record_name, content_key, slices))

    def build(self, limit: int) -> Sequence:
        """Finish; cut user texts, never images, from their ends where the sequence is longer than `limit` tokens.

        Raises:
            DataError: the images and the prompt alone are longer than the limit.
        """
        while (over := len(self.token_ids) - limit) > 0:
            start, end = max(self.text_spans, key=lambda span: span[1] - span[0], default=(0, 0))
            if end - start <= 1:
                what = f"{len(self.images)} images and the prompt take {len(self.token_ids)} tokens, the limit is {limit}"
                raise DataError(what, fix="Raise data.max_tokens or give the record fewer images")
            self._cut(max(start + 1, end - over), end)
        return Sequence(
            tuple(self.token_ids), tuple(self.labels), tuple(self.anchors), tuple(self.images)
        )

    def _cut(self, start: int, end: int) -> None:
        """Remove tokens [start, end), moving everything that points behind them."""
        del self.token_ids[start:end], self.labels[start:end]
        removed = end - start
        if start < len(self.labels):
            self.labels[start] = (
                IGNORE_INDEX  # what comes now is not what followed the text: nobody shall learn to stop here
            )

        def moved(at: int) -> int:
            return at if at <= start else max(start, at - removed)

        self.text_spans = [(moved(a), moved(b)) for a, b in self.text_spans]
        self.images = [(moved(at), image) for at, image in self.images]
        kept = []
        for a in self.anchors:
            begin, stop = moved(a.start), moved(a.end)
            begin = min(
                begin, stop - 1
            )  # a last-token anchor inside the cut moves to the last token that is left
            kept.append(replace(a, start=begin, end=stop))
        self.anchors = kept


class Renderer:
    """Builds sequences for one checkpoint.

    Args:
        processing: of the checkpoint.
        prompts: how content is presented for an embedding.
        max_tokens: longest sequence; user texts are cut to fit, images never.
    """

    def __init__(self, processing: Processor, *, prompts: Prompts, max_tokens: int = 2048):
        self.tokenizer, self.prepare_image = processing.tokenizer, processing.prepare_image
        self.image_token_id, self.image_delimiters = (
            processing.image_token_id,
            processing.image_delimiters,
        )
        self.image_placeholder, self.eos_token_ids = (
            processing.image_placeholder,
            [*processing.eos_token_ids],
        )
        self.prompts, self.max_tokens = prompts, max_tokens
        start = self.tokenizer.encode("", add_special_tokens=True)
        bos = self.tokenizer.bos_token_id
        self.bos_ids = [bos] if bos is not None and start[:1] == [bos] else []

    def new_builder(self) -> SequenceBuilder:
        """An empty sequence that starts as the checkpoint's sequences do."""
        builder = SequenceBuilder(self.tokenizer, self.image_token_id, self.image_delimiters)
        builder.append_tokens(list(self.bos_ids))
        return builder

    def append_prompt(
        self, builder: SequenceBuilder, parts: Parts, *, is_query: bool = False
    ) -> list[Span]:
        """Write the embedding prompt of `parts`; returns the span of every part."""
        before, after = self._frame(parts)
        builder.append_control(before)
        spans = [self._part(builder, parts, i, query=is_query) for i in range(len(parts))]
        builder.append_control(after)
        return spans

    def render_document(self, parts: Parts) -> tuple[SequenceBuilder, list[Span]]:
        """The embedding prompt of an interleaved document whose texts are supervised, as far as the document fits.

        Returns:
            The sequence so far, and the spans of the leading parts that fit into `max_tokens`: at least one. A document
            that is there whole and ends with a text ends with the end-of-text token.
        """
        before, after = self._frame(parts)
        builder = self.new_builder()
        builder.append_control(before)
        room = self.max_tokens - 1 - len(self.tokenizer.encode(after, add_special_tokens=False))
        spans: list[Span] = []
        for i in range(len(parts)):
            so_far = builder.copy()
            span = self._part(builder, parts, i, supervised=True)
            if i and len(builder.token_ids) > room:
                builder = so_far
                break
            spans.append(span)
        if len(spans) == len(parts) and isinstance(
            parts[-1], str
        ):  # an end after an image would silence captions
            builder.append_tokens(self.eos_token_ids[:1], supervised=True)
        builder.append_control(after)
        return builder, spans

    def _frame(self, parts: Parts) -> tuple[str, str]:
        """What stands before and after the content."""
        kinds = {isinstance(p, ImageRef) for p in parts}
        name = (
            ("image" if kinds == {True} and len(parts) == 1 else "text")
            if len(kinds) == 1
            else "parts"
        )
        name = "parts" if name == "image" and len(parts) > 1 else name
        template: str = getattr(self.prompts, name)
        before, after = SLOT_PATTERN.split(template)[::2]
        if self.prompts.chat:
            turn = self._template([Message("user", ("\ue000",))], generation_prompt=True)
            opening, closing = turn.split("\ue000")
            before, after = opening + before, after + closing
        if (
            self.bos_ids
            and self.tokenizer.bos_token
            and before.startswith(str(self.tokenizer.bos_token))
        ):
            before = before[len(str(self.tokenizer.bos_token)) :]
        return before, after

    def _part(
        self,
        builder: SequenceBuilder,
        parts: Parts,
        i: int,
        *,
        query: bool = False,
        supervised: bool = False,
    ) -> Span:
        part = parts[i]
        if isinstance(part, ImageRef):
            return builder.append_image(self.prepare_image(part))
        lead = " " if i and not isinstance(parts[i - 1], ImageRef) else ""
        return builder.append_text(
            lead + (self.prompts.query if query else "") + part, supervised=supervised
        )

    def render_embedding(
        self,
        parts: Parts,
        *,
        is_query: bool = False,
        role: str = "",
        record_name: str = "",
        content_key: str = "",
    ) -> Sequence:
        """The sequence whose one anchor is the embedding of `parts`. Raises DataError for nothing to embed."""
        if not parts or any(isinstance(p, str) and not p.strip() for p in parts):
            raise DataError("nothing to embed", fix="Give a non-empty text or an image")
        builder = self.new_builder()
        spans = self.append_prompt(builder, parts, is_query=is_query)
        builder.add_anchor(
            self.pooling_span(builder, parts, spans),
            role=role,
            record_name=record_name,
            content_key=content_key,
        )
        return builder.build(self.max_tokens)

    def render_caption(self, image: ImageRef, caption: str, *, record_name: str = "") -> Sequence:
        """Image prompt, read as the image's embedding; then the caption and its end, supervised: one image pass for both
        losses (VladVA)."""
        builder = self.new_builder()
        spans = self.append_prompt(builder, (image,))
        reading = self.pooling_span(builder, (image,), spans)
        builder.add_anchor(
            reading, role="image", record_name=record_name, content_key=content_key((image,))
        )
        builder.append_text(caption, supervised=True)
        builder.append_tokens(self.eos_token_ids[:1], supervised=True)
        return builder.build(self.max_tokens)

    def render_caption_request(self, image: ImageRef, prompt: str) -> Sequence:
        """What a caption is written after: image and instruction in a user's turn, or without one the image prompt.

        Raises:
            ConfigError: an instruction for a checkpoint without a chat template. DataError, ImageError: a broken image.
        """
        if not prompt:
            return self.render_embedding((image,))
        if not self.tokenizer.chat_template:
            fix = "Give an empty one: captions then go on from the image prompt"
            raise ConfigError(
                "the checkpoint has no chat template to ask in", place="prompt", fix=fix
            )
        return self.render_chat((Message("user", (image, prompt)),), add_generation_prompt=True)

    def pooling_span(self, builder: SequenceBuilder, parts: Parts, spans: list[Span]) -> Span:
        """Where the prompt that was just written is read: an image's tokens or the last token of all."""
        last, pool = len(builder.token_ids), self.prompts.image_pool
        alone = len(parts) == 1 and isinstance(parts[0], ImageRef)
        nothing_after = (
            isinstance(parts[-1], ImageRef) and builder.last_control[1] == self.image_delimiters[1]
        )
        by_image = (alone and pool != "last") or (nothing_after and pool == "mean")
        return spans[-1] if by_image else (last - 1, last)

    def render_chat(
        self, messages: tuple[Message, ...], *, add_generation_prompt: bool
    ) -> Sequence:
        """A conversation in the checkpoint's own chat template.

        Args:
            messages: turns.
            answer: True leaves the sequence open for the model to answer; False supervises every assistant turn, its
                end-of-turn token included.

        Raises:
            DataError: images and template alone exceed the limit, or the template refuses the chat.
            ConfigError: there is no chat template, or it loses content.
        """
        # Every user string becomes a numbered mark in the template's output, so control and user text stay apart.
        contents: list[tuple[str, bool, bool]] = []  # text, supervised, ends its turn
        marked = []
        for message in messages:
            parts = []
            said = message.role == "assistant" and not add_generation_prompt
            last = max(
                (i for i, part in enumerate(message.parts) if isinstance(part, str)), default=-1
            )
            for i, part in enumerate(message.parts):
                if isinstance(part, str):
                    parts.append(f"\ue000{len(contents)}\ue001")
                    contents.append((part, said, said and i == last))
                else:
                    parts.append(part)  # type: ignore[arg-type]
            marked.append(Message(message.role, tuple(parts)))
        refs = extract_images(part for message in messages for part in message.parts)
        rendered = self._template(marked, generation_prompt=add_generation_prompt)
        builder = self.new_builder()
        if self.bos_ids and self.tokenizer.bos_token:
            rendered = rendered.removeprefix(str(self.tokenizer.bos_token))
        closing = False  # True right after an answer: its end-of-turn token is supervised too
        for piece in re.split(rf"(\ue000\d+\ue001|{re.escape(self.image_placeholder)})", rendered):
            if piece == self.image_placeholder:
                builder.append_image(self.prepare_image(refs[len(builder.images)]))
            elif piece.startswith("\ue000"):
                text, supervised, closing = contents[int(piece[1:-1])]
                builder.append_text(text, supervised=supervised)
            elif piece or closing:
                self._control(builder, piece, closing=closing)
                closing = False
        return builder.build(self.max_tokens)

    def _control(self, builder: SequenceBuilder, piece: str, *, closing: bool) -> None:
        """A template piece; behind an answer its end-of-turn token is supervised, and added where the template has none."""
        ids = self.tokenizer.encode(piece, add_special_tokens=False)
        if closing:
            stop = next((i for i, token in enumerate(ids) if token in self.eos_token_ids), None)
            builder.append_tokens(
                self.eos_token_ids[:1] if stop is None else ids[: stop + 1], supervised=True
            )
            if stop is not None:
                _, _, piece = piece.partition(token_string(self.tokenizer, ids[stop]))
                ids = ids[stop + 1 :]
        builder.append_tokens(ids, text=piece)

    def _template(self, messages: list[Message], *, generation_prompt: bool) -> str:
        def content(message: Message, as_list: bool) -> Any:
            if as_list:
                return [
                    {"type": "text", "text": p} if isinstance(p, str) else {"type": "image"}
                    for p in message.parts
                ]
            return "".join(
                p if isinstance(p, str) else self.image_placeholder + "\n" for p in message.parts
            )

        if not self.tokenizer.chat_template:
            raise ConfigError(
                "the checkpoint has no chat template",
                place="prompts.chat",
                fix="Set prompts.chat to false",
            )
        refused: Exception | None = None
        for as_list in (True, False):  # templates of text-only origin take strings only
            rows = [{"role": m.role, "content": content(m, as_list)} for m in messages]
            try:
                text = str(
                    self.tokenizer.apply_chat_template(
                        rows, tokenize=False, add_generation_prompt=generation_prompt
                    )
                )
            except (TemplateError, TypeError) as error:
                refused = error
                continue
            wanted = [p for m in messages for p in m.parts if isinstance(p, str)]
            count = sum(not isinstance(p, str) for m in messages for p in m.parts)
            if (
                all(text.count(p) == 1 for p in wanted)
                and text.count(self.image_placeholder) == count
                and "'type'" not in text
            ):
                return text
        if refused is not None:  # such as roles that do not alternate: the record's fault
            raise DataError(
                f"the checkpoint's chat template refuses this chat ({refused})",
                fix="Mend its turns",
            )
        raise ConfigError(
            "the checkpoint's chat template drops or repeats content",
            place="chat_template",
            fix="Mend chat_template.jinja",
        )
