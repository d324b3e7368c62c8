"""Every benchmark: its official format is read, its prompts are right to the byte, and it runs through a model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers import official, tiny
from vlduet.data.records import ImageRef, Parts
from vlduet.errors import ConfigError, DataError, ModelError
from vlduet.eval.benchmarks.runners import run_choices
from vlduet.eval.benchmarks.official_files import OfficialFiles
from vlduet.eval.benchmarks.registry import BENCHMARKS, SUITES, get_benchmark
from vlduet.eval.benchmarks.tasks import ChoiceTask, PairTask, Question, RetrievalTask
from vlduet.eval.predictions import FluencyModel, ModelFunctions, prompt_text
from vlduet.eval.run import evaluate, import_predictions, run_folder
from vlduet.files import read_json_lines
from vlduet.harness.builtin import (
    EvaluationSettings,
    describe_provenance,
    model_functions,
    open_model_functions,
)

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return official.write(tmp_path_factory.mktemp("official"))


@pytest.fixture(scope="module")
def playing(tmp_path_factory: pytest.TempPathFactory) -> ModelFunctions:
    """A tiny random model whose judge is content with everything."""
    model = tiny.build_duet_model(tmp_path_factory.mktemp("model") / "base")
    played = model_functions(model, EvaluationSettings())

    def judge(official_judge: Any, prompt: str, temperature: float) -> str:
        return "0.5" if "Correctness" in prompt else "8 9\nfine"

    def short(prompts: list[Parts], longest: int) -> list[str]:
        assert played.generate is not None
        return played.generate(prompts, 3)  # what a random model says is not worth 1,024 tokens

    return ModelFunctions(played.embed, short, played.continuation_nll, played.embed, judge)


# ------------------------------------------------------------------ through a model


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if "/" not in name] + ["demon/VIST"])
def test_every_benchmark_runs_through_a_model_and_again_without_one(
    name: str, data: Path, playing: ModelFunctions, tmp_path: Path
) -> None:
    made = evaluate(
        BENCHMARKS[name], playing, source=OfficialFiles(data), runs=tmp_path, provenance={"model": "tiny"}
    )
    assert made["files"] or "val/WNID" in BENCHMARKS[name].files[0]
    assert made["missing"] == 0
    for value in made["values"].values():
        assert value["low"] <= value["mean"] <= value["high"] and value["n"] > 0, value
    assert bool(made["values"]) == ("export for the server" not in BENCHMARKS[name].metric)
    again = evaluate(
        BENCHMARKS[name], ModelFunctions(), source=OfficialFiles(data), runs=tmp_path, provenance={}
    )
    assert again["values"] == made["values"]
    assert json.loads((run_folder(tmp_path, BENCHMARKS[name]) / "scores.json").read_text()) == again


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name.startswith("demon/")])
def test_every_task_of_demon_has_a_benchmark_of_its_own(name: str, data: Path) -> None:
    assert len(BENCHMARKS[name].load(OfficialFiles(data)).items) == 1  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "name", [n for n, b in BENCHMARKS.items() if b.protocol in ("retrieval", "pairs")]
)
def test_an_encoder_that_gives_everything_one_vector_scores_nothing(
    name: str, data: Path, tmp_path: Path
) -> None:
    def constant(items: Sequence[Parts], query: bool) -> np.ndarray:
        return np.full((len(items), 7), 0.3, dtype=np.float32)

    made = evaluate(
        BENCHMARKS[name],
        ModelFunctions(embed=constant),
        source=OfficialFiles(data),
        runs=tmp_path,
        provenance={"model": "constant"},
    )
    sizes = made["facts"]
    for key, value in made["values"].items():
        # A gallery of less than k items holds every right one among its first k.
        gallery = sizes.get(f"{key.rpartition('/')[0]}/gallery", sizes.get("gallery", 10**9))
        if "R@" not in key or int(key.rpartition("@")[2]) < min(gallery, 3):
            assert value["mean"] == 0.0, key
    if BENCHMARKS[name].protocol == "retrieval":
        assert sum(value for key, value in sizes.items() if key.endswith("ties")) > 0


def test_missing_files_and_images_are_named(data: Path, tmp_path: Path) -> None:
    for name, benchmark in BENCHMARKS.items():
        with pytest.raises(DataError, match=benchmark.files[0].split("/")[0]):
            benchmark.load(OfficialFiles(tmp_path))
        assert name == benchmark.name
    broken = tmp_path / "copy"
    shutil.copytree(data, broken)
    (broken / "gqa/images/n161313.jpg").unlink()
    with pytest.raises(DataError, match=r"image 'gqa/images/n161313\.jpg' is not there"):
        get_benchmark("gqa").load(OfficialFiles(broken))
    (broken / "gqa/testdev_balanced_questions.json").write_text(
        '{"1": {"question": "?", "isBalanced": true}}'
    )
    with pytest.raises(
        DataError, match=r"testdev_balanced_questions\.json:1\.imageId: no 'imageId' here"
    ):
        get_benchmark("gqa").load(OfficialFiles(broken))
    with pytest.raises(ConfigError, match="Did you mean 'pope'"):
        get_benchmark("popee")


def test_every_benchmark_stands_in_one_suite() -> None:
    assert [row.name for rows in SUITES.values() for row in rows] == list(BENCHMARKS)


# ------------------------------------------------------------------ prompts

PROMPTS = {
    "vqav2_val": ("0", f"<image>\nWhere is he looking?{SHORT}"),
    "gqa": ("201307251", f"<image>\nIs it overcast?{SHORT}"),
    "vizwiz_val": (
        "VizWiz_val_00000000.jpg",
        "<image>\nWhat is this? and what color is it?\nWhen the provided information is insufficient, respond with "
        f"'Unanswerable'.{SHORT}",
    ),
    "textvqa": (
        "34602",
        f"<image>\nwhat is the brand of this camera?\nReference OCR token: DAKOTA, DIGITAL{SHORT}",
    ),
    "textvqa_plain": ("34602", f"<image>\nwhat is the brand of this camera?{SHORT}"),
    "pope": ("random/1", f"<image>\nIs there a snowboard in the image?{SHORT}"),
    "mme": ("existence/0001/1", f"<image>\nIs there a cat?{SHORT}"),
    "scienceqa_img": (
        "5",
        "<image>\nContext: People can use the engineering-design process.\nWhich of these is a plan?\n"
        f"A. a design\nB. a rock\nC. a tree{LETTER}",
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
        "Tell the story. <image>\nCaption#1:The parish.<image>\nCaption#2:Choice list:['a cat', 'two dogs']. "
        "Your answer is:",
    ),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_are_the_official_ones_to_the_byte(name: str, data: Path) -> None:
    key, prompt = PROMPTS[name]
    items = {item.id: item for item in get_benchmark(name).load(OfficialFiles(data)).items}  # type: ignore[union-attr]
    assert prompt_text(items[key].prompt) == prompt


def test_without_a_hint_there_is_no_context(data: Path) -> None:
    items = {item.id: item for item in get_benchmark("scienceqa_img").load(OfficialFiles(data)).items}  # type: ignore[union-attr]
    assert set(items) == {"5", "6"}  # 7 has no image
    assert (
        prompt_text(items["6"].prompt)
        == f"<image>\nWhich of these is a plan?\nA. yes\nB. no{LETTER}"
    )
    rows = {item.id: item for item in get_benchmark("mmbench_dev").load(OfficialFiles(data)).items}  # type: ignore[union-attr]
    assert (
        prompt_text(rows["1000241"].prompt)
        == f"<image>\nWhat is it?\nA. a dog\nB. a cow\nC. a cat{LETTER}"
    )


def test_rag_prompts(data: Path) -> None:
    task: Any = get_benchmark("fvqa").load(OfficialFiles(data))
    assert [item.id for item in task.items] == ["1", "2"]  # 3 is answered by the image
    assert prompt_text(task.prompt(task.items[0], task.facts[:1])) == (
        "Please answer the questions based on the pictures. If the reference information is useful, please use it. "
        "Otherwise, please ignore the reference information. Reference information: Cats can climb trees <image>\n "
        "Which animal can climb trees."
    )
    probe: Any = get_benchmark("webqa_position").load(OfficialFiles(data))
    first, last = probe.items[0], probe.items[5]
    assert prompt_text(first.parts).startswith("<image>\nCaption 6\n<image>\nCaption 1\n")
    assert prompt_text(last.parts).endswith(
        "<image>\nCaption 6\nIs the frog green? please answer the question in Yes or No."
    )
    mmvp: Any = get_benchmark("mmvp_vlm_qa").load(OfficialFiles(data))
    a, b = mmvp.items[0].options
    assert prompt_text(mmvp.items[0].parts) == (
        f"First Image:<image>\nSecond Image:<image>\n which choice meets the first image:\n A.{a}\nB.{b}\n"
        ".please answer in A or B"
    )


# ------------------------------------------------------------------ galleries


def search(name: str, data: Path) -> RetrievalTask:
    task = get_benchmark(name).load(OfficialFiles(data))
    assert isinstance(task, RetrievalTask)
    return task


def test_coco_variants(data: Path) -> None:
    first, every, unique = (search(name, data) for name in ("coco", "coco_all", "coco_unique"))
    assert (len(first.queries), len(every.queries), len(unique.queries)) == (20, 24, 23)
    assert len(first.documents) == len(unique.documents) == 4
    assert first.positives[5] == (1,) and unique.positives[0] == (0, 1)  # "A flower." is on both


def test_vist_skips_stories_without_an_image_and_hides_what_was_seen(data: Path) -> None:
    one, five, unseen = (
        search(name, data) for name in ("vist_1c", "vist_5c4i", "vist_5c4i_unseen")
    )
    assert one.details == {"stories": 2, "stories_without_an_image": 1}
    assert len(one.documents) == 13  # all images that are there, those of the story left out too
    assert one.queries[0] == ("story 0 sentence 4 .",)
    assert [isinstance(part, ImageRef) for part in five.queries[0]] == [False, True] * 4 + [False]
    assert not five.excluded_documents and len(unseen.excluded_documents[0]) == 4
    assert unseen.positives[0][0] not in unseen.excluded_documents[0]


def test_nocaps_and_imagenet(data: Path) -> None:
    assert [
        len(search(name, data).queries) for name in ("nocaps", "nocaps_first5", "nocaps_first1")
    ] == [30, 15, 3]
    plain, many = search("imagenet", data), search("imagenet_80", data)
    assert plain.documents[2] == ("a photo of a great white shark",)
    assert len(many.documents) == 240 and many.documents_per_class == 80
    assert plain.positives == ((0,), (0,), (1,), (1,), (2,), (2,))


def test_winoground_from_parquet(data: Path, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    row = {"id": [0], "caption_0": ["a b"], "caption_1": ["b a"], "collapsed_tag": ["Object"]}
    row |= {f"image_{i}": [{"bytes": official.png(i), "path": None}] for i in (0, 1)}
    (tmp_path / "winoground").mkdir()
    pyarrow.parquet.write_table(pa.table(row), tmp_path / "winoground/test-00000.parquet")
    task = get_benchmark("winoground").load(OfficialFiles(tmp_path))
    assert isinstance(task, PairTask) and task.items[0].images[1].data == official.png(1)


# ------------------------------------------------------------------ runs


def test_a_stopped_run_goes_on_where_it_was(data: Path, tmp_path: Path) -> None:
    asked: list[str] = []

    def answer(prompts: list[Parts], longest: int) -> list[str]:
        if len(asked) >= 3:
            raise KeyboardInterrupt
        asked.extend(prompt_text(prompt) for prompt in prompts)
        return ["yes"] * len(prompts)

    from vlduet.eval import predictions

    benchmark = get_benchmark("mme")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(predictions, "ANSWER_CHUNK", 4)
        evaluate(
            benchmark,
            ModelFunctions(generate=answer),
            source=OfficialFiles(data),
            runs=tmp_path,
            provenance={"model": "x"},
        )
    kept = tmp_path / "mme" / "predictions.jsonl"
    with kept.open("a") as out:
        out.write('{"key": "half')  # as kill -9 leaves it
    before = len(asked)
    count = 0

    def rest(prompts: list[Parts], longest: int) -> list[str]:
        nonlocal count
        count += len(prompts)
        return ["no"] * len(prompts)

    made = evaluate(
        benchmark,
        ModelFunctions(generate=rest),
        source=OfficialFiles(data),
        runs=tmp_path,
        provenance={"model": "x"},
    )
    assert before == 4 and count == 24 and made["missing"] == 0
    assert len({row["key"] for row in read_json_lines(kept)}) == 28


def test_another_run_is_refused_and_vectors_resume(data: Path, tmp_path: Path) -> None:
    calls: list[int] = []

    def embed(items: Sequence[Parts], query: bool) -> np.ndarray:
        calls.append(len(items))
        return np.random.default_rng(len(items)).normal(size=(len(items), 5)).astype(np.float32)

    benchmark = get_benchmark("coco")
    play = ModelFunctions(embed=embed)
    first = evaluate(benchmark, play, source=OfficialFiles(data), runs=tmp_path, provenance={"model": "x"})
    path = tmp_path / "coco" / "vectors" / "queries.f32"
    path.write_bytes(path.read_bytes()[: 4 * 5 * 7 + 3])  # cut within a row
    second = evaluate(
        benchmark, play, source=OfficialFiles(data), runs=tmp_path, provenance={"model": "x"}
    )
    assert calls == [20, 4, 13] and first["facts"] == second["facts"]
    path.with_suffix(".json").write_text(
        path.with_suffix(".json").read_text().replace('"items": "', '"items": "0')
    )
    with pytest.raises(DataError, match="vectors of these items are not there"):
        evaluate(benchmark, ModelFunctions(), source=OfficialFiles(data), runs=tmp_path, provenance={})
    assert path.exists(), "what was embedded for other items is not thrown away by scoring"
    with pytest.raises(ConfigError, match=r"another run: made_by.model was 'x', is 'y'"):
        evaluate(benchmark, play, source=OfficialFiles(data), runs=tmp_path, provenance={"model": "y"})


def test_a_broken_image_counts_as_missing_and_the_run_goes_on(
    data: Path, playing: ModelFunctions, tmp_path: Path
) -> None:
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    (copy / "coco/val2014/COCO_val2014_000000000001.jpg").write_bytes(b"\xff\xd8\xff broken")
    made = evaluate(
        get_benchmark("pope"), playing, source=OfficialFiles(copy), runs=tmp_path / "r", provenance={"model": "x"}
    )
    assert made["missing"] == 3 and made["values"]["F1"]["n"] == 6
    made = evaluate(
        get_benchmark("coco"), playing, source=OfficialFiles(copy), runs=tmp_path / "r", provenance={"model": "x"}
    )
    assert made["missing"] == 1


def test_predictions_of_others(data: Path, tmp_path: Path) -> None:
    """LLaVA's answer files: MME is matched by image and prompt, the others by id."""
    rows = [
        {"question_id": f"{task}/0001.jpg", "prompt": f"Is there a {thing}?{SHORT}", "text": text}
        for task in ("existence", "count")
        for thing, text in (("cat", "Yes"), ("dog", "No"))
    ]
    file = tmp_path / "answers.jsonl"
    file.write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, {"question_id": "?", "text": ""}])
    )
    assert import_predictions(get_benchmark("mme"), file, source=OfficialFiles(data), runs=tmp_path) == {
        "taken": 4,
        "unknown": 1,
    }
    made = evaluate(
        get_benchmark("mme"), ModelFunctions(), source=OfficialFiles(data), runs=tmp_path, provenance={}
    )
    assert made["values"]["perception"]["mean"] == 400.0 and made["missing"] == 24
    # POPE's answers have a running id, which only the question file explains; TextVQA's are called by their image.
    asked = [
        {
            "question_id": 10 * s + n,
            "image": f"COCO_val2014_{n:012d}.jpg",
            "text": f"Is there a {t} in the image?{SHORT}",
            "category": split,
        }
        for s, split in enumerate(("adversarial", "popular", "random"), 1)
        for n, t in enumerate(("snowboard", "car"), 1)
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    said = [
        {"question_id": row["question_id"], "text": "Yes" if "snow" in str(row["text"]) else "No"}
        for row in asked
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in said))
    taken = import_predictions(
        get_benchmark("pope"),
        file,
        source=OfficialFiles(data),
        runs=tmp_path,
        questions=tmp_path / "questions.jsonl",
    )
    assert taken == {"taken": 6, "unknown": 0}
    made = evaluate(
        get_benchmark("pope"), ModelFunctions(), source=OfficialFiles(data), runs=tmp_path, provenance={}
    )
    assert made["values"]["F1"]["mean"] == 100.0 and made["missing"] == 0
    prompt = f"What is the brand of this camera?\nReference{SHORT}"
    row = {"question_id": "003a8ae2ef43b901", "prompt": prompt, "text": "dakota"}
    file.write_text(json.dumps(row) + "\n")
    assert (
        import_predictions(get_benchmark("textvqa"), file, source=OfficialFiles(data), runs=tmp_path)["taken"] == 1
    )
    results = tmp_path / "mmvet.json"
    results.write_text(json.dumps({"v1_0": "x = -1", "v1_1": "a cat"}))
    assert import_predictions(get_benchmark("mmvet"), results, source=OfficialFiles(data), runs=tmp_path) == {
        "taken": 2,
        "unknown": 0,
    }
    made = evaluate(
        get_benchmark("mmvet"), ModelFunctions(), source=OfficialFiles(data), runs=tmp_path, provenance={}
    )
    assert made["values"] == {} and made["facts"]["needs"] == "judge"


