"""Word lists for `caption_negatives`: classes of English words that exclude each other.

A class is one string of words separated by blanks; replacing a word by another one of its class
makes a true caption false. Notation:

    bicycle/bike   two names of one thing: both are recognised, the first is written
    man=men        irregular plural; ``sheep=sheep`` has none
    next_to        a phrase

Two sorts of words are left out on purpose: words that are true together with another one of their
class ("child" with "boy"), and words whose other meaning is as frequent ("light").
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_OBJECTS = (
    "man=men woman=women boy girl",
    "dog/puppy=puppies cat/kitten horse cow sheep=sheep pig goat elephant giraffe zebra bear lion"
    " tiger monkey rabbit fox wolf=wolves mouse=mice squirrel deer=deer kangaroo camel frog turtle"
    " snake",
    "duck chicken eagle owl parrot penguin swan pigeon peacock flamingo",
    "shark whale dolphin octopus crab jellyfish=jellyfish",
    "bee butterfly ant spider ladybug snail",
    "car/automobile bus truck/lorry bicycle/bike motorcycle/motorbike train"
    " airplane/plane/aeroplane boat/ship helicopter tractor tram rocket",
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
    """Return ``an`` before a word with a spoken vowel, else ``a``; guessed from its letters."""
    return "an" if _VOWEL.match(word) else "a"


@dataclass(frozen=True, slots=True)
class LexiconEntry:
    """One form of a word that a lexicon recognises."""

    group: int
    """Number of its class, an index into `Lexicon.groups`."""
    lemma: str
    """First name of the word, in the singular."""
    surface_form: str
    """Recognised form in lower case: any of the names, singular or plural."""
    is_plural: bool


class Lexicon:
    """Classes of words, and a pattern that finds their forms in a text.

    Attributes:
        groups: lemmas of every class.
        pattern: matches any form as a whole word in any case, the longest first.
    """

    def __init__(self, groups: tuple[str, ...], *, has_plurals: bool = False):
        """Parse the classes and compile `pattern`.

        Args:
            groups: one string per class, in the notation of this module; it is not validated.
            has_plurals: recognise the plurals of all words too.
        """
        self.groups: list[list[str]] = []
        self._entries: dict[str, LexiconEntry] = {}
        self._plurals: dict[str, str] = {}
        for group, words in enumerate(groups):
            self.groups.append([])
            for word in words.split():
                names = [name.partition("=")[::2] for name in word.replace("_", " ").split("/")]
                lemma = names[0][0]
                self.groups[-1].append(lemma)
                for name, irregular_plural in names:
                    if has_plurals:
                        plural = irregular_plural or _pluralize(name)
                        self._plurals[name] = plural
                        self._entries[plural] = LexiconEntry(group, lemma, plural, True)
                    # Overwrites an equal plural: "sheep" counts as singular.
                    self._entries[name] = LexiconEntry(group, lemma, name, False)
        longest_first = sorted(self._entries, key=lambda form: (-len(form), form))
        forms = "|".join(re.escape(form).replace(r"\ ", r"\s+") for form in longest_first)
        self.pattern = re.compile(rf"(?<![\w'-])(?:{forms})(?![\w'-])", re.IGNORECASE)

    def lookup(self, text: str) -> LexiconEntry:
        """Return the entry of a match of `pattern`; KeyError for any other text."""
        return self._entries[" ".join(text.lower().split())]

    def inflect(self, lemma: str, *, plural: bool) -> str:
        """Return a lemma, or its plural; KeyError if the lexicon has no plurals."""
        return self._plurals[lemma] if plural else lemma


def _pluralize(noun: str) -> str:
    """Return a lower-case noun in the regular English plural.

    It ends in -es after s, x, ch and sh, in -ies for -y after a consonant, and else in -s.
    """
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


OBJECTS = Lexicon(_OBJECTS, has_plurals=True)
ATTRIBUTES = Lexicon(_ATTRIBUTES)
RELATIONS = Lexicon(_RELATIONS)
