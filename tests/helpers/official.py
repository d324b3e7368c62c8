"""Mini folders in the exact formats of the official files, with images of 8 x 8 pixels: a few items of every benchmark."""

from __future__ import annotations

import base64
import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from vlduet.data import images
from vlduet.eval.benchmarks.demon import TASKS
from vlduet.eval.benchmarks.yes_no import COGNITION, PERCEPTION


def png(seed: int) -> bytes:
    """A random image; equal seeds give equal bytes."""
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return images.encode_png(images.from_pixels(pixels))


class Writer:
    """Writes below a root; every image is another one."""

    def __init__(self, root: Path):
        self.root, self.count = root, 0

    def put(self, name: str, data: bytes | str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())

    def json(self, name: str, value: Any) -> None:
        self.put(name, json.dumps(value))

    def lines(self, name: str, rows: list[Any]) -> None:
        self.put(name, "".join(json.dumps(row) + "\n" for row in rows))

    def image(self, name: str) -> None:
        self.count += 1
        self.put(name, png(self.count))


def write(root: Path) -> Path:
    """All of them. Returns the root."""
    w = Writer(root)
    for part in (retrieval, compositional, vqa, yes_no, choice, judged, demon, knowledge, builtin):
        part(w)
    return root


# ------------------------------------------------------------------ discriminative


def retrieval(w: Writer) -> None:
    rows = []
    for i in range(4):
        name = f"COCO_val2014_{i:012d}.jpg"
        w.image(f"coco/val2014/{name}")
        captions = [f"caption {j} of image {i}" for j in range(6)]
        captions[0] = "A flower. " if i < 2 else captions[0]
        rows.append(
            {
                "filepath": "val2014",
                "filename": name,
                "imgid": i,
                "cocoid": i,
                "split": "test",
                "sentids": list(range(6)),
                "sentences": [
                    {"tokens": c.split(), "raw": c, "imgid": i, "sentid": j}
                    for j, c in enumerate(captions)
                ],
            }
        )
    trained = {**rows[0], "split": "train", "filename": "absent.jpg"}
    w.json("coco/dataset_coco.json", {"images": [trained, *rows], "dataset": "coco"})
    flickr = []
    for i in range(3):
        w.image(f"flickr30k/flickr30k-images/{i}.jpg")
        sentences = [{"raw": f"Person {i} does {j}."} for j in range(5)]
        flickr.append({"filename": f"{i}.jpg", "split": "test", "sentences": sentences})
    w.json("flickr30k/dataset_flickr30k.json", {"images": flickr, "dataset": "flickr30k"})
    for i in range(3):
        w.image(f"nocaps/images/{i:016x}.jpg")
    w.json(
        "nocaps/nocaps_val_4500_captions.json",
        {
            "images": [
                {"id": i, "file_name": f"{i:016x}.jpg", "domain": "near-domain"} for i in range(3)
            ],
            "annotations": [
                {"id": 10 * i + j, "image_id": i, "caption": f"No {i} {j}"}
                for i in range(3)
                for j in range(10)
            ],
        },
    )
    vist(w)
    for wnid, name in (
        ("n01440764", "tench"),
        ("n01443537", "goldfish"),
        ("n01484850", "great white shark"),
    ):
        for i in range(2):
            w.image(f"imagenet/val/{wnid}/ILSVRC2012_val_{wnid}_{i}.JPEG")
        del name
    index = {
        "0": ["n01440764", "tench"],
        "1": ["n01443537", "goldfish"],
        "2": ["n01484850", "great_white_shark"],
    }
    w.json("imagenet/imagenet_class_index.json", index)


def vist(w: Writer) -> None:
    """Three stories; the last image of the second one is not there, and the first image is in two stories."""
    stories = [
        ["1", "2", "3", "4", "5"],
        ["6", "7", "8", "9", "gone"],
        ["1", "10", "11", "12", "13"],
    ]
    known = list(dict.fromkeys(image for story in stories for image in story))
    for image in known:
        if image != "gone":
            w.image(f"vist/images/val/{image}.jpg")
    annotations = [
        [
            {
                "story_id": str(100 + s),
                "storylet_id": f"{s}{i}",
                "photo_flickr_id": image,
                "worker_arranged_photo_order": i,
                "text": f"story {s} sentence {i} .",
                "original_text": "",
                "album_id": "1",
            }
        ]
        for s, story in enumerate(stories)
        for i, image in enumerate(story)
    ]
    w.json(
        "vist/sis/val.story-in-sequence.json",
        {
            "images": [
                {"id": image, "url_o": f"https://example.org/{image}.jpg"} for image in known
            ]
            + [{"id": "no-url"}],
            "annotations": annotations,
        },
    )


