"""What a recipe says about a record by its fields agrees with what its layout gives."""

from __future__ import annotations

import pytest

from helpers import tiny
from vlduet.config import parse_options
from vlduet.data.records import Message, Record
from vlduet.data.stream import Sample
from vlduet.errors import DataError
from vlduet.model.prompts import Renderer
from vlduet.recipes.duet import PREFIX_ROLE
from vlduet.recipes.registry import RECIPES

IMAGE = tiny.random_image(0)
QUESTION = Message("user", ("what is it?",))
RECORDS = {
    "no caption": Record("1", image=IMAGE),
    "a short caption": Record("2", image=IMAGE, short=("a cat",)),
    "a long caption": Record("3", image=IMAGE, long="a cat sleeps. it is grey."),
    "captions of both lengths": Record("4", image=IMAGE, short=("a cat",), long="it sleeps."),
    "a chat": Record("5", messages=(QUESTION, Message("assistant", ("a cat",)))),
    "a chat without an answer to learn": Record(
        "6", messages=(QUESTION, Message("assistant", ("a cat",), supervised=False))
    ),
    "a document": Record("7", parts=(IMAGE, "a cat sleeps.")),
    "a document of images": Record("8", parts=(IMAGE, IMAGE)),
    "a document of texts": Record("9", parts=("a cat.", "a dog.")),
    "a retrieval record": Record("10", query=("a cat",), positive=((IMAGE,),)),
}
OPTIONS = {
    "vladva": [
        {},
        {"language_on": "any"},
        {"language_on": "short"},
        {"contrastive_on": "long"},
        {"contrastive_on": "long", "language_on": "short"},
    ],
    "sugar": [{}],
    "duet": [{}, {"structure_on": "documents"}, {"structure_on": "chats"}],
    "fromage": [{}],
    "clip": [{}],
}


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    return tiny.build_duet_model(tmp_path_factory.mktemp("model") / "base").renderer


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
@pytest.mark.parametrize("name", RECIPES)
def test_losses_by_fields_are_those_with_labels_or_anchors(
    renderer: Renderer, name: str, record: Record
) -> None:
    recipe = RECIPES[name]
    for values in OPTIONS[name]:
        bound = recipe.bind(parse_options(recipe.options, values, place="recipe"), {})
        try:
            sequences = bound.layout(Sample(record, 0, 0), renderer)
        except DataError:
            sequences = []
        roles = {anchor.role for sequence in sequences for anchor in sequence.anchors}
        losses = set()
        if any(sequence.num_labels for sequence in sequences):
            losses.add("language")
        if name == "sugar" and roles:
            losses.add("structure")
        elif roles:
            losses.add("structure" if roles == {PREFIX_ROLE} else "contrastive")
        assert set(bound.find_losses(record)) == losses


@pytest.mark.parametrize("name", RECIPES)
def test_every_loss_says_what_it_needs(name: str) -> None:
    assert RECIPES[name].requirements.keys() == set(RECIPES[name].objectives)


def test_a_split_by_length_leaves_the_choice_to_the_tokens() -> None:
    recipe = RECIPES["vladva"]
    bound = recipe.bind(parse_options(recipe.options, {"split": "length"}, place="recipe"), {})
    assert set(bound.find_losses(RECORDS["a long caption"])) == {"contrastive", "language"}
    assert bound.find_losses(RECORDS["no caption"]) == ()