def test_submissions(data: Path, playing: ModelFunctions, tmp_path: Path) -> None:
    for name, file in (
        ("vqav2_testdev", "vqav2.json"),
        ("vizwiz_test", "vizwiz.json"),
        ("mmbench_test", "mmbench.xlsx"),
    ):
        made = evaluate(
            get_benchmark(name), playing, source=OfficialFiles(data), runs=tmp_path, provenance={"model": "x"}
        )
        assert made["facts"]["needs"] == "server"
        assert (tmp_path / name / "submission" / file).stat().st_size > 0
    rows = json.loads((tmp_path / "vqav2_testdev/submission/vqav2.json").read_text())
    assert [set(row) for row in rows] == [{"question_id", "answer"}] * 2 and rows[1][
        "question_id"
    ] == 1000


def test_rag_never_finds_the_question_s_own_image(data: Path) -> None:
    task: Any = get_benchmark("vizwiz_rag").load(OfficialFiles(data))
    assert task.excluded == ((0,), ())
    assert task.facts[0].shown == ("Question: What is this? and what color is it? Answer: Blue.",)


def test_what_made_a_number_is_told(tmp_path: Path) -> None:
    model = tiny.build_duet_model(tmp_path / "base")
    model.save_pretrained(tmp_path / "mine")
    settings = EvaluationSettings(system="Be brief.")
    _, facts = open_model_functions(tmp_path / "mine", settings)
    told = describe_provenance(tmp_path / "mine", facts, settings)
    assert (
        told["fingerprint"] == model.fingerprint
        and told["system"] == "Be brief."
        and "seed" not in told
    )


