"""Duet: places of labels and anchors in every kind of record, and losses against other recipes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from helpers import frozen_encoders, tiny
from vlduet.data.records import ImageRef, Message, Record
from vlduet.data.sequences import IGNORE_INDEX, Anchor, Sequence
from vlduet.data.stream import Sample
from vlduet.model.adapters import LoraSettings
from vlduet.model.duet import DuetModel
from vlduet.model.pooling import Readout
from vlduet.recipes import sugar, vladva
from vlduet.recipes.duet import (
    PREFIX_ROLE,
    DuetOptions,
    layout,
    objective,
    select_encoder_roles,
)

BARE_PROMPTS = replace(tiny.PLAIN_PROMPTS, text="{text}", parts="{parts}", image_pool="last")
EOS = 2
IMAGE = tiny.random_image(0)
ANSWER = "It is Dr. no. 3.5, e.g. a cat. (It sleeps.) Good"
SENTENCES = ["It is Dr. no. 3.5, e.g. a cat.", "(It sleeps.)", "Good"]


def make_chat(*answers: str, image: bool = True, supervised: bool = True) -> Record:
    """Return a chat of a system turn, and a question of two sentences before every answer."""
    messages = [Message("system", ("Be brief.",))]
    for answer in answers:
        question = "Look. What is it?"
        parts = (IMAGE, question) if image else (question,)
        messages.append(Message("user", parts))
        messages.append(Message("assistant", (answer,), supervised=supervised))
    return Record("chat", messages=tuple(messages))


def make_document() -> Record:
    parts = (IMAGE, "It rains.", tiny.random_image(1), "It stops. The end.")
    return Record("document", parts=parts)


def layout_at(
    model: DuetModel,
    record: Record,
    *,
    position: int = 0,
    max_tokens: int | None = None,
    **options: Any,
) -> list[Sequence]:
    """Return the sequences of a record at a position of the data stream."""
    renderer = model.renderer.with_options(max_tokens=max_tokens)
    return layout(Sample(record, position, 0), renderer, DuetOptions(**options))


def layout_one(model: DuetModel, record: Record, **options: Any) -> Sequence:
    (sequence,) = layout_at(model, record, **options)
    return sequence


def describe(sequences: list[Sequence]) -> list[tuple[Any, ...]]:
    """Return everything of sequences but the pixels of their images."""
    return [(sequence.token_ids, sequence.labels, sequence.anchors) for sequence in sequences]


def list_slices(anchor: Anchor) -> list[str]:
    """Return the texts of an anchor's slices, `image` for an image."""
    slices = []
    for part in anchor.slices:
        slices.append("image" if isinstance(part.part, ImageRef) else part.part)
    return slices


def read_until(model: DuetModel, sequence: Sequence, anchor: Anchor) -> str:
    """Return the text up to the token where an anchor is read."""
    return str(model.backbone.tokenizer.decode(sequence.token_ids[: anchor.end]))


@pytest.fixture(scope="module")
def bare_model(tmp_path_factory: pytest.TempPathFactory) -> DuetModel:
    folder = tmp_path_factory.mktemp("bare") / "base"
    return tiny.build_duet_model(folder, prompts=BARE_PROMPTS)


# ------------------------------------------------------------------ chats


def test_prefixes_of_a_chat_end_at_images_questions_and_sentences_of_answers(
    model: DuetModel,
) -> None:
    chat = make_chat(ANSWER, "A dog.")
    sequence = layout_one(model, chat, k=9)
    question = ["image", "Look.", "What is it?"]
    content = [*question, *SENTENCES, *question, "A dog."]
    slices = [list_slices(anchor) for anchor in sequence.anchors]
    # Not after the first sentence of a question, and never in the turn of the system.
    assert slices == [content[:n] for n in (1, 3, 4, 5, 6, 7, 9, 10)]
    assert {anchor.role for anchor in sequence.anchors} == {PREFIX_ROLE}
    image_spans = []
    for first, image in sequence.images:
        start, end = image.feature_span
        image_spans.append((first + start, first + end))
    for anchor, names in zip(sequence.anchors, slices, strict=True):
        if names[-1] == "image":
            assert (anchor.start, anchor.end) == image_spans.pop(0)
            continue
        assert anchor.end == anchor.start + 1
        assert read_until(model, sequence, anchor).endswith(names[-1])
    (plain,) = vladva.layout(Sample(chat, 0, 0), model.renderer, vladva.VladvaOptions())
    assert (sequence.token_ids, sequence.labels) == (plain.token_ids, plain.labels)


