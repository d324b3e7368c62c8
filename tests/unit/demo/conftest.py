"""A demo of a few records and a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers import tiny
from vlduet.data.formats import read_jsonl
from vlduet.data.record_json import record_to_json
from vlduet.data.tools.instructions import generate_instructions
from vlduet.demo import encoders, prepare


@pytest.fixture
def tiny_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> prepare.DemoData:
    """A tiny default model in nano, 8 training and 8 held-out stamps, and a few training steps."""
    tiny.build_duet_model(tmp_path / "nano")
    text_encoder = tiny.build_frozen_encoders(tmp_path / "encoders")["text"]
    monkeypatch.setattr(encoders, "fetch_minilm_folder", lambda: text_encoder)
    monkeypatch.setattr(encoders, "DUAL_ENCODER_STEPS", 3)
    monkeypatch.setattr(encoders, "DUAL_ENCODER_BATCH_SIZE", 4)
    monkeypatch.setattr(encoders, "NUM_QUESTIONS", 3)
    monkeypatch.setattr(encoders, "NUM_SOLVED_QUESTIONS", 4)
    folder = tmp_path / "data" / "stamps"
    folder.mkdir(parents=True)
    rows = []
    for i in range(16):
        (folder / f"{i}.png").write_bytes(tiny.random_image(i).data or b"")
        metadata = {"category": ("animals/birds", "food", "town/houses")[i % 3]}
        row = {"id": str(i), "image": f"{i}.png", "short": f"A thing {i}.", "metadata": metadata}
        rows.append(json.dumps(row) + "\n")
    (folder / "train.jsonl").write_text("".join(rows[:8]))
    (folder / "test.jsonl").write_text("".join(rows[8:]))
    (folder / "val.jsonl").write_text("".join(rows[6:8]))
    held_out = tuple(read_jsonl(folder / "test.jsonl"))
    chats = list(generate_instructions(list(read_jsonl(folder / "train.jsonl"))))
    lines = [json.dumps(record_to_json(chat, root=folder)) + "\n" for chat in chats]
    (folder / "instructions.jsonl").write_text("".join(lines))
    names = ("train.jsonl", "instructions.jsonl", "val.jsonl")
    train, instructions, validation = (folder / name for name in names)
    return prepare.DemoData(train, instructions, validation, held_out, corpus_table=())
