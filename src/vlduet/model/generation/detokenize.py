"""Incremental detokenization: the text that each new token adds, at a constant cost per token."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream

from vlduet.model.processing import Tokenizer

REPLACEMENT_CHARACTER = "\N{REPLACEMENT CHARACTER}"
"""Decoded form of bytes that are not, or not yet, valid UTF-8."""
MAX_PENDING_TOKENS = 16
"""Number of tokens without complete text after which their settled part is returned."""
MAX_CHARACTER_BYTES = 4
"""Largest number of bytes, and so of tokens, in which UTF-8 encodes a character."""


class IncrementalDetokenizer:
    """Decoder of one answer, token by token; special tokens are skipped.

    The text of an answer is the concatenation of what `add` returns and a final `flush`. It equals
    `tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)`,
    with one exception: if a byte-fallback tokenizer yields invalid UTF-8, characters returned
    before the invalid byte stay, where a whole decode replaces all bytes of the run by U+FFFD.

    Decoding a token needs its predecessors: a character may span tokens, and SentencePiece
    decoders strip the first space. Therefore the tokens of the previous piece of text, and no
    earlier ones, are decoded again as context. `DecodeStream` of `tokenizers` does that; where it
    fails, and for a tokenizer without a Rust backend, `_text_after` does.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True) if tokenizer.is_fast else None
        self._context: list[int] = []
        self._pending: list[int] = []

    def add(self, token_id: int) -> str:
        """Append a token and return the text that it completes; empty if there is none.

        After `MAX_PENDING_TOKENS` tokens without text, the part of them that no later token can
        change is returned, with U+FFFD for invalid bytes.
        """
        self._pending.append(token_id)
        text = self._step(token_id)
        if text:
            self._context, self._pending = self._pending, []
        elif len(self._pending) >= MAX_PENDING_TOKENS:
            text = self._take_settled_text()
        return text

    def flush(self) -> str:
        """Return the text of the pending tokens, which are then no longer pending.

        Incomplete characters become U+FFFD. Empty if no token is pending. `add` must not follow.
        """
        text = self._text_after(self._context, self._pending)
        self._context, self._pending = self._pending, []
        return text

    def _step(self, token_id: int) -> str:
        """Return the text of the pending tokens if it is complete, else an empty string.

        Pending tokens are not removed. An exception of the stream drops the stream for good; the
        pending tokens are then decoded here.

        Args:
            token_id: the last pending token, new to the stream.
        """
        if self._stream is not None:
            try:
                return self._stream.step(self._tokenizer.backend_tokenizer, token_id) or ""
            except Exception:  # noqa: BLE001 - a bare Exception: the new token changed earlier text
                self._stream = None
        text = self._text_after(self._context, self._pending)
        return "" if text.endswith(REPLACEMENT_CHARACTER) else text

    def _take_settled_text(self) -> str:
        """Return the part of the pending text that no later token can change; "" if none is found.

        This keeps an endless run of invalid bytes from making every step slower. Its tokens become
        the context, the stream is dropped for good, and one to three tokens stay pending, which may
        be an incomplete character. If none is found, nothing changes.
        """
        text = self._text_after(self._context, self._pending)
        for num_open in range(1, MAX_CHARACTER_BYTES):
            settled, unsettled = self._pending[:-num_open], self._pending[-num_open:]
            settled_text = self._text_after(self._context, settled)
            if settled_text + self._text_after(settled, unsettled) == text:
                self._context, self._pending = settled, unsettled
                self._stream = None  # it cannot start from a context that ends in invalid bytes
                return settled_text
        return ""

    def _text_after(self, context: list[int], token_ids: list[int]) -> str:
        """Return the text that `token_ids` add to that of the tokens `context` before them.

        If they change the text of `context`, it is the text of `token_ids` decoded alone.
        """
        context_text = self._decode(context)
        text = self._decode(context + token_ids)
        if text.startswith(context_text):
            return text[len(context_text) :]
        return self._decode(token_ids)

    def _decode(self, token_ids: list[int]) -> str:
        text = self._tokenizer.decode(
            token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text


def holdback_length(text: str, stop_strings: Sequence[str]) -> int:
    """Return the length of the longest end of `text` that begins a stop string; 0 if none does.

    A stop string that is complete at the end counts only if its end begins one again.
    """
    lengths = [0]
    for stop_string in stop_strings:
        for length in range(1, min(len(stop_string), len(text) + 1)):
            if text.endswith(stop_string[:length]):
                lengths.append(length)
    return max(lengths)
