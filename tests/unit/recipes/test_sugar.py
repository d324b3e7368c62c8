"""Sugar: where its anchors stand, what the encoders are asked, and that its losses are the loops of the paper."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing import assert_close

from helpers import frozen_encoders, tiny
from vlduet.config import parse_options as checked
from vlduet.data.records import ImageRef, Message, Record
from vlduet.data.sequences import IGNORE_INDEX, Sequence
from vlduet.data.stream import Sample
from vlduet.encoders.frozen import make_slice
from vlduet.errors import ConfigError, DataError
from vlduet.model.duet import DuetModel
from vlduet.model.pooling import create_empty_readout
from vlduet.recipes import sugar
from vlduet.recipes.sugar import SugarOptions, draw_anchor_positions, layout, objective

SUGAR = replace(tiny.PLAIN_PROMPTS, text="{text}", parts="{parts}")
EOS = 2


@pytest.fixture(scope="module")
def model(family: str, tmp_path_factory: pytest.TempPathFactory) -> DuetModel:
    made = tiny.build_duet_model(
        tmp_path_factory.mktemp(family) / "base", family=family, prompts=SUGAR
    )
    return made


def story(number: int = 0, *, name: str | None = None) -> Record:
    a, b = tiny.random_image(2 * number), tiny.random_image(2 * number + 1)
    return Record(
        name or f"story{number}", parts=(a, f"First {number}.", "And then a bird.", b, "The end.")
    )


def lay(model: DuetModel, record: Record, *, position: int = 0, **options: Any) -> Sequence:
    (sequence,) = layout(Sample(record, position, 0), model.renderer, SugarOptions(**options))
    return sequence


def text_at(model: DuetModel, sequence: Sequence, start: int, end: int) -> str:
    return str(model.backbone.tokenizer.decode(sequence.token_ids[start:end]))


# ---------------------------------------------------------------------- layout


def test_an_anchor_at_every_slice_s_end(model: DuetModel) -> None:
    sequence = lay(model, story(), k=5)
    assert [anchor.role for anchor in sequence.anchors] == [
        "image",
        "text",
        "text",
        "image",
        "text",
    ]
    assert [len(anchor.slices) for anchor in sequence.anchors] == [1, 2, 3, 4, 5]
    images = [
        (at + image.feature_span[0], at + image.feature_span[1]) for at, image in sequence.images
    ]
    assert [(a.start, a.end) for a in sequence.anchors if a.role == "image"] == images
    for anchor in sequence.anchors:
        if anchor.role == "text":
            assert anchor.end == anchor.start + 1
            text = anchor.slices[-1].part
            assert isinstance(text, str)
            assert (
                text_at(model, sequence, anchor.end - len(text), anchor.end) == text
            )  # a token is a byte
    told = [i for i in sequence.labels if i != IGNORE_INDEX]
    assert (
        model.backbone.tokenizer.decode(told, skip_special_tokens=True)
        == "First 0. And then a bird.The end."
    )
    assert sequence.labels[-1] == EOS


def test_a_prefix_is_embedded_as_the_same_content_alone(model: DuetModel) -> None:
    """What is trained is what `encode` computes of an image, a text, or a mixture that ends with either."""
    record = story(1)
    sequence = lay(model, record, k=5)
    with torch.no_grad():
        trained = model(model.collate([sequence])).embeddings
    alone = model.encode([record.parts[:n] for n in range(1, 6)])
    assert_close(trained, torch.from_numpy(alone), atol=1e-5, rtol=1e-4)


def test_pool_last_reads_the_last_image_token(model: DuetModel) -> None:
    model.set_prompts(replace(SUGAR, image_pool="last"))
    try:
        sequence = lay(model, story(), k=5, pool="last")
        at, image = sequence.images[0]
        last = at + image.feature_span[1] - 1
        assert (sequence.anchors[0].start, sequence.anchors[0].end) == (last, last + 1)
        with pytest.raises(ConfigError, match=r"recipe.pool is mean.*image_pool is last"):
            lay(model, story())
    finally:
        model.set_prompts(SUGAR)


def test_positions_are_drawn_by_the_sample_alone(model: DuetModel) -> None:
    def ends(position: int) -> list[int]:
        return [
            len(anchor.slices) for anchor in lay(model, story(), position=position, k=2).anchors
        ]

    assert [ends(p) for p in range(20)] == [ends(p) for p in range(20)]
    assert len({tuple(ends(p)) for p in range(20)}) > 3


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 6), st.integers(0, 99))
def test_positions(images: list[bool], k: int, seed: int) -> None:
    chosen = draw_anchor_positions(images, k, random.Random(seed))
    assert chosen == sorted(set(chosen)) and len(chosen) == min(k, len(images))
    if k > 1 and len(set(images)) == 2:
        assert {images[i] for i in chosen} == {True, False}


def test_every_position_is_drawn() -> None:
    images = [True, False, False, True, False]
    drawn = {i for seed in range(50) for i in draw_anchor_positions(images, 2, random.Random(seed))}
    assert drawn == set(range(5))


def test_pairs_retrieval_records_and_chats(model: DuetModel) -> None:
    pair = Record("p", image=tiny.random_image(1), short=("a flower",), long="Long one. And more.")
    sequence = lay(model, pair)
    assert [[type(one.part) for one in anchor.slices] for anchor in sequence.anchors] == [
        [ImageRef],
        [ImageRef, str],
    ]
    either = {lay(model, pair, position=p, pair_order="either").anchors[0].role for p in range(20)}
    assert either == {"image", "text"}
    long = lay(model, Record("p", image=tiny.random_image(1), long="Long one. And more."))
    assert [len(anchor.slices) for anchor in long.anchors] == [1, 2, 3]
    image = lay(model, Record("p", image=tiny.random_image(1)))
    assert len(image.anchors) == 1 and set(image.labels) == {IGNORE_INDEX}
    asked = lay(model, Record("r", query=(tiny.random_image(2), "what?"), positive=(("a bird",),)))
    assert [anchor.slices[-1].part for anchor in asked.anchors][1:] == ["what?", "a bird"]
    chat = lay(
        model, Record("c", messages=(Message("user", ("hi",)), Message("assistant", ("ho",))))
    )
    assert chat.anchors == () and set(chat.labels) != {IGNORE_INDEX}
    with pytest.raises(DataError, match="an empty sequence"):
        lay(model, Record("none"))


def test_what_does_not_fit_is_left_out_whole(model: DuetModel) -> None:
    slices = tuple(f"sentence {i}." if i % 7 else tiny.random_image(i) for i in range(500))
    model.renderer.max_tokens = 300
    try:
        begins = set()
        for position in range(8):
            sequence = lay(model, Record("long", parts=slices), k=400, position=position)
            assert 250 < len(sequence) <= 300
            assert [len(a.slices) for a in sequence.anchors] == list(
                range(1, len(sequence.anchors) + 1)
            )
            window = tuple(one.part for one in sequence.anchors[-1].slices)
            begin = slices.index(window[0])
            assert window == slices[begin : begin + len(window)]
            begins.add(begin)
            assert (sequence.labels[-1] == EOS) == (
                window[-1] is slices[-1]
            )  # else it does not end here
            last = sequence.anchors[-1]
            if isinstance(text := window[-1], str):
                assert text_at(model, sequence, last.end - len(text), last.end) == text
        assert len(begins) > 5
        long = Record("p", image=tiny.random_image(1), long="A sentence of a caption. " * 40)
        assert {
            lay(model, long, position=p).anchors[0].slices[0].content_key for p in range(4)
        } == {make_slice(long.image).content_key}
        alone = lay(model, Record("one", parts=("x" * 400,)))
        assert len(alone) == 300 and alone.anchors[0].end == 299  # then the end-of-text token
    finally:
        model.renderer.max_tokens = 2048
    assert len(lay(model, Record("long", parts=slices[:60]), k=100).anchors) == 60


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "dtw"}, "recipe.target"),
        ({"taget": "gak"}, "Did you mean 'target'"),
        ({"k": 0}, "recipe.k"),
        ({"delta": 0}, "recipe.delta"),
        ({"temperature": -1}, "recipe.temperature"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        checked(SugarOptions, options, place="recipe")


def test_the_encoders_that_are_asked() -> None:
    assert sugar.select_encoder_roles(SugarOptions(), {"structure": 1.0, "language": 1.0}) == (
        "vision",
        "text",
        "cross",
    )
    assert sugar.select_encoder_roles(SugarOptions(triple=False), {"structure": 1.0}) == ("cross",)
    assert sugar.select_encoder_roles(SugarOptions(), {"structure": 0.0, "language": 1.0}) == ()
    assert sugar.select_encoder_roles(SugarOptions(), {"language": 1.0}) == ()


# ---------------------------------------------------------------------- losses


def records() -> list[Record]:
    return [
        story(0),
        Record(
            "pair", image=tiny.random_image(0), short=("First 0.",)
        ),  # shares both slices with story0
        Record("chat", messages=(Message("user", ("hi",)), Message("assistant", ("ho",)))),
        story(3),
        story(0),  # the same record at another place
        Record("text", parts=("Only one.",)),
    ]


def batch(model: DuetModel, encoders: Any = None, **options: Any) -> Any:
    sequences = [lay(model, record, position=i, **options) for i, record in enumerate(records())]
    return model(
        model.collate(
            (encoders or frozen_encoders.build_random_encoders()).attach_features(sequences)
        )
    )


SWITCHES: list[dict[str, Any]] = [
    {},
    {"triple": False},
    {"target": "mean", "n_ref": 7},
    {"target": "awm", "delta": 0.5, "loss": "kl"},
    {"single": "gak", "same_sequence": "nested", "k": 2},
]


@pytest.mark.parametrize("options", SWITCHES)
def test_structure_is_the_paper_s_sum(model: DuetModel, options: dict[str, Any]) -> None:
    """Targets are looked up by content, whatever order the slices are packed in."""
    from vlduet.objectives.structure import structure_loss
    from vlduet.objectives.sugar_targets import Prefixes, compute_target_matrix

    readout = batch(model, **options)
    found = sugar.compute_structure_loss(readout, SugarOptions(**options))
    prefixes = [(a.record, a.slices) for a in readout.anchors]
    flat = [one for _, slices in prefixes for one in slices]  # every slice as often as it occurs

    def cosine(a: Any, b: Any) -> float:
        kinds = {isinstance(one.part, ImageRef) for one in (a, b)}
        role = (
            "cross"
            if len(kinds) == 2 or options.get("triple") is False
            else "vision"
            if True in kinds
            else "text"
        )
        return float(
            F.cosine_similarity(
                frozen_encoders.draw_vector(a.part, role),
                frozen_encoders.draw_vector(b.part, role),
                dim=0,
            )
        )

    # Equal slices get one number: the share that two prefixes have in common is counted by number.
    keys = list(dict.fromkeys(one.key for one in flat))
    by_key = {one.key: one for one in flat}
    cosines = torch.tensor([[cosine(by_key[a], by_key[b]) for b in keys] for a in keys])
    names = list(dict.fromkeys(record for record, _ in prefixes))
    longest = max(len(slices) for _, slices in prefixes)
    rows = [
        [keys.index(one.key) for one in slices] + [0] * (longest - len(slices))
        for _, slices in prefixes
    ]
    packed = Prefixes(
        torch.tensor(rows),
        torch.tensor([len(slices) for _, slices in prefixes]),
        torch.tensor([names.index(record) for record, _ in prefixes]),
    )
    rules = {
        key: value
        for key, value in options.items()
        if key in ("target", "same_sequence", "single", "delta")
    }
    form = {key: value for key, value in options.items() if key in ("loss", "n_ref")}
    target = compute_target_matrix(cosines, packed, **rules)
    wanted = structure_loss(readout.embeddings, readout.embeddings, target=target, **form)
    assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    found.backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


def test_no_weight_costs_nothing(model: DuetModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sugar, "compared", lambda *_, **__: pytest.fail("the slices were compared"))
    monkeypatch.setattr(
        sugar, "target_matrix", lambda *_, **__: pytest.fail("targets were computed")
    )
    losses = objective(
        batch(model, frozen_encoders.FrozenEncoders({}, cache=frozen_encoders.FeatureCache(None))),
        model.logit_scale,
        SugarOptions(),
    )
    assert float(losses["structure"].detach()) == 0.0 and float(losses["language"].detach()) > 0


def test_a_part_of_the_features_is_our_mistake(model: DuetModel) -> None:
    seen = frozen_encoders.build_random_encoders().attach_features([lay(model, story())])[0]
    with pytest.raises(AssertionError, match="a part of the slices"):
        sugar.compute_structure_loss(
            model(model.collate([seen, lay(model, story(1))])), SugarOptions()
        )


def test_calibration_uses_the_batch(model: DuetModel) -> None:
    raw, scaled = (
        sugar.compute_structure_loss(batch(model, calibrate=on), SugarOptions(calibrate=on))
        for on in (False, True)
    )
    assert bool(scaled.isfinite()) and float(scaled.detach()) != float(raw.detach())


def test_nothing_usable_is_zero_and_part_of_the_graph() -> None:
    losses = objective(
        create_empty_readout(4, like=torch.zeros(())), torch.zeros(()), SugarOptions()
    )
    assert float(losses["structure"].detach()) == 0 and losses["structure"].requires_grad


def test_flat_targets_are_told_once(model: DuetModel, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="vlduet")
    sugar._warn_once.cache_clear()
    encoders = frozen_encoders.build_random_encoders()
    for encoder in encoders.by_role.values():  # everything is like everything
        encoder.load = lambda: dict.fromkeys(
            ("image", "text"), lambda parts: torch.ones(len(parts), 3)
        )
    for _ in range(2):
        sugar.compute_structure_loss(batch(model, encoders), SugarOptions(target="mean"))
    assert caplog.text.count("nothing to learn") == 1
    caplog.clear()
    sugar._warn_once.cache_clear()
    sugar.compute_structure_loss(batch(model), SugarOptions(target="mean"))
    assert "nothing to learn" not in caplog.text


def test_two_draws_of_a_record_are_one_sequence_and_two_files_are_not(model: DuetModel) -> None:
    record = Record("0", parts=("one", tiny.random_image(0), "two", tiny.random_image(1)))
    samples = [
        Sample(record, 3, 0, "0.0"),
        Sample(record, 8, 0, "0.0"),
        Sample(record, 9, 0, "1.0"),
    ]
    names = [
        {a.record_name for s in layout(one, model.renderer, SugarOptions()) for a in s.anchors}
        for one in samples
    ]
    assert all(len(name) == 1 for name in names)
    assert names[0] == names[1] != names[2]
