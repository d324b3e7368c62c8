"""Small English word lists for `edits`: classes of words that exclude each other, so that one for another makes a lie.

A class is one string, its words apart by blanks. ``bicycle/bike`` are one thing by two names: both are found, the first
is written. ``man=men`` gives an irregular plural, ``sheep=sheep`` none. ``_`` joins the words of a phrase. Kept out on
purpose: words that are true together with another of their class ("child" beside "boy"), and words whose other meaning
is as frequent ("light", "orange" as a fruit).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_OBJECTS = (
    "man=men woman=women boy girl",
    "dog/puppy=puppies cat/kitten horse cow sheep=sheep pig goat elephant giraffe zebra bear lion tiger monkey rabbit"
    " fox wolf=wolves mouse=mice squirrel deer=deer kangaroo camel frog turtle snake",
    "duck chicken eagle owl parrot penguin swan pigeon peacock flamingo",
    "shark whale dolphin octopus crab jellyfish=jellyfish",
    "bee butterfly ant spider ladybug snail",
    "car/automobile bus truck/lorry bicycle/bike motorcycle/motorbike train airplane/plane/aeroplane boat/ship helicopter"
    " tractor tram rocket",
    "apple banana pear strawberry lemon cherry grape pineapple watermelon peach=peaches",
    "pizza sandwich cake hamburger/burger donut/doughnut salad soup cookie pancake",
    "carrot tomato=tomatoes potato=potatoes onion mushroom cucumber pumpkin cabbage",
    "chair table bed bench sofa/couch desk bookcase wardrobe",
    "cup/mug bowl plate bottle fork knife=knives spoon",
    "hat shirt dress jacket/coat scarf=scarves shoe sock tie glove",
    "guitar piano violin drum trumpet flute accordion",
    "hammer saw screwdriver wrench shovel",
    "laptop telephone/phone television/tv camera clock radio",
    "house church castle bridge lighthouse barn skyscraper windmill tent",
    "tree flower cactus=cacti bush",
    "mountain river lake beach desert waterfall volcano=volcanoes",
    "ball kite skateboard surfboard umbrella frisbee balloon",
    "moon star cloud rainbow",
)

_ATTRIBUTES = (
    "red orange yellow green blue purple/violet pink brown black white gray/grey",
    "big/large/huge small/tiny/little",
    "old young",
    "wooden metal/metallic plastic glass leather",
    "round square triangular oval",
    "striped dotted/spotted checkered/chequered",
    "two three four five six seven eight",
    "open closed/shut",
    "empty full",
    "wet dry",
    "clean dirty",
    "hot cold",
    "happy sad angry",
    "sunny rainy snowy",
)

_RELATIONS = (
    "on_top_of/on under/below/beneath/underneath above/over",
    "in_front_of behind",
    "to_the_left_of/left_of to_the_right_of/right_of",
    "on_the_left on_the_right",
    "inside outside",
    "into out_of",
    "next_to/beside/near/close_to far_from",
    "towards/toward away_from",
    "without with",
    "sitting standing lying sleeping",
    "walking running jumping flying swimming",
    "riding feeding washing chasing carrying",
    "eating cooking throwing",
    "pushing pulling",
    "sits stands lies sleeps",
    "rides feeds washes chases carries",
)

_VOWEL = re.compile(r"(?!uni|use|eu|one\b|ukulele)[aeiou]", re.IGNORECASE)


def choose_article(word: str) -> str:
    """a or an, by the first letter of what follows."""
    return "an" if _VOWEL.match(word) else "a"


@dataclass(frozen=True, slots=True)
class LexiconEntry:
    """A word as it was found."""

    group: int
    """Its class."""
    lemma: str
    """The first of its names, in the singular."""
    surface_form: str
    """As it was found, in lower case."""
    is_plural: bool


class Lexicon:
    """Classes of words.

    Args:
        groups: one string a class, as above.
        inflected: whether words have a plural.

    Attributes:
        groups: the first names of every class; pattern: finds any name, the longest first.
    """

    def __init__(self, groups: tuple[str, ...], *, inflected: bool = False):
        self.groups: list[list[str]] = []
        self._entries: dict[str, LexiconEntry] = {}
        self._plurals: dict[str, str] = {}
        for group, listed in enumerate(groups):
            self.groups.append([])
            for item in listed.split():
                names = [name.partition("=")[::2] for name in item.replace("_", " ").split("/")]
                word = names[0][0]
                self.groups[-1].append(word)
                for name, irregular in names:
                    if inflected:
                        plural = irregular or _plural(name)
                        self._plurals[name] = plural
                        self._entries[plural] = LexiconEntry(group, word, plural, True)
                    self._entries[name] = LexiconEntry(
                        group, word, name, False
                    )  # a sheep, unless it cannot be told
        longest = sorted(self._entries, key=lambda name: (-len(name), name))
        spelled = "|".join(re.escape(name).replace(r"\ ", r"\s+") for name in longest)
        self.pattern = re.compile(rf"(?<![\w'-])(?:{spelled})(?![\w'-])", re.IGNORECASE)

    def lookup(self, found: str) -> LexiconEntry:
        """What `pattern` found."""
        return self._entries[" ".join(found.lower().split())]

    def inflect(self, word: str, *, plural: bool) -> str:
        """A first name in the number wanted."""
        return self._plurals[word] if plural else word


def _plural(noun: str) -> str:
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


OBJECTS = Lexicon(_OBJECTS, inflected=True)
ATTRIBUTES = Lexicon(_ATTRIBUTES)
RELATIONS = Lexicon(_RELATIONS)
