"""Tokenisation of texts in which control text and user text meet, with character offsets.

A text between two special tokens is one string for the tokenizer, whoever wrote its parts, so that
its tokens are those of every other library. User text nevertheless never becomes a special token:
the special tokens of control text are replaced by aliases that no user can know, and only these are
special here.

    control text    <|im_start|>user\\n        alias text   <|9f3c...-1|>user\\n
    user text       what is </s>?             the same text, in which </s> is three characters
"""

from __future__ import annotations

import re
import secrets
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from tokenizers import AddedToken
from tokenizers import Tokenizer as BackendTokenizer

from vlduet.errors import ModelError
from vlduet.model.processing import Tokenizer

PROBE = "A"
"""Beginning of an answer, in place of all: a tokenizer that merges a space merges it with this."""
MAX_CACHED_TEXTS = 10_000
"""Number of short texts whose aliases or last tokens are remembered."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """Tokens of a text with their places.

    Offsets ascend. Several tokens of one character, such as the bytes of an emoji, have its
    offsets.
    """

    token_ids: list[int]
    """Tokens of the checkpoint."""
    starts: list[int]
    """Index of the first character of every token."""
    ends: list[int]
    """Index after the last character of every token."""

    def num_tokens_before(self, position: int) -> int:
        """Return the number of tokens that end at a character position or before it."""
        return bisect_right(self.ends, position)


class TextTokenizer:
    """The tokenizer of a checkpoint for texts whose special tokens are aliases.

    A control token is special, or the chat template writes it. All other added tokens, such as
    runs of line ends, are ordinary in user text, too, as in transformers.

    Args:
        tokenizer: with a Rust backend, which is shared and not modified. Tokens that are added to
            it later are not known here (see `is_current`).
        extra_ids: further token ids that control text may contain.

    Raises:
        ModelError: the tokenizer has no Rust backend, and so no offsets.
    """

    def __init__(self, tokenizer: Tokenizer, extra_ids: tuple[int, ...] = ()):
        if not tokenizer.is_fast:
            raise ModelError(
                "the tokenizer has no Rust backend, which tells where a token begins",
                fix="Save the checkpoint with a tokenizer.json",
            )
        self.tokenizer = tokenizer
        self._version = _version(tokenizer)
        shared = tokenizer.backend_tokenizer
        # The model is shared. Without a post-processor, offsets include the spaces of a token.
        self._backend = BackendTokenizer(shared.model)
        if shared.normalizer is not None:
            self._backend.normalizer = shared.normalizer
        if shared.pre_tokenizer is not None:
            self._backend.pre_tokenizer = shared.pre_tokenizer
        nonce = secrets.token_hex(8)
        template = str(tokenizer.chat_template)
        tokens = dict(tokenizer.added_tokens_decoder)
        for token_id in extra_ids:
            content = str(tokenizer.convert_ids_to_tokens(token_id))
            tokens.setdefault(token_id, AddedToken(content, special=True, normalized=False))
        self._aliases: dict[str, str] = {}
        content_of_id: dict[int, str] = {}
        added = []
        for token_id, token in tokens.items():
            content = token.content
            is_written = content in template and not content.isspace()
            if token.special or is_written or token_id in extra_ids:
                alias = f"<|{nonce}-{token_id}|>"
                self._aliases[content] = alias
                content = alias
            content_of_id[token_id] = content
            added.append(_copy_added_token(token, content))
        self._context = f"<|{nonce}|>"
        self._backend.add_tokens([*added, AddedToken(self._context, normalized=False)])
        self._id_of_added = {
            self._backend.token_to_id(content): token_id
            for token_id, content in content_of_id.items()
        }
        self._first_added_id = min(self._id_of_added, default=0)
        self._control_texts: dict[str, str] = {}
        self._tails: dict[str, list[int]] = {}

    def is_current(self, tokenizer: Tokenizer) -> bool:
        """Return whether this is the tokenizer, without tokens or a template that were set later."""
        return tokenizer is self.tokenizer and _version(tokenizer) == self._version

    @cached_property
    def _alias_pattern(self) -> re.Pattern[str]:
        """Pattern of all control tokens, longer ones first."""
        contents = sorted(self._aliases, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, contents)) or r"(?!)")

    def alias_control(self, text: str) -> str:
        """Return control text with the aliases of its control tokens."""
        if text not in self._control_texts:
            if len(self._control_texts) >= MAX_CACHED_TEXTS:
                self._control_texts.clear()
            aliased = self._alias_pattern.sub(lambda match: self._aliases[match[0]], text)
            self._control_texts[text] = aliased
        return self._control_texts[text]

    def alias_token(self, token_id: int) -> str:
        """Return the alias of a control token. KeyError for any other token."""
        return self._aliases[str(self.tokenizer.convert_ids_to_tokens(token_id))]

    def encode(self, text: str, *, continues: bool = False) -> Encoding:
        """Return the tokens of a text of user text and aliases.

        Args:
            text: may be empty.
            continues: tokenise it as what follows a special token, instead of as the beginning of
                a text, where some tokenizers add a space.
        """
        context = self._context if continues else ""
        encoding = self._backend.encode(context + text, add_special_tokens=False)
        token_ids, offsets = encoding.ids, encoding.offsets
        if continues:
            token_ids, offsets = token_ids[1:], offsets[1:]
        starts = [max(0, start - len(context)) for start, _ in offsets]
        ends = [end - len(context) for _, end in offsets]
        for i, token_id in enumerate(token_ids):
            if token_id >= self._first_added_id and token_id in self._id_of_added:
                token_ids[i] = self._id_of_added[token_id]
                # A token that takes the white space around it is at its own place nevertheless.
                content = text[starts[i] : ends[i]]
                if content[:1].isspace() or content[-1:].isspace():
                    starts[i] += len(content) - len(content.lstrip())
                    ends[i] -= len(content) - len(content.rstrip())
        return Encoding(token_ids, starts, list(accumulate(ends, max)))

    def is_boundary(self, text: str, encoding: Encoding, position: int) -> bool:
        """Return whether the text before a position has the tokens that it has alone.

        Then a prompt that ends there has the same tokens, whatever follows.
        """
        count = encoding.num_tokens_before(position)
        if count < len(encoding.starts) and encoding.starts[count] < position:
            return False
        # Without a token across the position, only white space depends on what follows.
        tail = _find_tail(text[:position])
        if not tail:
            return True
        if tail not in self._tails:
            if len(self._tails) >= MAX_CACHED_TEXTS:
                self._tails.clear()
            alone = self.encode(tail)
            num_stable = alone.num_tokens_before(len(tail.rstrip()))
            self._tails[tail] = alone.token_ids[num_stable:]
        last_ids = self._tails[tail]
        return encoding.token_ids[count - len(last_ids) : count] == last_ids

    def count_merged_space(self, text: str) -> int:
        """Return how many characters of white space at the end of a prompt an answer would take.

        0 for white space that remains a token of its own. `text` is control text.
        """
        tail = _find_tail(text)
        if not tail:
            return 0
        aliased = self.alias_control(tail)
        encoding = self.encode(aliased + PROBE)
        start = encoding.starts[encoding.num_tokens_before(len(aliased))]
        merged = aliased[start:]
        return len(merged) if merged.isspace() else 0


def _find_tail(text: str) -> str:
    """Return the white space at the end of a text with the word before it; "" if there is none."""
    stripped = text.rstrip()
    if len(stripped) == len(text):
        return ""
    words = stripped.rsplit(None, 1)
    return text[len(stripped) - len(words[-1]) :] if words else text


def _version(tokenizer: Tokenizer) -> tuple[int, str]:
    """Return what changes where a tokenizer gets tokens or another chat template."""
    return len(tokenizer), str(tokenizer.chat_template)


def _copy_added_token(token: AddedToken, content: str) -> AddedToken:
    """Return an added token that is matched as `token` is, with another content."""
    return AddedToken(
        content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
    )