def test_a_clip_embeds_and_does_not_speak(data: Path, tmp_path: Path) -> None:
    """As the independent retriever, and as a baseline: its numbers are what the papers compare with."""
    tiny.build_cross_encoder(tmp_path / "clip")
    playing, facts = open_model_functions(tmp_path / "clip", EvaluationSettings())
    assert facts["fingerprint"]
    made = evaluate(
        get_benchmark("winoground"), playing, source=OfficialFiles(data), runs=tmp_path, provenance=facts
    )
    assert set(made["values"]) >= {"text", "image", "group"}
    with pytest.raises(ModelError, match="does not generate"):
        evaluate(get_benchmark("gqa"), playing, source=OfficialFiles(data), runs=tmp_path, provenance=facts)
    assert playing.embed is not None
    image = ImageRef(data=official.png(1))
    one, other, both = playing.embed([(image,), ("a cat",), (image, "a cat")], False)
    assert np.allclose(both, (one + other) / np.linalg.norm(one + other), atol=1e-6)
    model = tiny.build_duet_model(tmp_path / "base")
    play = model_functions(model, EvaluationSettings(retriever=tmp_path / "clip"))

    def short(prompts: list[Parts], longest: int) -> list[str]:
        return ["a cat"] * len(prompts)

    mixed = ModelFunctions(play.embed, short, play.continuation_nll, play.retriever_embed)
    made = evaluate(
        get_benchmark("fvqa"), mixed, source=OfficialFiles(data), runs=tmp_path, provenance={"model": "x"}
    )
    assert {"self/retrieval/R@1", "other/retrieval/R@1", "none/ROUGE-L", "other/ROUGE-L"} <= set(
        made["values"]
    )


