"""Mini versions of benchmarks with text answers in their official formats."""

from __future__ import annotations

import base64
import csv
import io
from typing import Any

from helpers.official_writer import OfficialWriter, random_png
from vlduet.eval.benchmarks.interleaved import DEMON_TASKS
from vlduet.eval.benchmarks.yes_no import MME_COGNITION, MME_PERCEPTION

# ------------------------------------------------------------------ short answers


def ten_answers(*answers: str) -> list[dict[str, Any]]:
    """Return the answers of ten annotators; the last answer is repeated."""
    texts = [*answers, *[answers[-1]] * (10 - len(answers))]
    return [
        {"answer": text, "answer_confidence": "yes", "answer_id": i}
        for i, text in enumerate(texts, 1)
    ]


def write_vqa(writer: OfficialWriter) -> None:
    """Write VQAv2, GQA, VizWiz and TextVQA."""
    write_vqav2(writer)
    write_gqa(writer)
    write_vizwiz(writer)
    write_textvqa(writer)


def write_vqav2(writer: OfficialWriter) -> None:
    """Write two questions of VQAv2: on one the annotators disagree, on the other they agree."""
    questions = [
        {"image_id": 0, "question": "Where is he looking?", "question_id": 0},
        {"image_id": 1, "question": "Is it red?", "question_id": 1000},
    ]
    disputed = ten_answers("down", "down", "down", "up")
    annotations = [
        {
            "question_type": "none of the above",
            "answer_type": "other",
            "question_id": 0,
            "image_id": 0,
            "multiple_choice_answer": "down",
            "answers": disputed,
        },
        {
            "question_type": "is it",
            "answer_type": "yes/no",
            "question_id": 1000,
            "image_id": 1,
            "multiple_choice_answer": "yes",
            "answers": ten_answers("yes"),
        },
    ]
    content = {"annotations": annotations}
    writer.write_json("vqav2/v2_mscoco_val2014_annotations.json", content)
    for name in ("mscoco_val2014", "mscoco_test-dev2015", "mscoco_test2015"):
        file_name = f"vqav2/v2_OpenEnded_{name}_questions.json"
        writer.write_json(file_name, {"questions": questions})
    for i in range(2):
        writer.write_image(f"coco/test2015/COCO_test2015_{i:012d}.jpg")


def write_gqa(writer: OfficialWriter) -> None:
    """Write a binary, an open and an unbalanced question of GQA."""
    writer.write_image("gqa/images/n161313.jpg")
    types = {"detailed": "weatherVerify", "semantic": "global", "structural": "verify"}
    binary = {
        "question": "Is it overcast?",
        "imageId": "n161313",
        "isBalanced": True,
        "answer": "no",
        "types": types,
    }
    open_question = {**binary, "question": "Who is there?", "answer": "man"}
    open_question["types"] = {**types, "structural": "query"}
    questions = {"201307251": binary, "2": open_question, "3": {**binary, "isBalanced": False}}
    writer.write_json("gqa/testdev_balanced_questions.json", questions)


def write_vizwiz(writer: OfficialWriter) -> None:
    """Write two questions of every split of VizWiz.

    One training image equals a validation image of another name: it must not be retrieved for it.
    """
    for split in ("val", "train", "test"):
        rows = []
        for i in range(2):
            name = f"VizWiz_{split}_{i:08d}.jpg"
            writer.write_image(f"vizwiz/{split}/{name}")
            row: dict[str, Any] = {"image": name, "question": "What is this? and what color is it?"}
            if split != "test":
                row["answers"] = ten_answers("unanswerable", "Blue.")
                row |= {"answer_type": "other", "answerable": 1}
            rows.append(row)
        writer.write_json(f"vizwiz/Annotations/{split}.json", rows)
    image = (writer.root / "vizwiz/val/VizWiz_val_00000000.jpg").read_bytes()
    writer.write_file("vizwiz/train/VizWiz_train_00000000.jpg", image)


