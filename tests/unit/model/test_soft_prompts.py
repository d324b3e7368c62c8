"""Soft prompts: they start as the written ones, are learned beside LoRA, and are ordinary tokens of an exported model."""

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

WRITTEN = Prompts(image="See {image} sum:", text="{text} sum:", parts="{parts} all:", chat=False)
ITEMS = ["a red apple", tiny.random_image(1), (tiny.random_image(2), "what is this?")]
PAIRS = [(tiny.random_image(3), "a caption"), (tiny.random_image(4), "another one")]
LORA = LoraSettings(rank=2, alpha=4)


@pytest.fixture
def written(family: str, tmp_path: Path) -> DuetModel:
    return tiny.build_duet_model(tmp_path / "base", family=family, head="none", prompts=WRITTEN)


@pytest.fixture
def trained(written: DuetModel) -> DuetModel:
    """Learned rows so large that they would win every word, were they words."""
    written.make_trainable(lora=LORA, projector=True, soft_prompts=True)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in written.named_parameters():
            if parameter.requires_grad:
                parameter += (9.0 if "soft" in name else 0.1) * torch.randn_like(parameter)
    return written.eval()


@pytest.mark.parametrize("chat", [False, True])
def test_they_start_as_the_written_prompts(written: DuetModel, chat: bool) -> None:
    written.set_prompts(Prompts(WRITTEN.image, WRITTEN.text, WRITTEN.parts, chat=chat))
    before, ids = (
        written.encode(ITEMS),
        written.renderer.render_embedding(("a red apple",)).token_ids,
    )
    written.make_trainable(lora=LORA, projector=False, soft_prompts=True)
    after = written.renderer.render_embedding(("a red apple",)).token_ids
    assert len(after) == len(ids) and sum(a != b for a, b in zip(after, ids, strict=True)) == len(
        " sum:"
    )
    assert_close(written.encode(ITEMS), before, atol=2e-6, rtol=0)
    assert written.soft_prompts is not None and len(written.soft_prompts.rows) == len(
        "See  sum: sum: all:"
    )
    assert "<|soft_0|>" in written.prompts.image and written.prompts.chat is chat


def test_they_learn_beside_lora_and_only_where_they_stand(written: DuetModel) -> None:
    written.make_trainable(lora=LORA, projector=False, soft_prompts=True)
    readout = written.train()(
        written.collate([written.renderer.render_embedding(("a red apple",))])
    )
    readout.embeddings.square().sum(1).sub(readout.embeddings[:, 0]).sum().backward()
    assert written.soft_prompts is not None and written.soft_prompts.rows.grad is not None
    moved = written.soft_prompts.rows.grad.abs().amax(1) > 0
    image, text = len("See  sum:"), len(" sum:")
    assert moved.tolist() == [False] * image + [True] * text + [False] * len(" all:")
    assert any(
        p.grad is not None and p.grad.abs().max() > 0 for p in written.adapter_tensors().values()
    )
    written.make_trainable(lora=LORA, projector=False)
    assert not written.soft_prompts.rows.requires_grad, (
        "learned prompts that nobody asks to train stay as they are"
    )


def test_padding_and_packing_do_not_matter(trained: DuetModel) -> None:
    rows = [
        trained.renderer.render_embedding((text,), record_name=text)
        for text in ("a", "a longer text", "bb")
    ]
    with torch.no_grad():
        alone = torch.cat([trained(trained.collate([row])).embeddings for row in rows])
        assert_close(
            trained(trained.collate(rows, padding_side="left")).embeddings,
            alone,
            atol=5e-6,
            rtol=1e-5,
        )
        packed = trained(trained.collate(rows, pack_to=200))
    assert [a.record for a in packed.anchors] == ["a", "a longer text", "bb"]
    assert_close(packed.embeddings, alone, atol=5e-6, rtol=1e-5)


def test_a_text_cannot_spell_one(trained: DuetModel) -> None:
    assert trained.soft_prompts is not None
    ids = trained.renderer.render_embedding(("a <|soft_0|> b",)).token_ids
    assert trained.soft_prompts.first_token_id not in ids


