"""Questions by rule: answers are true, balanced, and made of names of the same records alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vlduet.cli.main import app
from vlduet.data.formats import read_records
from vlduet.data.records import ImageRef, Record, split_sentences
from vlduet.data.tools.instructions import (
    NUM_OPTIONS,
    QUESTION_RULES,
    format_name,
    generate_instructions,
)
from vlduet.errors import ConfigError

COLOURS = ("red", "green", "blue", "grey")
ANIMALS = ("frog", "cat", "dog", "bird", "horse", "snail")


def make_records() -> list[Record]:
    """Return pairs of which 24 are named by a colour and an animal, and one by an animal alone."""
    records = [Record("plain", image=ImageRef(data=b"frog"), short=("A frog.",))]
    for colour in COLOURS:
        for animal in ANIMALS:
            name = f"{colour} {animal}"
            records.append(
                Record(
                    name,
                    image=ImageRef(data=name.encode()),
                    short=(f"A {name}.",),
                    metadata={"animal": animal},
                )
            )
    unusable = Record("x", image=ImageRef(data=b"x"), short=("Eat your bread!",))
    return [*records, unusable, Record("y", parts=("A text.",))]


def list_images(chat: Record) -> list[str]:
    """Return the names of the images that are asked about."""
    images = [image.data for image in chat.images()]
    return [f"a {data.decode()}" for data in images if data is not None]


def read_turns(chat: Record) -> tuple[str, str]:
    """Return the question, the last text of its turn, and the answer."""
    question, answer = (message.parts[-1] for message in chat.messages)
    assert isinstance(question, str) and isinstance(answer, str)
    return question.strip(), answer


def iterate_kind(kind: str, **options: str) -> Iterator[tuple[list[str], str, str]]:
    """Yield the images, the question and the answer of all chats of a kind."""
    for chat in generate_instructions(make_records(), kinds=[kind], **options):
        yield list_images(chat), *read_turns(chat)


def is_right(name: str, image: str) -> bool:
    """Return whether a name is true of an image: all its words are in the image's name."""
    return set(name.split()) <= set(image.split())


@pytest.mark.parametrize(
    ("caption", "name"),
    [
        ("A frog.", "a frog"),
        ("An  Adelaide Rosella.", "an Adelaide Rosella"),
        ("grinning face", "a grinning face"),
        ("owl", "an owl"),
        ("A wizard's hat", "a wizard's hat"),
        ("The sun.", None),
        ("Two wild boars.", None),
        ("two hearts", None),
        ("glasses", None),
        ("Hair.", None),
        ("A lion!", None),
        ("A camera. Say cheese.", None),
        ("A box for trash that can be recycled.", None),
        ("flag: Norway", None),
        ("", None),
    ],
)
def test_names_have_an_article_and_no_other_punctuation(caption: str, name: str | None) -> None:
    assert format_name(caption) == name


def test_every_name_gives_a_chat_of_every_kind_with_whole_sentences() -> None:
    chats = list(generate_instructions(make_records()))
    counts = Counter(chat.metadata["instruction"] for chat in chats)
    assert counts == dict.fromkeys(QUESTION_RULES, 25)
    assert len({chat.id for chat in chats}) == len(chats)
    for chat in chats:
        assert [message.role for message in chat.messages] == ["user", "assistant"]
        assert all(sentence.endswith(".") for sentence in split_sentences(read_turns(chat)[1]))
        num_images = (
            2 if chat.metadata["instruction"] in ("exists_in_two", "which", "differ") else 1
        )
        assert len(chat.images()) == num_images


def test_the_right_name_is_one_of_four_options_at_every_place() -> None:
    places = Counter[int]()
    for (image,), question, answer in iterate_kind("choose"):
        listed = question.removeprefix("Which of these four is it: ").removesuffix("?")
        options = listed.replace(" or ", ", ").split(", ")
        assert len(set(options)) == NUM_OPTIONS
        right = [option for option in options if is_right(option, image)]
        assert right == [image] and answer == f"The picture shows {image}."
        assert all(not is_right(image, option) for option in options if option != image)
        places[options.index(image)] += 1
    assert set(places) == {0, 1, 2, 3}


@pytest.mark.parametrize("kind", ["exists", "exists_in_two"])
def test_half_of_the_answers_are_yes_and_all_are_true(kind: str) -> None:
    answers = Counter[str]()
    for images, question, answer in iterate_kind(kind):
        name = question.removeprefix("Is there ").partition(" in ")[0]
        is_shown = name in images
        assert any(is_right(name, image) for image in images) == is_shown
        verdict = answer.partition(",")[0]
        assert verdict == ("Yes" if is_shown else "No")
        answers[verdict] += 1
        if kind == "exists_in_two" and is_shown:
            ordinal = ("first", "second")[images.index(name)]
            assert answer == f"Yes, there is {name} in the {ordinal} picture."
    assert abs(answers["Yes"] - answers["No"]) <= 1


def test_questions_about_two_images_name_the_right_one() -> None:
    places = Counter[str]()
    for images, question, answer in iterate_kind("which"):
        name = question.removeprefix("Which picture shows ").removesuffix("?")
        assert [is_right(name, image) for image in images].count(True) == 1
        ordinal = ("first", "second")[images.index(name)]
        assert answer == f"The {ordinal} picture shows {name}."
        places[ordinal] += 1
    assert set(places) == {"first", "second"}
    for (first, second), _, answer in iterate_kind("differ"):
        assert answer == f"The first picture shows {first}. The second picture shows {second}."


def test_half_of_the_wrong_names_are_near_neighbours() -> None:
    counts = Counter[bool]()
    for (image,), question, answer in iterate_kind("exists", group_key="animal"):
        if answer.startswith("No") and image != "a frog":
            absent = question.removeprefix("Is there ").removesuffix(" in the picture?")
            counts[absent.split()[-1] == image.split()[-1]] += 1
    assert counts[True] >= 5 and counts[False] >= 3


def test_equal_arguments_give_equal_chats_and_another_seed_others() -> None:
    records = make_records()
    chats = list(generate_instructions(records, seed=3))
    assert chats == list(generate_instructions(records, seed=3))
    assert chats != list(generate_instructions(records, seed=4))
    alone = list(generate_instructions(records, seed=3, kinds=["which"]))
    assert alone == [chat for chat in chats if chat.metadata["instruction"] == "which"]


def test_a_single_name_is_described_only() -> None:
    chats = list(generate_instructions(make_records()[:1]))
    assert [read_turns(chat) for chat in chats] == [("What is shown?", "The picture shows a frog.")]


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown kind of question 'exist'.*'exists'"):
        list(generate_instructions([], kinds=["exist"]))


def test_the_command_writes_chats(tmp_path: Path) -> None:
    rows = [{"id": name, "image": f"{name}.png", "short": f"A {name}."} for name in ANIMALS]
    source = tmp_path / "pairs.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    target = tmp_path / "chats.jsonl"
    command = ["data", "instruct", str(source), "--to", str(target), "--json", "--kinds", "choose"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    summary = json.loads(result.output)
    assert summary["records"] == len(ANIMALS) and summary["questions"] == {"choose": len(ANIMALS)}
    images = [record.images()[0].path for record in read_records(target)]
    assert images == [tmp_path / f"{name}.png" for name in ANIMALS]
