"""The tokens that `vlduet data show` lists are those that training uses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from helpers import tiny
from helpers.tiny_families import PIXTRAL_TOKENS, SMOLVLM_TOKENS, VISION_TOKENS
from vlduet.data import images
from vlduet.data.records import ImageRef, Message, Record
from vlduet.data.sequences import IGNORE_INDEX, Anchor, Sequence
from vlduet.data.stream import Sample
from vlduet.errors import DataError, ModelError
from vlduet.inspect.tokens import (
    RecordInspection,
    TokenRow,
    _list_sequence_tokens,
    format_tokens,
    inspect_record,
    list_record_tokens,
)
from vlduet.model import backbone
from vlduet.model.duet import DuetModel
from vlduet.model.processing import load_processor
from vlduet.recipes import vladva

PAIR = Record("1", image=tiny.random_image(1), short=("red",), long="A red one.")
IMAGE_DELIMITERS = (*VISION_TOKENS, *SMOLVLM_TOKENS, *PIXTRAL_TOKENS, "\n\n")


@pytest.fixture(scope="module")
def model_folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model folder of every family, trained with vladva; its base checkpoint lies beside it."""
    folder = tmp_path_factory.mktemp("tokens")
    prompts = replace(tiny.PLAIN_PROMPTS, image="<|user|>{image}")
    model = tiny.build_duet_model(folder / "base", family=family, prompts=prompts)
    recipe = {"name": "vladva", "language_on": "any"}
    model.save_pretrained(folder / "model", provenance={"config": {"recipe": recipe}})
    return folder / "model"


def join_text(rows: list[TokenRow], sequence: int, *, only_supervised: bool = False) -> str:
    rows = [row for row in rows if row.sequence == sequence]
    return "".join(row.text for row in rows if row.supervised or not only_supervised)


def anchor_texts(rows: list[TokenRow]) -> dict[tuple[int, str], str]:
    """Return the text of the row of every anchor, by sequence and role."""
    return {(row.sequence, role): row.text for row in rows for role in row.anchors}


# --- rows


def test_a_pair_becomes_a_sequence_of_the_image_and_one_of_the_caption(model_folder: Path) -> None:
    rows = list_record_tokens(PAIR, model_folder)
    assert {row.sequence for row in rows} == {0, 1}
    (image,) = [row.text for row in rows if row.text.startswith("[image")]
    text = join_text(rows, 0).removeprefix("<s>")
    for delimiter in IMAGE_DELIMITERS:
        text = text.replace(delimiter, "")
    assert text == f"<|user|>{image}A red one.</s>" and image.endswith(" tokens]")
    assert join_text(rows, 0, only_supervised=True) == "A red one.</s>"
    assert join_text(rows, 1, only_supervised=True) == ""
    assert join_text(rows, 1).removeprefix("<s>") == "red</s>"
    assert anchor_texts(rows) == {(0, "image"): image, (1, "text"): "</s>"}