def compositional(w: Writer) -> None:
    rows = []
    for i in range(3):
        for side in (0, 1):
            w.image(f"winoground/images/ex_{i}_img_{side}.png")
        rows.append(
            {
                "id": i,
                "image_0": f"ex_{i}_img_0",
                "image_1": f"ex_{i}_img_1",
                "caption_0": "some plants surrounding a lightbulb",
                "caption_1": "a lightbulb surrounding some plants",
                "tag": "Noun",
                "secondary_tag": "",
                "num_main_preds": 1,
                "collapsed_tag": "Object" if i else "Relation",
            }
        )
    w.lines("winoground/examples.jsonl", rows)
    for i in range(2):
        w.image(f"coco/val2017/{i:012d}.jpg")
    item = {
        "filename": "000000000000.jpg",
        "caption": "A cat sits on its hind legs, and swats at the plant.",
        "negative_caption": "A cat sits on the plant, and swats at its hind legs.",
    }
    subsets = (
        "add_att",
        "add_obj",
        "replace_att",
        "replace_obj",
        "replace_rel",
        "swap_att",
        "swap_obj",
    )
    for subset in subsets:
        w.json(
            f"sugarcrepe/{subset}.json", {"0": item, "1": {**item, "filename": "000000000001.jpg"}}
        )
    for subset in subsets[2:]:
        row = {"id": 0, **item, "caption2": "On its hind legs a cat swats at the plant."}
        w.json(f"sugarcrepe_pp/{subset}.json", [row])
    out = io.StringIO()
    table = csv.writer(out)
    table.writerow(["Question ID", "Type", "Statement"])
    for n in range(1, 5):
        pattern = "Orientation and Direction" if n < 3 else "State and Condition"
        table.writerow([n, pattern, f"statement {n}"])
        w.image(f"mmvp_vlm/MMVP_VLM_Images/{pattern}/{n}.jpg")
    w.put("mmvp_vlm/Questions.csv", out.getvalue())


# ------------------------------------------------------------------ generative