def write_textvqa(writer: OfficialWriter) -> None:
    """Write one question of TextVQA, and its OCR tokens."""
    writer.write_image("textvqa/train_images/003a8ae2ef43b901.jpg")
    answers = ["nous les gosses", "dakota", "clos culombu", "dakota digital", *["dakota"] * 4]
    row = {
        "question": "what is the brand of this camera?",
        "image_id": "003a8ae2ef43b901",
        "question_id": 34602,
        "answers": [*answers, "a", "b"],
        "set_name": "val",
    }
    writer.write_json("textvqa/TextVQA_0.5.1_val.json", {"data": [row]})
    tokens = {"image_id": "003a8ae2ef43b901", "ocr_tokens": ["DAKOTA", "DIGITAL"]}
    writer.write_json("textvqa/TextVQA_Rosetta_OCR_v0.2_val.json", {"data": [tokens]})


# ------------------------------------------------------------------ yes or no


def write_yes_no(writer: OfficialWriter) -> None:
    """Write POPE, and MME in both of its folder layouts."""
    for split in ("random", "popular", "adversarial"):
        rows = []
        for n, (noun, label) in enumerate((("snowboard", "yes"), ("car", "no")), 1):
            image = f"COCO_val2014_{n:012d}.jpg"
            text = f"Is there a {noun} in the image?"
            rows.append({"question_id": n, "image": image, "text": text, "label": label})
        writer.write_json_lines(f"pope/coco_pope_{split}.json", rows)
    for n, task in enumerate((*MME_PERCEPTION, *MME_COGNITION)):
        image_folder = text_folder = f"mme/MME_Benchmark_release_version/{task}"
        if n % 2 == 0:
            image_folder += "/images"
            text_folder += "/questions_answers_YN"
        writer.write_image(f"{image_folder}/0001.jpg")
        writer.write_file(
            f"{text_folder}/0001.txt",
            "Is there a cat? Please answer yes or no.\tYes\n"
            "Is there a dog? Please answer yes or no.\tNo\n",
        )


# ------------------------------------------------------------------ multiple choice


def write_multiple_choice(writer: OfficialWriter) -> None:
    """Write ScienceQA, MMBench and SEED-Bench."""
    write_scienceqa(writer)
    for name in ("mmbench_dev_20230712", "mmbench_test_20230712"):
        write_mmbench(writer, name, with_answers="dev" in name)
    write_seedbench(writer)


def write_scienceqa(writer: OfficialWriter) -> None:
    """Write two test questions with an image, one without, and a training question."""
    row: dict[str, Any] = {
        "question": "Which of these is a plan?",
        "choices": ["a design", "a rock", "a tree"],
        "answer": 1,
        "hint": "People can use the engineering-design process.",
        "image": "image.png",
        "subject": "natural science",
        "split": "test",
    }
    without_hint = {**row, "hint": "", "choices": ["yes", "no"], "answer": 0}
    without_hint["subject"] = "social science"
    without_image = {**row, "image": None}
    problems = {"5": row, "6": without_hint, "7": without_image, "8": {**row, "split": "train"}}
    writer.write_json("scienceqa/problems.json", problems)
    splits = {"train": ["8"], "val": [], "test": ["5", "6", "7"]}
    writer.write_json("scienceqa/pid_splits.json", splits)
    for folder in ("test/5", "test/6", "train/8"):
        writer.write_image(f"scienceqa/images/{folder}/image.png")


def write_mmbench(writer: OfficialWriter, name: str, *, with_answers: bool) -> None:
    """Write one question in three rotations; only the first one has a hint."""
    columns = "index question hint A B C D answer category image source l2-category comment split"
    table_file = io.StringIO()
    table = csv.writer(table_file, delimiter="\t", lineterminator="\n")
    table.writerow(columns.split())
    options = ["a cat", "a dog", "a cow"]
    image = base64.b64encode(random_png(7)).decode()
    for turn in range(3):
        rotated = options[turn:] + options[:turn]
        answer = "ABC"[rotated.index("a dog")] if with_answers else ""
        hint = "Look\nclosely." if turn == 0 else "nan"
        row: list[object] = [241 + turn * 10**6, "What is it?", hint, *rotated, "", answer]
        table.writerow([*row, "nature", image, "s", "fine", "", "dev"])
    writer.write_file(f"mmbench/{name}.tsv", table_file.getvalue())


