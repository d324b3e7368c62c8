"""Sugar: positions of anchors, needed encoders, and losses against the formulas of the paper."""

from __future__ import annotations

import logging
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from helpers import frozen_encoders, tiny
from vlduet.config import parse_options
from vlduet.data.records import ImageRef, Message, Record
from vlduet.data.sequences import IGNORE_INDEX, Sequence, Slice
from vlduet.data.stream import Sample
from vlduet.encoders.frozen import FrozenEncoders, make_slice
from vlduet.errors import ConfigError, DataError
from vlduet.model.duet import DuetModel
from vlduet.model.feature_cache import FeatureCache
from vlduet.model.pooling import Readout, create_empty_readout
from vlduet.objectives.structure import structure_loss
from vlduet.objectives.sugar_targets import Prefixes, compute_target_matrix
from vlduet.recipes import prefixes
from vlduet.recipes.prefixes import draw_anchor_positions, select_structure_roles
from vlduet.recipes.sugar import PREFIX_ROLES, SugarOptions, layout, objective

PROMPTS = replace(tiny.PLAIN_PROMPTS, text="{text}", parts="{parts}")
EOS = 2


@pytest.fixture(scope="module")
def model(family: str, tmp_path_factory: pytest.TempPathFactory) -> DuetModel:
    """A tiny model of every family with Sugar's prompts."""
    folder = tmp_path_factory.mktemp(family) / "base"
    return tiny.build_duet_model(folder, family=family, prompts=PROMPTS)


def make_story(number: int = 0) -> Record:
    """Return an interleaved record of two images and three sentences."""
    first, second = tiny.random_image(2 * number), tiny.random_image(2 * number + 1)
    parts = (first, f"First {number}.", "And then a bird.", second, "The end.")
    return Record(f"story{number}", parts=parts)


def make_chat() -> Record:
    messages = (Message("user", ("hi",)), Message("assistant", ("ho",)))
    return Record("chat", messages=messages)


def layout_one(
    model: DuetModel,
    record: Record,
    *,
    position: int = 0,
    max_tokens: int | None = None,
    **options: Any,
) -> Sequence:
    """Return the sequence of a record at a position of the data stream."""
    sample = Sample(record, position, 0)
    renderer = model.renderer.with_options(max_tokens=max_tokens)
    (sequence,) = layout(sample, renderer, SugarOptions(**options))
    return sequence


def decode(model: DuetModel, sequence: Sequence, start: int, end: int) -> str:
    return str(model.backbone.tokenizer.decode(sequence.token_ids[start:end]))


# ------------------------------------------------------------------ layout


def test_every_slice_gets_an_anchor_at_its_tokens(model: DuetModel) -> None:
    sequence = layout_one(model, make_story(), k=5)
    roles = [anchor.role for anchor in sequence.anchors]
    assert roles == ["image", "text", "text", "image", "text"]
    assert [len(anchor.slices) for anchor in sequence.anchors] == [1, 2, 3, 4, 5]
    image_spans = []
    for first, image in sequence.images:
        start, end = image.feature_span
        image_spans.append((first + start, first + end))
    anchors_at_images = [anchor for anchor in sequence.anchors if anchor.role == "image"]
    assert [(anchor.start, anchor.end) for anchor in anchors_at_images] == image_spans
    for anchor in sequence.anchors:
        if anchor.role == "text":
            text = anchor.slices[-1].part
            assert anchor.end == anchor.start + 1
            # A token of the tiny tokenizers is a byte.
            assert decode(model, sequence, anchor.end - len(text), anchor.end) == text


def test_all_texts_and_the_end_token_are_supervised(model: DuetModel) -> None:
    sequence = layout_one(model, make_story(), k=5)
    labels = [label for label in sequence.labels if label != IGNORE_INDEX]
    text = model.backbone.tokenizer.decode(labels, skip_special_tokens=True)
    assert text == "First 0. And then a bird.The end."
    assert sequence.labels[-1] == EOS


def test_embedding_of_a_prefix_equals_that_of_the_same_content_alone(model: DuetModel) -> None:
    record = make_story(1)
    sequence = layout_one(model, record, k=5)
    with torch.no_grad():
        in_sequence = model(model.collate([sequence])).embeddings
    alone = model.encode([record.parts[:n] for n in range(1, 6)])
    assert_close(in_sequence, torch.from_numpy(alone), atol=1e-5, rtol=1e-4)


