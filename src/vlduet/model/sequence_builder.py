"""Construction of one `Sequence` from segments: control texts, user texts and images.

All texts between two special tokens or images are tokenised as one string, as transformers does;
labels and anchors follow from character offsets.

    segments   "<|im_start|>assistant\\n"    "A red circle."    "<|im_end|>"
    tokens      <|im_start|> assistant \\n    A Ġred Ġcircle .   <|im_end|>

- A token belongs to the segment of its last character: `Ġred` to the text that begins with "red",
  and a token of a full stop and the line end after it to what writes the line end.
- Control text may contain special tokens. User text never does: a caption that spells `<|im_end|>`
  remains ordinary text.
- Before an answer the text is cut in two where a token would cross that place, or where the prompt
  alone has other tokens: what precedes an answer has the tokens that the answer is prompted with.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Literal

from vlduet.data.sequences import (
    IGNORE_INDEX,
    Anchor,
    PreparedImage,
    Sequence,
    Slice,
    join_content_keys,
)
from vlduet.errors import DataError
from vlduet.model.limits import LIMIT_REMEDY
from vlduet.model.text_tokenizer import TextTokenizer

Span = tuple[int, int]
"""Token indices [start, end) of a sequence."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Part of a sequence: control text, user text, or an image."""

    kind: Literal["control", "text", "image"]
    text: str
    """Text with aliases of control tokens; the alias of the image token for an image."""
    is_supervised: bool = False
    """Make the tokens labels."""
    is_answer_start: bool = False
    """The model is prompted with what precedes."""
    image: PreparedImage | None = None


@dataclass(frozen=True, slots=True)
class AnchorRequest:
    """Anchor whose segment is not tokenised yet."""

    segment: int
    is_last: bool
    anchor: Anchor
    """The anchor with a span to be replaced."""
    span: tuple[int, int | None] | None = None
    """Tokens to read in place of those of the segment; None as their end: the segment's."""
    text_end: int | None = None
    """Read the token that covers the character before this index of the segment's text instead."""
    needs_prefix: bool = False
    """Leave the anchor out if text at or before its end is cut."""


@dataclass(frozen=True, slots=True)
class _SegmentTokens:
    """Tokens of a segment."""

    token_ids: list[int]
    num_shared: int
    """Number of leading tokens that also cover the segment before, 0 or 1."""
    starts: list[int]
    """Index in the segment's text of the first character of every token; negative before it."""


