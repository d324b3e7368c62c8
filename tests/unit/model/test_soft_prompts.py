"""Soft prompts start as hand-written prompts, train beside LoRA and export as ordinary tokens."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText, AutoTokenizer

from helpers import tiny
from vlduet.data.records import Message, Record
from vlduet.errors import ConfigError
from vlduet.inspect.tokens import list_record_tokens
from vlduet.model.adapters import LoraSettings
from vlduet.model.duet import DuetModel
from vlduet.model.prompts import Prompts

HAND_WRITTEN = Prompts(
    image="See {image} sum:", text="{text} sum:", parts="{parts} all:", chat=False
)
NUM_IMAGE_TOKENS = len("See  sum:")  # the tiny tokenizer has one token for each character
NUM_TEXT_TOKENS = len(" sum:")
NUM_PARTS_TOKENS = len(" all:")
ITEMS = ["a red apple", tiny.random_image(1), (tiny.random_image(2), "what is this?")]
CAPTIONS = [(tiny.random_image(3), "a caption"), (tiny.random_image(4), "another one")]
LORA = LoraSettings(rank=2, alpha=4)
CHAT = (Message("user", ("hello",)),)


@pytest.fixture
def initial(family: str, tmp_path: Path) -> DuetModel:
    """A model with hand-written prompts."""
    return tiny.build_duet_model(
        tmp_path / "base", family=family, head="none", prompts=HAND_WRITTEN
    )


@pytest.fixture
def trained(initial: DuetModel) -> DuetModel:
    """A model whose soft prompts would have the largest logits, were they in the LM head."""
    initial.make_trainable(lora=LORA, projector=True, soft_prompts=True)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in initial.named_parameters():
            if parameter.requires_grad:
                scale = 9.0 if "soft_prompts" in name else 0.1
                parameter += scale * torch.randn_like(parameter)
    return initial.eval()


def rows_of(model: DuetModel) -> torch.nn.Parameter:
    assert model.soft_prompts is not None
    return model.soft_prompts.rows


@pytest.mark.parametrize("chat", [False, True])
def test_they_start_as_the_prompts_they_replace(initial: DuetModel, chat: bool) -> None:
    initial.set_prompts(
        Prompts(HAND_WRITTEN.image, HAND_WRITTEN.text, HAND_WRITTEN.parts, chat=chat)
    )
    embeddings = initial.encode(ITEMS)
    token_ids = initial.renderer.render_embedding(("a red apple",)).token_ids
    initial.make_trainable(lora=LORA, projector=False, soft_prompts=True)
    soft_ids = initial.renderer.render_embedding(("a red apple",)).token_ids
    num_replaced = sum(a != b for a, b in zip(soft_ids, token_ids, strict=True))
    assert num_replaced == NUM_TEXT_TOKENS
    assert_close(initial.encode(ITEMS), embeddings, atol=2e-6, rtol=0)
    assert len(rows_of(initial)) == NUM_IMAGE_TOKENS + NUM_TEXT_TOKENS + NUM_PARTS_TOKENS
    assert "<|soft_0|>" in initial.prompts.image and initial.prompts.chat is chat


def test_gradients_reach_lora_and_the_rows_of_the_prompt_in_use_only(initial: DuetModel) -> None:
    initial.make_trainable(lora=LORA, projector=False, soft_prompts=True)
    sequence = initial.renderer.render_embedding(("a red apple",))
    embeddings = initial.train()(initial.collate([sequence])).embeddings
    embeddings.square().sum(1).sub(embeddings[:, 0]).sum().backward()
    gradient = rows_of(initial).grad
    assert gradient is not None
    has_gradient = gradient.abs().amax(1) > 0
    expected = [False] * NUM_IMAGE_TOKENS + [True] * NUM_TEXT_TOKENS + [False] * NUM_PARTS_TOKENS
    assert has_gradient.tolist() == expected
    adapter_gradients = [p.grad for p in initial.adapter_tensors().values() if p.grad is not None]
    assert any(grad.abs().max() > 0 for grad in adapter_gradients)
    initial.make_trainable(lora=LORA, projector=False)
    assert not rows_of(initial).requires_grad, "existing soft prompts are trained on request only"


def test_padding_and_packing_do_not_matter(trained: DuetModel) -> None:
    texts = ["a", "a longer text", "bb"]
    sequences = [trained.renderer.render_embedding((t,), record_name=t) for t in texts]
    with torch.no_grad():
        single = torch.cat([trained(trained.collate([s])).embeddings for s in sequences])
        padded = trained(trained.collate(sequences, padding_side="left"))
        packed = trained(trained.collate(sequences, pack_to=200))
    assert_close(padded.embeddings, single, atol=5e-6, rtol=1e-5)
    assert [anchor.record_name for anchor in packed.anchors] == texts
    assert_close(packed.embeddings, single, atol=5e-6, rtol=1e-5)


def test_user_text_cannot_spell_a_soft_prompt_token(trained: DuetModel) -> None:
    assert trained.soft_prompts is not None
    token_ids = trained.renderer.render_embedding(("a <|soft_0|> b",)).token_ids
    assert trained.soft_prompts.first_token_id not in token_ids


def test_they_are_saved_with_the_adapter(trained: DuetModel, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    trained.save_pretrained(folder)
    loaded = DuetModel.from_pretrained(folder)
    assert loaded.prompts == trained.prompts and loaded.fingerprint == trained.fingerprint
    assert np.array_equal(loaded.encode(ITEMS), trained.encode(ITEMS))
    assert "soft.rows" in json.loads((folder / "vlduet.json").read_text())["trained"]
    record = Record("1", image=tiny.random_image(1), short=("red",))
    texts = [row.text for row in list_record_tokens(record, folder)]
    last_text_token = NUM_IMAGE_TOKENS + NUM_TEXT_TOKENS - 1
    assert texts.count("<|soft_0|>") == 1 and texts[-1] == f"<|soft_{last_text_token}|>"


def test_plain_transformers_computes_the_same_embeddings_from_an_export(
    trained: DuetModel, tmp_path: Path
) -> None:
    """With the export's own prompt, the hidden state at the last token is the embedding."""
    embeddings = trained.encode(ITEMS[:2])
    image = trained.renderer.render_embedding((tiny.random_image(1),)).images[0][1]
    trained.save_merged(tmp_path / "merged")
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    prompts = json.loads((tmp_path / "merged" / "vlduet.json").read_text())["prompts"]
    text_prompt = prompts["text"].replace("{text}", "a red apple")
    image_text = tiny.image_as_text(trained.renderer, tiny.random_image(1))
    image_prompt = prompts["image"].replace("{image}", image_text)
    cases = ((text_prompt, [], embeddings[0]), (image_prompt, [image], embeddings[1]))
    for prompt, images, expected in cases:
        token_ids = tokenizer(prompt, return_tensors="pt").input_ids
        inputs = tiny.transformers_inputs(trained, token_ids, images)
        with torch.no_grad():
            states = plain.model(**inputs).last_hidden_state
        theirs = torch.nn.functional.normalize(states[0, -1], dim=0)
        assert_close(theirs, torch.from_numpy(expected), atol=1e-5, rtol=0)


