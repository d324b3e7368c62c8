"""Rules make exactly the expected wrong captions, and never one that is known to be right."""

from __future__ import annotations

import json
import re
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from helpers import tiny
from vlduet.cli.data import app
from vlduet.data import images
from vlduet.data.content_keys import text_key
from vlduet.data.formats import read_records
from vlduet.data.records import Record
from vlduet.data.tools.caption_negatives import (
    EDIT_RULES,
    add_caption_negatives,
    generate_caption_negatives,
)
from vlduet.data.tools.lexicon import ATTRIBUTES, OBJECTS, RELATIONS, Lexicon, choose_article
from vlduet.errors import ConfigError

LEXICONS = (OBJECTS, ATTRIBUTES, RELATIONS)


def all_edits(kind: str, caption: str) -> set[str]:
    """Return every text that a rule makes of a caption, by trying many seeds."""
    texts = set()
    for seed in range(150):
        for negative in generate_caption_negatives(caption, seed=seed, kinds=[kind]):
            texts.add(negative.text)
    return texts


# --- rules

CLOTHES = ("shirt", "dress", "jacket", "scarf", "shoe", "sock", "tie", "glove")
OTHER_COLOURS = set(ATTRIBUTES.groups[0]) - {"black", "white"}
ADDED_COLOURS = ("green", "blue", "purple", "pink")
OTHER_PEOPLE = {"a woman and a boy", "a girl and a boy", "a man and a woman", "a man and a girl"}
COLOURED_OWLS = {f"two {c} owls, and green grass" for c in ADDED_COLOURS if c != "green"}