def test_pool_last_puts_the_anchor_at_the_last_image_token(model: DuetModel) -> None:
    model.set_prompts(replace(PROMPTS, image_pool="last"))
    try:
        sequence = layout_one(model, make_story(), k=5, pool="last")
        first, image = sequence.images[0]
        last = first + image.feature_span[1] - 1
        assert (sequence.anchors[0].start, sequence.anchors[0].end) == (last, last + 1)
        with pytest.raises(ConfigError, match=r"recipe.pool is mean.*image_pool is last"):
            layout_one(model, make_story())
    finally:
        model.set_prompts(PROMPTS)


def test_anchors_are_drawn_by_the_position_of_the_sample(model: DuetModel) -> None:
    def draw_ends(position: int) -> tuple[int, ...]:
        sequence = layout_one(model, make_story(), position=position, k=2)
        return tuple(len(anchor.slices) for anchor in sequence.anchors)

    ends = [draw_ends(position) for position in range(20)]
    assert ends == [draw_ends(position) for position in range(20)]
    assert len(set(ends)) > 3


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 6), st.integers(0, 99))
def test_k_positions_are_drawn_in_order_with_both_modalities(
    is_image: list[bool], k: int, seed: int
) -> None:
    kinds = ["image" if flag else "text" for flag in is_image]
    positions = draw_anchor_positions(kinds, k, random.Random(seed))
    assert positions == sorted(set(positions))
    assert len(positions) == min(k, len(is_image))
    if k > 1 and len(set(is_image)) == 2:
        assert {is_image[i] for i in positions} == {True, False}


def test_every_position_can_be_drawn() -> None:
    kinds = ["image", "text", "text", "image", "text"]
    drawn = set()
    for seed in range(50):
        drawn |= set(draw_anchor_positions(kinds, 2, random.Random(seed)))
    assert drawn == set(range(5))


def test_a_pair_gives_its_image_and_short_caption(model: DuetModel) -> None:
    image = tiny.random_image(1)
    pair = Record("p", image=image, short=("a flower",), long="Long one. And more.")
    prefixes = []
    for anchor in layout_one(model, pair).anchors:
        prefixes.append([type(part.part) for part in anchor.slices])
    assert prefixes == [[ImageRef], [ImageRef, str]]
    first_roles = set()
    for position in range(20):
        sequence = layout_one(model, pair, position=position, pair_order="either")
        first_roles.add(sequence.anchors[0].role)
    assert first_roles == {"image", "text"}


def test_a_pair_without_a_short_caption_gives_the_sentences_of_its_long_one(
    model: DuetModel,
) -> None:
    image = tiny.random_image(1)
    sequence = layout_one(model, Record("p", image=image, long="Long one. And more."))
    assert [len(anchor.slices) for anchor in sequence.anchors] == [1, 2, 3]
    without_text = layout_one(model, Record("p", image=image))
    assert len(without_text.anchors) == 1
    assert set(without_text.labels) == {IGNORE_INDEX}


def test_a_retrieval_record_gives_its_query_and_a_positive(model: DuetModel) -> None:
    record = Record("r", query=(tiny.random_image(2), "what?"), positive=(("a bird",),))
    sequence = layout_one(model, record)
    texts = [anchor.slices[-1].part for anchor in sequence.anchors][1:]
    assert texts == ["what?", "a bird"]


def test_a_chat_has_labels_and_no_anchors(model: DuetModel) -> None:
    sequence = layout_one(model, make_chat())
    assert sequence.anchors == ()
    assert set(sequence.labels) != {IGNORE_INDEX}


def test_a_record_without_content_is_refused(model: DuetModel) -> None:
    with pytest.raises(DataError, match="an empty sequence"):
        layout_one(model, Record("none"))


