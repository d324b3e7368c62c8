"""Predictions on disk: every output of a model is stored before the next one is computed.

An interrupted run therefore continues where it stopped. The folder of a run contains:

    run.json            benchmark, model, files and settings; another run may not write here
    predictions.jsonl   {"key", "prompt", "text"} per answer; the last line of a key counts
    likelihoods.jsonl   {"key", "prompt", "options": [[total nats, tokens], ...]}
    reviews.jsonl       {"key", "answer", "text"}, reviews by the LLM grader
    fluency.jsonl       {"by", "source", "target", "nats"}, nats per token by another model
    vectors/NAME.f32    float32 rows, appended; NAME.json says which items they belong to
    submission/...      files in the format that an evaluation server takes
    scores.json         the result
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlduet.data.quarantine import bisect_failures
from vlduet.data.records import Parts
from vlduet.errors import ConfigError, DataError
from vlduet.eval.benchmarks.tasks import AskGrader, LLMGradedTask, Question
from vlduet.eval.identities import (
    describe_difference,
    hash_items,
    prompt_identity,
    question_key,
)
from vlduet.files import (
    open_for_append,
    read_json_lines,
    write_atomically,
    write_text_atomically,
)
from vlduet.locks import remove_drafts
from vlduet.structured_files import read_json_object

Vectors = NDArray[np.float32]

EmbedFunction = Callable[[list[Parts], bool], Vectors]
"""(items, whether they are queries) -> float32[N, D]."""
GenerateFunction = Callable[[list[Parts], int], list[str]]
"""(prompts, maximal number of new tokens) -> answers."""
NLLFunction = Callable[[list[tuple[Parts, str]]], Sequence[tuple[float, int]]]
"""(prompt, continuation) pairs -> (total nats, number of tokens) of each continuation."""
GradeFunction = Callable[[Mapping[str, Any], str, float], str]
"""(settings of the benchmark's official grader, prompt, temperature) -> review."""

EMBED_CHUNK = 128
"""Number of items whose vectors are computed before they are written to disk."""
ANSWER_CHUNK = 32
"""Number of questions that are answered before the answers are written to disk."""


@dataclass(frozen=True, slots=True)
class FluencyModel:
    """Another model that scores how fluent answers are."""

    name: str
    """Identifies the weights; scores of a model with another name are not reused."""
    nats_per_token: Callable[[Sequence[tuple[str, str]]], Sequence[float]]
    """(source, target) pairs -> nats per token of each target after its source."""


@dataclass(frozen=True, slots=True)
class ModelFunctions:
    """Functions of the evaluated model and of its helpers; None where there is no such model."""

    embed: EmbedFunction | None = None
    generate: GenerateFunction | None = None
    continuation_nll: NLLFunction | None = None
    retriever_embed: EmbedFunction | None = None
    """Embedding by an independent retriever."""
    grade: GradeFunction | None = None
    """Review of an answer by the LLM grader."""
    fluency_model: FluencyModel | None = None


def no_progress(items: Iterable[Any], label: str) -> Iterable[Any]:
    """Return `items` unchanged: the progress function of a run without a progress bar."""
    return items


class PredictionStore:
    """Outputs of a model for one benchmark, computed where they are not on disk yet."""

    def __init__(
        self,
        folder: Path,
        functions: ModelFunctions,
        *,
        seed: int = 0,
        progress: Callable[[Iterable[Any], str], Iterable[Any]] = no_progress,
    ):
        """Store the arguments, and create the folder and its sub-folder ``vectors`` if missing.

        Args:
            folder: folder of the run.
            functions: the model's functions; ``ModelFunctions()`` only reads stored outputs.
            seed: seed of the bootstrap intervals.
            progress: (iterable, label) -> iterable, wraps long loops to show a progress bar.
        """
        self.folder = folder
        self.functions = functions
        self.seed = seed
        self.progress = progress
        (folder / "vectors").mkdir(parents=True, exist_ok=True)

    def claim_folder(self, identity: Mapping[str, Any]) -> None:
        """Write run.json, or check that the existing one is of the same run.

        Args:
            identity: JSON types that identify the run; other keys of the file do not count.

        Raises:
            ConfigError: the folder belongs to another run; the message names a difference.
        """
        path = self.folder / "run.json"
        identity = json.loads(json.dumps(identity))  # tuples become lists, as in the file
        if not path.exists():
            write_text_atomically(path, json.dumps(identity, indent=1) + "\n")
            return
        fix = "Give another --to, or remove that folder"
        stored = read_json_object(path, error_class=ConfigError, fix=fix)
        for key, value in identity.items():
            if stored.get(key) != value:
                raise ConfigError(
                    f"another run: {describe_difference(key, stored.get(key), value)}",
                    place=self.folder,
                    fix="Give another --to, or remove that folder",
                )

    # -------------------------------------------------------------- vectors

    def embed(self, items: Sequence[Parts], *, name: str, query: bool) -> Vectors:
        """Return the model's vectors of items, float32[N, D], with NaN for items that fail.

        Args:
            name: file name of the vectors.
            query: whether the items are queries; otherwise they are documents.

        Raises:
            DataError: vectors are missing on disk and there is no model, or none of the first
                `EMBED_CHUNK` items can be embedded.
        """
        return self._embed(self.functions.embed, items, name=name, query=query)

    def embed_with_retriever(
        self, items: Sequence[Parts], *, name: str, query: bool
    ) -> Vectors | None:
        """Return the independent retriever's vectors as `embed` does.

        None is returned where there is neither a retriever nor a file of its vectors.
        """
        function = self.functions.retriever_embed
        if function is None and not (self.folder / "vectors" / f"{name}.json").exists():
            return None
        return self._embed(function, items, name=name, query=query)

    def _embed(
        self, function: EmbedFunction | None, items: Sequence[Parts], *, name: str, query: bool
    ) -> Vectors:
        """Return the vectors of items, float32[N, D], with rows of NaN for items that fail.

        Vectors that ``vectors/NAME.f32`` lacks are computed and appended, `EMBED_CHUNK` at a time.
        A file of other items, or with another `query`, is replaced. No items with a function give
        float32[0, 0].

        Raises:
            DataError: vectors are missing and `function` is None, or the width of the vectors is
                unknown because all items of the first chunk fail.
        """
        path = self.folder / "vectors" / f"{name}.f32"
        facts_path = path.with_suffix(".json")
        facts = {"items": hash_items(items), "count": len(items), "query": query}
        stored_facts = _read_json(facts_path)
        if stored_facts is None or any(stored_facts.get(key) != facts[key] for key in facts):
            if function is None:
                raise DataError(
                    "vectors of these items are not there", place=path, fix="Run it with a model"
                )
            path.unlink(missing_ok=True)
            stored_facts = {}
        dim = int(stored_facts.get("dim", 0))
        stored = _read_rows(path, dim)
        if len(stored) == len(items):
            return stored
        if function is None:
            num_missing = len(items) - len(stored)
            raise DataError(
                f"{num_missing} vectors are not there", place=path, fix="Run it with a model"
            )
        remove_drafts(path.parent)  # of a killed run; `evaluate` holds the lock
        blocks = [stored] if len(stored) else []
        starts = range(len(stored), len(items), EMBED_CHUNK)
        with path.open("r+b" if path.exists() else "wb") as file:
            file.truncate(4 * dim * len(stored))  # a killed run may have left half a row
            file.seek(0, 2)
            for begin in self.progress(starts, f"embedding {name}, in {EMBED_CHUNK}s"):
                chunk = list(items[begin : begin + EMBED_CHUNK])
                block = embed_chunk(function, chunk, query=query, dim=dim)
                if not dim:
                    dim = block.shape[1]
                    write_text_atomically(facts_path, json.dumps({**facts, "dim": dim}))
                file.write(block.astype(np.float32).tobytes())
                file.flush()
                blocks.append(block)
        return np.concatenate(blocks)

    # -------------------------------------------------------------- answers

    def generate_answers(
        self, questions: Sequence[Question], *, name: str = ""
    ) -> list[str | None]:
        """Return the answers in the order of the questions, None where there is none.

        Answers that ``predictions.jsonl`` lacks, or has for another prompt, are generated and
        appended in groups; without a function for it they are None. A question that raises
        DataError gets the answer None, which is stored too and not tried again.

        Args:
            name: prefix of the stored keys, where the same questions are asked in several ways.
        """
        function = self.functions.generate

        def answer(group: list[Question]) -> list[str | None]:
            """Return the answers to questions with one length limit; None for ones that fail."""
            assert function is not None
            generate = function
            return bisect_failures(
                lambda qs: generate([q.prompt for q in qs], qs[0].max_new_tokens),
                group,
                on_error=_ignore_failure,
            )

        # Questions with equal length limits form groups, the longest answers last.
        ordered = sorted(questions, key=lambda q: q.max_new_tokens)
        stored = self._complete_file(
            ordered,
            "predictions.jsonl",
            name=name,
            field="text",
            compute=answer if function else None,
        )
        return [stored.get(question_key(name, question)) for question in questions]

    def score_options(
        self, questions: Sequence[Question], *, name: str = ""
    ) -> list[list[tuple[float, int]] | None]:
        """Return (total nats, number of tokens) of every option of every question.

        None stands for a question that could not be scored. Stored in ``likelihoods.jsonl`` as
        `generate_answers` stores answers, with the same `name`, failures and missing function.
        """
        function = self.functions.continuation_nll

        def score(group: list[Question]) -> list[Any]:
            """Return [[total nats, tokens] per option] per question; None for ones that fail."""
            assert function is not None
            nll = function
            return bisect_failures(
                lambda qs: _score_group(nll, qs), group, on_error=_ignore_failure
            )

        stored = self._complete_file(
            questions,
            "likelihoods.jsonl",
            name=name,
            field="options",
            compute=score if function else None,
        )
        scores: list[list[tuple[float, int]] | None] = []
        for question in questions:
            options = stored.get(question_key(name, question))
            if options is None:
                scores.append(None)
            else:
                scores.append([(float(nats), int(tokens)) for nats, tokens in options])
        return scores

    def _complete_file(
        self,
        questions: Sequence[Question],
        file: str,
        *,
        name: str,
        field: str,
        compute: Callable[[list[Question]], list[Any]] | None,
    ) -> dict[str, Any]:
        """Return the field `field` of the questions by key, after appending what the file lacks.

        A row for another prompt counts as missing; one without a prompt (imported) is taken as it
        is. Rows of other questions are not returned.

        Args:
            questions: questions; runs of equal `max_new_tokens` are computed together.
            file: name of a JSON lines file in the folder of the run.
            name: prefix of the keys; see `question_key`.
            compute: returns the values of a group of questions. None leaves the file as it is, and
                the result lacks the missing questions.
        """
        path = self.folder / file
        rows = {row["key"]: row for row in read_json_lines(path)}
        prompts = {
            question_key(name, question): prompt_identity(question) for question in questions
        }
        stored = {}
        for key, prompt in prompts.items():
            # A row without a prompt is an imported prediction and is taken as it is.
            if key in rows and rows[key].get("prompt", prompt) == prompt:
                stored[key] = rows[key][field]
        missing = [question for question in questions if question_key(name, question) not in stored]
        if compute is None or not missing:
            return stored
        groups = list(group_questions(missing))
        with open_for_append(path) as out:
            for group in self.progress(groups, f"answering, in {ANSWER_CHUNK}s"):
                for question, value in zip(group, compute(group), strict=True):
                    key = question_key(name, question)
                    stored[key] = value
                    out.write(json_line({"key": key, "prompt": prompts[key], field: value}))
                out.flush()
        return stored

    # -------------------------------------------------------------- other models

    def grade_answers(
        self, task: LLMGradedTask, answers: Sequence[str | None]
    ) -> list[str | None] | None:
        """Return the grader's review of the answer to every item of the task, in order.

        A review in ``reviews.jsonl`` is reused if it is of the same answer, or imported (without
        an answer). The grader is asked for the others, a missing answer counting as an empty one,
        and each is appended at once. Without a grader they are None, and the whole result is None
        if the file has no review at all.

        Raises:
            ConfigError: the grader fails; the reviews so far are stored.
            ValueError: there are not as many answers as items.
        """
        path = self.folder / "reviews.jsonl"
        function = self.functions.grade
        rows = {row["key"]: row for row in read_json_lines(path)}
        if function is None and not rows:
            return None
        reviews: list[str | None] = []
        pairs = list(zip(task.items, answers, strict=True))
        with open_for_append(path) as out:
            for item, answer in self.progress(pairs, "grading"):
                row = rows.get(item.id)
                if row is not None and row.get("answer", answer) == answer:
                    reviews.append(row["text"])
                elif function is None:
                    reviews.append(None)
                else:
                    ask = bind_grader(function, task.grader_settings)
                    review = task.grade_answer(item, answer or "", ask)
                    reviews.append(review)
                    out.write(json_line({"key": item.id, "answer": answer, "text": review}))
                    out.flush()
        return reviews

    def score_fluency(self, pairs: Sequence[tuple[str, str]]) -> list[float] | None:
        """Return the nats per token of every target after its source, for (source, target) pairs.

        Scores that ``fluency.jsonl`` lacks of this fluency model are computed and appended. Without
        a model, the scores of the one that wrote last are returned, or None where the file is empty
        or does not cover all pairs.
        """
        path = self.folder / "fluency.jsonl"
        model = self.functions.fluency_model
        rows = read_json_lines(path)
        name = model.name if model else next((row["by"] for row in reversed(rows)), None)
        rows = [row for row in rows if row["by"] == name]
        scores = {(row["source"], row["target"]): float(row["nats"]) for row in rows}
        missing = [pair for pair in dict.fromkeys(pairs) if pair not in scores]
        if model is None:
            return None if missing or not rows else [scores[pair] for pair in pairs]
        starts = range(0, len(missing), ANSWER_CHUNK)
        with open_for_append(path) as out:
            for begin in self.progress(starts, f"reading answers, in {ANSWER_CHUNK}s"):
                chunk = missing[begin : begin + ANSWER_CHUNK]
                for pair, nats in zip(chunk, model.nats_per_token(chunk), strict=True):
                    scores[pair] = float(nats)
                    row = {"by": model.name, "source": pair[0], "target": pair[1]}
                    out.write(json_line({**row, "nats": scores[pair]}))
                out.flush()
        return [scores[pair] for pair in pairs]

    def write_submission(self, name: str, data: bytes) -> None:
        """Write a file of the submission for an evaluation server, replacing an older one."""
        path = self.folder / "submission" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: file.write(data))


