"""Runs of benchmarks on disk: resuming, refusing another run, imported predictions, submissions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

from helpers import official, tiny
from vlduet.data.records import ImageRef, Parts
from vlduet.errors import ConfigError, DataError, LockError, ModelError
from vlduet.eval import predictions
from vlduet.eval.benchmarks.official_files import OfficialFiles
from vlduet.eval.benchmarks.registry import get_benchmark
from vlduet.eval.identities import prompt_text
from vlduet.eval.predictions import FluencyModel, ModelFunctions
from vlduet.eval.run import evaluate, import_predictions, import_reviews
from vlduet.files import read_json_lines
from vlduet.harness.builtin import (
    EvaluationSettings,
    describe_provenance,
    model_functions,
    open_model_functions,
)

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."


def run(
    name: str, functions: ModelFunctions, *, data: Path, runs: Path, model: str = "x"
) -> dict[str, Any]:
    """Run a benchmark, or score its stored predictions where `functions` is empty."""
    provenance = {} if functions == ModelFunctions() else {"model": model}
    files = OfficialFiles(data)
    return evaluate(get_benchmark(name), functions, source=files, runs=runs, provenance=provenance)


def write_json_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ------------------------------------------------------------------ resuming


def test_one_process_at_a_time_writes_a_run(data: Path, tmp_path: Path) -> None:
    answers = tmp_path / "answers.jsonl"
    write_json_lines(answers, [{"key": "x", "text": "yes"}])
    folder = tmp_path / "mme"
    folder.mkdir()
    functions = ModelFunctions(generate=lambda prompts, max_new_tokens: ["no"] * len(prompts))
    with FileLock(folder / ".lock"):
        with pytest.raises(LockError, match="another process is writing here"):
            run("mme", functions, data=data, runs=tmp_path)
        with pytest.raises(LockError, match="another process is writing here"):
            import_reviews(get_benchmark("mme"), answers, runs=tmp_path)
    assert [path.name for path in folder.iterdir()] == [".lock"]


def test_interrupted_run_continues_where_it_stopped(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts_before: list[str] = []
    num_after = 0

    def generate_until_interrupted(prompts: list[Parts], max_new_tokens: int) -> list[str]:
        if prompts_before:
            raise KeyboardInterrupt
        prompts_before.extend(prompt_text(prompt) for prompt in prompts)
        return ["yes"] * len(prompts)

    def generate(prompts: list[Parts], max_new_tokens: int) -> list[str]:
        nonlocal num_after
        num_after += len(prompts)
        return ["no"] * len(prompts)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(predictions, "ANSWER_CHUNK", 4)
        interrupted = ModelFunctions(generate=generate_until_interrupted)
        run("mme", interrupted, data=data, runs=tmp_path)
    predictions_file = tmp_path / "mme" / "predictions.jsonl"
    with predictions_file.open("a") as out:
        out.write('{"key": "half')  # as kill -9 leaves it
    scores = run("mme", ModelFunctions(generate=generate), data=data, runs=tmp_path)
    assert len(prompts_before) == 4
    assert num_after == 24
    assert scores["missing"] == 0
    assert len({row["key"] for row in read_json_lines(predictions_file)}) == 28


@pytest.fixture
def embedding_calls() -> list[int]:
    """Numbers of items of the calls of `embedding_functions`."""
    return []


@pytest.fixture
def embedding_functions(embedding_calls: list[int]) -> ModelFunctions:
    """Functions of a model that embeds at random."""

    def embed(items: Sequence[Parts], query: bool) -> np.ndarray:
        embedding_calls.append(len(items))
        return np.random.default_rng(len(items)).normal(size=(len(items), 5)).astype(np.float32)

    return ModelFunctions(embed=embed)


def test_embedding_continues_after_the_last_complete_row(
    data: Path, tmp_path: Path, embedding_calls: list[int], embedding_functions: ModelFunctions
) -> None:
    scores = run("coco", embedding_functions, data=data, runs=tmp_path)
    path = tmp_path / "coco" / "vectors" / "queries.f32"
    row_size = 4 * 5
    path.write_bytes(path.read_bytes()[: 7 * row_size + 3])
    draft = path.with_name(".queries.json.4711.draft")  # of a killed run
    draft.touch()
    scores_again = run("coco", embedding_functions, data=data, runs=tmp_path)
    assert embedding_calls == [20, 4, 13]
    assert scores_again["facts"] == scores["facts"] and not draft.exists()


def test_vectors_of_other_items_are_neither_scored_nor_deleted(
    data: Path, tmp_path: Path, embedding_functions: ModelFunctions
) -> None:
    run("coco", embedding_functions, data=data, runs=tmp_path)
    path = tmp_path / "coco" / "vectors" / "queries.json"
    path.write_text(path.read_text().replace('"items": "', '"items": "0'))
    with pytest.raises(DataError, match="these items"):
        run("coco", ModelFunctions(), data=data, runs=tmp_path)
    assert path.with_suffix(".f32").exists()


def test_folder_of_another_model_is_refused(
    data: Path, tmp_path: Path, embedding_functions: ModelFunctions
) -> None:
    run("coco", embedding_functions, data=data, runs=tmp_path)
    with pytest.raises(ConfigError, match=r"another run: made_by.model was 'x', is 'y'"):
        run("coco", embedding_functions, data=data, runs=tmp_path, model="y")


def test_broken_image_counts_as_missing(
    data: Path, tiny_functions: ModelFunctions, tmp_path: Path
) -> None:
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    (copy / "coco/val2014/COCO_val2014_000000000001.jpg").write_bytes(b"\xff\xd8\xff broken")
    scores = run("pope", tiny_functions, data=copy, runs=tmp_path / "runs")
    assert scores["missing"] == 3
    assert scores["values"]["F1"]["n"] == 6
    assert run("coco", tiny_functions, data=copy, runs=tmp_path / "runs")["missing"] == 1


# ------------------------------------------------------------------ imported predictions


def import_rows(
    name: str, rows: Sequence[dict[str, Any]], *, data: Path, runs: Path, **files: Path
) -> dict[str, int]:
    """Import the rows of another toolkit's predictions, and return the counts."""
    path = runs / "answers.jsonl"
    write_json_lines(path, rows)
    return import_predictions(
        get_benchmark(name), path, source=OfficialFiles(data), runs=runs, **files
    )


