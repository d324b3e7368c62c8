"""Mini versions of knowledge benchmarks in their official formats, and of our own corpora."""

from __future__ import annotations

import base64
from typing import Any

from helpers.official_writer import OfficialWriter, random_png


def write_knowledge(writer: OfficialWriter) -> None:
    """Write WebQA and FVQA."""
    write_webqa(writer)
    write_fvqa(writer)


def write_webqa(writer: OfficialWriter) -> None:
    """Write a question about a color, a yes-or-no question, and a training question."""
    offsets, table = [], b""
    for i in range(12):
        offsets.append(len(table))
        table += f"{30000000 + i}\t".encode() + base64.b64encode(random_png(50 + i)) + b"\n"
    writer.write_file("webqa/imgs.tsv", table)
    writer.write_file("webqa/imgs.lineidx", "".join(f"{offset}\n" for offset in offsets))
    facts = []
    for n in range(7):
        fact = {"image_id": 30000000 + n, "title": f"Title {n}", "caption": f'"Caption {n}"'}
        facts.append({**fact, "imgUrl": "", "url": ""})
    snippet = {"snippet_id": "s1", "fact": "Frogs jump.", "title": "Frog", "url": ""}
    color: dict[str, Any] = {
        "Q": '"What color is the belly of a Green Tree Frog?"',
        "A": ['"The belly of a Green Tree Frog is white."'],
        "Keywords_A": '"white"',
        "Qcate": "color",
        "split": "val",
        "Guid": "d5c5",
        "img_posFacts": facts[:1],
        "img_negFacts": facts[1:6],
        "txt_posFacts": [],
        "txt_negFacts": [snippet],
    }
    yes_no = {
        **color,
        "Q": '"Is the frog green?"',
        "A": ['"Yes, it is green."'],
        "Keywords_A": '"yes"',
        "Qcate": "YesNo",
        "img_posFacts": facts[6:],
    }
    rows = {"a": color, "b": yes_no, "c": {**color, "split": "train"}}
    writer.write_json("webqa/WebQA_train_val.json", rows)


def write_fvqa(writer: OfficialWriter) -> None:
    """Write two questions for the knowledge base, in both spellings of their keys, and another."""
    root = "fvqa/new_dataset_release"
    facts = {}
    for n, (subject, verb) in enumerate(
        (("Cats", "climb trees"), ("Dogs", "bark"), ("Cars", "drive"))
    ):
        fact = {"KB": "conceptnet", "e1": "", "e1_label": subject, "e2": "", "e2_label": verb}
        facts[f"f/{n}"] = {**fact, "r": "can", "surface": f"[[{subject}]] can [[{verb}]]"}
    writer.write_json(f"{root}/all_fact_triples_release.json", facts)
    question: dict[str, Any] = {"question": "Which animal can climb trees", "answer": "cat"}
    question |= {"fact": ["f/0"], "question_id": "1"}
    image = "ILSVRC2012_test_00050748.JPEG"
    questions = {
        "1": {**question, "ans_source": "KB", "img_file": image},
        "2": {**question, "ans source": "KB", "img file": image},
        "3": {**question, "ans_source": "Image", "img_file": image},
    }
    writer.write_json(f"{root}/all_qs_dict_release.json", questions)
    writer.write_image(f"{root}/images/{image}")


# ------------------------------------------------------------------ our own corpora


def write_corpus(
    writer: OfficialWriter, name: str, rows: list[dict[str, Any]], *, split: str = "test"
) -> None:
    """Write the records of a corpus, with an image for every name under ``image``."""
    for n, row in enumerate(rows):
        row.setdefault("id", str(n))
        for part in [row, *row.get("parts", [])]:
            if part.get("image") is not None:
                part["image"] = f"images/{part['image']}.png"
                if not (writer.root / f"corpora/{name}/{part['image']}").exists():
                    writer.write_image(f"corpora/{name}/{part['image']}")
    writer.write_json_lines(f"corpora/{name}/{split}.jsonl", rows)


