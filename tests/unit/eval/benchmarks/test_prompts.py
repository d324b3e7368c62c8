"""Prompts equal the official ones to the byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vlduet.eval.benchmarks.official_files import OfficialFiles
from vlduet.eval.benchmarks.registry import get_benchmark
from vlduet.eval.identities import prompt_text

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."

PROMPTS = {
    "vqav2_val": ("0", f"<image>\nWhere is he looking?{SHORT_ANSWER}"),
    "gqa": ("201307251", f"<image>\nIs it overcast?{SHORT_ANSWER}"),
    "vizwiz_val": (
        "VizWiz_val_00000000.jpg",
        "<image>\nWhat is this? and what color is it?\nWhen the provided information is "
        f"insufficient, respond with 'Unanswerable'.{SHORT_ANSWER}",
    ),
    "textvqa": (
        "34602",
        "<image>\nwhat is the brand of this camera?\n"
        f"Reference OCR token: DAKOTA, DIGITAL{SHORT_ANSWER}",
    ),
    "textvqa_plain": ("34602", f"<image>\nwhat is the brand of this camera?{SHORT_ANSWER}"),
    "pope": ("random/1", f"<image>\nIs there a snowboard in the image?{SHORT_ANSWER}"),
    "mme": ("existence/0001/1", f"<image>\nIs there a cat?{SHORT_ANSWER}"),
    "scienceqa_img": (
        "5",
        "<image>\nContext: People can use the engineering-design process.\n"
        f"Which of these is a plan?\nA. a design\nB. a rock\nC. a tree{LETTER}",
    ),
    "mmbench_dev": (
        "241",
        f"<image>\nLook\nclosely.\nWhat is it?\nA. a cat\nB. a dog\nC. a cow{LETTER}",
    ),
    "seedbench": (
        "101669",
        f"<image>\nHow many towels are in the image?\nA. One\nB. Two\nC. Three\nD. Four{LETTER}",
    ),
    "seedbench_likelihood": ("101669", "<image>\nHow many towels are in the image?"),
    "llava_bench": ("1", "<image>\nQuestion 1?"),
    "mmvet": ("v1_0", "<image>\nWhat is x in the equation?"),
    "demon/AESOP": ("AESOP/0", "Tell the story. <image>\nCaption#1:The parish.<image>\nCaption#2:"),
    "demon/TQA": (
        "TQA/0",
        "Tell the story. <image>\nCaption#1:The parish.<image>\nCaption#2:"
        "Choice list:['a cat', 'two dogs']. Your answer is:",
    ),
}


def load_prompts(name: str, data: Path) -> dict[str, str]:
    """Return the prompts of a benchmark as text, by the id of the question."""
    task: Any = get_benchmark(name).load(OfficialFiles(data))
    return {item.id: prompt_text(item.prompt) for item in task.items}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompt_is_the_official_one(name: str, data: Path) -> None:
    key, prompt = PROMPTS[name]
    assert load_prompts(name, data)[key] == prompt


def test_scienceqa_without_a_hint_has_no_context(data: Path) -> None:
    prompts = load_prompts("scienceqa_img", data)
    assert set(prompts) == {"5", "6"}  # question 7 has no image
    assert prompts["6"] == f"<image>\nWhich of these is a plan?\nA. yes\nB. no{LETTER}"


def test_mmbench_without_a_hint_begins_with_the_question(data: Path) -> None:
    prompt = load_prompts("mmbench_dev", data)["1000241"]
    assert prompt == f"<image>\nWhat is it?\nA. a dog\nB. a cow\nC. a cat{LETTER}"


def test_fvqa_prompt_contains_the_retrieved_facts(data: Path) -> None:
    task: Any = get_benchmark("fvqa").load(OfficialFiles(data))
    assert [item.id for item in task.items] == ["1", "2"]  # 3 is answered by the image
    assert prompt_text(task.build_prompt(task.items[0], task.entries[:1])) == (
        "Please answer the questions based on the pictures. If the reference information is "
        "useful, please use it. Otherwise, please ignore the reference information. Reference "
        "information: Cats can climb trees <image>\n Which animal can climb trees."
    )


def test_webqa_probe_moves_the_relevant_image_from_first_to_last(data: Path) -> None:
    prompts = list(load_prompts("webqa_position", data).values())
    assert prompts[0].startswith("<image>\nCaption 6\n<image>\nCaption 1\n")
    assert prompts[5].endswith(
        "<image>\nCaption 6\nIs the frog green? please answer the question in Yes or No."
    )


def test_mmvp_question_shows_both_images_and_both_statements(data: Path) -> None:
    task: Any = get_benchmark("mmvp_vlm_qa").load(OfficialFiles(data))
    first, second = task.items[0].options
    assert prompt_text(task.items[0].prompt) == (
        "First Image:<image>\nSecond Image:<image>\n which choice meets the first image:\n "
        f"A.{first}\nB.{second}\n.please answer in A or B"
    )