@pytest.mark.parametrize(
    ("kind", "caption", "expected"),
    [
        ("replace_obj", "a hat", {f"a {name}" for name in CLOTHES}),
        ("replace_obj", "Men at work", {"Women at work", "Boys at work", "Girls at work"}),
        ("replace_obj", "a man and a boy", OTHER_PEOPLE),
        ("replace_obj", "a steadfast thought", set()),
        ("replace_obj", "a dog-eared catalogue", set()),
        ("replace_att", "an old house", {"a young house"}),
        ("replace_att", "The cup is Empty.", {"The cup is Full."}),
        ("replace_att", "a spotted flag", {"a striped flag", "a checkered flag"}),
        ("replace_att", "a black and white cat", {f"a black and {c} cat" for c in OTHER_COLOURS}),
        ("replace_att", "a glass of milk", set()),
        ("replace_att", "an orange", set()),
        ("replace_att", "an orange on a plate", set()),
        ("replace_rel", "A dog on  top of a box", {"A dog under a box", "A dog above a box"}),
        ("replace_rel", "a dog behind a box", {"a dog in front of a box"}),
        ("replace_rel", "Outside, a boat", {"Inside, a boat"}),
        ("replace_rel", "a tree on the left", {"a tree on the right"}),
        ("replace_rel", "the onset", set()),
        ("swap_obj", "a dog on a chair", {"a chair on a dog"}),
        ("swap_obj", "A DOG ON A HAT", {"A HAT ON A DOG"}),
        ("swap_obj", "An owl above two cats", {"A cat above two owls"}),
        ("swap_obj", "Boats near a man riding a horse.", {"Boats near a horse riding a man."}),
        ("swap_obj", "Children see a man riding a horse.", {"Children see a horse riding a man."}),
        ("swap_obj", "a dog and a cat", set()),
        ("swap_obj", "a dog next to a cat", set()),
        ("swap_obj", "a puppy under a dog", set()),
        ("swap_obj", "a dog, under a roof, and a cat", set()),
        ("swap_att", "a red cup and a blue bowl", {"a blue cup and a red bowl"}),
        ("swap_att", "An orange hat on a small grey dog", {"A grey hat on a small orange dog"}),
        ("swap_att", "two dogs and three cats", {"three dogs and two cats"}),
        ("swap_att", "a black and white cat", set()),
        ("swap_att", "a red white flag", set()),
        ("swap_att", "a red car and a blue car", set()),
        ("swap_att", "a big dog and a red cat", set()),
        ("add_att", "A dog.", {f"A {c} dog." for c in ADDED_COLOURS}),
        ("add_att", "Dogs", {f"{c.capitalize()} dogs" for c in ADDED_COLOURS}),
        ("add_att", "a red dog", set()),
        ("add_att", "a bow tie", set()),
        ("add_att", "two owls, and green grass", COLOURED_OWLS),
        ("add_obj", "a dog park", set()),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_rule_makes_exactly_these_captions(kind: str, caption: str, expected: set[str]) -> None:
    assert all_edits(kind, caption) == expected


def test_an_added_thing_is_of_a_class_that_is_not_named() -> None:
    texts = all_edits("add_obj", "A dog on a chair.")
    patterns = {re.sub(r" and an? \w+", " AND", text) for text in texts}
    assert patterns == {"A dog AND on a chair.", "A dog on a chair AND."}
    words = set(" ".join(texts).replace(".", "").split())
    assert not {"horse", "table"} & words and "hat" in words


LEMMAS = [*chain.from_iterable(chain.from_iterable(lexicon.groups for lexicon in LEXICONS))]
FILLERS = ["a", "an", "A", "and", "is", "of", ",", ".", "é", "x\ny"]
captions = st.lists(st.sampled_from(LEMMAS + FILLERS), max_size=9).map(" ".join)


@given(captions, st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_negatives_are_reproducible_distinct_and_in_order(caption: str, seed: int) -> None:
    negatives = generate_caption_negatives(caption, seed=seed)
    assert negatives == generate_caption_negatives(caption, seed=seed)
    keys = [text_key(negative.text) for negative in negatives]
    assert len({text_key(caption), *keys}) == len(keys) + 1
    kinds = [negative.kind for negative in negatives]
    assert kinds == [kind for kind in EDIT_RULES if kind in kinds]


def test_a_correct_caption_is_never_a_negative() -> None:
    caption, kinds = "a dog on a hat", ["swap_obj"]
    (negative,) = generate_caption_negatives(caption, kinds=kinds)
    assert negative.text == "a hat on a dog"
    correct_captions = ["A hat  on a dog"]
    negatives = generate_caption_negatives(caption, kinds=kinds, correct_captions=correct_captions)
    assert negatives == []


def test_an_unknown_kind_suggests_a_known_one() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'swap_obj'"):
        generate_caption_negatives("x", kinds=["swap_object"])


# --- word lists


@pytest.mark.parametrize("lexicon", LEXICONS)
def test_every_word_is_in_one_class_with_others(lexicon: Lexicon) -> None:
    lemmas = [*chain.from_iterable(lexicon.groups)]
    assert len(lemmas) == len(set(lemmas))
    assert all(len(group) > 1 for group in lexicon.groups)
    assert all(lexicon.lookup(lemma).lemma == lemma for lemma in lemmas)


def test_the_lexicon_knows_singular_and_plural() -> None:
    assert OBJECTS.inflect("wolf", plural=True) == "wolves"
    assert OBJECTS.inflect("cherry", plural=True) == "cherries"
    assert OBJECTS.lookup("Bikes").lemma == "bicycle" and OBJECTS.lookup("bikes").is_plural
    assert not OBJECTS.lookup("sheep").is_plural
    articles = [choose_article(word) for word in ("apple", "umbrella", "unicorn", "dog")]
    assert articles == ["an", "an", "a", "a"]


# --- records


def test_a_record_gets_one_negative_per_kind() -> None:
    captions = ("Something.", "a red cup on a blue chair near a dog")
    record = Record("1", image=tiny.random_image(), short=captions)
    edited = add_caption_negatives(record, seed=1)
    assert edited.metadata["edits"] == list(EDIT_RULES)
    assert len(edited.negative) == len(EDIT_RULES)
    swapped = edited.negative[list(EDIT_RULES).index("swap_att")]
    assert swapped == ("a blue cup on a red chair near a dog",)
    assert edited == add_caption_negatives(record, seed=1)
    assert edited != add_caption_negatives(record, seed=2)


def test_an_existing_negative_is_not_added_again() -> None:
    record = Record("1", image=tiny.random_image(), short=("a red cup on a blue chair",))
    once = add_caption_negatives(record, seed=1)
    twice = add_caption_negatives(once, seed=1)
    assert len(set(twice.negative)) == len(twice.negative) >= len(once.negative)


def test_texts_of_retrieval_answers_are_edited_in_their_place() -> None:
    image = tiny.random_image()
    record = Record("2", query=("q",), positive=((image, "a hat on a dog"),))
    assert add_caption_negatives(record, kinds=["swap_obj"]).negative == (
        (image, "a dog on a hat"),
    )
    without_words = Record("3", query=("q",), positive=(("nothing",),))
    assert add_caption_negatives(without_words) == without_words


# --- the command


def test_the_command_writes_negatives_and_counts_them_by_kind(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(images.read_bytes(tiny.random_image()))
    rows = [
        {"id": "1", "image": "a.png", "short": "a dog on a chair"},
        {"id": "2", "image": "a.png", "short": "etwas anderes"},
        {"id": "3", "image": "a.png", "long": "Long."},
        {"id": "4"},
    ]
    source, first, second = (tmp_path / name for name in ("x.jsonl", "y.jsonl", "z.jsonl"))
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["edit", str(source), "--to", str(first)]
    result = CliRunner().invoke(app, [*arguments, "--kinds", "swap_obj, replace_rel", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["records"] == 2 and report["without"] == 1 and report["dropped"] == 2
    assert report["negatives"] == {"replace_rel": 1, "swap_obj": 1}
    edited, unchanged = read_records(first)
    assert edited.kind == "pair" and edited.short == ("a dog on a chair",)
    assert edited.negative[0] == ("a chair on a dog",) and unchanged.negative == ()
    arguments = ["edit", str(first), "--to", str(second), "--kinds", "swap_obj", "--json"]
    report = json.loads(CliRunner().invoke(app, arguments).stdout)
    assert report["negatives"] == {} and report["without"] == 2, "only new negatives are counted"


def test_the_command_refuses_an_unknown_kind(tmp_path: Path) -> None:
    arguments = ["edit", str(tmp_path / "x.jsonl"), "--to", str(tmp_path / "y.jsonl")]
    result = CliRunner().invoke(app, [*arguments, "--kinds", "swap"])
    assert isinstance(result.exception, ConfigError)