def test_webqa_s_fluency_is_that_of_its_formula_and_is_kept(data: Path, tmp_path: Path) -> None:
    said = {"self": ["The belly is white.", ""], "none": ["White.", "Yes."]}
    asked: list[tuple[str, str]] = []

    def nats(pairs: Sequence[tuple[str, str]]) -> list[float]:
        asked.extend(pairs)
        return [1.0 if source == target else 1.0 + len(target) / 10 for source, target in pairs]

    def answer(prompts: list[Parts], longest: int) -> list[str]:
        return said["none" if len(prompts[0]) == 1 else "self"]

    def embed(items: Sequence[Parts], query: bool) -> np.ndarray:
        return np.eye(40, dtype=np.float32)[: len(items)]

    play = ModelFunctions(embed=embed, generate=answer, fluency_model=FluencyModel("a bart", nats))
    made = evaluate(
        get_benchmark("webqa"), play, source=OfficialFiles(data), runs=tmp_path, provenance={"model": "x"}
    )
    fluent = np.exp(-np.array([19, 0, 6, 4]) / 10) * [
        1,
        0,
        1,
        1,
    ]  # BARTScore(A -> c) / BARTScore(A -> A)
    got = {name: value["mean"] for name, value in made["values"].items()}
    assert got["self/FL"] == pytest.approx(100 * fluent[:2].mean())
    assert got["none/FL"] == pytest.approx(100 * fluent[2:].mean())
    assert got["self/QA"] == pytest.approx(50 * fluent[0])  # white is right, nothing is not
    assert got["none/QA"] == pytest.approx(50 * (fluent[2] + fluent[3]))
    count = len(asked)
    again = evaluate(
        get_benchmark("webqa"), ModelFunctions(), source=OfficialFiles(data), runs=tmp_path, provenance={}
    )
    assert again["values"] == made["values"] and len(asked) == count
    other = replace(
        play, fluency_model=FluencyModel("another bart", lambda pairs: [0.5 for _ in pairs])
    )
    third = evaluate(
        get_benchmark("webqa"), other, source=OfficialFiles(data), runs=tmp_path, provenance={"model": "x"}
    )
    assert third["values"]["none/FL"]["mean"] == 100.0, "what another reader wrote is not taken"
    without = evaluate(
        get_benchmark("webqa"),
        replace(play, fluency_model=None),
        source=OfficialFiles(data),
        runs=tmp_path / "b",
        provenance={"m": 1},
    )
    assert "self/FL" not in without["values"] and "self/Acc" in without["values"]