def test_our_own_loader_opens_the_same_model_from_an_export(
    trained: DuetModel, tmp_path: Path
) -> None:
    embeddings = trained.encode(ITEMS)
    nll = torch.tensor(trained.compute_caption_nll(CAPTIONS))
    trained.save_merged(tmp_path / "merged")
    (tmp_path / "base").rename(tmp_path / "renamed")
    merged = DuetModel.from_pretrained(tmp_path / "merged")
    assert merged.peft_model is None and not merged.adapter_tensors()
    for model in (merged, trained):
        assert_close(model.encode(ITEMS), embeddings, atol=1e-5, rtol=0)
        model_nll = torch.tensor(model.compute_caption_nll(CAPTIONS))
        assert_close(model_nll, nll, atol=1e-3, rtol=1e-4)
    merged.save_merged(tmp_path / "twice")  # folding the rows twice equals folding them once
    twice = DuetModel.from_pretrained(tmp_path / "twice")
    num_rows = [len(model.backbone.token_embedding.weight) for model in (twice, merged)]
    assert num_rows[0] == num_rows[1]
    assert np.array_equal(twice.encode(ITEMS), merged.encode(ITEMS))


def test_soft_prompt_tokens_are_never_generated(trained: DuetModel, tmp_path: Path) -> None:
    """Also with tied weights, where their rows would have the largest logits."""
    prompt = trained.renderer.render_chat(CHAT, add_generation_prompt=True)
    token_ids = torch.tensor([prompt.token_ids])
    answer = trained.generate(CHAT, max_new_tokens=6)
    continuation = generate_by_transformers(trained.backbone.model, token_ids)
    assert "".join(trained.generate(CHAT, max_new_tokens=6, stream=True)).strip() == answer
    trained.save_merged(tmp_path / "merged")
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    assert generate_by_transformers(plain, token_ids) == continuation
    merged = DuetModel.from_pretrained(tmp_path / "merged")
    assert merged.generate(CHAT, max_new_tokens=6) == answer
    assert "".join(merged.generate(CHAT, max_new_tokens=6, stream=True)).strip() == answer
    assert trained.soft_prompts is not None
    plain.generation_config.suppress_tokens = None
    unsuppressed = generate_by_transformers(plain, token_ids)
    is_tied = plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    generates_soft_tokens = max(unsuppressed) >= trained.soft_prompts.first_token_id
    assert generates_soft_tokens == is_tied, "else this test would prove nothing"


def generate_by_transformers(model: torch.nn.Module, token_ids: torch.Tensor) -> list[int]:
    """Return six greedy tokens after a prompt int64[1, T], by transformers alone."""
    mask = torch.ones_like(token_ids)
    output = model.generate(
        input_ids=token_ids, attention_mask=mask, max_new_tokens=6, do_sample=False
    )
    return [int(i) for i in output[0, token_ids.shape[1] :]]


def test_prompts_without_a_token_are_refused(tmp_path: Path) -> None:
    bare = Prompts(image="{image}", text="{text}", parts="{parts}", chat=False)
    model = tiny.build_duet_model(tmp_path / "base", prompts=bare)
    with pytest.raises(ConfigError, match="no tokens to start from"):
        model.make_trainable(lora=None, projector=False, soft_prompts=True)