def test_they_are_saved_with_the_adapter(trained: DuetModel, tmp_path: Path) -> None:
    trained.save_pretrained(tmp_path / "model")
    loaded = DuetModel.from_pretrained(tmp_path / "model")
    assert loaded.prompts == trained.prompts and loaded.fingerprint == trained.fingerprint
    assert np.array_equal(loaded.encode(ITEMS), trained.encode(ITEMS))
    manifest = json.loads((tmp_path / "model" / "vlduet.json").read_text())
    assert "soft.rows" in manifest["trained"]
    shown = [
        row.text
        for row in list_record_tokens(
            Record("1", image=tiny.random_image(1), short=("red",)), tmp_path / "model"
        )
    ]
    assert shown.count("<|soft_0|>") == 1 and shown[-1] == f"<|soft_{len('See  sum: sum:') - 1}|>"


def test_plain_transformers_gives_the_same_vectors(trained: DuetModel, tmp_path: Path) -> None:
    """The export without any code of ours: its tokenizer, the prompt's text, the last hidden state at the last token."""
    vectors, image = (
        trained.encode(ITEMS[:2]),
        trained.renderer.render_embedding((tiny.random_image(1),)).images[0][1],
    )
    trained.save_merged(tmp_path / "merged")
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    prompts = json.loads((tmp_path / "merged" / "vlduet.json").read_text())["prompts"]
    text = prompts["text"].replace("{text}", "a red apple")
    picture = prompts["image"].replace(
        "{image}", tiny.image_as_text(trained.renderer, tiny.random_image(1))
    )
    with torch.no_grad():
        for prompt, seen, ours in ((text, [], vectors[0]), (picture, [image], vectors[1])):
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            states = plain.model(**tiny.transformers_inputs(trained, ids, seen)).last_hidden_state
            theirs = torch.nn.functional.normalize(states[0, -1], dim=0)
            assert_close(theirs, torch.from_numpy(ours), atol=1e-5, rtol=0)


def test_our_loader_of_the_export_sees_the_same_model(trained: DuetModel, tmp_path: Path) -> None:
    vectors, nll = trained.encode(ITEMS), trained.compute_caption_nll(PAIRS)
    trained.save_merged(tmp_path / "merged")
    (tmp_path / "base").rename(tmp_path / "gone")
    merged = DuetModel.from_pretrained(tmp_path / "merged")
    assert merged.peft_model is None and not merged.adapter_tensors()
    for model in (merged, trained):
        assert_close(model.encode(ITEMS), vectors, atol=1e-5, rtol=0)
        assert_close(
            torch.tensor(model.compute_caption_nll(PAIRS)), torch.tensor(nll), atol=1e-3, rtol=1e-4
        )
    merged.save_merged(tmp_path / "again")  # folding twice is folding once
    again = DuetModel.from_pretrained(tmp_path / "again")
    assert len(again.backbone.token_embedding.weight) == len(merged.backbone.token_embedding.weight)
    assert np.array_equal(again.encode(ITEMS), merged.encode(ITEMS))


def test_learned_tokens_are_never_generated(trained: DuetModel, tmp_path: Path) -> None:
    """Also where the LM head is the embedding table: the new rows would be its loudest words."""
    turn = (Message("user", ("hello",)),)
    ids = torch.tensor([trained.renderer.render_chat(turn, add_generation_prompt=True).token_ids])
    said, before = trained.generate(turn, max_new_tokens=6), _continued(trained.backbone.model, ids)
    assert "".join(trained.generate(turn, max_new_tokens=6, stream=True)).strip() == said
    trained.save_merged(tmp_path / "merged")
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    assert _continued(plain, ids) == before
    merged = DuetModel.from_pretrained(tmp_path / "merged")
    assert merged.generate(turn, max_new_tokens=6) == said
    assert "".join(merged.generate(turn, max_new_tokens=6, stream=True)).strip() == said
    assert trained.soft_prompts is not None
    plain.generation_config.suppress_tokens = None
    words = _continued(plain, ids)
    tied = plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    assert (max(words) >= trained.soft_prompts.first_token_id) == tied, (
        "else this test would prove nothing"
    )


def _continued(model: torch.nn.Module, ids: torch.Tensor) -> list[int]:
    """Six greedy tokens by transformers alone."""
    found = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
    )
    return [int(i) for i in found[0, ids.shape[1] :]]


def test_prompts_without_a_token_have_nothing_to_learn(tmp_path: Path) -> None:
    bare = Prompts(image="{image}", text="{text}", parts="{parts}", chat=False)
    model = tiny.build_duet_model(tmp_path / "base", prompts=bare)
    with pytest.raises(ConfigError, match="no tokens to start from"):
        model.make_trainable(lora=None, projector=False, soft_prompts=True)