def ten(*answers: str) -> list[dict[str, Any]]:
    """Ten annotators' answers; the last one fills up."""
    told = [*answers, *[answers[-1]] * (10 - len(answers))]
    return [
        {"answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in enumerate(told, 1)
    ]


def vqa(w: Writer) -> None:
    questions = [
        {"image_id": 0, "question": "Where is he looking?", "question_id": 0},
        {"image_id": 1, "question": "Is it red?", "question_id": 1000},
    ]
    answers = [
        {"question_type": "none of the above", "answer_type": "other", "question_id": 0, "image_id": 0,
         "multiple_choice_answer": "down", "answers": ten("down", "down", "down", "up")},
        {"question_type": "is it", "answer_type": "yes/no", "question_id": 1000, "image_id": 1,
         "multiple_choice_answer": "yes", "answers": ten("yes")},
    ]  # fmt: skip
    w.json("vqav2/v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
    w.json("vqav2/v2_mscoco_val2014_annotations.json", {"annotations": answers})
    for name in ("test-dev2015", "test2015"):
        w.json(f"vqav2/v2_OpenEnded_mscoco_{name}_questions.json", {"questions": questions})
    for i in range(2):
        w.image(f"coco/test2015/COCO_test2015_{i:012d}.jpg")
    w.image("gqa/images/n161313.jpg")
    kinds = {"detailed": "weatherVerify", "semantic": "global", "structural": "verify"}
    record = {
        "question": "Is it overcast?",
        "imageId": "n161313",
        "isBalanced": True,
        "answer": "no",
        "types": kinds,
    }
    open_one = {
        **record,
        "question": "Who is there?",
        "answer": "man",
        "types": {**kinds, "structural": "query"},
    }
    left_out = {**record, "isBalanced": False}
    w.json(
        "gqa/testdev_balanced_questions.json", {"201307251": record, "2": open_one, "3": left_out}
    )
    for split in ("val", "train", "test"):
        rows = []
        for i in range(2):
            name = f"VizWiz_{split}_{i:08d}.jpg"
            w.image(f"vizwiz/{split}/{name}")
            row: dict[str, Any] = {"image": name, "question": "What is this? and what color is it?"}
            if split != "test":
                row |= {
                    "answers": ten("unanswerable", "Blue."),
                    "answer_type": "other",
                    "answerable": 1,
                }
            rows.append(row)
        w.json(f"vizwiz/Annotations/{split}.json", rows)
    # One training image is a validation image too, under another name: it must not be found for it.
    w.put(
        "vizwiz/train/VizWiz_train_00000000.jpg",
        (w.root / "vizwiz/val/VizWiz_val_00000000.jpg").read_bytes(),
    )
    w.image("textvqa/train_images/003a8ae2ef43b901.jpg")
    told = [
        "nous les gosses",
        "dakota",
        "clos culombu",
        "dakota digital",
        "dakota",
        "dakota",
        "dakota",
        "dakota",
        "a",
        "b",
    ]
    row = {
        "question": "what is the brand of this camera?",
        "image_id": "003a8ae2ef43b901",
        "question_id": 34602,
        "answers": told,
        "set_name": "val",
    }
    w.json("textvqa/TextVQA_0.5.1_val.json", {"data": [row]})
    tokens = {"image_id": "003a8ae2ef43b901", "ocr_tokens": ["DAKOTA", "DIGITAL"]}
    w.json("textvqa/TextVQA_Rosetta_OCR_v0.2_val.json", {"data": [tokens]})


def yes_no(w: Writer) -> None:
    for split in ("random", "popular", "adversarial"):
        rows = [
            {
                "question_id": n,
                "image": f"COCO_val2014_{n:012d}.jpg",
                "text": f"Is there a {thing} in the image?",
                "label": label,
            }
            for n, (thing, label) in enumerate((("snowboard", "yes"), ("car", "no")), 1)
        ]
        w.lines(f"pope/coco_pope_{split}.json", rows)
    root = "mme/MME_Benchmark_release_version"
    for n, task in enumerate((*PERCEPTION, *COGNITION)):
        apart = n % 2 == 0  # both official layouts
        pictures, texts = (
            (f"{root}/{task}/images", f"{root}/{task}/questions_answers_YN")
            if apart
            else (f"{root}/{task}",) * 2
        )
        w.image(f"{pictures}/0001.jpg")
        w.put(
            f"{texts}/0001.txt",
            "Is there a cat? Please answer yes or no.\tYes\nIs there a dog? Please answer yes or no.\tNo\n",
        )


def choice(w: Writer) -> None:
    row: dict[str, Any] = {
        "question": "Which of these is a plan?",
        "choices": ["a design", "a rock", "a tree"],
        "answer": 1,
        "hint": "People can use the engineering-design process.",
        "image": "image.png",
        "subject": "natural science",
        "split": "test",
    }
    problems = {
        "5": row,
        "6": {
            **row,
            "hint": "",
            "choices": ["yes", "no"],
            "answer": 0,
            "subject": "social science",
        },
        "7": {**row, "image": None},
        "8": {**row, "split": "train"},
    }
    w.json("scienceqa/problems.json", problems)
    w.json("scienceqa/pid_splits.json", {"train": ["8"], "val": [], "test": ["5", "6", "7"]})
    for place in ("test/5", "test/6", "train/8"):
        w.image(f"scienceqa/images/{place}/image.png")
    header = [
        "index",
        "question",
        "hint",
        "A",
        "B",
        "C",
        "D",
        "answer",
        "category",
        "image",
        "source",
        "l2-category",
    ]
    header += ["comment", "split"]
    for name in ("mmbench_dev_20230712", "mmbench_test_20230712"):
        out = io.StringIO()
        table = csv.writer(out, delimiter="\t", lineterminator="\n")
        table.writerow(header)
        options, picture = ["a cat", "a dog", "a cow"], base64.b64encode(png(7)).decode()
        for turn in range(3):
            turned = options[turn:] + options[:turn]
            answer = "ABC"[turned.index("a dog")] if "dev" in name else ""
            hint = "Look\nclosely." if turn == 0 else "nan"
            table.writerow(
                [
                    241 + turn * 10**6,
                    "What is it?",
                    hint,
                    *turned,
                    "",
                    answer,
                    "nature",
                    picture,
                    "s",
                    "fine",
                    "",
                    "dev",
                ]
            )
        w.put(f"mmbench/{name}.tsv", out.getvalue())
    seed = {
        "answer": "A",
        "choice_a": "One",
        "choice_b": "Two",
        "choice_c": "Three",
        "choice_d": "Four",
        "data_id": "1454426_2591111986",
        "data_type": "image",
        "question": "How many towels are in the image?",
        "question_id": "101669",
        "question_type_id": 5,
    }
    video = {
        **seed,
        "data_type": "video",
        "data_id": "v1.mp4",
        "question_id": "v0",
        "question_type_id": 10,
        "segment": [0, 1],
    }
    names = {"Instances Counting": 5, "Action Recognition": 10}
    w.json("seedbench/SEED-Bench.json", {"questions": [seed, video], "question_type": names})
    w.image("seedbench/SEED-Bench-image/1454426_2591111986")
    w.image("seedbench/SEED-Bench-video-image/v0.png")


def judged(w: Writer) -> None:
    w.image("llava_bench/images/001.jpg")
    rows = [
        {"question_id": n, "image": "001.jpg", "category": category, "text": f"Question {n}?"}
        for n, category in enumerate(("conv", "detail", "complex"))
    ]
    w.lines("llava_bench/questions.jsonl", rows)
    w.lines(
        "llava_bench/context.jsonl",
        [{"id": "001", "image": "001.jpg", "caption": "A photo of Diamond Head."}],
    )
    references = [
        {"question_id": n, "text": f"Reference {n}.", "answer_id": str(n)} for n in range(3)
    ]
    w.lines("llava_bench/answers_gpt4.jsonl", references)
    rules = {
        f"llava_bench_{c}": {"role": "Assistant", "prompt": f"Rule of {c}."}
        for c in ("conv", "detail", "complex")
    }
    w.json("llava_bench/rule.json", rules)
    w.image("mmvet/images/v1_0.png")
    question = {
        "imagename": "v1_0.png",
        "question": "What is x in the equation?",
        "answer": "-1<AND>-5",
    }
    one = {**question, "imagesource": "", "capability": ["ocr", "math"]}
    w.json("mmvet/mm-vet.json", {"v1_0": one, "v1_1": {**one, "capability": ["rec"]}})


def demon(w: Writer) -> None:
    chosen = ("MMC", "KGQA", "TRQA", "MMR")
    for category, members in TASKS.items():
        for name in members:
            for i in range(2):
                w.image(f"demon/{name}/core/images/{i}.jpg")
            instance: dict[str, Any] = {
                "context": "{image#1}Caption#1:The parish.{table#2}Caption#2:",
                "images_path": ["0.jpg", "1.jpg"],
            }
            response = "Some of the crafters dress up."
            if category in chosen:
                pictures = name in (
                    "COMICS_Panel",
                    "RecipeQA_ImageCoherence",
                    "RecipeQA_VisualCloze",
                )
                instance["choice_list"] = (
                    ["image A", "image B"] if pictures else ["a cat", "two dogs"]
                )
                response = instance["choice_list"][1]
            sample = {
                "sample_id": 0,
                "task_instruction_id": 1,
                "task_instance": instance,
                "response": response,
            }
            metadata = {
                "dataset": name,
                "split": "core",
                "num_sample": 1,
                "task_instruction": ["First. ", "Tell the story. "],
                "question_type": ""
                if name == "ALFRED"
                else "multi-choice"
                if category in chosen
                else "open-ended",
            }
            w.json(f"demon/{name}/core/core.json", {"metadata": metadata, "data": [sample]})


# ------------------------------------------------------------------ knowledge


def knowledge(w: Writer) -> None:
    starts, table = [], b""
    for identity in range(12):
        starts.append(len(table))
        table += (
            str(30000000 + identity).encode() + b"\t" + base64.b64encode(png(50 + identity)) + b"\n"
        )
    w.put("webqa/imgs.tsv", table)
    w.put("webqa/imgs.lineidx", "".join(f"{start}\n" for start in starts))

    def fact(n: int) -> dict[str, Any]:
        return {
            "image_id": 30000000 + n,
            "title": f"Title {n}",
            "caption": f'"Caption {n}"',
            "imgUrl": "",
            "url": "",
        }

    row: dict[str, Any] = {
        "Q": '"What color is the belly of a Green Tree Frog?"',
        "A": ['"The belly of a Green Tree Frog is white."'],
        "Keywords_A": '"white"',
        "Qcate": "color",
        "split": "val",
        "Guid": "d5c5",
        "img_posFacts": [fact(0)],
        "img_negFacts": [fact(n) for n in range(1, 6)],
        "txt_posFacts": [],
        "txt_negFacts": [{"snippet_id": "s1", "fact": "Frogs jump.", "title": "Frog", "url": ""}],
    }
    yes = {
        **row,
        "Q": '"Is the frog green?"',
        "A": ['"Yes, it is green."'],
        "Keywords_A": '"yes"',
        "Qcate": "YesNo",
    }
    yes["img_posFacts"] = [fact(6)]
    w.json("webqa/WebQA_train_val.json", {"a": row, "b": yes, "c": {**row, "split": "train"}})
    root = "fvqa/new_dataset_release"
    facts = {
        f"f/{n}": {
            "KB": "conceptnet",
            "e1": "",
            "e1_label": a,
            "e2": "",
            "e2_label": b,
            "r": "can",
            "surface": f"[[{a}]] can [[{b}]]",
        }
        for n, (a, b) in enumerate((("Cats", "climb trees"), ("Dogs", "bark"), ("Cars", "drive")))
    }
    w.json(f"{root}/all_fact_triples_release.json", facts)
    asked = {
        "question": "Which animal can climb trees",
        "answer": "cat",
        "fact": ["f/0"],
        "question_id": "1",
    }
    questions = {
        "1": {**asked, "ans_source": "KB", "img_file": "ILSVRC2012_test_00050748.JPEG"},
        "2": {**asked, "ans source": "KB", "img file": "ILSVRC2012_test_00050748.JPEG"},
        "3": {**asked, "ans_source": "Image", "img_file": "ILSVRC2012_test_00050748.JPEG"},
    }
    w.json(f"{root}/all_qs_dict_release.json", questions)
    w.image(f"{root}/images/ILSVRC2012_test_00050748.JPEG")


# ------------------------------------------------------------------ our own corpora


def builtin(w: Writer) -> None:
    def corpus(name: str, rows: list[dict[str, Any]], *, split: str = "test") -> None:
        for n, row in enumerate(rows):
            row.setdefault("id", str(n))
            for part in [row, *row.get("parts", [])]:
                if part.get("image") is not None:
                    part["image"] = f"images/{part['image']}.png"
                    if not (w.root / f"corpora/{name}/{part['image']}").exists():
                        w.image(f"corpora/{name}/{part['image']}")
        w.lines(f"corpora/{name}/{split}.jsonl", rows)

    stamps = [
        "A red apple.",
        "A green apple.",
        "A boat.",
        "A cat.",
        "A dog.",
        "A tree.",
        "A house.",
        "A boat.",
    ]
    corpus(
        "stamps",
        [
            {"image": n, "short": text, "metadata": {"category": f"{'ab'[n % 2]}/x"}}
            for n, text in enumerate(stamps)
        ],
    )
    trained = [
        {"image": f"t{n}", "short": f"Thing {n}.", "metadata": {"category": f"{'ab'[n]}/x"}}
        for n in range(2)
    ]
    corpus("stamps", trained, split="train")
    emoji = [("red heart", "heart"), ("blue heart", "heart"), ("grinning face", "face")]
    emoji += [("flag: Norway", "country-flag"), ("flag: Peru", "country-flag")]
    corpus(
        "emoji",
        [
            {
                "image": f"{vendor}{n}",
                "short": text,
                "metadata": {"vendor": vendor, "group": sub, "subgroup": sub},
            }
            for vendor in ("openmoji", "twemoji")
            for n, (text, sub) in enumerate(emoji)
        ],
    )
    for name in ("wesnoth", "endless-sky"):
        kinds = (("elf", "lawful"), ("orc", "chaotic"), ("elf", "neutral"))
        facts = [{"race": race, "alignment": kind} for race, kind in kinds]
        corpus(
            name,
            [
                {"image": n, "short": f"Unit {n}", "long": f"Lore of {n}.", "metadata": f}
                for n, f in enumerate(facts)
            ],
        )
    lands = (("Ruritania", ("Ain", "Oise", "Var")), ("Syldavia", ("Klow", "Niz")))
    rows = []
    for land, regions in lands:
        facts = {"territory": land, "divisions": "departments"}
        rows.append({"id": f"map/{land}", "metadata": facts | {"kind": "map", "regions": regions}})
        for n, region in enumerate(regions):
            told = {"kind": "region", "name": region, "map": land, "capital": f"{region} City"}
            told |= {"place": ("top", "left", "middle")[n]}
            rows.append({"id": f"region/{land}/{region}", "metadata": facts | told})
        told = {"kind": "flag", "name": land, "capital": f"{land} City"}
        rows.append({"id": f"flag/{land}", "metadata": told})
        rows.append(
            {"id": f"flag/{land}/Ain", "metadata": told | {"name": "Ain", "territory": land}}
        )
    corpus("maps", [row | {"image": row["id"], "short": f"Caption of {row['id']}"} for row in rows])
    for name in ("campaigns", "gimp-help"):
        told = [{"text": "First."}, {"image": "a"}, {"text": "Second."}, {"image": "b"}]
        corpus(
            name, [{"parts": told}, {"parts": [{"text": "Third."}, {"image": "c"}, {"image": "c"}]}]
        )