def test_an_image_is_one_row_with_its_name(model_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(images.read_bytes(tiny.random_image(1)))
    rows = list_record_tokens(replace(PAIR, image=ImageRef(path=path)), model_folder)
    (image_row,) = [row for row in rows if row.image]
    assert image_row.image == str(path)
    next_row = rows[rows.index(image_row) + 1]
    num_tokens = int(image_row.text.split()[1])
    assert next_row.position == image_row.position + num_tokens
    assert next_row.text in ("A", VISION_TOKENS[1], SMOLVLM_TOKENS[0], PIXTRAL_TOKENS[1])


def test_rows_equal_the_layout_of_training(model_folder: Path) -> None:
    model = DuetModel.from_pretrained(model_folder)
    options = vladva.VladvaOptions(language_on="any")
    sequences = vladva.layout(Sample(PAIR, 0, 0), model.renderer, options)
    all_rows = list_record_tokens(PAIR, model_folder)
    for number, sequence in enumerate(sequences):
        rows = [row for row in all_rows if row.sequence == number]
        labels = [t for t, label in enumerate(sequence.labels) if label != IGNORE_INDEX]
        assert [row.position for row in rows if row.supervised] == labels
        assert rows[-1].position == len(sequence) - 1
        roles = {role for row in rows for role in row.anchors}
        assert roles == {anchor.role for anchor in sequence.anchors}


def test_an_anchor_over_several_tokens_is_labelled_at_both_ends(model_folder: Path) -> None:
    tokenizer = load_processor(model_folder.parent / "base").tokenizer
    token_ids = tuple(tokenizer.encode("abcd", add_special_tokens=False))
    anchor = Anchor(1, 3, "slice", "", "")
    sequence = Sequence(token_ids, (IGNORE_INDEX,) * 4, (anchor,))
    rows = _list_sequence_tokens(0, sequence, tokenizer, {})
    assert [row.anchors for row in rows] == [(), ("slice from here",), ("slice to here",), ()]


def test_chats_and_retrieval_records_become_rows(model_folder: Path) -> None:
    question = Message("user", (tiny.random_image(1), "q?"))
    chat = Record("c", messages=(question, Message("assistant", ("a!",))))
    rows = list_record_tokens(chat, model_folder)
    assert join_text(rows, 0, only_supervised=True) == "a!</s>"
    retrieval = Record("r", query=("q",), positive=(("p",),), negative=(("n",), ("m",)))
    rows = list_record_tokens(retrieval, model_folder)
    roles = [role for row in rows for role in row.anchors]
    assert roles == ["query", "positive", "negative", "negative"]


def test_a_plain_checkpoint_uses_the_prompts_of_the_paper(model_folder: Path) -> None:
    record = Record("1", image=tiny.random_image(1), short=("red",))
    rows = list_record_tokens(record, model_folder.parent / "base")
    assert "Summarize the provided image in one word:" in join_text(rows, 0)
    assert not any(row.supervised for row in rows)
    assert anchor_texts(rows) == {(0, "image"): "<|assistant|>", (1, "text"): "<|assistant|>"}


def test_no_weights_are_loaded(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbone, "AutoModelForImageTextToText", None)
    assert list_record_tokens(PAIR, model_folder)


def test_a_missing_image_and_a_folder_without_model_are_errors(
    model_folder: Path, tmp_path: Path
) -> None:
    missing = ImageRef(path=tmp_path / "none.png")
    with pytest.raises(DataError, match=r"none\.png"):
        list_record_tokens(replace(PAIR, image=missing), model_folder)
    with pytest.raises(ModelError, match=r"neither vlduet\.json nor config\.json"):
        list_record_tokens(PAIR, tmp_path)


# --- text and JSON

ROWS = (
    TokenRow(0, 0, "[image, 4 tokens]", supervised=False, anchors=("image",), image="a.png"),
    TokenRow(0, 4, "red", supervised=True, anchors=(), image=None),
    TokenRow(1, 0, "red", supervised=False, anchors=("text", "query"), image=None),
)


def test_tokens_are_numbered_marked_and_labelled() -> None:
    assert format_tokens(ROWS, colour=False).splitlines() == [
        "    0   '[image, 4 tokens]'  <- image",
        "    1 * 'red'",
        "    2   'red'  <- text, query",
    ]
    assert "\x1b[32m    1 * 'red'\x1b[0m" in format_tokens(ROWS, colour=True)


def test_an_inspection_becomes_text_with_its_sequences(tmp_path: Path) -> None:
    record = replace(PAIR, metadata={"key": "value\x1b"}, long=None)
    inspection = RecordInspection(record, ROWS)
    assert inspection.sequences == [list(ROWS[:2]), [ROWS[2]]]
    lines = inspection.to_text(colour=False).splitlines()
    assert lines[0] == "1  (pair)"
    assert lines[1].startswith("       image  bytes:") and lines[1].endswith("  24 x 24")
    assert lines[2:4] == ["       short  red", "         key: value "]
    assert lines[4] == "sequence 0:" and lines[7] == "sequence 1:"
    drawn = inspection.to_text(colour=True)
    assert drawn.count("▀") == 24 * 12, "two pixels per cell"
    broken = Record("2", image=ImageRef(path=tmp_path / "gone.png"))
    assert "no such image" in RecordInspection(broken, ()).to_text(colour=True)


def test_without_a_model_there_are_no_tokens() -> None:
    inspection = inspect_record(Record("1", parts=("x",)), None)
    assert inspection.tokens == () and inspection.sequences == []
    value = json.loads(json.dumps(inspection.to_json()))
    assert value == {
        "record": {"id": "1", "parts": [{"text": "x"}]},
        "kind": "interleaved",
        "tokens": [],
    }
