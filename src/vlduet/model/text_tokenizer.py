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
from unicodedata import normalize

from tokenizers import AddedToken
from tokenizers import Tokenizer as BackendTokenizer

from vlduet.model.processing import Tokenizer

PROBES = ("A", "a", "The", "the", "It", "Yes", "1")
"""Beginnings of answers: a tokenizer that merges a space with answers merges it with one of these.
"""
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
    """

    def __init__(self, tokenizer: Tokenizer, extra_ids: tuple[int, ...] = ()):
        self.tokenizer = tokenizer
        self._version = _version(tokenizer)
        self._backend = _copy_backend(tokenizer.backend_tokenizer)
        nonce = secrets.token_hex(8)
        self._context = f"<|{nonce}|>"
        template = str(tokenizer.chat_template)
        tokens = dict(tokenizer.added_tokens_decoder)
        for token_id in extra_ids:
            content = str(tokenizer.convert_ids_to_tokens(token_id))
            tokens.setdefault(token_id, AddedToken(content, special=True, normalized=False))
        self._aliases: dict[str, str] = {}
        self._alias_of_id: dict[int, str] = {}
        added = {}
        for token_id, token in tokens.items():
            content = token.content
            is_written = content in template and not content.isspace()
            if token.special or is_written or token_id in extra_ids:
                content = f"<|{nonce}-{token_id}|>"
                self._aliases[token.content] = self._alias_of_id[token_id] = content
            added[token_id] = _copy_added_token(token, content)
        num_model_tokens = self._backend.get_vocab_size()
        self._backend.add_tokens([*added.values(), AddedToken(self._context, normalized=False)])
        self._id_of_added: dict[int, int] = {}
        for token_id, token in added.items():
            own_id = self._backend.token_to_id(token.content)
            if own_id is not None and own_id != token_id:
                self._id_of_added[own_id] = token_id
        self._first_added_id = min(self._id_of_added, default=num_model_tokens)
        # Aliases stand for control tokens: with ids of the model itself they are spelled by a text.
        self._model_control_ids = {i for i in self._alias_of_id if i < num_model_tokens}
        self._control_texts: dict[str, str] = {}
        self._tails: dict[str, list[int]] = {}

    def is_current(self, tokenizer: Tokenizer) -> bool:
        """Return whether this is the tokenizer, and no token or template was set later."""
        return tokenizer is self.tokenizer and _version(tokenizer) == self._version

    @cached_property
    def max_token_chars(self) -> int:
        """Number of characters of the longest token: n tokens spell n times as many at most."""
        added = [token.content for token in self.tokenizer.added_tokens_decoder.values()]
        vocabulary = self._backend.get_vocab(with_added_tokens=False)
        return max(map(len, [*vocabulary, *added]), default=1)

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
        return self._alias_of_id[token_id]

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
            token_ids = token_ids[1:]
            offsets = [(start - len(context), end - len(context)) for start, end in offsets[1:]]
        starts = [start for start, _ in offsets]
        ends = [end for _, end in offsets]
        if not self._model_control_ids.isdisjoint(token_ids):
            token_ids, starts, ends = self._spell_control_tokens(token_ids, starts, ends, text)
        first_added_id = self._first_added_id
        for i in [i for i, token_id in enumerate(token_ids) if token_id >= first_added_id]:
            token_ids[i] = self._id_of_added.get(token_ids[i], token_ids[i])
            # A token that takes the white space around it is at its own place nevertheless.
            content = text[starts[i] : ends[i]]
            if content[:1].isspace() or content[-1:].isspace():
                starts[i] += len(content) - len(content.lstrip())
                ends[i] -= len(content) - len(content.rstrip())
        return Encoding(token_ids, starts, ends)

    def _spell_control_tokens(
        self, token_ids: list[int], starts: list[int], ends: list[int], text: str
    ) -> tuple[list[int], list[int], list[int]]:
        """Return tokens and offsets with those of single characters in place of control tokens.

        Some models have their control tokens among the pieces of ordinary text, too.
        """
        tokens: list[tuple[int, int, int]] = []
        for token_id, start, end in zip(token_ids, starts, ends, strict=True):
            if token_id not in self._model_control_ids:
                tokens.append((token_id, start, end))
                continue
            for i in range(start, end):
                pieces = self._backend.model.tokenize(text[i])
                tokens += [(piece.id, i, i + 1) for piece in pieces]
        return tuple(map(list, zip(*tokens, strict=True)))  # type: ignore[return-value]

    def is_boundary(self, text: str, encoding: Encoding, position: int) -> bool:
        """Return whether the text before a position has the tokens that it has alone.

        Then a prompt that ends there has the same tokens, whatever follows.
        """
        count = encoding.num_tokens_before(position)
        if count < len(encoding.starts) and encoding.starts[count] < position:
            return False
        # A normalizer may make one character of two, such as a letter and its accent.
        left, right = text[max(0, position - 4) : position], text[position : position + 4]
        if not right.isascii() and any(
            normalize(form, left + right) != normalize(form, left) + normalize(form, right)
            for form in ("NFC", "NFKC")
        ):
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
        start = len(aliased)
        for probe in PROBES:
            encoding = self.encode(aliased + probe)
            first = encoding.starts[encoding.num_tokens_before(len(aliased))]
            if aliased[first:].isspace():
                start = min(start, first)
        return len(aliased) - start


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


def _copy_backend(backend: BackendTokenizer) -> BackendTokenizer:
    """Return a tokenizer without added tokens and post-processor that shares the model of another.

    Without a post-processor, the offsets of a token include its space.
    """
    copy = BackendTokenizer(backend.model)
    if backend.normalizer is not None:
        copy.normalizer = backend.normalizer
    if backend.pre_tokenizer is not None:
        copy.pre_tokenizer = backend.pre_tokenizer
    # New tokens get ids from the size of the vocabulary on, which some vocabularies exceed.
    highest_id = max(backend.get_vocab(with_added_tokens=False).values(), default=-1)
    num_missing = highest_id + 1 - copy.get_vocab_size()
    copy.add_tokens([f"<|missing-{secrets.token_hex(8)}|>" for _ in range(num_missing)])
    return copy


def _copy_added_token(token: AddedToken, content: str) -> AddedToken:
    """Return an added token that is matched as `token` is, with another content."""
    return AddedToken(
        content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
    )
