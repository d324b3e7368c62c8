"""Captions are written where they lack, once an image, and an interrupted run goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers import tiny
from vlduet.data import images
from vlduet.data.formats import read_records
from vlduet.data.records import ImageRef
from vlduet.errors import ConfigError, DataError, VLDuetError
from vlduet.workflows.captioning import (
    DEFAULT_INSTRUCTIONS,
    NO_INSTRUCTION,
    CaptionSpec,
    build_caption_specs,
    known_texts,
    tidy_caption,
    write_missing_captions,
)

BOTH = build_caption_specs(short=9, long=99)


class FakeModel:
    """Writes the width of the picture."""

    fingerprint = "fake"

    def __init__(self, answer: str = "It is {width} wide. Really. And the") -> None:
        self.answer = answer
        self.asked: list[tuple[str, int, list[int]]] = []
        self.stop_after: int | None = None

    def encode_query(self, items: Sequence[str]) -> np.ndarray:
        return np.array([[len(item)] for item in items], np.float32)

    def caption(
        self,
        images_: Sequence[ImageRef],
        *,
        prompt: str = NO_INSTRUCTION,
        max_new_tokens: int = 32,
        batch: int = 32,
        drafts: int = 1,
        known: Mapping[str, np.ndarray] | None = None,
    ) -> list[str]:
        widths = [images.load_image(ref).width for ref in images_]
        if self.stop_after is not None and len(self.asked) >= self.stop_after:
            raise KeyboardInterrupt
        self.asked.append((prompt, max_new_tokens, widths))
        self.drafts = drafts
        # A known text is nearest to the picture that is as wide as it is long.
        lengths = {int(vector[0]): text for text, vector in (known or {}).items()}
        return [lengths.get(width, self.answer.format(width=width)) for width in widths]


def write(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def photos(folder: Path, count: int) -> list[str]:
    folder.mkdir(exist_ok=True)
    for i in range(count):
        (folder / f"{i}.png").write_bytes(tiny.random_image(i, side=10 + i).data or b"")
    return [f"{i}.png" for i in range(count)]


def test_a_folder_of_images(tmp_path: Path) -> None:
    photos(tmp_path / "photos", 3)
    (tmp_path / "photos" / "2.txt").write_text("There already.")
    model = FakeModel()
    report = write_missing_captions(
        model,
        tmp_path / "photos",
        output=tmp_path / "out.jsonl",
        specs=BOTH,
        model_name="m",
        batch_size=2,
    )
    a, _, c = read_records(tmp_path / "out.jsonl")
    assert a.short == ("It is 10 wide.",) and a.long == "It is 10 wide. Really."
    assert c.short == ("There already.",) and c.long == "It is 12 wide. Really."
    assert [asked[:2] for asked in model.asked[:2]] == [
        (DEFAULT_INSTRUCTIONS["short"], 9),
        (DEFAULT_INSTRUCTIONS["long"], 99),
    ]
    assert [widths for _, _, widths in model.asked] == [[10, 11], [10, 11], [12]]
    told = {
        "model": "m",
        "fingerprint": "fake",
        "prompt": DEFAULT_INSTRUCTIONS["long"],
        "tokens": 99,
        "drafts": 1,
        "known": False,
    }
    assert a.metadata["captioned"]["long"] == told and list(c.metadata["captioned"]) == ["long"]
    assert (report.records, report.short, report.long, report.generated) == (
        3,
        2,
        3,
        5,
    ) and report.dropped == 0
    assert {p.name for p in tmp_path.iterdir()} == {"photos", "out.jsonl"}, "nothing is left behind"


def test_a_folder_that_holds_its_captions_may_grow(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    photos(folder, 2)
    write_missing_captions(FakeModel(), folder, output=folder / "train.jsonl", specs=BOTH)
    photos(folder, 3)
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:60])
    model = FakeModel()
    report = write_missing_captions(model, folder, output=folder / "train.jsonl", specs=BOTH)
    assert [r.id for r in read_records(folder / "train.jsonl")] == ["0.png", "1.png", "2.png"]
    assert [widths for _, _, widths in model.asked] == [[12], [12]]
    assert (report.records, report.generated, report.dropped) == (3, 2, 1)


def test_a_folder_s_captions_are_not_replaced_where_one_would_be_lost(tmp_path: Path) -> None:
    photos(tmp_path, 1)
    rows = '{"id": "0", "image": "0.png", "short": "by hand"}\n{"id": "1", "image": "gone.png", "long": "by hand, too"}\n'
    (tmp_path / "train.jsonl").write_text(rows)
    with pytest.raises(
        DataError, match=r"train.jsonl: 1 of its 2 records cannot be used .* would be lost"
    ):
        write_missing_captions(FakeModel(), tmp_path, output=tmp_path / "train.jsonl", specs=BOTH)
    assert (tmp_path / "train.jsonl").read_text() == rows


def test_what_is_there_is_never_replaced_and_seen_images_are_not_asked_again(
    tmp_path: Path,
) -> None:
    names = photos(tmp_path, 1)
    rows = [
        {"id": "full", "image": "gone.png", "short": "s", "long": "l"},
        {
            "id": "first",
            "image": names[0],
            "long": "l",
            "metadata": {"captioned": {"long": "by hand"}},
        },
        {"id": "again", "image": names[0]},
        {
            "id": "chat",
            "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}],
        },
    ]
    model = FakeModel()
    report = write_missing_captions(
        model,
        write(tmp_path, rows),
        output=tmp_path / "out.jsonl",
        specs=build_caption_specs(short=9, long=0),
    )
    found = {record.id: record for record in read_records(tmp_path / "out.jsonl")}
    assert (
        found["full"].short == ("s",)
        and found["full"].metadata == {}
        and found["chat"].kind == "chat"
    )
    assert found["first"].short == found["again"].short == ("It is 10 wide.",)
    assert list(found["first"].metadata["captioned"]) == ["long", "short"]
    assert report.generated == 1 and report.short == 2 and found["again"].long is None


def test_broken_images_are_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    names = photos(tmp_path, 4)
    (tmp_path / "broken.png").write_bytes((tmp_path / names[0]).read_bytes()[:60])
    every = ["gone.png", *names[:2], "broken.png", *names[2:]]
    rows = [{"id": str(i), "image": name} for i, name in enumerate(every)]
    report = write_missing_captions(
        FakeModel(), write(tmp_path, rows), output=tmp_path / "out.jsonl", specs=BOTH, batch_size=8
    )
    assert [r.id for r in read_records(tmp_path / "out.jsonl")] == ["1", "2", "4", "5"]
    assert report.dropped == 2 and sum(report.causes.values()) == 2
    listed = [
        json.loads(line) for line in (tmp_path / "out.quarantine.jsonl").read_text().splitlines()
    ]
    assert {row["id"] for row in listed} == {"0", "3"} and all(row["fix"] for row in listed)


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    rows = [{"id": name, "image": name} for name in photos(tmp_path, 5)]
    source, out = write(tmp_path, rows), tmp_path / "out.jsonl"
    whole = FakeModel()
    write_missing_captions(whole, source, output=tmp_path / "whole.jsonl", specs=BOTH, batch_size=2)
    stopped = FakeModel()
    stopped.stop_after = 3
    with pytest.raises(KeyboardInterrupt):
        write_missing_captions(stopped, source, output=out, specs=BOTH, batch_size=2)
    assert not out.exists()
    (journal,) = tmp_path.glob(".out.jsonl.*.captions")
    journal.write_bytes(journal.read_bytes()[:-7])  # a kill in the middle of a line
    rest = FakeModel()
    report = write_missing_captions(rest, source, output=out, specs=BOTH, batch_size=2)
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes() and not journal.exists()
    assert report.generated == 5, "four were kept, and one of a broken line is written again"
    assert [asked[2] for asked in rest.asked] == [[13], [12, 13], [14], [14]]


def test_captions_of_other_settings_are_not_taken_over(tmp_path: Path) -> None:
    rows = [{"id": name, "image": name} for name in photos(tmp_path, 2)]
    stopped = FakeModel()
    stopped.stop_after = 1
    with pytest.raises(KeyboardInterrupt):
        write_missing_captions(
            stopped, write(tmp_path, rows), output=tmp_path / "out.jsonl", specs=BOTH, batch_size=1
        )
    wanted = [CaptionSpec("short", 9, "Otherwise.")]
    assert (
        write_missing_captions(
            FakeModel(), tmp_path / "pairs.jsonl", output=tmp_path / "out.jsonl", specs=wanted
        ).generated
        == 2
    )


def test_an_empty_caption_is_counted_and_left_out(tmp_path: Path) -> None:
    rows = [{"id": name, "image": name} for name in photos(tmp_path, 1)]
    report = write_missing_captions(
        FakeModel(' " " '), write(tmp_path, rows), output=tmp_path / "out.jsonl", specs=BOTH
    )
    (record,) = read_records(tmp_path / "out.jsonl")
    assert (
        report.empty == 2 and record.short == () and record.long is None and record.metadata == {}
    )


def test_known_texts_are_short_captions_as_they_stand(tmp_path: Path) -> None:
    rows = [{"id": name, "image": name} for name in photos(tmp_path, 3)]
    known = [
        "A barge.  Or",
        "A boat. Say!",
    ]  # as long as the first picture, and the third, are wide
    known[0] = known[0][:10]
    wanted = build_caption_specs(short=9, long=99, drafts=4, known=known)
    model = FakeModel()
    report = write_missing_captions(
        model, write(tmp_path, rows), output=tmp_path / "out.jsonl", specs=wanted
    )
    found = list(read_records(tmp_path / "out.jsonl"))
    assert [record.short for record in found] == [(known[0],), ("It is 11 wide.",), (known[1],)], (
        "two sentences are kept"
    )
    assert [record.long for record in found] == [f"It is {n} wide. Really." for n in (10, 11, 12)]
    told = [record.metadata["captioned"]["short"] for record in found]
    assert [one["known"] for one in told] == [True, False, True] and all(
        one["drafts"] == 4 for one in told
    )
    assert report.known == 2 and report.short == 3 and model.drafts == 4


def test_captions_of_other_known_texts_are_not_taken_over(tmp_path: Path) -> None:
    rows = [{"id": name, "image": name} for name in photos(tmp_path, 2)]
    stopped = FakeModel()
    stopped.stop_after = 1
    with pytest.raises(KeyboardInterrupt):
        write_missing_captions(
            stopped,
            write(tmp_path, rows),
            output=tmp_path / "out.jsonl",
            specs=build_caption_specs(short=9, long=0),
            batch_size=1,
        )
    wanted = build_caption_specs(short=9, long=0, known=["A car."])
    assert (
        write_missing_captions(
            FakeModel(), tmp_path / "pairs.jsonl", output=tmp_path / "out.jsonl", specs=wanted
        ).generated
        == 2
    )


def test_known_texts_are_read_from_lines_and_from_records(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text(" A  car.\n\nÄpfel\n", encoding="utf-8")
    assert known_texts(tmp_path / "names.txt") == ["A car.", "Äpfel"]
    (name,) = photos(tmp_path, 1)
    both = write(
        tmp_path,
        [{"id": "a", "image": name, "short": ["a", "b"]}, {"id": "b", "image": name, "long": "c"}],
    )
    assert known_texts(both) == ["a", "b"]
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes(b"\xc4pfel")
    for name, said in [
        ("empty.txt", "no texts"),
        ("latin.txt", "cannot be read"),
        ("gone.txt", "cannot be read"),
    ]:
        with pytest.raises(DataError, match=said):
            known_texts(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "sentences", "wanted"),
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
def test_tidy(text: str, sentences: int | None, wanted: str) -> None:
    assert tidy_caption(text, max_sentences=sentences) == wanted


def test_wishes_and_bad_options(tmp_path: Path) -> None:
    assert build_caption_specs(short=5, long=0, prompt="") == [
        CaptionSpec("short", 5, NO_INSTRUCTION)
    ]
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"short": 0, "long": 0}, "neither"),
        ({"short": -1, "long": 5}, "--short"),
        ({"short": 5, "long": 5, "prompt": "x"}, "--long 0 or --short 0"),
        ({"short": 0, "long": 5, "known": ["a"]}, "--known"),
        ({"short": 5, "long": 5, "known": ["a"], "drafts": 0}, "--long 0"),
        ({"short": 5, "long": 0, "drafts": 0}, "--known texts"),
    ]
    for options, said in wrong:
        with pytest.raises(ConfigError, match=said):
            build_caption_specs(**options)
    source = write(tmp_path, [])
    for options, said in [({"batch": 0}, "--batch"), ({"to": source}, "the source itself")]:
        with pytest.raises(VLDuetError, match=said):
            write_missing_captions(
                FakeModel(), source, **{"to": tmp_path / "o.jsonl", "wanted": BOTH, **options}
            )
    with pytest.raises(DataError, match="no such file"):
        write_missing_captions(
            FakeModel(), tmp_path / "none", output=tmp_path / "o.jsonl", specs=BOTH
        )


def test_the_verb_with_a_real_model(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from vlduet.cli.main import app

    photos(tmp_path / "photos", 2)
    tiny.build_llava(tmp_path / "base")
    tokenizer_config = tmp_path / "base" / "tokenizer_config.json"
    assert tokenizer_config.exists()
    arguments = [
        "caption",
        str(tmp_path / "base"),
        str(tmp_path / "photos"),
        "--to",
        str(tmp_path / "out.jsonl"),
    ]
    done = CliRunner().invoke(app, [*arguments, "--short", "3", "--long", "5", "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (
        told["records"] == 2
        and told["short"] + told["long"] + told["empty"] == 4
        and told["generated"] == 4
    )
    for record in read_records(tmp_path / "out.jsonl"):
        assert all(
            made["model"] == "base" for made in record.metadata.get("captioned", {}).values()
        )
    # One that reads images outside its chat template is not asked in it, unless the user says so.
    tiny.build_duet_model(tmp_path / "own").save_pretrained(tmp_path / "model")
    arguments[1] = str(tmp_path / "model")
    refused = CliRunner().invoke(app, arguments)
    assert isinstance(refused.exception, ConfigError) and "--prompt ''" in str(refused.exception)
    (tmp_path / "names.txt").write_text("red\na blue car\n")
    words = [
        "--long",
        "0",
        "--short",
        "3",
        "--prompt",
        "",
        "--drafts",
        "2",
        "--known",
        str(tmp_path / "names.txt"),
    ]
    done = CliRunner().invoke(app, [*arguments, *words])
    assert done.exit_code == 0 and " of them are known texts" in done.output, done.output
    words[words.index("--drafts") + 1] = "0"
    done = CliRunner().invoke(app, [*arguments, *words, "--json"])
    told = json.loads(done.stdout)
    assert told["known"] == told["short"] == 2, done.output
    assert {r.short[0] for r in read_records(tmp_path / "out.jsonl")} <= {"red", "a blue car"}


def test_instructions_and_the_image_prompt_are_both_answered(tmp_path: Path) -> None:
    model = tiny.build_duet_model(tmp_path / "base")
    asked = model.renderer.render_caption_request(tiny.random_image(), "Describe.")
    text = model.backbone.tokenizer.decode(asked.token_ids)
    assert (
        "<|user|>" in text
        and "Describe." in text
        and text.endswith("<|assistant|>")
        and len(asked.images) == 1
    )
    model.backbone.tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        model.renderer.render_caption_request(tiny.random_image(), "Describe.")
    assert (
        model.renderer.render_caption_request(tiny.random_image(), NO_INSTRUCTION).token_ids
        == model.renderer.render_embedding((tiny.random_image(),)).token_ids
    )
