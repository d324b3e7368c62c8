"""Tokenizers whose tokens are words and their parts, of every type that checkpoints have.

They are trained in milliseconds on a few sentences; unlike those of `tiny_tokenizers`, they merge
characters across the places where a chat template and a text meet.
"""

from __future__ import annotations

import json
import string

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from helpers.tiny_tokenizers import SPECIAL_TOKENS

SENTENCES = [
    "What is this? A red circle. User: what is red? Assistant: a red circle is red.",
    "It's 12 o'clock: (a circle) and (a square). Human: is this a square?\n\nAssistant:\nA square.",
    "Summarize the provided image in one word: a red circle\nSummarize the provided text:\n",
    "USER: is it red? ASSISTANT: it is red. :) )) \n\n\n  two spaces",
] * 4
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
VOCABULARY_SIZE = 700
STRIPPING = "byte-level BPE, special tokens that take white space"
"""Type of a tokenizer whose special tokens take the white space after them, as of Phi."""


def build_word_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of one of WORD_TOKENIZERS, with the special tokens of tiny checkpoints."""
    more: list[AddedToken | str] = [*SPECIAL_TOKENS[3:]]
    if kind == STRIPPING:
        more = [AddedToken(token, rstrip=True, normalized=False) for token in SPECIAL_TOKENS[3:]]
    return PreTrainedTokenizerFast(
        tokenizer_object=WORD_TOKENIZERS[kind](),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=more,
    )


def _build_byte_level() -> Tokenizer:
    """Return a BPE over bytes as of GPT-2."""
    return _train_byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))


def _build_single_digits() -> Tokenizer:
    """Return a BPE over bytes as of Qwen: digits take no space, punctuation takes line ends."""
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return _train_byte_level(pre_tokenizer, normalizers.NFC())


def _train_byte_level(
    pre_tokenizer: pre_tokenizers.PreTokenizer, normalizer: normalizers.Normalizer | None = None
) -> Tokenizer:
    """Return a BPE over bytes that was trained on SENTENCES."""
    backend = Tokenizer(models.BPE())
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=SPECIAL_TOKENS,
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    return backend


def _build_sentencepiece(prepend_scheme: str) -> Tokenizer:
    """Return a BPE with `▁` for spaces and byte fallback, as of Llama and Mistral."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    # A piece begins with a space or has none, although texts are not split later.
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[*SPECIAL_TOKENS, "<unk>", *BYTE_TOKENS],
        show_progress=False,
    )
    backend.train_from_iterator([f" {sentence}" for sentence in SENTENCES], trainer)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme, split=False)
    # The trainer makes byte tokens special, which they are not in any checkpoint.
    return _without_byte_tokens(backend)


def _without_byte_tokens(backend: Tokenizer) -> Tokenizer:
    """Return a copy whose byte tokens are ordinary entries of the vocabulary."""
    spec = json.loads(backend.to_str())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] not in BYTE_TOKENS]
    return Tokenizer.from_str(json.dumps(spec))


def _build_prepend() -> Tokenizer:
    """Return the older form of the same, in which a normalizer writes the first `▁`."""
    backend = _build_sentencepiece("never")
    backend.pre_tokenizer = pre_tokenizers.Sequence([])
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return backend


def _build_unigram() -> Tokenizer:
    """Return a unigram model with `▁` for spaces."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="never")
    trainer = trainers.UnigramTrainer(
        vocab_size=300,
        special_tokens=[*SPECIAL_TOKENS, "<unk>"],
        unk_token="<unk>",
        initial_alphabet=[*string.printable, *"😀中文é\u0301"],
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    return backend


WORD_TOKENIZERS = {
    "byte-level BPE": _build_byte_level,
    "byte-level BPE, digits apart": _build_single_digits,
    STRIPPING: _build_byte_level,
    "SentencePiece, first": lambda: _build_sentencepiece("first"),
    "SentencePiece, always": lambda: _build_sentencepiece("always"),
    "SentencePiece, never": lambda: _build_sentencepiece("never"),
    "SentencePiece, normalizer": _build_prepend,
    "unigram": _build_unigram,
}
"""Type of a tokenizer -> function that builds it."""