def test_another_window_of_a_long_document_is_used_each_time(model: DuetModel) -> None:
    parts: list[Any] = []
    for i in range(500):
        parts.append(f"sentence {i}." if i % 7 else tiny.random_image(i))
    record = Record("long", parts=tuple(parts))
    window_starts = set()
    for position in range(8):
        sequence = layout_one(model, record, k=400, position=position, max_tokens=300)
        assert 250 < len(sequence) <= 300
        num_slices = [len(anchor.slices) for anchor in sequence.anchors]
        assert num_slices == list(range(1, len(sequence.anchors) + 1))
        last = sequence.anchors[-1]
        window = [part.part for part in last.slices]
        start = parts.index(window[0])
        assert window == parts[start : start + len(window)], "slices are left out as a whole"
        window_starts.add(start)
        ends_document = window[-1] is parts[-1]
        assert (sequence.labels[-1] == EOS) == ends_document
        if isinstance(window[-1], str):
            text = decode(model, sequence, last.end - len(window[-1]), last.end)
            assert text == window[-1]
    assert len(window_starts) > 5


def test_a_long_caption_keeps_its_image(model: DuetModel) -> None:
    image = tiny.random_image(1)
    record = Record("p", image=image, long="A sentence of a caption. " * 40)
    for position in range(4):
        sequence = layout_one(model, record, position=position, max_tokens=300)
        assert sequence.anchors[0].slices[0].content_key == make_slice(image).content_key


def test_a_single_text_beyond_the_limit_is_cut(model: DuetModel) -> None:
    sequence = layout_one(model, Record("one", parts=("x" * 400,)), max_tokens=300)
    assert len(sequence) == 300
    assert sequence.anchors[0].end == 299, "the end token follows"


def test_a_record_has_one_name_in_all_its_draws_and_another_file_another_one(
    model: DuetModel,
) -> None:
    record = Record("0", parts=("one", tiny.random_image(0), "two", tiny.random_image(1)))
    names = []
    for position, origin in ((3, "0.0"), (8, "0.0"), (9, "1.0")):
        (sequence,) = layout(Sample(record, position, 0, origin), model.renderer, SugarOptions())
        (name,) = {anchor.record_name for anchor in sequence.anchors}
        names.append(name)
    assert names[0] == names[1] != names[2]


# ------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "dtw"}, "recipe.target"),
        ({"taget": "gak"}, "Did you mean 'target'"),
        ({"k": 0}, "recipe.k"),
        ({"n_ref": 0}, "recipe.n_ref"),
        ({"delta": 0}, "recipe.delta"),
        ({"temperature": -1}, "recipe.temperature"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_options(SugarOptions, options, place="recipe")


@pytest.mark.parametrize(
    ("options", "weights", "roles"),
    [
        ({}, {"structure": 1.0, "language": 1.0}, ("vision", "text", "cross")),
        ({"triple": False}, {"structure": 1.0}, ("cross",)),
        ({}, {"structure": 0.0, "language": 1.0}, ()),
        ({}, {"language": 1.0}, ()),
    ],
)
def test_encoders_are_needed_for_a_structure_loss_with_weight(
    options: dict[str, Any], weights: dict[str, float], roles: tuple[str, ...]
) -> None:
    assert select_structure_roles(SugarOptions(**options), weights) == roles


# ------------------------------------------------------------------ losses


def compute_loss(readout: Readout, options: SugarOptions) -> Tensor:
    return prefixes.compute_structure_loss(readout, options, roles=PREFIX_ROLES)


def read_batch(model: DuetModel, encoders: FrozenEncoders | None = None, **options: Any) -> Readout:
    """Return the readout of six records, two of which are the same one."""
    records = [
        make_story(0),
        Record("pair", image=tiny.random_image(0), short=("First 0.",)),  # slices of story 0
        make_chat(),
        make_story(3),
        make_story(0),
        Record("text", parts=("Only one.",)),
    ]
    sequences = []
    for position, record in enumerate(records):
        sequences.append(layout_one(model, record, position=position, **options))
    encoders = encoders or frozen_encoders.build_random_encoders()
    readout: Readout = model(model.collate(encoders.attach_features(sequences)))
    return readout


def compute_expected_cosine(a: Slice, b: Slice, *, triple: bool) -> float:
    """Return the cosine by the encoder that the paper uses for the two slices."""
    num_images = sum(isinstance(part.part, ImageRef) for part in (a, b))
    role = {0: "text", 1: "cross", 2: "vision"}[num_images] if triple else "cross"
    vectors = [frozen_encoders.draw_vector(part.part, role) for part in (a, b)]
    return float(F.cosine_similarity(*vectors, dim=0))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"triple": False},
        {"target": "mean", "n_ref": 7},
        {"target": "awm", "delta": 0.5, "loss": "kl"},
        {"single": "gak", "same_sequence": "nested", "k": 2},
    ],
)
def test_structure_loss_compares_slices_by_content(
    model: DuetModel, options: dict[str, Any]
) -> None:
    readout = read_batch(model, **options)
    loss = compute_loss(readout, SugarOptions(**options))
    slices: dict[str, Slice] = {}
    for anchor in readout.anchors:
        slices.update((part.content_key, part) for part in anchor.slices)
    keys = list(slices)
    triple = options.get("triple", True)
    rows = []
    for a in slices.values():
        rows.append([compute_expected_cosine(a, b, triple=triple) for b in slices.values()])
    record_names = list(dict.fromkeys(anchor.record_name for anchor in readout.anchors))
    longest = max(len(anchor.slices) for anchor in readout.anchors)
    indices = []
    for anchor in readout.anchors:
        prefix = [keys.index(part.content_key) for part in anchor.slices]
        indices.append(prefix + [0] * (longest - len(prefix)))
    prefixes = Prefixes(
        torch.tensor(indices),
        torch.tensor([len(anchor.slices) for anchor in readout.anchors]),
        torch.tensor([record_names.index(anchor.record_name) for anchor in readout.anchors]),
    )
    switches = ("target", "same_sequence", "single", "delta")
    target_options = {key: value for key, value in options.items() if key in switches}
    target = compute_target_matrix(torch.tensor(rows), prefixes, **target_options)
    expected = structure_loss(
        readout.embeddings,
        target,
        kind=options.get("loss", "mse"),
        n_ref=options.get("n_ref"),
    )
    assert_close(loss, expected, atol=1e-5, rtol=1e-4)
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads
    assert all(bool(grad.isfinite().all()) for grad in grads)


