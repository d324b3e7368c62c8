"""What `vlduet data show` says of a record is what training does with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from helpers import tiny
from vlduet.data.records import ImageRef, Message, Record
from vlduet.errors import DataError, ModelError
from vlduet.inspect.tokens import TokenRow, list_record_tokens
from vlduet.model.duet import DuetModel

PAIR = Record("1", image=tiny.random_image(1), short=("red",), long="A red one.")


@pytest.fixture(scope="module")
def saved(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("show")
    tiny.build_duet_model(
        folder / "base", family=family, prompts=replace(tiny.PLAIN_PROMPTS, image="<|user|>{image}")
    ).save_pretrained(
        folder / "model",
        provenance={"config": {"recipe": {"name": "vladva", "language_on": "any"}}},
    )
    return folder / "model"


def text(rows: list[TokenRow], sequence: int, *, supervised: bool | None = None) -> str:
    chosen = [r for r in rows if r.sequence == sequence and supervised in (None, r.supervised)]
    return "".join(r.text for r in chosen)


def anchors(rows: list[TokenRow]) -> dict[tuple[int, str], str]:
    return {(r.sequence, role): r.text for r in rows for role in r.anchors}


def test_a_pair_is_two_sequences(saved: Path) -> None:
    rows = list_record_tokens(PAIR, saved)
    assert {r.sequence for r in rows} == {0, 1}
    (image,) = [row.text for row in rows if row.text.startswith("[image")]
    pictured = text(rows, 0).removeprefix("<s>")
    for frame in (*tiny.VISION_TOKENS, *tiny.SMOLVLM_TOKENS, *tiny.PIXTRAL_TOKENS, "\n\n"):
        pictured = pictured.replace(frame, "")
    assert pictured == f"<|user|>{image}A red one.</s>" and image.endswith(" tokens]")
    assert (
        text(rows, 0, supervised=True) == "A red one.</s>" and text(rows, 1, supervised=True) == ""
    )
    assert text(rows, 1).removeprefix("<s>") == "red</s>"
    assert anchors(rows) == {(0, "image"): image, (1, "text"): "</s>"}


def test_an_image_is_one_row_with_its_name(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(tiny.random_image(1).data or b"")
    rows = list_record_tokens(replace(PAIR, image=ImageRef(path=tmp_path / "a.png")), saved)
    (image,) = [r for r in rows if r.image]
    assert image.image == str(tmp_path / "a.png")
    after = rows[rows.index(image) + 1]
    count = int(image.text.split()[1])
    assert after.position == image.position + count and after.text in (
        "A",
        tiny.VISION_TOKENS[1],
        tiny.SMOLVLM_TOKENS[0],
        tiny.PIXTRAL_TOKENS[1],
    )


def test_it_is_what_training_lays_out(saved: Path) -> None:
    from vlduet.data.sequences import IGNORE_INDEX
    from vlduet.data.stream import Sample
    from vlduet.recipes import vladva

    model = DuetModel.from_pretrained(saved)
    sequences = vladva.layout(Sample(PAIR, 0, 0), model.renderer, vladva.VladvaOptions(language_on="any"))
    rows = list_record_tokens(PAIR, saved)
    for number, sequence in enumerate(sequences):
        mine = [r for r in rows if r.sequence == number]
        wanted = [t for t, label in enumerate(sequence.labels) if label != IGNORE_INDEX]
        assert [r.position for r in mine if r.supervised] == wanted
        assert mine[-1].position == len(sequence) - 1
        assert {role for r in mine for role in r.anchors} == {a.role for a in sequence.anchors}


def test_a_reading_over_several_tokens_shows_both_ends(saved: Path) -> None:
    from vlduet.data.sequences import Anchor, Sequence
    from vlduet.inspect.tokens import _list_sequence_tokens
    from vlduet.model.processing import load_processor

    tokenizer = load_processor(saved.parent / "base").tokenizer
    ids = tuple(tokenizer.encode("abcd", add_special_tokens=False))
    rows = _list_sequence_tokens(
        0, Sequence(ids, (-100,) * 4, (Anchor(1, 3, "slice", "", ""),)), tokenizer, {}
    )
    assert [r.anchors for r in rows] == [(), ("slice from here",), ("slice to here",), ()]


def test_other_kinds(saved: Path) -> None:
    chat = Record(
        "c", messages=(Message("user", (tiny.random_image(1), "q?")), Message("assistant", ("a!",)))
    )
    assert text(list_record_tokens(chat, saved), 0, supervised=True) == "a!</s>"
    found = list_record_tokens(
        Record("r", query=("q",), positive=(("p",),), negative=(("n",), ("m",))), saved
    )
    assert [role for r in found for role in r.anchors] == [
        "query",
        "positive",
        "negative",
        "negative",
    ]


def test_a_plain_checkpoint_is_shown_with_the_papers_prompts(saved: Path) -> None:
    rows = list_record_tokens(
        Record("1", image=tiny.random_image(1), short=("red",)), saved.parent / "base"
    )
    assert "Summarize the provided image in one word:" in text(rows, 0)
    assert not any(r.supervised for r in rows)
    assert anchors(rows) == {(0, "image"): "<|assistant|>", (1, "text"): "<|assistant|>"}


def test_no_weights_are_read(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlduet.model import backbone

    monkeypatch.setattr(backbone, "AutoModelForImageTextToText", None)
    assert list_record_tokens(PAIR, saved)


def test_errors(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.png"):
        list_record_tokens(replace(PAIR, image=ImageRef(path=tmp_path / "none.png")), saved)
    with pytest.raises(ModelError, match=r"neither vlduet\.json nor config\.json"):
        list_record_tokens(PAIR, tmp_path)
