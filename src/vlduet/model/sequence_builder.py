"""Construction of one `Sequence` from parts that are tokenised one by one.

A label or an anchor therefore is exactly where its text was appended; nothing is tokenised again to
find offsets. Control text (prompts, chat templates) may contain special tokens. User text never
does: a caption that spells `<|im_end|>` or `<image>` remains ordinary text.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from vlduet.data.sequences import IGNORE_INDEX, Anchor, PreparedImage, Sequence, Slice
from vlduet.errors import DataError
from vlduet.model.limits import LIMIT_REMEDY
from vlduet.model.processing import Tokenizer

Span = tuple[int, int]
"""Token indices [start, end) of a sequence."""


@dataclass(slots=True)
class SequenceBuilder:
    """Sequence under construction.

    The `append_*` methods modify it in place and return the span of the new tokens. Spans stay
    valid until `build`, which may cut user text.
    """

    tokenizer: Tokenizer
    """Tokenizer of the checkpoint."""
    image_token_id: int
    """Token id that image features replace."""
    image_delimiters: tuple[str, str]
    """Control texts that the checkpoint expects before and after an image; either may be empty."""
    token_ids: list[int] = field(default_factory=list)
    """Tokens so far."""
    labels: list[int] = field(default_factory=list)
    """Label of every token so far."""
    images: list[tuple[int, PreparedImage]] = field(default_factory=list)
    """Pairs (index of the image's first token, image)."""
    anchors: list[Anchor] = field(default_factory=list)
    """Anchors so far."""
    text_spans: list[Span] = field(default_factory=list)
    """Spans of the user texts: what `build` may cut."""
    trailing_control: str = ""
    """Control text that the sequence ends with; empty after user text and images."""
    trailing_start: int = 0
    """Index of the first token of the last appended part."""

    def append_tokens(
        self, token_ids: list[int], *, supervised: bool = False, control_text: str = ""
    ) -> Span:
        """Append tokens as they are and return their span.

        Args:
            token_ids: the tokens; the list is copied.
            supervised: make them labels. The first token of a sequence is never a label.
            control_text: control text that they encode, which a following control text may extend.
        """
        start = len(self.token_ids)
        labels = list(token_ids) if supervised else [IGNORE_INDEX] * len(token_ids)
        if start == 0 and labels:
            labels[0] = IGNORE_INDEX
        self.token_ids += token_ids
        self.labels += labels
        self.trailing_control = control_text
        self.trailing_start = start
        return start, len(self.token_ids)

    def append_control(self, text: str) -> Span:
        """Append control text, in which special tokens are special, and return its span.

        Its tokens are never labels. Directly after other control text both are tokenised again as
        one text, and the span covers both: two line ends, for example, may be one token. Empty text
        changes nothing and gives an empty span at the end.
        """
        if not text:
            return len(self.token_ids), len(self.token_ids)
        if self.trailing_control:
            text = self.trailing_control + text
            del self.token_ids[self.trailing_start :], self.labels[self.trailing_start :]
        token_ids = self.tokenizer.encode(text, add_special_tokens=False)
        return self.append_tokens(token_ids, control_text=text)

    def append_text(self, text: str, *, supervised: bool = False) -> Span:
        """Append user text, in which special tokens are spelled out, and return its span.

        Args:
            text: the text; `build` may cut its end.
            supervised: make its tokens labels.
        """
        token_ids = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        span = self.append_tokens(token_ids, supervised=supervised)
        self.text_spans.append(span)
        return span

    def append_image(self, image: PreparedImage) -> Span:
        """Append an image between its delimiters; if control text wrote the first, without either.

        Returns:
            The span from its first to its last feature token, without delimiters and outer row
            ends.
        """
        before, after = self.image_delimiters
        # A chat template may have written the delimiters itself.
        is_delimited = bool(before) and self.trailing_control.endswith(before)
        self.append_control("" if is_delimited else before)
        start, _ = self.append_tokens(image.token_ids(self.image_token_id))
        self.images.append((start, image))
        self.append_control("" if is_delimited else after)
        first, end = image.feature_span
        return start + first, start + end

    def add_anchor(
        self,
        span: Span,
        *,
        role: str,
        record_name: str,
        content_key: str,
        slices: tuple[Slice, ...] = (),
    ) -> None:
        """Add an anchor at `span`, where the mean hidden state will be read.

        The other arguments are the fields of `Anchor`.
        """
        self.anchors.append(Anchor(span[0], span[1], role, record_name, content_key, slices))

    def copy(self) -> SequenceBuilder:
        """Return an independent copy: appending to either does not change the other."""
        return replace(
            self,
            token_ids=[*self.token_ids],
            labels=[*self.labels],
            images=[*self.images],
            anchors=[*self.anchors],
            text_spans=[*self.text_spans],
        )

    def build(self, max_tokens: int) -> Sequence:
        """Return the finished sequence of at most `max_tokens` tokens.

        A longer sequence is cut, which modifies the builder: the longest user text loses tokens at
        its end, down to one, then the next longest. Images and control text are never cut. Anchors
        move with their text, and the token after a cut loses its label.

        Raises:
            DataError: images, control text and one token of each user text exceed `max_tokens`; the
                builder then has been cut that far.
        """
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
        return Sequence(
            tuple(self.token_ids),
            tuple(self.labels),
            tuple(self.anchors),
            tuple(self.images),
            num_cut_tokens=full_length - len(self.token_ids),
        )

    def _cut(self, start: int, end: int) -> None:
        """Remove the tokens [start, end), in place, and shift text spans, images and anchors.

        Spans that reach into the removed tokens end at `start`; an anchor keeps at least one token.
        The token that follows the removed ones is no label any more.
        """
        del self.token_ids[start:end], self.labels[start:end]
        if start < len(self.labels):
            # The next token, often the end of the text, does not follow what is left of the text:
            # supervised, it would teach the model to stop early.
            self.labels[start] = IGNORE_INDEX

        def shift(index: int) -> int:
            return index if index <= start else max(start, index - (end - start))

        self.text_spans = [(shift(first), shift(last)) for first, last in self.text_spans]
        self.images = [(shift(first), image) for first, image in self.images]
        anchors = []
        for anchor in self.anchors:
            new_end = shift(anchor.end)
            # A last-token anchor inside the cut moves to the last token that is left.
            new_start = min(shift(anchor.start), new_end - 1)
            anchors.append(replace(anchor, start=new_start, end=new_end))
        self.anchors = anchors
