"""Missing captions are written, once per image, and an interrupted run continues."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from typer.testing import CliRunner

from helpers import tiny
from vlduet.cli.main import app
from vlduet.data import images
from vlduet.data.formats import read_records
from vlduet.data.records import ImageRef
from vlduet.errors import ConfigError, DataError, LockError, VLDuetError
from vlduet.workflows.captioning import (
    DEFAULT_INSTRUCTIONS,
    NO_INSTRUCTION,
    CaptionSpec,
    build_caption_specs,
    tidy_caption,
    write_missing_captions,
)

SHORT_AND_LONG = build_caption_specs(short=9, long=99)


class WidthCaptioner:
    """Captioner that writes the width of the image.

    Args:
        template: text of a caption, with ``{width}``.
        max_calls: number of calls after which the next one raises KeyboardInterrupt.
    """

    fingerprint = "fake"

    def __init__(
        self, template: str = "It is {width} wide. Really. And the", max_calls: int | None = None
    ) -> None:
        self.template = template
        self.max_calls = max_calls
        self.calls: list[tuple[str, int, int]] = []
        """(prompt, max_new_tokens, num_drafts) of each call."""
        self.widths: list[list[int]] = []
        """Widths of the images of each call."""

    def caption_images(
        self,
        refs: Sequence[ImageRef],
        *,
        prompt: str = NO_INSTRUCTION,
        max_new_tokens: int = 32,
        batch_size: int = 32,
        num_drafts: int = 1,
    ) -> list[str]:
        widths = [images.load_image(ref).width for ref in refs]
        if self.max_calls is not None and len(self.calls) >= self.max_calls:
            raise KeyboardInterrupt
        self.calls.append((prompt, max_new_tokens, num_drafts))
        self.widths.append(widths)
        return [self.template.format(width=width) for width in widths]


def write_rows(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_photos(folder: Path, count: int) -> list[str]:
    """Write images 0.png, 1.png, ... that are 10, 11, ... pixels wide."""
    folder.mkdir(exist_ok=True)
    names = [f"{i}.png" for i in range(count)]
    for i, name in enumerate(names):
        (folder / name).write_bytes(images.read_bytes(tiny.random_image(i, side=10 + i)))
    return names


def write_photo_rows(folder: Path, count: int) -> Path:
    """Write photos, and a file of pairs without captions."""
    return write_rows(folder, [{"id": name, "image": name} for name in write_photos(folder, count)])


# --- what is written


def test_images_of_a_folder_get_short_and_long_captions(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    write_photos(photos, 3)
    (photos / "2.txt").write_text("There already.")
    model = WidthCaptioner()
    output = tmp_path / "out.jsonl"
    report = write_missing_captions(
        model, photos, output=output, specs=SHORT_AND_LONG, model_name="m", batch_size=2
    )
    first, _, third = read_records(output)
    assert first.short == ("It is 10 wide.",) and first.long == "It is 10 wide. Really."
    assert third.short == ("There already.",) and third.long == "It is 12 wide. Really."
    assert model.calls[:2] == [
        (DEFAULT_INSTRUCTIONS["short"], 9, 1),
        (DEFAULT_INSTRUCTIONS["long"], 99, 1),
    ]
    assert model.widths == [[10, 11], [10, 11], [12]]
    assert first.metadata["captioned"]["long"] == {
        "model": "m",
        "fingerprint": "fake",
        "prompt": DEFAULT_INSTRUCTIONS["long"],
        "tokens": 99,
        "drafts": 1,
    }
    assert list(third.metadata["captioned"]) == ["long"]
    assert (report.records, report.short, report.long, report.generated) == (3, 2, 3, 5)
    assert report.dropped == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"photos", "out.jsonl", ".out.jsonl.files.json"}


def test_present_captions_are_kept_and_equal_images_are_captioned_once(tmp_path: Path) -> None:
    (name,) = write_photos(tmp_path, 1)
    by_hand = {"captioned": {"long": "by hand"}}
    question = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    rows = [
        {"id": "full", "image": "gone.png", "short": "s", "long": "l"},
        {"id": "first", "image": name, "long": "l", "metadata": by_hand},
        {"id": "again", "image": name},
        {"id": "chat", "messages": question},
    ]
    report = write_missing_captions(
        WidthCaptioner(),
        write_rows(tmp_path, rows),
        output=tmp_path / "out.jsonl",
        specs=build_caption_specs(short=9, long=0),
    )
    records = {record.id: record for record in read_records(tmp_path / "out.jsonl")}
    assert records["full"].short == ("s",) and records["full"].metadata == {}
    assert records["chat"].kind == "chat"
    assert records["first"].short == records["again"].short == ("It is 10 wide.",)
    assert list(records["first"].metadata["captioned"]) == ["long", "short"]
    assert report.generated == 1 and report.short == 2 and records["again"].long is None


def test_broken_images_are_listed_and_the_others_captioned(tmp_path: Path) -> None:
    names = write_photos(tmp_path, 4)
    (tmp_path / "broken.png").write_bytes((tmp_path / names[0]).read_bytes()[:60])
    all_names = ["gone.png", *names[:2], "broken.png", *names[2:]]
    rows = [{"id": str(i), "image": name} for i, name in enumerate(all_names)]
    output = tmp_path / "out.jsonl"
    source = write_rows(tmp_path, rows)
    report = write_missing_captions(
        WidthCaptioner(), source, output=output, specs=SHORT_AND_LONG, batch_size=8
    )
    assert [record.id for record in read_records(output)] == ["1", "2", "4", "5"]
    assert report.dropped == 2 and sum(report.causes.values()) == 2
    listing = (tmp_path / "out.quarantine.jsonl").read_text().splitlines()
    drops = [json.loads(line) for line in listing]
    assert {drop["id"] for drop in drops} == {"0", "3"} and all(drop["fix"] for drop in drops)


def test_an_empty_caption_is_counted_and_left_out(tmp_path: Path) -> None:
    source = write_photo_rows(tmp_path, 1)
    output = tmp_path / "out.jsonl"
    model = WidthCaptioner(' " " ')
    report = write_missing_captions(model, source, output=output, specs=SHORT_AND_LONG)
    (record,) = read_records(output)
    assert report.empty == 2
    assert record.short == () and record.long is None and record.metadata == {}


def test_drafts_are_requested_from_the_model(tmp_path: Path) -> None:
    source = write_photo_rows(tmp_path, 1)
    model = WidthCaptioner()
    specs = build_caption_specs(short=9, long=0, drafts=4)
    write_missing_captions(model, source, output=tmp_path / "out.jsonl", specs=specs)
    (record,) = read_records(tmp_path / "out.jsonl")
    assert model.calls == [(DEFAULT_INSTRUCTIONS["short"], 9, 4)]
    assert record.metadata["captioned"]["short"]["drafts"] == 4


# --- an output inside the folder of images


def test_new_images_of_a_captioned_folder_are_added(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    output = folder / "train.jsonl"
    write_photos(folder, 2)
    write_missing_captions(WidthCaptioner(), folder, output=output, specs=SHORT_AND_LONG)
    write_photos(folder, 3)
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:60])
    model = WidthCaptioner()
    report = write_missing_captions(model, folder, output=output, specs=SHORT_AND_LONG)
    assert [record.id for record in read_records(output)] == ["0.png", "1.png", "2.png"]
    assert model.widths == [[12], [12]]
    assert (report.records, report.generated, report.dropped) == (3, 2, 1)


def test_an_existing_file_is_not_replaced_if_a_record_would_be_lost(tmp_path: Path) -> None:
    write_photos(tmp_path, 1)
    output = tmp_path / "train.jsonl"
    output.write_text(
        '{"id": "0", "image": "0.png", "short": "by hand"}\n'
        '{"id": "1", "image": "gone.png", "long": "by hand, too"}\n'
    )
    content = output.read_text()
    expected = r"train.jsonl: 1 of its 2 records cannot be used .* would be lost"
    with pytest.raises(DataError, match=expected):
        write_missing_captions(WidthCaptioner(), tmp_path, output=output, specs=SHORT_AND_LONG)
    assert output.read_text() == content


# --- interruptions


def test_an_interrupted_run_continues_with_the_same_result(tmp_path: Path) -> None:
    source = write_photo_rows(tmp_path, 5)
    output = tmp_path / "out.jsonl"
    complete = tmp_path / "complete.jsonl"
    write_missing_captions(
        WidthCaptioner(), source, output=complete, specs=SHORT_AND_LONG, batch_size=2
    )
    interrupted = WidthCaptioner(max_calls=3)
    with pytest.raises(KeyboardInterrupt):
        write_missing_captions(
            interrupted, source, output=output, specs=SHORT_AND_LONG, batch_size=2
        )
    assert not output.exists()
    (journal,) = tmp_path.glob(".out.jsonl.*.captions")
    journal.write_bytes(journal.read_bytes()[:-7])  # a kill in the middle of a line
    resumed = WidthCaptioner()
    report = write_missing_captions(
        resumed, source, output=output, specs=SHORT_AND_LONG, batch_size=2
    )
    assert output.read_bytes() == complete.read_bytes() and not journal.exists()
    assert report.generated == 5, "five are in the journal, and the one of a cut line is repeated"
    assert resumed.widths == [[13], [12, 13], [14], [14]]


def test_one_process_at_a_time_writes_an_output(tmp_path: Path) -> None:
    source, output = write_photo_rows(tmp_path, 5), tmp_path / "out.jsonl"
    with (
        FileLock(tmp_path / ".out.jsonl.lock"),
        pytest.raises(LockError, match=r"out\.jsonl: another process is writing here"),
    ):
        write_missing_captions(WidthCaptioner(), source, output=output, specs=SHORT_AND_LONG)
    assert [path.name for path in tmp_path.glob("*out*")] == [".out.jsonl.lock"]


def test_a_journal_of_other_settings_is_not_used(tmp_path: Path) -> None:
    source = write_photo_rows(tmp_path, 2)
    output = tmp_path / "out.jsonl"
    interrupted = WidthCaptioner(max_calls=1)
    with pytest.raises(KeyboardInterrupt):
        write_missing_captions(
            interrupted, source, output=output, specs=SHORT_AND_LONG, batch_size=1
        )
    specs = [CaptionSpec("short", 9, "Otherwise.")]
    report = write_missing_captions(WidthCaptioner(), source, output=output, specs=specs)
    assert report.generated == 2


# --- texts and options


@pytest.mark.parametrize(
    ("text", "max_sentences", "expected"),
    [
        (" A  red\ncar. ", None, "A red car."),
        ('"A car."', None, "A car."),
        ("“A car” and a bus", None, "“A car” and a bus"),
        ("A car. It is re", None, "A car."),
        ("A car on a roa", None, "A car on a roa"),
        ("A car! It drives. Away.", 1, "A car!"),
        ('A sign. It says "Stop."', None, 'A sign. It says "Stop."'),
        ("A car\n\nAnd more.", 1, "A car"),
        ('""', None, ""),
        ("", None, ""),
    ],
)
def test_captions_become_complete_sentences_on_one_line(
    text: str, max_sentences: int | None, expected: str
) -> None:
    assert tidy_caption(text, max_sentences=max_sentences) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"short": 0, "long": 0}, "neither"),
        ({"short": -1, "long": 5}, "--short"),
        ({"short": 5, "long": 5, "prompt": "x"}, "--long 0 or --short 0"),
        ({"short": 5, "long": 5, "drafts": 0}, "--drafts: 0 drafts"),
    ],
)
def test_wrong_caption_options_name_the_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_caption_specs(**options)


def test_an_empty_prompt_means_no_instruction() -> None:
    specs = build_caption_specs(short=5, long=0, prompt="")
    assert specs == [CaptionSpec("short", 5, NO_INSTRUCTION)]


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    source = write_rows(tmp_path, [])
    output = tmp_path / "out.jsonl"
    model = WidthCaptioner()
    with pytest.raises(VLDuetError, match="--batch"):
        write_missing_captions(model, source, output=output, specs=SHORT_AND_LONG, batch_size=0)
    with pytest.raises(VLDuetError, match="the source itself"):
        write_missing_captions(model, source, output=source, specs=SHORT_AND_LONG)
    with pytest.raises(DataError, match="no such file"):
        write_missing_captions(model, tmp_path / "none", output=output, specs=SHORT_AND_LONG)


# --- the command, with a model


def test_the_command_captions_a_folder_with_a_chat_model(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", 2)
    tiny.build_llava(tmp_path / "base")
    output = tmp_path / "out.jsonl"
    arguments = ["caption", str(tmp_path / "base"), str(tmp_path / "photos"), "--to", str(output)]
    result = CliRunner().invoke(app, [*arguments, "--short", "3", "--long", "5", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["records"] == 2 and report["generated"] == 4
    assert report["short"] + report["long"] + report["empty"] == 4
    origins = []
    for record in read_records(output):
        origins += record.metadata.get("captioned", {}).values()
    assert len(origins) == report["short"] + report["long"]
    assert all(origin["model"] == "base" for origin in origins)


def test_the_command_asks_for_a_prompt_if_the_model_reads_images_outside_its_chat(
    tmp_path: Path,
) -> None:
    write_photos(tmp_path / "photos", 2)
    tiny.build_duet_model(tmp_path / "base").save_pretrained(tmp_path / "model")
    output = tmp_path / "out.jsonl"
    arguments = ["caption", str(tmp_path / "model"), str(tmp_path / "photos"), "--to", str(output)]
    refused = CliRunner().invoke(app, arguments)
    assert isinstance(refused.exception, ConfigError) and "--prompt ''" in str(refused.exception)
    options = ["--long", "0", "--short", "3", "--prompt", "", "--drafts", "2", "--json"]
    result = CliRunner().invoke(app, [*arguments, *options])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["records"] == 2 and report["short"] + report["empty"] == 2


def test_a_caption_request_is_a_chat_turn_or_the_image_prompt(tmp_path: Path) -> None:
    model = tiny.build_duet_model(tmp_path / "base")
    image = tiny.random_image()
    request = model.renderer.render_caption_request(image, "Describe.")
    text = model.backbone.tokenizer.decode(request.token_ids)
    assert "<|user|>" in text and "Describe." in text and text.endswith("<|assistant|>")
    assert len(request.images) == 1
    model.backbone.tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        model.renderer.render_caption_request(image, "Describe.")
    request = model.renderer.render_caption_request(image, NO_INSTRUCTION)
    assert request.token_ids == model.renderer.render_embedding((image,)).token_ids