def test_an_embedding_inside_an_answer_does_not_depend_on_what_follows(
    bare_model: DuetModel,
) -> None:
    sequence = layout_one(bare_model, make_chat(ANSWER), k=9)
    shorter = layout_one(bare_model, make_chat(SENTENCES[0]), k=9)
    with torch.no_grad():
        embeddings = bare_model(bare_model.collate([sequence])).embeddings
        expected = bare_model(bare_model.collate([shorter])).embeddings
    assert len(expected) == 3, "image, question and one sentence"
    assert_close(embeddings[:3], expected, atol=1e-5, rtol=1e-4)


def test_an_image_of_a_chat_is_read_as_the_prompts_say(
    model: DuetModel, bare_model: DuetModel
) -> None:
    for reader, is_mean in ((model, True), (bare_model, False)):
        anchor = layout_one(reader, make_chat("A cat."), k=9).anchors[0]
        assert (anchor.end - anchor.start > 1) == is_mean


def test_a_chat_without_images_and_an_answer_without_an_end(bare_model: DuetModel) -> None:
    sequence = layout_one(bare_model, make_chat("a cat", image=False), k=9)
    ends = [read_until(bare_model, sequence, anchor)[-11:] for anchor in sequence.anchors]
    assert ends == ["What is it?", "stant|>a cat"[-11:]]
    labels = [label for label in sequence.labels if label != IGNORE_INDEX]
    assert bare_model.backbone.tokenizer.decode(labels[:-1]) == "a cat"
    assert labels[-1] == EOS


def test_answers_that_are_not_learned_are_context(bare_model: DuetModel) -> None:
    first = make_chat("One. Two.", supervised=False)
    second = make_chat("A dog.")
    chat = replace(first, messages=first.messages + second.messages[1:])
    sequence = layout_one(bare_model, chat, k=9)
    last_slices = [list_slices(anchor)[-1] for anchor in sequence.anchors]
    assert last_slices == ["image", "What is it?", "image", "What is it?", "A dog."]
    assert list_slices(sequence.anchors[-1])[3:5] == ["One.", "Two."]
    assert layout_one(bare_model, first, k=9).anchors == ()


def test_one_prefix_of_every_kind_is_drawn(bare_model: DuetModel) -> None:
    draws = set()
    for position in range(12):
        sequence = layout_one(bare_model, make_chat(ANSWER), k=3, position=position)
        lengths = tuple(len(anchor.slices) for anchor in sequence.anchors)
        assert lengths[:2] == (1, 3) and lengths[2] in (4, 5, 6)
        draws.add(lengths)
    assert len(draws) == 3


def test_prefixes_that_are_cut_are_left_out(bare_model: DuetModel) -> None:
    chat = make_chat("A cat. " + "It sleeps. " * 30)
    full = layout_one(bare_model, chat, k=99)
    cut = layout_one(bare_model, chat, k=99, max_tokens=len(full) - 100)
    assert len(cut) == len(full) - 100
    texts = []
    for anchor in cut.anchors[2:]:
        assert read_until(bare_model, cut, anchor).endswith(list_slices(anchor)[-1])
        texts.append(list_slices(anchor)[-1])
    assert texts == ["A cat.", *["It sleeps."] * (len(texts) - 1)]
    assert 10 < len(texts) < len(full.anchors) - 2
    long_question = replace(
        chat, messages=(Message("user", ("why? " * 50,)), Message("assistant", ("So.",)))
    )
    assert layout_one(bare_model, long_question, k=9, max_tokens=100).anchors == ()


