"""Incremental detokenization: the pieces make the text of a whole decode, at a constant cost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.tiny_tokenizers import (
    LINE_END_MERGES,
    SPECIAL_TOKENS,
    build_sentencepiece_tokenizer,
    build_tokenizer,
    build_wordpiece_tokenizer,
)
from vlduet.model.generation import detokenize
from vlduet.model.generation.continuous import Request
from vlduet.model.generation.detokenize import (
    MAX_PENDING_TOKENS,
    IncrementalDetokenizer,
    holdback_length,
)

BYTE_LEVEL = build_tokenizer(bos=True)
TOKENIZERS = {
    "byte-level": BYTE_LEVEL,
    "byte-level with merges": build_tokenizer(bos=True, merges=LINE_END_MERGES),
    "sentencepiece": build_sentencepiece_tokenizer(),
    "wordpiece": build_wordpiece_tokenizer(),
}
TEXTS = st.text("abc,.?' \n\N{GRINNING FACE}\N{LATIN SMALL LETTER E WITH ACUTE}日", max_size=24)


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]


def decode(tokenizer, token_ids):
    """Return the reference: all tokens decoded at once."""
    return tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def detokenize_all(detokenizer, token_ids):
    """Return the text that every token adds, and that of the final flush."""
    pieces = [detokenizer.add(token_id) for token_id in token_ids]
    return [*pieces, detokenizer.flush()]


class SlowTokenizer:
    """Tokenizer without a Rust backend: nothing but `decode` may be used."""

    is_fast = False

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def decode(self, token_ids, **options):
        return self.tokenizer.decode(token_ids, **options)


def create_slow_detokenizer(tokenizer):
    return IncrementalDetokenizer(SlowTokenizer(tokenizer))


@pytest.mark.parametrize("create", [IncrementalDetokenizer, create_slow_detokenizer])
@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=TEXTS)
def test_pieces_of_a_text_make_the_whole_decode(name, create, text):
    tokenizer = TOKENIZERS[name]
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = detokenize_all(create(tokenizer), token_ids)
    assert "".join(pieces) == decode(tokenizer, token_ids)


@pytest.mark.parametrize("create", [IncrementalDetokenizer, create_slow_detokenizer])
@given(token_ids=st.lists(st.integers(0, len(BYTE_LEVEL) - 1), max_size=48))
def test_pieces_of_random_bytes_make_the_whole_decode(create, token_ids):
    """Most of these byte sequences are invalid UTF-8, as those of an untrained model are."""
    pieces = detokenize_all(create(BYTE_LEVEL), token_ids)
    assert "".join(pieces) == decode(BYTE_LEVEL, token_ids)


def test_incomplete_character_is_withheld_and_flushed_as_replacement():
    token_ids = BYTE_LEVEL.encode("a\N{GRINNING FACE}", add_special_tokens=False)
    assert len(token_ids) == 5
    pieces = detokenize_all(IncrementalDetokenizer(BYTE_LEVEL), token_ids)
    assert pieces == ["a", "", "", "", "\N{GRINNING FACE}", ""]
    pieces = detokenize_all(IncrementalDetokenizer(BYTE_LEVEL), token_ids[:-1])
    assert pieces == ["a", "", "", "", "\N{REPLACEMENT CHARACTER}"]


def test_spaces_between_pieces_survive_decoders_that_strip_the_first_space():
    tokenizer = TOKENIZERS["sentencepiece"]
    token_ids = tokenizer.encode("a b  a", add_special_tokens=False)
    pieces = detokenize_all(IncrementalDetokenizer(tokenizer), token_ids)
    assert pieces == ["a", " b", " ", " a", ""]


def test_text_before_an_invalid_byte_is_not_taken_back():
    """A whole decode replaces all bytes of a run; a stream has already returned the first."""
    tokenizer = TOKENIZERS["sentencepiece"]
    tokens = ["<0xE2>", "<0x82>", "<0xAC>", "<0xF0>", "▁a"]
    token_ids = tokenizer.convert_tokens_to_ids(tokens)
    pieces = detokenize_all(IncrementalDetokenizer(tokenizer), token_ids)
    assert "".join(pieces) == "\N{EURO SIGN}\N{REPLACEMENT CHARACTER} a"
    assert decode(tokenizer, token_ids) == 4 * "\N{REPLACEMENT CHARACTER}" + " a"


def test_special_tokens_are_skipped(tokenizer):
    special_ids = tokenizer.convert_tokens_to_ids(["<s>", "</s>"])
    token_ids = tokenizer.encode("ab c", add_special_tokens=False)
    token_ids = [special_ids[0], *token_ids, special_ids[1]]
    if "<s>" not in tokenizer.all_special_tokens:
        token_ids = token_ids[1:]
    text = "".join(detokenize_all(IncrementalDetokenizer(tokenizer), token_ids))
    assert not any(token in text for token in SPECIAL_TOKENS)
    assert text == decode(tokenizer, token_ids) != ""


INVALID_BYTE = BYTE_LEVEL.convert_tokens_to_ids("Ģ")  # 0x80, which begins no character


@pytest.fixture
def decoded_ids(monkeypatch):
    """Count, per appended token, the ids that are passed to `DecodeStream` and to `decode`."""
    counts = []
    stream_class, decode_all = detokenize.DecodeStream, BYTE_LEVEL.decode

    class CountingStream:
        def __init__(self, **options):
            self.stream = stream_class(**options)

        def step(self, backend, token_id):
            counts[-1] += 1
            return self.stream.step(backend, token_id)

    def count_and_decode(token_ids, **options):
        counts[-1] += len(token_ids)
        return decode_all(token_ids, **options)

    monkeypatch.setattr(detokenize, "DecodeStream", CountingStream)
    monkeypatch.setattr(BYTE_LEVEL, "decode", count_and_decode)
    return counts


def append_tokens(detokenizer, token_ids, decoded_ids):
    """Append tokens to a request and return its text; starts a count for every token."""
    request = Request(len(token_ids) + 1)
    request._detokenizer = detokenizer
    text = ""
    for token_id in token_ids:
        decoded_ids.append(0)
        text += request.append_token(token_id, BYTE_LEVEL, is_end=False).text
    return text


def test_every_token_is_decoded_once_by_the_stream(decoded_ids):
    text = "a\N{GRINNING FACE}" * 103
    token_ids = BYTE_LEVEL.encode(text, add_special_tokens=False)[:512]
    assert append_tokens(None, token_ids, decoded_ids) == text[: 2 * 102] + "a"
    assert decoded_ids == [1] * 512


def test_fallback_decodes_a_constant_number_of_ids_per_token(decoded_ids):
    token_ids = BYTE_LEVEL.encode("ab" * 256, add_special_tokens=False)
    text = append_tokens(create_slow_detokenizer(BYTE_LEVEL), token_ids, decoded_ids)
    assert text == "ab" * 256
    assert set(decoded_ids[1:]) == {3}, "the context twice and the new token"


def test_endless_invalid_bytes_are_decoded_at_a_constant_cost(decoded_ids):
    text = append_tokens(None, [INVALID_BYTE] * 512, decoded_ids)
    assert set(text) == {"\N{REPLACEMENT CHARACTER}"}
    assert 512 - MAX_PENDING_TOKENS < len(text) <= 512
    assert max(decoded_ids[256:]) == max(decoded_ids[64:256]) < 16 * MAX_PENDING_TOKENS
    assert sum(decoded_ids[480:]) <= sum(decoded_ids[64:96]) + 16 * MAX_PENDING_TOKENS


def test_white_space_before_an_answer_is_not_returned(decoded_ids):
    """A prompt that ends in "Assistant:" leaves the space to the first token of the answer."""
    token_ids = BYTE_LEVEL.encode(" \n a  b ", add_special_tokens=False)
    assert append_tokens(None, token_ids, decoded_ids) == "a  b "


LETTERS = "ab \N{RIGHTWARDS ARROW}"


@given(
    text=st.text(LETTERS, max_size=12),
    stop_strings=st.lists(st.text(LETTERS, min_size=1, max_size=3), max_size=2),
)
def test_streamed_text_never_contains_part_of_a_stop_string(text, stop_strings):
    """The tokens are single bytes, so stop strings and characters are split across tokens."""
    token_ids = BYTE_LEVEL.encode(text, add_special_tokens=False)
    request = Request(len(token_ids) + 1, stop_strings=stop_strings)
    expected = text
    for end in range(len(text) + 1):  # the first stop string to be complete ends the answer
        positions = [text.find(stop, 0, end) for stop in stop_strings if stop in text[:end]]
        if positions:
            expected = text[: min(positions)]
            break
    expected = expected.lstrip()
    streamed = ""
    for token_id in token_ids:
        delta = request.append_token(token_id, BYTE_LEVEL, is_end=False)
        streamed += delta.text
        assert expected.startswith(streamed)
        if request.is_finished:
            break
    if positions:
        assert delta.finish_reason == "stop"
    else:
        assert not request.is_finished
        delta = request.append_token(BYTE_LEVEL.eos_token_id, BYTE_LEVEL, is_end=True)
        streamed += delta.text
    assert streamed == expected


@pytest.mark.parametrize(
    ("text", "stop_strings", "length"),
    [
        ("abc", [], 0),
        ("abc", ["cd"], 1),
        ("abc", ["abcd", "cd"], 3),
        ("abc", ["x", "abc"], 0),  # a complete stop string is found, not held back
        ("aab", ["abc"], 2),
        ("", ["abc"], 0),
    ],
)
def test_holdback_is_the_longest_beginning_of_a_stop_string(text, stop_strings, length):
    assert holdback_length(text, stop_strings) == length