def write_seedbench(writer: OfficialWriter) -> None:
    """Write one question on an image and one on a video."""
    image_question = {
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
    video_question = {
        **image_question,
        "data_type": "video",
        "data_id": "v1.mp4",
        "question_id": "v0",
        "question_type_id": 10,
        "segment": [0, 1],
    }
    types = {"Instances Counting": 5, "Action Recognition": 10}
    content = {"questions": [image_question, video_question], "question_type": types}
    writer.write_json("seedbench/SEED-Bench.json", content)
    writer.write_image("seedbench/SEED-Bench-image/1454426_2591111986")
    writer.write_image("seedbench/SEED-Bench-video-image/v0.png")


# ------------------------------------------------------------------ graded by a language model


def write_llm_graded(writer: OfficialWriter) -> None:
    """Write three questions of LLaVA-Bench, one per category, and two of MM-Vet."""
    writer.write_image("llava_bench/images/001.jpg")
    questions, references, rules = [], [], {}
    for n, category in enumerate(("conv", "detail", "complex")):
        question = {"question_id": n, "image": "001.jpg", "category": category}
        questions.append({**question, "text": f"Question {n}?"})
        references.append({"question_id": n, "text": f"Reference {n}.", "answer_id": str(n)})
        rule = {"role": "Assistant", "prompt": f"Rule of {category}."}
        rules[f"llava_bench_{category}"] = rule
    context = {"id": "001", "image": "001.jpg", "caption": "A photo of Diamond Head."}
    writer.write_json_lines("llava_bench/questions.jsonl", questions)
    writer.write_json_lines("llava_bench/context.jsonl", [context])
    writer.write_json_lines("llava_bench/answers_gpt4.jsonl", references)
    writer.write_json("llava_bench/rule.json", rules)
    writer.write_image("mmvet/images/v1_0.png")
    row = {
        "imagename": "v1_0.png",
        "question": "What is x in the equation?",
        "answer": "-1<AND>-5",
        "imagesource": "",
    }
    rows = {"v1_0": {**row, "capability": ["ocr", "math"]}, "v1_1": {**row, "capability": ["rec"]}}
    writer.write_json("mmvet/mm-vet.json", rows)


# ------------------------------------------------------------------ DEMON

IMAGE_CHOICE_FOLDERS = ("COMICS_Panel", "RecipeQA_ImageCoherence", "RecipeQA_VisualCloze")


def write_demon(writer: OfficialWriter) -> None:
    """Write one sample of every task of DEMON."""
    for category, tasks in DEMON_TASKS.items():
        for task in tasks:
            for i in range(2):
                writer.write_image(f"demon/{task}/core/images/{i}.jpg")
            has_choices = category in ("MMC", "KGQA", "TRQA", "MMR")
            instance: dict[str, Any] = {
                "context": "{image#1}Caption#1:The parish.{table#2}Caption#2:",
                "images_path": ["0.jpg", "1.jpg"],
            }
            response = "Some of the crafters dress up."
            if has_choices:
                choices = ["a cat", "two dogs"]
                if task in IMAGE_CHOICE_FOLDERS:
                    choices = ["image A", "image B"]
                instance["choice_list"] = choices
                response = choices[1]
            question_type = "multi-choice" if has_choices else "open-ended"
            sample = {
                "sample_id": 0,
                "task_instruction_id": 1,
                "task_instance": instance,
                "response": response,
            }
            metadata = {
                "dataset": task,
                "split": "core",
                "num_sample": 1,
                "task_instruction": ["First. ", "Tell the story. "],
                "question_type": "" if task == "ALFRED" else question_type,
            }
            content = {"metadata": metadata, "data": [sample]}
            writer.write_json(f"demon/{task}/core/core.json", content)