def write_builtin(writer: OfficialWriter) -> None:
    """Write all corpora of the built-in suite."""
    write_stamps(writer)
    write_emoji(writer)
    titles = ("Bee.", "Dog on leash.", "Eiffel tower.", "Red kettle.", "Bee.")
    write_corpus(writer, "clipart", [{"image": n, "short": t} for n, t in enumerate(titles)])
    for name in ("wesnoth", "endless-sky"):
        units = (("elf", "lawful"), ("orc", "chaotic"), ("elf", "neutral"))
        rows = []
        for n, (race, alignment) in enumerate(units):
            metadata = {"race": race, "alignment": alignment}
            row = {"image": n, "short": f"Unit {n}", "long": f"Lore of {n}.", "metadata": metadata}
            rows.append(row)
        write_corpus(writer, name, rows)
    write_maps(writer)
    for name in ("campaigns", "gimp-help"):
        first = [{"text": "First."}, {"image": "a"}, {"text": "Second."}, {"image": "b"}]
        second = [{"text": "Third."}, {"image": "c"}, {"image": "c"}]
        write_corpus(writer, name, [{"parts": first}, {"parts": second}])


def write_stamps(writer: OfficialWriter) -> None:
    """Write eight test stamps of two kinds, one caption twice, and two training stamps."""
    captions = "A red apple.|A green apple.|A boat.|A cat.|A dog.|A tree.|A house.|A boat."
    rows: list[dict[str, Any]] = []
    for n, caption in enumerate(captions.split("|")):
        metadata = {"category": f"{'ab'[n % 2]}/x"}
        rows.append({"image": n, "short": caption, "metadata": metadata})
    write_corpus(writer, "stamps", rows)
    training_rows: list[dict[str, Any]] = []
    for n in range(2):
        metadata = {"category": f"{'ab'[n]}/x"}
        training_rows.append({"image": f"t{n}", "short": f"Thing {n}.", "metadata": metadata})
    write_corpus(writer, "stamps", training_rows, split="train")


def write_emoji(writer: OfficialWriter) -> None:
    """Write five emoji of two vendors."""
    names = {
        "red heart": "heart",
        "blue heart": "heart",
        "grinning face": "face",
        "flag: Norway": "country-flag",
        "flag: Peru": "country-flag",
    }
    rows: list[dict[str, Any]] = []
    for vendor in ("openmoji", "twemoji"):
        for n, (name, group) in enumerate(names.items()):
            metadata = {"vendor": vendor, "group": group, "subgroup": group}
            rows.append({"image": f"{vendor}{n}", "short": name, "metadata": metadata})
    write_corpus(writer, "emoji", rows)


def write_maps(writer: OfficialWriter) -> None:
    """Write two countries with maps, regions, national flags and the flag of a region."""
    rows: list[dict[str, Any]] = []

    def add_record(key: str, metadata: dict[str, Any]) -> None:
        rows.append({"id": key, "metadata": metadata, "image": key, "short": f"Caption of {key}"})

    for country, regions in (("Ruritania", ("Ain", "Oise", "Var")), ("Syldavia", ("Klow", "Niz"))):
        country_facts = {"territory": country, "divisions": "departments"}
        add_record(f"map/{country}", country_facts | {"kind": "map", "regions": regions})
        for region, place in zip(regions, ("top", "left", "middle"), strict=False):
            facts = {"kind": "region", "name": region, "map": country, "place": place}
            facts["capital"] = f"{region} City"
            add_record(f"region/{country}/{region}", country_facts | facts)
        flag = {"kind": "flag", "name": country, "capital": f"{country} City"}
        add_record(f"flag/{country}", flag)
        add_record(f"flag/{country}/Ain", flag | {"name": "Ain", "territory": country})
    write_corpus(writer, "maps", rows)