def bind_grader(function: GradeFunction, settings: Mapping[str, Any]) -> AskGrader:
    """Return a function (prompt, temperature) -> review for one benchmark's grader settings."""
    return lambda prompt, temperature: function(settings, prompt, temperature)


# ------------------------------------------------------------------ chunks and files


def group_questions(questions: Sequence[Question]) -> Iterator[list[Question]]:
    """Yield runs of at most `ANSWER_CHUNK` consecutive questions with equal `max_new_tokens`."""
    group: list[Question] = []
    for question in questions:
        is_full = len(group) == ANSWER_CHUNK
        if group and (is_full or group[0].max_new_tokens != question.max_new_tokens):
            yield group
            group = []
        group.append(question)
    if group:
        yield group


def embed_chunk(function: EmbedFunction, items: list[Parts], *, query: bool, dim: int) -> Vectors:
    """Return the vectors of items, float32[N, D], with rows of NaN for items with a DataError.

    Args:
        function: applied to all items, and again to ever smaller halves where it raises DataError.
        dim: width of the vectors, or 0 where it is not known yet.

    Raises:
        DataError: all items fail, or there are none, and `dim` is 0. A single item raises its own
            error.
    """
    errors: list[DataError] = []

    def embed(group: list[Parts]) -> Vectors:
        return np.asarray(function(group, query), dtype=np.float32)

    rows = bisect_failures(embed, items, on_error=lambda _, error: errors.append(error))
    width = dim or next((len(row) for row in rows if row is not None), 0)
    if not width:
        if len(items) == 1:
            raise errors[0]
        raise DataError(
            f"none of {len(items)} items can be embedded",
            fix="Check the images with 'vlduet data check'",
        )
    failed = np.full(width, np.nan, np.float32)
    return np.stack([failed if row is None else row for row in rows])