# ------------------------------------------------------------------ our own corpora


def test_next_image_shows_what_comes_before_and_hides_it(data: Path) -> None:
    task = search("builtin_next_image", data)
    assert (
        len(task.queries) == 4 and len(task.documents) == 6
    )  # two documents a corpus, three images each
    assert [isinstance(part, ImageRef) for part in task.queries[0]] == [False, True, False]
    assert task.positives[0] == (1,) and task.excluded_documents[0] == (0,)
    assert task.queries[1] == ("Third.",)  # its second image is the first one again


def test_minimal_pairs_and_templates(data: Path) -> None:
    emoji: Any = get_benchmark("builtin_pairs_emoji").load(OfficialFiles(data))
    assert [item.texts for item in emoji.items] == [("red heart", "blue heart")] * 2  # one a vendor
    stamps: Any = get_benchmark("builtin_pairs_stamps").load(OfficialFiles(data))
    assert ("A red apple.", "A green apple.") in [item.texts for item in stamps.items]
    vqa: Any = get_benchmark("builtin_vqa").load(OfficialFiles(data))
    races = [item for item in vqa.items if item.tags["kind"] == "wesnoth race"]
    assert [item.options[item.answer] for item in races] == ["elf", "orc", "elf"]
    again: Any = get_benchmark("builtin_vqa").load(OfficialFiles(data, seed=1))
    assert [item.options for item in again.items] != [item.options for item in vqa.items]


