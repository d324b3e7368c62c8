"""Gemma 3: images attend to themselves both ways, and some layers have a sliding window."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoTokenizer
from transformers.models.gemma3 import Gemma3Processor
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from helpers import tiny
from helpers.family_checks import (
    ODD,
    PROMPTS,
    SMALL,
    TALL,
    WIDE,
    assert_beams_equal_transformers,
    assert_logits_equal_transformers,
    assert_packed_embeddings_equal_single,
    render_mixed_sequences,
)
from vlduet.data import images
from vlduet.data.records import Message
from vlduet.data.sequences import IGNORE_INDEX
from vlduet.inspect import internals
from vlduet.model.backbone import load_backbone
from vlduet.model.duet import DuetModel
from vlduet.model.generation.inputs import suppressed_tokens
from vlduet.model.processing import load_processor


@pytest.fixture
def model(tmp_path: Path) -> DuetModel:
    return tiny.scale_up_weights(
        tiny.build_duet_model(tmp_path / "base", family="gemma3", prompts=PROMPTS, head="none")
    )


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_logits_equal_transformers(
    model: DuetModel, padding_side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some rows are longer than the window of 16 tokens of one of the two layers."""
    batch = model.collate(render_mixed_sequences(model), padding_side=padding_side)
    assert batch.num_tokens > 16 * len(batch.token_ids)
    logits = assert_logits_equal_transformers(model, batch)
    causal = {"full_attention": False, "sliding_attention": False}
    monkeypatch.setattr(model.backbone.family, "attention_mask_kinds", lambda: causal)
    with torch.no_grad():
        causal_logits = model.hidden_states(batch) @ model.lm_head_weight.T
    difference = (causal_logits - logits).abs().amax(2)[batch.segment_ids > 0]
    assert difference.max() > 1e-2, "bidirectional images change nothing"


def test_packed_embeddings_equal_single_ones(model: DuetModel) -> None:
    items = [ODD, "no image " * 4, (WIDE, "then", TALL), (SMALL, "so"), (SMALL, TALL)]
    packed = assert_packed_embeddings_equal_single(model, items, pack_to=128)
    length = packed.token_ids.shape[1]
    assert packed.attention_mask().shape[1:] == (1, length, length)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_answers_equal_transformers(model: DuetModel, num_beams: int) -> None:
    turns = [(WIDE, "what is it, and of what?"), (TALL, SMALL, "and these?")]
    assert_beams_equal_transformers(model, turns, num_beams=num_beams)


@pytest.mark.parametrize("line_end", ["", "\n"])
def test_line_ends_around_images_are_merged_as_by_the_checkpoint_s_processor(
    model: DuetModel, tmp_path: Path, line_end: str
) -> None:
    """Two line ends stand before and after an image; adjacent ones make longer tokens."""
    template = tiny.gemma_chat_template(line_end)
    model.backbone.tokenizer.chat_template = f"{{{{ bos_token }}}}{template}"
    merged = tmp_path / "merged"
    model.save_merged(merged)
    processor = Gemma3Processor(
        Gemma3ImageProcessorPil.from_pretrained(merged),
        AutoTokenizer.from_pretrained(merged),
        image_seq_length=4,
    )

    def process(text: str, refs: list[images.ImageRef]) -> dict[str, list[object]]:
        pictures = [images.load_image(ref) for ref in refs]
        return processor(text=text, images=[pictures], add_special_tokens=False)

    begin = tiny.VISION_TOKENS[0]
    turn_end = "</s>" + line_end
    text = (
        f"<s><|user|>{line_end}{begin}what?{turn_end}"
        f"<|assistant|>{line_end}a thing{turn_end}"
        f"<|user|>{line_end}{begin}{begin}and this?{turn_end}"
    )
    messages = (
        Message("user", (WIDE, "what?")),
        Message("assistant", ("a thing",)),
        Message("user", (TALL, SMALL, "and this?")),
    )
    chat = model.renderer.render_chat(messages, add_generation_prompt=False)
    assert list(chat.token_ids) == process(text, [WIDE, TALL, SMALL])["input_ids"][0]
    tokens = model.backbone.tokenizer.convert_ids_to_tokens(list(chat.token_ids))
    assert ("ĊĊĊ" in tokens) == bool(line_end)
    embedded = model.renderer.render_embedding((WIDE,))
    expected = process(f"<s>See {begin} sum:", [WIDE])
    assert list(embedded.token_ids) == expected["input_ids"][0]
    pixel_values = torch.as_tensor(np.array(expected["pixel_values"]))
    assert_close(pixel_values, model.prepare_image(WIDE).inputs["pixel_values"])


def test_attention_map_of_a_bidirectional_image(model: DuetModel) -> None:
    with internals.eager_attention(model):
        attention = internals.attention_map(model, WIDE)
    assert attention.weights.shape == (2, 2)
    assert_close(attention.weights.sum(), attention.share)


def test_answer_also_ends_with_the_tokens_of_the_generation_config(tmp_path: Path) -> None:
    """Gemma's tokenizer says how a text ends, its generation config also how a turn ends."""
    path = tiny.build_gemma3(tmp_path / "base") / "generation_config.json"
    turn_end = tiny.SPECIAL_TOKENS.index("<|user|>")
    config = json.loads(path.read_text()) | {"eos_token_id": [2, turn_end]}
    path.write_text(json.dumps(config))
    model = DuetModel(load_backbone(tmp_path / "base"), prompts=PROMPTS).eval()
    assert model.renderer.eos_token_ids == [2, turn_end]
    assert load_processor(tmp_path / "base").eos_token_ids == (2, turn_end)
    assert turn_end not in suppressed_tokens(model.backbone, model.renderer.eos_token_ids)
    tokenizer = model.backbone.tokenizer
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|user|>\n{% endfor %}"
    messages = (Message("user", ("a",)), Message("assistant", ("b",)))
    chat = model.renderer.render_chat(messages, add_generation_prompt=False)
    labels = [label for label in chat.labels if label != IGNORE_INDEX]
    assert labels == [*tokenizer.encode("b", add_special_tokens=False), turn_end]