def test_slices_are_not_compared_if_the_structure_loss_has_no_weight(
    model: DuetModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        pytest.fail("slices were compared")

    monkeypatch.setattr(prefixes, "slice_cosines", fail)
    monkeypatch.setattr(prefixes, "compute_target_matrix", fail)
    no_encoders = FrozenEncoders({}, cache=FeatureCache(None))
    readout = read_batch(model, no_encoders)
    losses = objective(readout, model.logit_scale, SugarOptions())
    assert float(losses["structure"].detach()) == 0.0
    assert float(losses["language"].detach()) > 0


def test_features_of_only_some_slices_are_an_assertion_error(model: DuetModel) -> None:
    encoders = frozen_encoders.build_random_encoders()
    (with_features,) = encoders.attach_features([layout_one(model, make_story())])
    batch = model.collate([with_features, layout_one(model, make_story(1))])
    with pytest.raises(AssertionError, match="only a part of the slices"):
        compute_loss(model(batch), SugarOptions())


def test_calibration_changes_the_structure_loss(model: DuetModel) -> None:
    losses: list[Tensor] = []
    for calibrate in (False, True):
        readout = read_batch(model, calibrate=calibrate)
        losses.append(compute_loss(readout, SugarOptions(calibrate=calibrate)))
    assert bool(torch.stack(losses).isfinite().all())
    assert float(losses[0].detach()) != float(losses[1].detach())


def test_an_empty_readout_gives_0_that_is_part_of_the_graph() -> None:
    readout = create_empty_readout(4, like=torch.zeros(()))
    losses = objective(readout, torch.zeros(()), SugarOptions())
    assert float(losses["structure"].detach()) == 0
    assert losses["structure"].requires_grad


def test_targets_that_hardly_differ_are_logged_once(
    model: DuetModel, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="vlduet")
    encoders = frozen_encoders.build_random_encoders()
    for encoder in encoders.by_role.values():  # all contents get the same vector
        encoder.load = lambda: dict.fromkeys(
            ("image", "text"), lambda parts: torch.ones(len(parts), 3)
        )
    prefixes._log_once.cache_clear()
    for _ in range(2):
        compute_loss(read_batch(model, encoders), SugarOptions(target="mean"))
    assert caplog.text.count("nothing to learn") == 1
    caplog.clear()
    prefixes._log_once.cache_clear()
    compute_loss(read_batch(model), SugarOptions(target="mean"))
    assert "nothing to learn" not in caplog.text