def test_llava_answers_to_mme_are_matched_by_image_and_prompt(data: Path, tmp_path: Path) -> None:
    rows = []
    for task in ("existence", "count"):
        for noun, text in (("cat", "Yes"), ("dog", "No")):
            prompt = f"Is there a {noun}?{SHORT_ANSWER}"
            rows.append({"question_id": f"{task}/0001.jpg", "prompt": prompt, "text": text})
    rows.append({"question_id": "?", "text": ""})
    counts = import_rows("mme", rows, data=data, runs=tmp_path)
    assert counts == {"taken": 4, "unknown": 1}
    scores = run("mme", ModelFunctions(), data=data, runs=tmp_path)
    assert scores["values"]["perception"]["mean"] == 400.0
    assert scores["missing"] == 24


def test_llava_answers_to_pope_are_matched_by_the_question_file(data: Path, tmp_path: Path) -> None:
    questions = []
    answers = []
    for s, split in enumerate(("adversarial", "popular", "random"), 1):
        for n, noun in enumerate(("snowboard", "car"), 1):
            image = f"COCO_val2014_{n:012d}.jpg"
            text = f"Is there a {noun} in the image?{SHORT_ANSWER}"
            question = {"question_id": 10 * s + n, "image": image, "text": text}
            questions.append({**question, "category": split})
            answer = "Yes" if noun == "snowboard" else "No"
            answers.append({"question_id": 10 * s + n, "text": answer})
    question_file = tmp_path / "questions.jsonl"
    write_json_lines(question_file, questions)
    counts = import_rows("pope", answers, data=data, runs=tmp_path, questions=question_file)
    assert counts == {"taken": 6, "unknown": 0}
    scores = run("pope", ModelFunctions(), data=data, runs=tmp_path)
    assert scores["values"]["F1"]["mean"] == 100.0
    assert scores["missing"] == 0


