"""The demo's own decisions: what is kept out of training, what is removed, and the config that it trains with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import tiny
from vlduet.corpora.build import CorpusSummary
from vlduet.data.records import Record, read_jsonl
from vlduet.demo import encoders, prepare, run
from vlduet.errors import ConfigError


def write_corpus(folder: Path, splits: dict[str, list[str]]) -> None:
    folder.mkdir(parents=True)
    for split, captions in splits.items():
        rows = [
            {"id": f"{split}{i}", "image": f"{split}{i}.png", "short": text}
            for i, text in enumerate(captions)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def fake_fetch(monkeypatch: pytest.MonkeyPatch) -> None:
    content = {
        "stamps": {"train": ["A boat."], "val": ["A kite."], "test": ["A red apple.", "The horse"]},
        "emoji": {
            "train": ["red apple", "horse", "a kite!", "green apple"],
            "val": ["x"],
            "test": ["y"],
        },
    }

    def fetch(name: str, to: Path, *, progress: Callable[[str], None]) -> CorpusSummary:
        write_corpus(to / name, content[name])
        counts = {split: len(captions) for split, captions in content[name].items()}
        return CorpusSummary(name, to / name, counts, 9, "free", reused=False)

    monkeypatch.setattr(prepare.corpora, "fetch_corpus", fetch)


@pytest.mark.usefixtures("fake_fetch")
def test_what_names_a_held_out_thing_is_kept_out_of_training(tmp_path: Path) -> None:
    data = prepare.prepare_data(tmp_path)
    captions = [r.short[0] for path in data.train_files for r in read_jsonl(path)]
    assert captions == ["A boat.", "green apple"] and data.captions == ("A boat.",)
    assert [record.short for record in data.held_out] == [("A red apple.",), ("The horse",)]
    assert [(row["trained on"], row["left out"]) for row in data.corpus_table] == [
        ("1", "0"),
        ("1", "3"),
    ]
    assert (data.corpus_table[0]["held out"], data.corpus_table[1]["held out"]) == ("2", "")
    # The kept records still find their images, which lie beside the corpus' own file.
    kept = next(read_jsonl(data.train_files[0]))
    assert kept.image is not None and kept.image.path == tmp_path / "data" / "stamps" / "train0.png"


@pytest.mark.usefixtures("fake_fetch")
def test_the_training_config_is_valid_and_trains_on_nothing_held_out(tmp_path: Path) -> None:
    settings = prepare.training_config(tmp_path, prepare.prepare_data(tmp_path), seed=3, steps=20)
    assert settings.seed == 3 and settings.train.steps == 20 and settings.out == tmp_path
    assert not [source for source in settings.data.train if source.path.name == "test.jsonl"]


def test_a_former_demo_is_replaced_and_nothing_else_is_touched(tmp_path: Path) -> None:
    to = tmp_path / "runs" / "demo"
    run.clear_demo_folder(to)
    for name in ("model", "data", "features"):
        (to / name).mkdir()
    (to / "report.html").touch()
    run.clear_demo_folder(to)
    assert sorted(path.name for path in to.iterdir()) == sorted(
        [run.MARKER_FILE, "data", "features"]
    )

    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "cat.jpg").touch()
    with pytest.raises(ConfigError, match="something else than a demo"):
        run.clear_demo_folder(photos)
    assert (photos / "cat.jpg").exists()


def test_minutes_scale_the_steps() -> None:
    assert prepare.scale_training_steps(None) == prepare.DEFAULT_STEPS
    assert prepare.scale_training_steps(prepare.DEFAULT_MINUTES / 2) == prepare.DEFAULT_STEPS // 2
    assert prepare.scale_training_steps(1e-9) >= 2
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="minutes"):
            prepare.scale_training_steps(wrong)


def test_steps_are_numbered_and_timed(capsys: pytest.CaptureFixture[str]) -> None:
    story = run.StepTimer(2)
    for name in ("one", "two"):
        with story.step(name):
            pass
    assert list(story.seconds) == ["one", "two"]
    assert capsys.readouterr().err.splitlines() == ["[1/2] one", "[2/2] two"]


def test_the_next_commands_are_verbs_of_the_command_line() -> None:
    commands = run.suggest_commands(Path("runs/demo"))
    assert len(commands) == 3
    assert {command.split()[1] for command in commands} <= {"search", "ask", "index"}


def test_the_story_and_its_echo() -> None:
    held_out = tuple(
        Record(f"r{i}", image=tiny.random_image(i), short=(f"Thing {i // 2}.",)) for i in range(20)
    )
    story, echo, backwards = encoders.make_alignment_records(held_out)
    assert (
        len(story.parts) == 2 * encoders.NUM_STORY_ITEMS
        and len(echo.parts) == encoders.NUM_STORY_ITEMS - 1
    )
    assert set(echo.parts) <= set(story.parts) and backwards.parts == echo.parts[::-1]
    assert [story.parts.index(part) // 2 for part in echo.parts] == [0, 1, 3, 4]


def test_the_dual_encoder_sees_and_retrieves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The triple kernel and self-RAG of the demo, on a tiny model: training, both pictures, and the three conditions."""
    tiny.build_duet_model(tmp_path / "nano")
    text = tiny.build_frozen_encoders(tmp_path / "encoders")["text"]
    for name, value in (("STEPS", 3), ("BATCH", 4), ("ASKED", 3), ("SOLVED", 4)):
        monkeypatch.setattr(encoders, name, value)
    monkeypatch.setattr(encoders, "fetch_minilm_folder", lambda: text)
    folder = tmp_path / "data" / "stamps"
    folder.mkdir(parents=True)
    rows = []
    for i in range(16):
        (folder / f"{i}.png").write_bytes(tiny.random_image(i).data or b"")
        kind = {"category": ("animals/birds", "food", "town/houses")[i % 3]}
        rows.append({"id": str(i), "image": f"{i}.png", "short": f"Thing {i}.", "metadata": kind})
    for split, chosen in (("train", rows[:8]), ("test", rows[8:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    held_out = tuple(read_jsonl(folder / "test.jsonl"))
    data = prepare.DemoData(
        (folder / "train.jsonl",), folder / "val.jsonl", held_out, corpus_table=(), captions=()
    )

    model = prepare.open_model(tmp_path, "nano")
    frozen_encoders = encoders.open_frozen_encoders(
        tmp_path, model, cross=encoders.train_dual_encoder(tmp_path, data, model=model, seed=0)
    )
    forth, back = encoders.align_demo_records(data.held_out, encoders)
    assert forth.mean == pytest.approx(back.mean, abs=1e-5) and forth.awm != pytest.approx(back.awm)
    assert len(forth.rows) == 2 * encoders.NUM_STORY_ITEMS and forth.rows[0].startswith(
        "data:image/"
    )
    found = encoders.measure_retrieval_augmented(
        tmp_path, model, data=data, encoders=encoders, seed=0
    )
    assert (found.questions, found.solved) == (3, 4) and found.chance == pytest.approx(1 / 3)
    assert set(found.accuracy) == {"none", "self", "other"} and len(found.gaps) == 2