def _score_group(function: NLLFunction, questions: list[Question]) -> list[list[list[float]]]:
    """Return [[total nats, tokens] of every option] of every question, by one call of `function`.

    Its errors propagate. A question without options gets [].
    """
    pairs = [(question.prompt, option) for question in questions for option in question.options]
    scores = [list(score) for score in function(pairs)]
    groups = []
    begin = 0
    for question in questions:
        groups.append(scores[begin : begin + len(question.options)])
        begin += len(question.options)
    return groups


def _ignore_failure(question: Question, error: DataError) -> None:
    """Do nothing: a question that cannot be asked has no prediction and counts as missing."""


def json_line(value: Mapping[str, Any]) -> str:
    """Return one line of ASCII JSON.

    Generated text may contain lone surrogates and characters that splitlines takes for line ends.
    """
    return json.dumps(value) + "\n"


def _read_json(path: Path) -> dict[str, Any] | None:
    """Return the content of a JSON file, or None where it is missing or broken."""
    try:
        return read_json_object(path, error_class=DataError, fix="Delete it")
    except DataError:
        return None


def _read_rows(path: Path, dim: int) -> Vectors:
    """Return the complete rows of a file of vectors, float32[N, dim]; no rows where dim is 0."""
    if not dim or not path.exists():
        return np.zeros((0, 0), dtype=np.float32)
    num_rows = path.stat().st_size // (4 * dim)
    return np.fromfile(path, dtype=np.float32, count=num_rows * dim).reshape(num_rows, dim)