def test_llava_answers_to_textvqa_are_matched_by_image(data: Path, tmp_path: Path) -> None:
    prompt = f"What is the brand of this camera?\nReference{SHORT_ANSWER}"
    row = {"question_id": "003a8ae2ef43b901", "prompt": prompt, "text": "dakota"}
    assert import_rows("textvqa", [row], data=data, runs=tmp_path)["taken"] == 1


def test_results_file_of_mmvet_is_imported_and_waits_for_a_grader(
    data: Path, tmp_path: Path
) -> None:
    results = tmp_path / "mmvet.json"
    results.write_text(json.dumps({"v1_0": "x = -1", "v1_1": "a cat"}))
    files = OfficialFiles(data)
    counts = import_predictions(get_benchmark("mmvet"), results, source=files, runs=tmp_path)
    assert counts == {"taken": 2, "unknown": 0}
    scores = run("mmvet", ModelFunctions(), data=data, runs=tmp_path)
    assert scores["values"] == {}
    assert scores["facts"]["needs"] == "judge"


# ------------------------------------------------------------------ outputs


@pytest.mark.parametrize(
    ("name", "file_name"),
    [
        ("vqav2_testdev", "vqav2.json"),
        ("vizwiz_test", "vizwiz.json"),
        ("mmbench_test", "mmbench.xlsx"),
    ],
)
def test_benchmark_of_a_server_writes_a_submission(
    name: str, file_name: str, data: Path, tiny_functions: ModelFunctions, tmp_path: Path
) -> None:
    scores = run(name, tiny_functions, data=data, runs=tmp_path)
    assert scores["facts"]["needs"] == "server"
    assert (tmp_path / name / "submission" / file_name).stat().st_size > 0


def test_submission_of_vqav2_has_ids_and_normalized_answers(data: Path, tmp_path: Path) -> None:
    def generate(prompts: list[Parts], max_new_tokens: int) -> list[str]:
        return ["The dog!", "two"]

    run("vqav2_testdev", ModelFunctions(generate=generate), data=data, runs=tmp_path)
    rows = json.loads((tmp_path / "vqav2_testdev/submission/vqav2.json").read_text())
    assert rows == [{"question_id": 0, "answer": "dog"}, {"question_id": 1000, "answer": "2"}]


def test_provenance_contains_fingerprint_and_changed_settings(tmp_path: Path) -> None:
    model = tiny.build_duet_model(tmp_path / "base")
    model.save_pretrained(tmp_path / "mine")
    settings = EvaluationSettings(system="Be brief.")
    _, facts = open_model_functions(tmp_path / "mine", settings)
    provenance = describe_provenance(tmp_path / "mine", facts, settings)
    assert provenance["fingerprint"] == model.fingerprint
    assert provenance["system"] == "Be brief."
    assert "seed" not in provenance


# ------------------------------------------------------------------ dual encoders and fluency


def test_clip_model_is_scored_on_embeddings_only(data: Path, tmp_path: Path) -> None:
    tiny.build_cross_encoder(tmp_path / "clip")
    functions, facts = open_model_functions(tmp_path / "clip", EvaluationSettings())
    assert facts["fingerprint"]
    scores = run("winoground", functions, data=data, runs=tmp_path)
    assert set(scores["values"]) >= {"text", "image", "group"}
    with pytest.raises(ModelError, match="does not generate"):
        run("gqa", functions, data=data, runs=tmp_path)
    assert functions.embed is not None
    image = ImageRef(data=official.random_png(1))
    items: list[Parts] = [(image,), ("a cat",), (image, "a cat")]
    image_row, text_row, mixed_row = functions.embed(items, False)
    mean = (image_row + text_row) / np.linalg.norm(image_row + text_row)
    assert np.allclose(mixed_row, mean, atol=1e-6)