# ------------------------------------------------------------------ documents, pairs, queries


def test_prefixes_of_a_document_equal_the_same_content_alone(bare_model: DuetModel) -> None:
    record = make_document()
    sequence = layout_one(bare_model, record, k=9)
    assert [len(anchor.slices) for anchor in sequence.anchors] == [1, 2, 3, 4]
    assert {anchor.role for anchor in sequence.anchors} == {PREFIX_ROLE}
    labels = [label for label in sequence.labels if label != IGNORE_INDEX]
    text = bare_model.backbone.tokenizer.decode(labels[:-1])
    assert (text, labels[-1]) == ("It rains.It stops. The end.", EOS)
    with torch.no_grad():
        embeddings = bare_model(bare_model.collate([sequence])).embeddings
    alone = bare_model.encode([record.parts[:n] for n in range(1, 5)])
    assert_close(embeddings, torch.from_numpy(alone), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("k", [1, 3])
def test_the_end_of_a_prompt_stands_for_the_document(model: DuetModel, k: int) -> None:
    record = make_document()
    sequence = layout_one(model, record, k=k)
    assert len(sequence.anchors) == k
    assert len(sequence.anchors[-1].slices) == len(record.parts)
    with torch.no_grad():
        embedding = model(model.collate([sequence])).embeddings[-1:]
    alone = model.encode([record.parts])
    assert_close(embedding, torch.from_numpy(alone), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("guide", ["none", "triple"])
def test_pairs_and_queries_have_the_layout_of_vladva(bare_model: DuetModel, guide: Any) -> None:
    records = [
        Record("1", image=IMAGE, short=("a cat", "cats"), negative=(("a dog",),)),
        Record("2", image=IMAGE, short=("a cat",), long="a cat sleeps. it is grey."),
        Record("3", query=("a cat",), positive=((IMAGE,),), negative=(("a dog",),)),
    ]
    options = vladva.VladvaOptions(language_on="any", guide=guide)
    for record in records:
        expected = vladva.layout(Sample(record, 5, 0), bare_model.renderer, options)
        sequences = layout_at(bare_model, record, position=5, guide=guide)
        assert describe(sequences) == describe(expected)


@pytest.mark.parametrize(
    ("structure_on", "numbers"), [("all", (3, 3)), ("documents", (3, 0)), ("chats", (0, 3))]
)
def test_structure_on_selects_records(
    bare_model: DuetModel, structure_on: Any, numbers: tuple[int, int]
) -> None:
    num_anchors = []
    for record in (make_document(), make_chat(ANSWER)):
        sequence = layout_one(bare_model, record, k=3, structure_on=structure_on)
        num_anchors.append(len(sequence.anchors))
        assert sequence.num_labels
    assert tuple(num_anchors) == numbers


# ------------------------------------------------------------------ losses


@pytest.mark.parametrize(
    ("options", "weights", "roles"),
    [
        ({}, {"structure": 1.0, "contrastive": 1.0}, ("vision", "text", "cross")),
        ({}, {"contrastive": 1.0, "language": 1.0}, ()),
        ({"guide": "cross"}, {"contrastive": 1.0}, ("cross",)),
        ({"triple": False, "guide": "triple"}, {"structure": 1.0}, ("cross", "vision", "text")),
    ],
)
def test_encoders_are_needed_by_the_structure_loss_and_a_guide(
    options: dict[str, Any], weights: dict[str, float], roles: tuple[str, ...]
) -> None:
    assert select_encoder_roles(DuetOptions(**options), weights) == roles


def concatenate(groups: list[list[Sequence]]) -> list[Sequence]:
    return [sequence for group in groups for sequence in group]


def build_double_model(folder: Path) -> DuetModel:
    """Return a tiny model in double precision whose trained parameters all have gradients."""
    model = tiny.build_duet_model(folder / "base", prompts=BARE_PROMPTS).double()
    model.make_trainable(lora=LoraSettings(rank=2, alpha=4), projector=True)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.double()


def list_gradients(model: DuetModel, loss: Tensor) -> list[Tensor]:
    """Return the gradients of a loss at all trained parameters."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [
        torch.zeros_like(p) if gradient is None else gradient
        for p, gradient in zip(parameters, gradients, strict=True)
    ]


@pytest.mark.parametrize(
    "options",
    [{}, {"guide": "triple"}, {"guide": "cross", "target": "awm", "loss": "kl", "triple": False}],
)
def test_losses_equal_those_of_vladva_and_sugar_on_their_records(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    model = build_double_model(tmp_path)
    pairs = [
        Record(f"p{i}", image=tiny.random_image(i), short=(f"caption {i}",), negative=(("x",),))
        for i in range(3)
    ]
    query = Record("q", query=("where?",), positive=(("here",),))
    prefix_records = [make_document(), make_chat(ANSWER), make_chat("No.", image=False)]
    settings = {"k": 3, "n_ref": 12, **options}
    sequences: list[list[Sequence]] = []
    for position, record in enumerate([*pairs, query, *prefix_records]):
        sequences.append(layout_at(model, replace(record, id=str(position)), **settings))
    encoders = frozen_encoders.build_random_encoders()
    of_vladva = encoders.attach_features(concatenate(sequences[:4]))
    of_sugar = encoders.attach_features(concatenate(sequences[4:]))
    # The cache rounds vision features to float32: fill it, so that all passes read the same.
    model.vision_features([image for s in of_vladva + of_sugar for _, image in s.images])
    duet_options = DuetOptions(**settings)
    joint_readout = model(model.collate([*of_sugar, *of_vladva]))
    losses = objective(joint_readout, model.logit_scale, duet_options)
    pair_readout = model(model.collate(of_vladva))
    pair_losses = vladva.objective(pair_readout, model.logit_scale, duet_options.pair_options())
    readout = model(model.collate(of_sugar))
    anchors = tuple(replace(anchor, role="text") for anchor in readout.anchors)
    names = ("k", "target", "triple", "calibrate", "loss", "n_ref")
    sugar_options = sugar.SugarOptions(**{name: getattr(duet_options, name) for name in names})
    structure = sugar.objective(
        Readout(readout.embeddings, anchors, readout.nll), model.logit_scale, sugar_options
    )["structure"]
    expected = {
        "contrastive": pair_losses["contrastive"],
        "language": torch.cat([pair_readout.nll, readout.nll]).mean(),
        "structure": structure,
    }
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        assert float(loss.detach()) > 0.01, name
        assert_close(loss, expected[name], atol=1e-10, rtol=1e-8)
    total = losses["contrastive"] + 0.7 * losses["language"] + 0.3 * losses["structure"]
    reference = expected["contrastive"] + 0.7 * expected["language"] + 0.3 * expected["structure"]
    for gradient, expected_gradient in zip(
        list_gradients(model, total), list_gradients(model, reference), strict=True
    ):
        assert_close(gradient, expected_gradient, atol=1e-10, rtol=1e-8)


def test_a_guide_alone_does_not_compare_prefixes(bare_model: DuetModel) -> None:
    records = [make_document(), Record("p", image=IMAGE, short=("a cat",))]
    sequences = concatenate([layout_at(bare_model, record, guide="cross") for record in records])
    encoders = frozen_encoders.build_random_encoders("cross")
    readout = bare_model(bare_model.collate(encoders.attach_features(sequences)))
    losses = objective(readout, bare_model.logit_scale, DuetOptions(guide="cross"))
    assert float(losses["structure"].detach()) == 0.0
