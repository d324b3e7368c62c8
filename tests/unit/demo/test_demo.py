"""Decisions of the demo: what is kept out of training, what is deleted, and how it measures."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from helpers import tiny
from vlduet.corpora.build import CorpusSummary
from vlduet.data.formats import read_jsonl
from vlduet.data.records import Message, Record
from vlduet.demo import encoders, measure, prepare, run, use
from vlduet.errors import ConfigError
from vlduet.eval import protocols
from vlduet.eval.plain_questions import PLAIN_QUESTIONS


def write_corpus(folder: Path, splits: dict[str, list[str]]) -> None:
    """Write records with these captions for each split; their image files do not exist."""
    folder.mkdir(parents=True)
    for split, captions in splits.items():
        rows = [
            {"id": f"{split}{i}", "image": f"{split}{i}.png", "short": caption}
            for i, caption in enumerate(captions)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text)


@pytest.fixture
def small_corpora(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the real corpora by a few captions without images."""
    content = {
        "train": ["A boat.", "A kite", "The horse.", "A big red apple."],
        "val": ["a kite!"],
        "test": ["A red apple.", "The horse"],
    }

    def fetch(name: str, to: Path) -> CorpusSummary:
        write_corpus(to / name, content)
        counts = {split: len(captions) for split, captions in content.items()}
        return CorpusSummary(name, to / name, counts, 9, "free", reused=False)

    monkeypatch.setattr(prepare, "fetch_corpus", fetch)


@pytest.mark.usefixtures("small_corpora")
def test_training_has_no_caption_of_the_test_split(
    tmp_path: Path,
) -> None:
    data = prepare.prepare_data(tmp_path)
    captions = [record.short[0] for record in read_jsonl(data.train_file)]
    assert captions == ["A boat.", "A big red apple."]
    assert [record.short for record in data.held_out] == [("A red apple.",), ("The horse",)]
    texts = [turn.parts[-1] for r in read_jsonl(data.instruction_file) for turn in r.messages]
    assert texts and not any("kite" in str(text) or "horse" in str(text) for text in texts)
    (row,) = data.corpus_table
    assert (row["pairs trained on"], row["left out"], row["held out"]) == ("2", "2", "2")


@pytest.mark.usefixtures("small_corpora")
def test_training_records_find_the_images_of_their_corpus(tmp_path: Path) -> None:
    data = prepare.prepare_data(tmp_path)
    record = next(read_jsonl(data.train_file))
    assert record.image is not None
    assert record.image.path == tmp_path / "data" / "stamps" / "train0.png"


@pytest.mark.usefixtures("small_corpora")
def test_the_training_config_trains_on_training_records_only(tmp_path: Path) -> None:
    data = prepare.prepare_data(tmp_path)
    folders = {role: tmp_path / role for role in ("vision", "text", "cross")}
    config = prepare.training_config(tmp_path, data, encoders=folders, seed=3, steps=20)
    assert (config.seed, config.train.steps, config.out) == (3, 20, tmp_path)
    names = [source.path.name for source in config.data.train]
    assert names == [prepare.TRAINING_FILE, prepare.INSTRUCTION_FILE]
    assert config.encoders.cross == folders["cross"]


def test_an_earlier_demo_is_deleted_except_for_reusable_folders(tmp_path: Path) -> None:
    to = tmp_path / "runs" / "demo"
    run.clear_demo_folder(to)
    for name in ("model", "data", "features"):
        (to / name).mkdir()
    (to / "report.html").touch()
    run.clear_demo_folder(to)
    assert {path.name for path in to.iterdir()} == {run.MARKER_FILE, "data", "features"}


def test_a_folder_without_a_demo_is_not_touched(tmp_path: Path) -> None:
    photo = tmp_path / "photos" / "cat.jpg"
    photo.parent.mkdir()
    photo.touch()
    with pytest.raises(ConfigError, match="something else than a demo"):
        run.clear_demo_folder(photo.parent)
    assert list(photo.parent.iterdir()) == [photo]


def test_minutes_scale_the_training_steps() -> None:
    assert prepare.scale_training_steps(None) == prepare.DEFAULT_STEPS
    half = prepare.scale_training_steps(prepare.DEFAULT_MINUTES / 2)
    assert half == prepare.DEFAULT_STEPS // 2
    assert prepare.scale_training_steps(1e-9) == 2


@pytest.mark.parametrize("minutes", [0.0, -1.0, float("nan")])
def test_minutes_must_be_above_zero(minutes: float) -> None:
    with pytest.raises(ConfigError, match="minutes"):
        prepare.scale_training_steps(minutes)


def test_wrong_minutes_leave_an_earlier_demo_unchanged(tmp_path: Path) -> None:
    (tmp_path / run.MARKER_FILE).touch()
    (tmp_path / "report.html").touch()
    with pytest.raises(ConfigError, match="minutes"):
        run.run_demo(tmp_path, minutes=0.0)
    assert {path.name for path in tmp_path.iterdir()} == {run.MARKER_FILE, "report.html"}