def test_questions_on_maps_need_the_picture(data: Path, tmp_path: Path) -> None:
    task: Any = get_benchmark("builtin_maps").load(OfficialFiles(data))
    by_kind: dict[str, list[Any]] = {}
    for item in task.items:
        by_kind.setdefault(item.tags["kind"], []).append(item)
        assert len(set(item.options)) == len(item.options) <= 4
    assert {kind: len(items) for kind, items in by_kind.items()} == {
        "place": 5, "region": 5, "map": 2, "flag": 2, "capital": 2,
    }  # fmt: skip
    ain = by_kind["region"][0]
    assert (
        prompt_text(ain.parts) == "<image>\nWhich of the departments of Ruritania is shown in red?"
    )
    assert (
        set(ain.options) == {"Ain", "Oise", "Var"} and ain.options[ain.answer] == "Ain"
    )  # of its own map
    assert by_kind["flag"][0].id == "flag/flag/Ruritania"  # the flag of a region is no country's

    def by_words(pairs: list[tuple[Parts, str]]) -> list[tuple[float, int]]:
        """Knows where the red region is if it sees it, and guesses the first letter of the alphabet if not."""
        return [
            (float(ord(text[0])) if all(isinstance(p, str) for p in parts) else 1.0, 1)
            for parts, text in pairs
        ]

    made = evaluate(
        get_benchmark("builtin_maps"),
        ModelFunctions(continuation_nll=by_words),
        source=OfficialFiles(data),
        runs=tmp_path,
        provenance={"m": 1},
    )
    assert made["values"]["accuracy"]["mean"] == 0.0  # all options are equal: ties are wrong
    blind = [
        item.options[item.answer] == min(item.options, key=lambda o: o[0]) for item in task.items
    ]
    assert made["values"]["accuracy_blind"]["mean"] <= 100 * np.mean(blind)
    assert made["facts"]["chance"] > 25