def test_clip_model_retrieves_for_another_model(data: Path, tmp_path: Path) -> None:
    tiny.build_cross_encoder(tmp_path / "clip")
    model = tiny.build_duet_model(tmp_path / "base")
    settings = EvaluationSettings(retriever=tmp_path / "clip")

    def generate(prompts: list[Parts], max_new_tokens: int) -> list[str]:
        return ["a cat"] * len(prompts)

    functions = replace(model_functions(model, settings), generate=generate)
    scores = run("fvqa", functions, data=data, runs=tmp_path)
    names = {"self/retrieval/R@1", "other/retrieval/R@1", "none/ROUGE-L", "other/ROUGE-L"}
    assert names <= set(scores["values"])


WEBQA_ANSWERS = {"self": ["The belly is white.", ""], "none": ["White.", "Yes."]}


def webqa_functions() -> ModelFunctions:
    """Return the functions of a model with fixed answers to WebQA."""

    def generate(prompts: list[Parts], max_new_tokens: int) -> list[str]:
        return WEBQA_ANSWERS["none" if len(prompts[0]) == 1 else "self"]

    def embed(items: Sequence[Parts], query: bool) -> np.ndarray:
        return np.eye(40, dtype=np.float32)[: len(items)]

    return ModelFunctions(embed=embed, generate=generate)


def test_webqa_fluency_equals_its_formula_and_is_stored(data: Path, tmp_path: Path) -> None:
    scored_pairs: list[tuple[str, str]] = []

    def nats_per_token(pairs: Sequence[tuple[str, str]]) -> list[float]:
        scored_pairs.extend(pairs)
        return [1.0 if source == target else 1.0 + len(target) / 10 for source, target in pairs]

    model = FluencyModel("a bart", nats_per_token)
    functions = replace(webqa_functions(), fluency_model=model)
    scores = run("webqa", functions, data=data, runs=tmp_path)
    means = {name: value["mean"] for name, value in scores["values"].items()}
    # BARTScore(A -> answer) / BARTScore(A -> A) of the answers; the empty one has 0.
    white_belly, white, yes = np.exp(-np.array([19, 6, 4]) / 10)
    assert means["self/FL"] == pytest.approx(100 * white_belly / 2)
    assert means["none/FL"] == pytest.approx(100 * (white + yes) / 2)
    assert means["self/QA"] == pytest.approx(50 * white_belly)
    assert means["none/QA"] == pytest.approx(50 * (white + yes))
    num_pairs = len(scored_pairs)
    scores_again = run("webqa", ModelFunctions(), data=data, runs=tmp_path)
    assert scores_again["values"] == scores["values"]
    assert len(scored_pairs) == num_pairs


def test_webqa_fluency_of_another_model_is_computed_again(data: Path, tmp_path: Path) -> None:
    for name, nats in (("a bart", 2.0), ("another bart", 0.5)):

        def nats_per_token(pairs: Sequence[tuple[str, str]], nats: float = nats) -> list[float]:
            return [1.0 if source == target else nats for source, target in pairs]

        functions = replace(webqa_functions(), fluency_model=FluencyModel(name, nats_per_token))
        scores = run("webqa", functions, data=data, runs=tmp_path)
        expected = 100 * min(1.0, np.exp(1.0 - nats))
        assert scores["values"]["none/FL"]["mean"] == pytest.approx(expected)


def test_webqa_without_a_fluency_model_has_no_fluency(data: Path, tmp_path: Path) -> None:
    scores = run("webqa", webqa_functions(), data=data, runs=tmp_path)
    assert "self/FL" not in scores["values"]
    assert "self/Acc" in scores["values"]