@dataclass(slots=True)
class SequenceBuilder:
    """Sequence under construction.

    The `append_*` methods modify it in place and return the index of the new segment. Nothing is
    tokenised before `build` or `count_tokens`.
    """

    tokenizer: TextTokenizer
    """Tokenizer of the checkpoint."""
    image_token_id: int
    """Token id that image features replace."""
    image_delimiters: tuple[str, str]
    """Control texts that the checkpoint expects before and after an image; either may be empty."""
    bos_text: str = ""
    """Text of the begin-of-sequence token if every sequence begins with one."""
    joined: bool = True
    """Tokenise neighbouring texts together. False: every user text, and the control texts between,
    apart, as in models of early versions."""
    continues: bool = False
    """The segments follow tokens that another sequence has: nothing begins a text here."""
    segments: list[Segment] = field(default_factory=list)
    anchor_requests: list[AnchorRequest] = field(default_factory=list)
    trailing_control: str = ""
    """Control text that the sequence ends with; empty after user text and images."""
    _tokens: list[_SegmentTokens] = field(default_factory=list)
    """Result of `_tokenize` for the present segments; empty if it is unknown."""

    def append_control(
        self, text: str, *, supervised: bool = False, starts_answer: bool = False
    ) -> int:
        """Append control text, in which special tokens are special.

        Args:
            text: may be empty.
            supervised: make its tokens labels.
            starts_answer: as of `append_text`.
        """
        self.trailing_control += text
        aliased = self.tokenizer.alias_control(text)
        return self._append(Segment("control", aliased, supervised, starts_answer))

    def append_token(self, token_id: int, *, supervised: bool = False) -> int:
        """Append one special token. KeyError for an ordinary one."""
        self.trailing_control = ""
        alias = self.tokenizer.alias_token(token_id)
        return self._append(Segment("control", alias, supervised))

    def append_text(
        self, text: str, *, supervised: bool = False, starts_answer: bool = False
    ) -> int:
        """Append user text, in which special tokens are spelled out.

        Args:
            text: the text; `build` may cut its end.
            supervised: make its tokens labels. The first token of a sequence is never a label.
            starts_answer: the model is prompted with what precedes, whose tokens then do not depend
                on the text.
        """
        self.trailing_control = ""
        return self._append(Segment("text", text, supervised, starts_answer))

    def append_image(self, image: PreparedImage) -> int:
        """Append an image between its delimiters; if control text wrote the first, without either.

        Returns:
            The index of the segment of the image alone.
        """
        before, after = self.image_delimiters
        # A chat template may have written the delimiters itself.
        is_delimited = bool(before) and self.trailing_control.endswith(before)
        if before and not is_delimited:
            self.append_control(before)
        self.trailing_control = ""
        alias = self.tokenizer.alias_token(self.image_token_id)
        index = self._append(Segment("image", alias, image=image))
        if after and not is_delimited:
            self.append_control(after)
        return index

    def _append(self, segment: Segment) -> int:
        """Append a segment and return its index."""
        self._tokens = []
        self.segments.append(segment)
        return len(self.segments) - 1

    def add_anchor(
        self,
        segment: int,
        *,
        is_last: bool,
        role: str,
        record_name: str,
        content_key: str,
        slices: tuple[Slice, ...] = (),
        span: tuple[int, int | None] | None = None,
    ) -> None:
        """Add an anchor, where a hidden state or the mean of several will be read.

        Args:
            segment: index of a segment. Of an image, the tokens between its first and its last
                feature count.
            is_last: read its last token, or the token before it if it has none; False: the mean of
                all its tokens.
            span: read the mean of the tokens from an index to another, or for None to the end of
                the segment, instead; of at least one.

        The other arguments are the fields of `Anchor`.
        """
        anchor = Anchor(0, 1, role, record_name, content_key, slices)
        self.anchor_requests.append(AnchorRequest(segment, is_last, anchor, span))

    def add_prefix_anchor(
        self,
        segment: int,
        *,
        role: str,
        record_name: str,
        slices: tuple[Slice, ...],
        text_end: int | None = None,
        is_mean: bool = False,
    ) -> None:
        """Add an anchor that stands for everything up to it.

        If a text at or before it is cut, it is left out of the sequence, for its content would be
        another one.

        Args:
            segment: index of a segment with tokens.
            role: field of the anchor, as `record_name` and `slices`. Its `content_key` is made of
                the keys of the slices.
            text_end: read the token that covers the character before this index of the segment's
                text, even one that also covers what follows; None: the segment's last token.
            is_mean: read the mean of all tokens of the segment instead.
        """
        anchor = Anchor(0, 1, role, record_name, join_content_keys(slices), slices)
        self.anchor_requests.append(
            AnchorRequest(segment, not is_mean, anchor, text_end=text_end, needs_prefix=True)
        )

    def drop_segments(self, count: int) -> None:
        """Remove all segments but the first `count`, in place. No anchor may be in the others."""
        self._tokens = []
        del self.segments[count:]
        self.trailing_control = ""

    # ------------------------------------------------------------------ tokens

    def count_tokens(self) -> list[int]:
        """Return the number of tokens up to the end of every segment, as if nothing followed."""
        num_tokens = self._num_bos_tokens()
        counts = []
        for tokens in self._tokenize():
            num_tokens += len(tokens.token_ids)
            counts.append(num_tokens)
        return counts

    def _num_bos_tokens(self) -> int:
        """Return 1 if a begin-of-sequence token must be put before the segments, else 0."""
        if not self.bos_text or self.continues:
            return 0
        bos = self.tokenizer.alias_control(self.bos_text)
        beginning = next((segment.text for segment in self.segments if segment.text), "")
        return int(not beginning.startswith(bos))

    def _tokenize(self) -> list[_SegmentTokens]:
        """Return the tokens of every segment."""
        if not self._tokens:
            if self.joined:
                self._tokens = self._tokenize_joined(self.segments, continues=self.continues)
            else:
                for is_control, group in groupby(self.segments, lambda s: s.kind == "control"):
                    segments = list(group)
                    for apart in [segments] if is_control else [[s] for s in segments]:
                        self._tokens += self._tokenize_joined(apart, continues=False)
        return self._tokens

    def _tokenize_joined(self, segments: list[Segment], *, continues: bool) -> list[_SegmentTokens]:
        """Return the same for segments whose texts are one string.

        `continues` says that they follow others, at whose end the string was cut.
        """
        text = "".join(segment.text for segment in segments)
        encoding = self.tokenizer.encode(text, continues=continues)
        tokens = []
        position = start = 0
        for i, segment in enumerate(segments):
            is_cut = segment.is_answer_start and position > 0
            if is_cut and not self.tokenizer.is_boundary(text, encoding, position):
                before = self._tokenize_joined(segments[:i], continues=continues)
                return before + self._tokenize_joined(segments[i:], continues=True)
            is_shared = start < len(encoding.starts) and encoding.starts[start] < position
            end = encoding.num_tokens_before(position + len(segment.text))
            token_ids = encoding.token_ids[start:end]
            starts = [first - position for first in encoding.starts[start:end]]
            if segment.image is not None:
                assert end - start == 1, "an image is one token of the text"
                token_ids = segment.image.token_ids(self.image_token_id)
                starts = [0] * len(token_ids)
            tokens.append(_SegmentTokens(token_ids, int(is_shared and end > start), starts))
            position += len(segment.text)
            start = end
        return tokens

    def _find_token(self, segment: int, text_end: int) -> int:
        """Return the index of the token that covers the character before an index of a text.

        The first token of the sequence is 0. A character of several tokens has the last of them.
        """
        position = text_end - 1 + sum(len(before.text) for before in self.segments[:segment])
        starts: list[int] = []  # of all tokens, in the text of all segments
        segment_start = 0
        for other, tokens in zip(self.segments, self._tokenize(), strict=True):
            starts += [segment_start + start for start in tokens.starts]
            segment_start += len(other.text)
        return self._num_bos_tokens() + max(bisect_right(starts, position) - 1, 0)

    def build(self, max_tokens: int) -> Sequence:
        """Return the finished sequence of at most `max_tokens` tokens; the builder stays.

        A longer sequence is cut: the longest user text loses tokens at its end, down to one, then
        the next longest. Images, control text and tokens that cover both kinds of text are never
        cut. Anchors move with their text (those of `add_prefix_anchor` are left out), and what
        follows the cut up to the end of the answer is no label.

        Raises:
            DataError: images, control text and one token of each user text exceed `max_tokens`.
        """
        draft = _Draft()
        if self._num_bos_tokens():
            draft.append(
                self.tokenizer.encode(self.tokenizer.alias_control(self.bos_text)).token_ids
            )
        spans: list[Span] = []
        for segment, tokens in zip(self.segments, self._tokenize(), strict=True):
            start, end = draft.append(tokens.token_ids, supervised=segment.is_supervised)
            if segment.kind == "text":
                draft.text_spans.append((start + tokens.num_shared, end))
            elif segment.image is not None:
                draft.images.append((start, segment.image))
                first, last = segment.image.feature_span
                start, end = start + first, start + last
            spans.append((start, end))
        for request in self.anchor_requests:
            start, end = spans[request.segment]
            if request.text_end is not None:
                start = self._find_token(request.segment, request.text_end)
                end = start + 1
            elif request.span is not None:
                end = max(request.span[1] or end, 1)
                start = min(request.span[0], end - 1)
            elif request.is_last or start == end:
                end = max(end, 1)
                start = end - 1
            anchor = replace(request.anchor, start=start, end=end)
            draft.anchors.append((anchor, request.needs_prefix))
        return draft.build(max_tokens)