def test_capitals_are_looked_up_by_what_the_picture_shows(data: Path) -> None:
    task: Any = get_benchmark("builtin_maps_rag").load(OfficialFiles(data))
    assert [item.tags["kind"] for item in task.items] == ["flag"] * 2 + ["region"] * 5
    assert (
        len(task.facts) == 9
    )  # two countries, their two flags of regions' own sentences among five regions'
    for item, right in zip(task.items, task.positives, strict=True):
        (fact,) = right
        assert task.facts[fact].shown[0].endswith(f" is {item.answer[0]}.")
        assert item.answer[0] not in prompt_text(item.parts)
    assert prompt_text(task.prompt(task.items[0], task.facts[:1])).endswith(
        "\n<image>\nWhat is the capital of the country whose flag this is?\nAnswer with the name alone."
    )


def test_the_prior_is_what_the_frequency_in_other_questions_gives() -> None:
    items = tuple(
        Question(str(n), ("?",), answer, {"kind": "x"}, options)
        for n, (answer, options) in enumerate(
            [(0, ("a", "b")), (1, ("b", "a")), (0, ("a", "c")), (0, ("b", "a")), (0, ("e", "f"))]
        )
    )

    class Player:
        def likelihoods(
            self, questions: Sequence[Question], *, name: str = ""
        ) -> list[list[tuple[float, int]] | None]:
            return [[(1.0, 1), (2.0, 1)] for _ in questions]

    made = run_choices(ChoiceTask(items, "kind", without_images_too=True), Player())  # type: ignore[arg-type]
    assert made.details["prior"] == pytest.approx(100 * (1 + 1 + 1 + 0 + 1 / 2) / 5)
    assert made.samples["accuracy"].mean == made.samples["accuracy_blind"].mean == 80.0


def test_the_position_probe_asks_of_every_place_of_a_prompt(data: Path) -> None:
    probe: Any = get_benchmark("builtin_position").load(OfficialFiles(data))
    assert probe.blind and [item.answer for item in probe.items] == list(range(6)) * 8
    for first in range(0, len(probe.items), 6):
        prompt = probe.items[first].parts[:-2]
        assert len(set(probe.items[first].options)) == 6
        for place, item in enumerate(probe.items[first : first + 6]):
            assert item.parts[:-2] == prompt and item.tags == {"place": str(place + 1)}
            shown = [n for n in range(0, 12, 2) if prompt[n] == item.parts[-2]]
            assert [prompt[n + 1] for n in shown] == [f"This is: {item.options[place]}\n"]