def test_plain_answers_are_scored_by_token_and_restore_the_mode(
    tmp_path: Path,
) -> None:
    tiny.build_duet_model(tmp_path / "tiny")
    model = prepare.open_model(tmp_path, "tiny")
    answers = measure.measure_plain_answers(model)
    chats = []
    for question, answer in PLAIN_QUESTIONS:
        turns = (Message("user", (question,)), Message("assistant", (answer,)))
        chats.append(model.renderer.render_chat(turns, add_generation_prompt=False))
    totals, counts = map(list, zip(*model.compute_sequence_nll(chats), strict=True))
    assert answers.nats().mean == pytest.approx(sum(totals) / sum(counts), rel=1e-5)
    assert answers.nats_difference(answers).mean == 0
    assert not model.training
    model.train()
    assert measure.measure_plain_answers(model).total_nats.tolist() == answers.total_nats.tolist()
    assert model.training


def test_steps_are_numbered_and_timed(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="vlduet")
    timer = run.StepTimer(2)
    for name in ("first", "second"):
        with timer.step(name):
            pass
    assert list(timer.seconds) == ["first", "second"]
    assert all(seconds >= 0 for seconds in timer.seconds.values())
    assert caplog.messages == ["[1/2] first", "[2/2] second"]


def test_the_suggested_commands_exist() -> None:
    commands = run.suggest_commands(Path("runs/demo"))
    assert [command.split()[1] for command in commands] == ["search", "ask", "index", "serve"]
    assert all("runs/demo" in command for command in commands)


def test_the_echo_has_one_half_of_each_item_of_the_story_except_the_middle_one() -> None:
    held_out = tuple(
        Record(f"r{i}", image=tiny.random_image(i), short=(f"Thing {i // 2}.",)) for i in range(20)
    )
    story, echo, reversed_echo = encoders.make_alignment_records(held_out)
    assert len(story.parts) == 2 * encoders.NUM_STORY_ITEMS
    items = [story.parts.index(part) // 2 for part in echo.parts]
    assert items == [0, 1, 3, 4]
    assert [isinstance(part, str) for part in echo.parts] == [True, False, False, True]
    assert reversed_echo.parts == echo.parts[::-1]


def test_the_dual_encoder_aligns_documents_and_retrieves_for_questions(
    tmp_path: Path, tiny_demo: prepare.DemoData
) -> None:
    model = prepare.open_model(tmp_path, "nano")
    dual = encoders.train_dual_encoder(tmp_path, tiny_demo, model=model, seed=0)
    frozen = encoders.open_frozen_encoders(tmp_path, model, cross=dual)
    forward, backward = encoders.align_demo_records(tiny_demo.held_out, frozen).values()
    # The mean does not depend on the order of the slices, the alignment does.
    assert forward.mean == pytest.approx(backward.mean, abs=1e-5)
    assert forward.awm != pytest.approx(backward.awm)
    assert len(forward.rows) == 2 * encoders.NUM_STORY_ITEMS
    score = encoders.measure_retrieval_augmented(
        tmp_path, model, data=tiny_demo, encoders=frozen, seed=0
    )
    assert score.details["items"] == 3
    assert score.details["chance"] == pytest.approx(100 / 3)
    for name in ("none/accuracy", "self/accuracy", "other/accuracy", "self/retrieval/R@1"):
        assert 0 <= score.samples[name].mean <= 100


def test_the_model_is_measured_and_captions_are_its_own(
    tmp_path: Path, tiny_demo: prepare.DemoData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "MAX_CAPTION_TOKENS", 3)
    monkeypatch.setattr(measure, "NUM_CAPTION_DRAFTS", 2)
    model = prepare.open_model(tmp_path, "nano")
    results = measure.measure_model(model, tiny_demo, seed=0)
    assert len(results.captions.items) == len(tiny_demo.held_out)
    images = [record.image for record in tiny_demo.held_out if record.image is not None]
    captions = model.caption_images(images, max_new_tokens=3, num_drafts=2)
    assert [item.generated for item in results.captions.items] == captions
    assert results.retrieval.text_to_image.similarity.shape == (8, 8)
    assert results.answers.nats().mean > 0
    frozen = encoders.open_frozen_encoders(tmp_path, model)
    ridge = measure.fit_ridge_baseline(model, tiny_demo, encoders=frozen)
    assert ridge.captions == results.retrieval.captions


def test_questions_are_answered_without_and_with_training_records(
    tmp_path: Path, tiny_demo: prepare.DemoData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(use, "MAX_ANSWER_TOKENS", 2)
    model = prepare.open_model(tmp_path, "nano")
    model.save_pretrained(tmp_path / "model")
    retrieval = protocols.measure_retrieval(
        model.encode_document, model.encode_query, records=tiny_demo.held_out
    )
    galleries, answers = use.use_model(tmp_path, model, tiny_demo, retrieval=retrieval)
    assert (tmp_path / "index").is_dir()
    assert len(answers) == len(use.QUESTION_KINDS) * use.NUM_QUESTIONS_PER_KIND
    held_out_images = [record.image for record in tiny_demo.held_out]
    for answer in answers:
        assert answer.image in held_out_images and answer.reference
        assert answer.sources
        assert not {hit.image for hit in answer.sources} & set(held_out_images)
    assert [len(gallery.searches) for gallery in galleries] == [6, 6, 4]
