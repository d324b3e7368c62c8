"""Caption edits, rule by rule: what may come out, what must not be touched, and that the original never comes back."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from helpers import tiny
from vlduet.cli.data import app
from vlduet.data.formats import read_records
from vlduet.data.records import Record
from vlduet.data.tools.caption_negatives import (
    EDIT_RULES,
    add_caption_negatives,
    generate_caption_negatives,
)
from vlduet.data.tools.lexicon import ATTRIBUTES, OBJECTS, RELATIONS, choose_article
from vlduet.data.tools.queries import split_into_queries
from vlduet.errors import ConfigError


def every(kind: str, caption: str) -> set[str]:
    """All that a rule makes of a caption."""
    return {
        edit.text
        for seed in range(150)
        for edit in generate_caption_negatives(caption, seed=seed, kinds=[kind])
    }


COLOURS = set(ATTRIBUTES.groups[0])
ADDED = {"green", "blue", "purple", "pink"}

EXACTLY = [
    ("replace_obj", "a hat", {f"a {w}" for w in ("shirt", "dress", "jacket", "scarf", "shoe", "sock", "tie", "glove")}),
    ("replace_obj", "Men at work", {"Women at work", "Boys at work", "Girls at work"}),
    ("replace_obj", "a man and a boy", {"a woman and a boy", "a girl and a boy", "a man and a woman", "a man and a girl"}),
    ("replace_obj", "a steadfast thought", set()),
    ("replace_obj", "a dog-eared catalogue", set()),
    ("replace_att", "an old house", {"a young house"}),
    ("replace_att", "The cup is Empty.", {"The cup is Full."}),
    ("replace_att", "a spotted flag", {"a striped flag", "a checkered flag"}),
    ("replace_att", "a black and white cat", {f"a black and {c} cat" for c in COLOURS - {"black", "white"}}),
    ("replace_att", "a glass of milk", set()),
    ("replace_att", "an orange", set()),
    ("replace_att", "an orange on a plate", set()),
    ("replace_rel", "A dog on  top of a box", {"A dog under a box", "A dog above a box"}),
    ("replace_rel", "a dog behind a box", {"a dog in front of a box"}),
    ("replace_rel", "Outside, a boat", {"Inside, a boat"}),
    ("replace_rel", "a tree on the left", {"a tree on the right"}),
    ("replace_rel", "the onset", set()),
    ("swap_obj", "a dog on a chair", {"a chair on a dog"}),
    ("swap_obj", "An owl above two cats", {"A cat above two owls"}),
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
    ("add_att", "A dog.", {f"A {c} dog." for c in ADDED}),
    ("add_att", "Dogs", {f"{c.capitalize()} dogs" for c in ADDED}),
    ("add_att", "a red dog", set()),
    ("add_att", "a bow tie", set()),
    ("add_att", "two owls, and green grass", {f"two {c} owls, and green grass" for c in ADDED - {"green"}}),
    ("add_obj", "a dog park", set()),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "caption", "wanted"), EXACTLY, ids=lambda x: x if isinstance(x, str) else ""
)
def test_what_a_rule_makes(kind: str, caption: str, wanted: set[str]) -> None:
    assert every(kind, caption) == wanted


def test_an_added_thing_is_of_no_class_that_is_named() -> None:
    found = every("add_obj", "A dog on a chair.")
    forms = {re.sub(r" and an? \w+", " AND", text) for text in found}
    assert forms == {"A dog AND on a chair.", "A dog on a chair AND."}
    for text in found:
        assert not {"horse", "table"} & set(text.replace(".", "").split())


def test_capitals_stay() -> None:
    assert every("swap_obj", "A DOG ON A HAT") == {"A HAT ON A DOG"}


WORDS = [
    word
    for vocabulary in (OBJECTS, ATTRIBUTES, RELATIONS)
    for group in vocabulary.groups
    for word in group
]
CAPTIONS = st.lists(
    st.sampled_from([*WORDS, "a", "an", "A", "and", "is", "of", ",", ".", "é", "x\ny"]), max_size=9
).map(" ".join)


@given(CAPTIONS, st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_properties(caption: str, seed: int) -> None:
    found = generate_caption_negatives(caption, seed=seed)
    assert found == generate_caption_negatives(caption, seed=seed), "a pure function"
    keys = [" ".join(edit.text.casefold().split()) for edit in found]
    assert len(set(keys)) == len(keys) and " ".join(caption.casefold().split()) not in keys
    kinds = [edit.kind for edit in found]
    assert kinds == [kind for kind in EDIT_RULES if kind in kinds]


def test_what_is_known_to_be_right_is_not_made() -> None:
    assert every("swap_obj", "a dog on a hat") == {"a hat on a dog"}
    assert (
        generate_caption_negatives(
            "a dog on a hat", kinds=["swap_obj"], correct_captions=["A hat  on a dog"]
        )
        == []
    )


def test_the_lists_are_what_they_claim() -> None:
    for vocabulary in (OBJECTS, ATTRIBUTES, RELATIONS):
        words = [word for group in vocabulary.groups for word in group]
        assert len(words) == len(set(words)) and all(len(group) > 1 for group in vocabulary.groups)
        assert all(vocabulary.lookup(word).lemma == word for word in words)
    assert (
        OBJECTS.inflect("wolf", plural=True) == "wolves"
        and OBJECTS.inflect("cherry", plural=True) == "cherries"
    )
    assert OBJECTS.lookup("Bikes").lemma == "bicycle" and OBJECTS.lookup("bikes").is_plural
    assert [choose_article(word) for word in ("apple", "umbrella", "unicorn", "dog")] == [
        "an",
        "an",
        "a",
        "a",
    ]


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'swap_obj'"):
        generate_caption_negatives("x", kinds=["swap_object"])


# ------------------------------------------------------------------ records


def test_records_get_one_negative_a_kind() -> None:
    (record,) = split_into_queries(
        Record(
            "1",
            image=tiny.random_image(),
            short=("Something.", "a red cup on a blue chair near a dog"),
        )
    )
    made = add_caption_negatives(record, seed=1)
    assert made.metadata["edits"] == list(EDIT_RULES) and len(made.negative) == len(EDIT_RULES)
    assert made.negative[list(EDIT_RULES).index("swap_att")] == (
        "a blue cup on a red chair near a dog",
    )
    assert made == add_caption_negatives(record, seed=1) and made != add_caption_negatives(
        record, seed=2
    )
    again = add_caption_negatives(made, seed=1)
    assert len({str(parts) for parts in again.negative}) == len(again.negative), (
        "never the same negative twice"
    )
    mixed = Record("2", query=("q",), positive=((tiny.random_image(), "a hat on a dog"),))
    (found,) = add_caption_negatives(mixed, kinds=["swap_obj"]).negative
    assert found == (mixed.positive[0][0], "a dog on a hat")
    assert add_caption_negatives(Record("3", query=("q",), positive=(("nothing",),))).negative == ()


def test_the_verb(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(tiny.random_image().data or b"")
    rows = [
        {"id": "1", "image": "a.png", "short": "a dog on a chair"},
        {"id": "2", "image": "a.png", "short": "etwas anderes"},
        {"id": "3", "image": "a.png", "long": "Long."},
        {"id": "4"},
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["edit", str(tmp_path / "x.jsonl"), "--to", str(tmp_path / "y.jsonl")]
    done = CliRunner().invoke(app, [*arguments, "--kinds", "swap_obj, replace_rel", "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["records"] == 2 and told["without"] == 1 and told["dropped"] == 2
    assert told["negatives"] == {"replace_rel": 1, "swap_obj": 1}
    one, two = read_records(tmp_path / "y.jsonl")
    assert one.kind == "pair" and one.short == ("a dog on a chair",)
    assert one.negative[0] == ("a chair on a dog",) and two.negative == ()
    again = [
        "edit",
        str(tmp_path / "y.jsonl"),
        "--to",
        str(tmp_path / "z.jsonl"),
        "--kinds",
        "swap_obj",
        "--json",
    ]
    told = json.loads(CliRunner().invoke(app, again).stdout)
    assert told["negatives"] == {} and told["without"] == 2, (
        "what an earlier run made is not counted again"
    )
    wrong = CliRunner().invoke(app, [*arguments, "--kinds", "swap"])
    assert isinstance(wrong.exception, ConfigError)