@dataclass(slots=True)
class _Draft:
    """Tokens of a sequence that may be too long."""

    token_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    images: list[tuple[int, PreparedImage]] = field(default_factory=list)
    """Pairs (index of the image's first token, image)."""
    anchors: list[tuple[Anchor, bool]] = field(default_factory=list)
    """Anchors, and which of them are left out if a text before their end is cut."""
    text_spans: list[Span] = field(default_factory=list)
    """Spans of the user texts: what may be cut."""

    def append(self, token_ids: list[int], *, supervised: bool = False) -> Span:
        """Append tokens in place and return their span."""
        start = len(self.token_ids)
        self.token_ids += token_ids
        self.labels += token_ids if supervised else [IGNORE_INDEX] * len(token_ids)
        return start, len(self.token_ids)

    def build(self, max_tokens: int) -> Sequence:
        """Return the sequence, cut in place as `SequenceBuilder.build` says. Raises DataError."""
        full_length = len(self.token_ids)
        while (excess := len(self.token_ids) - max_tokens) > 0:
            start, end = max(self.text_spans, key=lambda span: span[1] - span[0], default=(0, 0))
            if end - start <= 1:
                raise DataError(
                    f"{len(self.images)} images and the prompt take {len(self.token_ids)} tokens, "
                    f"the limit is {max_tokens}",
                    fix=LIMIT_REMEDY,
                )
            self._cut(max(start + 1, end - excess), end)
        labels = self.labels
        if labels:
            labels = [IGNORE_INDEX, *labels[1:]]  # the first token has no prefix that predicts it
        return Sequence(
            tuple(self.token_ids),
            tuple(labels),
            tuple(anchor for anchor, _ in self.anchors),
            tuple(self.images),
            num_cut_tokens=full_length - len(self.token_ids),
        )

    def _cut(self, start: int, end: int) -> None:
        """Remove the tokens [start, end), in place, and shift text spans, images and anchors.

        Spans that reach into the removed tokens end at `start`; an anchor keeps at least one token,
        unless it needs what precedes: then it is removed if it ends after `start`.
        The labels that follow, up to the next text or token without a label, are removed.
        """
        del self.token_ids[start:end], self.labels[start:end]

        def shift(index: int) -> int:
            return index if index <= start else max(start, index - (end - start))

        self.text_spans = [(shift(first), shift(last)) for first, last in self.text_spans]
        self.images = [(shift(first), image) for first, image in self.images]
        anchors = []
        for anchor, needs_prefix in self.anchors:
            if needs_prefix and anchor.end > start:
                continue
            new_end = shift(anchor.end)
            # A last-token anchor inside the cut moves to the last token that is left.
            new_start = min(shift(anchor.start), new_end - 1)
            anchors.append((replace(anchor, start=new_start, end=new_end), needs_prefix))
        self.anchors = anchors
        # The end of the turn does not follow what is left of the text: supervised, it would teach
        # the model to stop early.
        text_starts = [first for first, last in self.text_spans if start <= first < last]
        limit = min(text_starts, default=len(self.labels))
        for i in range(start, limit):
            if self.labels[i] == IGNORE_INDEX:
                break
            self.labels[i] = IGNORE_INDEX
