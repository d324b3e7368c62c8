"""Ends of the slices (sentences) of an answer, found while it is generated.

That a sentence has ended is known when the text after it begins: a full stop may also be a decimal
point. By then the hidden states of its tokens have been computed, because the next token follows
from them, so reading one costs no forward pass.

    tokens          A   dog   runs   .      Then
    hidden states                    ^ read here, when " Then" is sampled and not yet appended
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlduet.data.records import find_sentences


@dataclass(frozen=True, slots=True, eq=False)
class SliceEnd:
    """End of a slice, at which a request pauses."""

    state: Tensor
    """float[D], hidden state (after the final norm) where the slice ends."""
    is_last: bool = False
    """Whether the answer ends here, too."""


class SliceReader:
    """Finds the ends of the sentences of one answer, and the hidden states there.

    A sentence ends where `data.records.find_sentences` says, which splits the answers that the
    recipe duet learns from, and what is left ends with the answer. The state is that of the token
    that covers its last visible character, as for the anchors of that recipe.
    """

    def __init__(self) -> None:
        self._text = ""  # of the present slice, up to the last token that was added
        # Length of `_text` after each token, and the hidden state at the token.
        self._states: list[tuple[int, Tensor]] = []

    def find_end(self, state: Tensor, next_text: str, *, is_end: bool) -> SliceEnd | None:
        """Return the slice that ends before the next token, or None; to call once for every token.

        Args:
            state: float[D], hidden state at the last token that was added, or before the first one
                at the last token of the prompt.
            next_text: text of the next token, which is not added; "" if it has none.
            is_end: the answer ends with the next token.
        """
        self._states.append((len(self._text), state.clone()))  # a view would keep the whole batch
        sentences = find_sentences(self._text + ("" if is_end else next_text))
        if is_end and sentences:
            end = sentences[-1][1]
        elif len(sentences) > 1:
            end = sentences[0][1]
        else:
            return None
        if end > len(self._text):
            return None  # it ends within the next token
        slice_state = next(state for length, state in self._states if length >= end)
        self._text = self._text[end:]
        self._states = [(length - end, state) for length, state in self._states if length > end]
        return SliceEnd(slice_state, is_last=is_end)

    def add_text(self, text: str) -> None:
        """Append the text of a token to the present slice."""
        self._text += text

    def restart(self) -> None:
        """Begin a new slice, as after an image."""
        self._text = ""
        self._states = []
