"""Cutting a sequence keeps images, control text and the meaning of labels and anchors."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers import tiny
from helpers.word_tokenizers import build_word_tokenizer
from vlduet.data.sequences import IGNORE_INDEX, Sequence
from vlduet.errors import DataError
from vlduet.model.duet import DuetModel
from vlduet.model.prompts import Renderer
from vlduet.model.sequence_builder import SequenceBuilder
from vlduet.model.text_tokenizer import TextTokenizer

EOS_ID = 2


def make_renderer(model: DuetModel, *, max_tokens: int | None = None) -> Renderer:
    return model.renderer.with_options(prompts=tiny.PLAIN_PROMPTS, max_tokens=max_tokens)


def decode(renderer: Renderer, token_ids: Any) -> str:
    tokens = [i for i in token_ids if i != IGNORE_INDEX]
    return str(renderer.tokenizer.decode(tokens, skip_special_tokens=False))


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    num_images=st.integers(0, 2),
    limit=st.integers(14, 80),
)
def test_cutting_keeps_images_and_the_last_token(
    model: DuetModel, lengths: list[int], num_images: int, limit: int
) -> None:
    images = tuple(tiny.random_image(i) for i in range(num_images))
    parts: tuple[Any, ...] = (*images, *("x" * length for length in lengths))
    full = make_renderer(model).render_embedding(parts)
    renderer = make_renderer(model, max_tokens=limit)
    # A space separates two texts; each text keeps at least one token.
    num_fixed_tokens = len(full) - sum(lengths) - (len(lengths) - 1)
    if num_fixed_tokens + len(lengths) > limit:
        with pytest.raises(DataError, match=rf"{num_images} images.*the limit is {limit}"):
            renderer.render_embedding(parts)
        return
    sequence = renderer.render_embedding(parts)
    assert len(sequence) == min(len(full), limit)
    assert [image.cache_key for _, image in sequence.images] == [
        image.cache_key for _, image in full.images
    ]
    for start, image in sequence.images:
        image_ids = sequence.token_ids[start : start + image.num_tokens]
        assert list(image_ids) == image.token_ids(renderer.image_token_id)
    (anchor,) = sequence.anchors
    assert (anchor.start, anchor.end) == (len(sequence) - 1, len(sequence))
    assert sequence.token_ids[-1] == EOS_ID


def test_a_cut_caption_does_not_teach_the_model_to_stop(model: DuetModel) -> None:
    caption = "abcdefghijklmnopqrstuvwxyz"
    image_length = len(make_renderer(model).render_embedding((tiny.random_image(1),)))
    renderer = make_renderer(model, max_tokens=image_length + 10)
    sequence = renderer.render_caption(tiny.random_image(1), caption)
    assert len(sequence) == image_length + 10
    labels = decode(renderer, sequence.labels)
    assert caption.startswith(labels) and len(labels) >= 8
    (anchor,) = sequence.anchors
    start, image = sequence.images[0]
    assert (anchor.start - start, anchor.end - start) == image.feature_span


def test_the_longest_text_is_cut_first(model: DuetModel) -> None:
    renderer = make_renderer(model, max_tokens=24)
    sequence = renderer.render_embedding(("short", "x" * 40))
    text = decode(renderer, sequence.token_ids).removeprefix("<s>")
    assert text.startswith("short x")


def test_anchors_of_a_cut_text_end_with_it(model: DuetModel) -> None:
    renderer = make_renderer(model)
    builder = renderer.new_builder()
    builder.append_text("ab")
    text = builder.append_text("cdefghij")
    end = builder.append_control("</s>")
    for role, segment, is_last in (("mean", text, False), ("last", text, True), ("end", end, True)):
        builder.add_anchor(segment, is_last=is_last, role=role, record_name="", content_key="")
    sequence = builder.build(builder.count_tokens()[-1] - 3)
    texts = {
        anchor.role: decode(renderer, sequence.token_ids[anchor.start : anchor.end])
        for anchor in sequence.anchors
    }
    assert texts == {"mean": "cdefg", "last": "g", "end": "</s>"}


def test_tokens_that_cover_text_and_prompt_are_not_cut() -> None:
    tokenizer = TextTokenizer(build_word_tokenizer("byte-level BPE, digits apart"))
    builder = SequenceBuilder(tokenizer, 3, ("", ""))
    builder.append_control("Text: ")
    text = builder.append_text("red circle is a red circle:")
    closing = builder.append_control("\nSummarize:")
    for segment in (text, closing):
        builder.add_anchor(segment, is_last=True, role="", record_name="", content_key="")
    complete = builder.build(100)

    def decode_all(token_ids: Any) -> str:
        return str(tokenizer.tokenizer.decode(list(token_ids)))

    tokens = [decode_all([i]) for i in complete.token_ids]
    assert ":\n" in tokens and " red" in tokens, "both cover control text and user text"
    cut = builder.build(len(complete) - 4)
    assert decode_all(cut.token_ids) == "Text: red circle:\nSummarize:"
    assert cut.num_cut_tokens == 4
    last_tokens = [decode_all(cut.token_ids[: anchor.end]) for anchor in cut.anchors]
    assert last_tokens == ["Text: red circle", "Text: red circle:\nSummarize:"]
    assert builder.build(100) == complete


def test_an_anchor_of_a_prefix_is_read_at_the_token_of_its_last_character() -> None:
    tokenizer = TextTokenizer(build_word_tokenizer("byte-level BPE, digits apart"))
    builder = SequenceBuilder(tokenizer, 3, ("", ""), bos_text="<s>")
    builder.append_control("Text: ")
    answer = "a red circle:\nit is 12: it is red:"
    text = builder.append_text(answer, supervised=True)
    builder.append_control("\nEnd")
    ends = [answer.index(":") + 1, answer.index("12") + 2, len(answer)]
    for end in ends:
        builder.add_prefix_anchor(text, role="", record_name="", slices=(), text_end=end)

    def decode_until(sequence: Sequence, index: int) -> str:
        token_ids = sequence.token_ids[: sequence.anchors[index].end]
        return str(tokenizer.tokenizer.decode(list(token_ids)))

    sequence = builder.build(100)
    texts = [decode_until(sequence, i) for i in range(3)]
    # The token of a colon also covers the line end after it, the last one the control text's.
    expected = [f"<s>Text: {answer[:end]}" for end in ends]
    assert texts == [expected[0] + "\n", expected[1], expected[2] + "\n"]
    assert all(anchor.end == anchor.start + 1 for anchor in sequence.anchors)
    cut = builder.build(len(sequence) - 4)
    assert [decode_until(cut, i) for i in range(len(cut.anchors))] == texts[:2]


def test_a_sequence_without_text_to_cut_is_refused(model: DuetModel) -> None:
    renderer = make_renderer(model, max_tokens=10)
    images = tuple(tiny.random_image(i) for i in range(3))
    with pytest.raises(
        DataError,
        match=r"3 images and the prompt take \d+ tokens, the limit is 10.*data\.max_tokens",
    ):
        renderer.render_embedding(images)
